// The words of CUDA that csrc/cuda uses, on the host: every CUDA thread of a block is an OS thread, the
// blocks run one after the other. It shows the arithmetic, the indexing and the tails, not races
// between warps nor speed.
#pragma once
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>

#define FMFT_KERNEL inline void
#define FMFT_DEVICE inline
#define FMFT_SHARED static  // blocks take turns, so that one copy serves them all

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim, blockDim;
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }

namespace fmft::cuda {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t, Args... args) {
  std::barrier<> barrier(threads);
  block_barrier = &barrier;
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<std::thread> block;
  for (int t = 0; t < threads; ++t)
    block.emplace_back([=, &barrier] {
      threadIdx = dim3(t);
      for (unsigned b = 0; b < grid.x * grid.y; ++b) {
        blockIdx = dim3(b % grid.x, b / grid.x);
        kernel(args...);
        barrier.arrive_and_wait();
      }
    });
  for (std::thread& thread : block) thread.join();
}

}  // namespace fmft::cuda
