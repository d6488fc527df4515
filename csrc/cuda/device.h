// The few words of CUDA that the step kernels use. Tests compile everything here with g++: a
// cuda_runtime.h of theirs then defines the same words on the host.
#pragma once
#include <cuda_runtime.h>

#ifdef __CUDACC__
#define FMFT_KERNEL __global__ void
#define FMFT_DEVICE __device__ __forceinline__
#define FMFT_SHARED __shared__

namespace fmft::cuda {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, Args... args) {
  kernel<<<grid, threads, 0, stream>>>(args...);
}

}  // namespace fmft::cuda
#endif
