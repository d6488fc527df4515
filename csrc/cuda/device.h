// The few words of CUDA that the step kernels use. Tests compile everything here with g++: a
// cuda_runtime.h of theirs then defines the same words on the host.
#pragma once
#include <cuda_runtime.h>

#ifdef __CUDACC__
#define FMFT_KERNEL __global__ void
#define FMFT_DEVICE __device__ __forceinline__
#define FMFT_SHARED __shared__
#define FMFT_GRID_CONSTANT __grid_constant__

namespace fmft::cuda {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, Args... args) {
  kernel<<<grid, threads, 0, stream>>>(args...);
}

// With so many bytes of dynamic_shared(), which the kernel must have been allowed before.
template <class... Params, class... Args>
void launch_with(size_t bytes, void (*kernel)(Params...), dim3 grid, int threads,
                 cudaStream_t stream, const Args&... args) {
  kernel<<<grid, threads, bytes, stream>>>(args...);
}

// The same for blocks that wait for each other: all of them run at once, or the launch fails.
template <class... Params, class... Args>
void launch_together(size_t bytes, void (*kernel)(Params...), dim3 grid, int threads,
                     cudaStream_t stream, const Args&... args) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), addresses,
                              bytes, stream);
}

FMFT_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ float4 fmft_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(fmft_dynamic_shared);
}

}  // namespace fmft::cuda
#endif
