// What the launchers share: checks, the current device, the grid, the width of the loads.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "step.h"
#include "step_kernels.h"

namespace fmft::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status));
}

// Makes the device of the queue current and gives the former one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&former_), "asking for the current CUDA device");
    if (former_ != device) check(cudaSetDevice(device), "choosing the CUDA device");
    changed_ = former_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

constexpr int64_t kMaxBlocks = int64_t{1} << 16;

inline cudaStream_t stream_of(const Queue& queue) { return static_cast<cudaStream_t>(queue.stream); }

inline unsigned blocks_for(int64_t packs, int64_t limit) {
  return static_cast<unsigned>(std::clamp<int64_t>((packs + kThreads - 1) / kThreads, 1, limit));
}

// Whether every tensor allows loads of N neighbours.
template <int N, class T, class K>
bool aligned(const Step<T, K>& step) {
  auto fits = [](const void* address, size_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;
  };
  bool all = fits(step.out, sizeof(T) * N) && fits(step.y, sizeof(T) * N);
  for (int s = 0; s < step.stages; ++s) all = all && fits(step.k[s], sizeof(K) * N);
  return all;
}

// 16 bytes of y at a time.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

}  // namespace fmft::cuda
