// The words of CUDA that csrc/cuda uses, on the host. Every CUDA thread of a block is a fiber. A warp runs
// until all of it waits for the block, then the next one, so that a result which needs a barrier that is
// not there comes out wrong. The blocks run one after the other. This shows the arithmetic, the indexing,
// the tails and missing barriers, not speed.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define FMFT_KERNEL inline void
#define FMFT_DEVICE inline
#define FMFT_SHARED static  // blocks take turns, so that one copy serves them all
#define FMFT_GRID_CONSTANT
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace host {

constexpr size_t kStack = size_t{1} << 17;

// Where `count` fibers wait for each other.
struct Meeting {
  int count = 0, arrived = 0;
  unsigned long round = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  const Meeting* meeting = nullptr;
  unsigned long round = 0;
  bool done = false;
  std::vector<std::pair<float*, const float*>> copies;
};

// What the lanes of a warp hand to each other.
struct Warp {
  Meeting meeting;
  uint32_t sent[32][8];
  const uint16_t* rows[32];
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Meeting block;
inline unsigned current = 0;
inline std::vector<float4> shared;
inline std::function<void()> body;

inline void meet(Meeting& meeting) {
  if (++meeting.arrived == meeting.count) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  Fiber& fiber = fibers[current];
  fiber.meeting = &meeting;
  fiber.round = meeting.round;
  swapcontext(&fiber.context, &scheduler);
}

inline Warp& warp() { return warps[current / 32]; }
inline int lane() { return static_cast<int>(current % 32); }

inline void run_fiber() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

// FMFT_HOST_ORDER=reverse lets the last warp run ahead instead of the first.
inline void run_block(unsigned threads) {
  const char* order = std::getenv("FMFT_HOST_ORDER");
  const bool reverse = order && !std::strcmp(order, "reverse");
  for (Fiber& fiber : fibers) {
    fiber.meeting = nullptr;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  // Runs the threads first ... first + 31 until each waits for others; returns whether one ran.
  auto run_warp = [&](unsigned first) {
    bool any = false;
    for (bool ran = true; ran;) {
      ran = false;
      for (unsigned t = first; t < std::min(first + 32, threads); ++t) {
        Fiber& fiber = fibers[t];
        if (fiber.done || (fiber.meeting && fiber.meeting->round == fiber.round)) continue;
        fiber.meeting = nullptr;
        current = t;
        threadIdx = dim3(t);
        swapcontext(&scheduler, &fiber.context);
        any = ran = true;
      }
    }
    return any;
  };
  const unsigned count = (threads + 31) / 32;
  for (bool any = true; any;) {
    any = false;
    for (unsigned i = 0; i < count; ++i) any |= run_warp(32 * (reverse ? count - 1 - i : i));
  }
  for (const Fiber& fiber : fibers)
    if (!fiber.done) std::abort();  // it waits for threads that have left
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace host

inline void __syncthreads() { host::meet(host::block); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }

// A device of two multiprocessors, with the shared memory of an H200.
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 2 : 232448;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

namespace fmft::cuda {

// Shared memory begins as NaN.
template <class... Params, class... Args>
void launch_with(size_t bytes, void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t,
                 const Args&... args) {
  using namespace host;
  gridDim = grid;
  blockDim = dim3(threads);
  fibers.clear();
  fibers.resize(threads);
  body = [&] { kernel(args...); };
  for (unsigned b = 0; b < grid.x * grid.y; ++b) {
    blockIdx = dim3(b % grid.x, b / grid.x);
    block = {threads};
    warps.assign((threads + 31) / 32, Warp{{32}});
    shared.assign(bytes / sizeof(float4) + 1, {NAN, NAN, NAN, NAN});
    run_block(threads);
  }
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, Args... args) {
  launch_with(0, kernel, grid, threads, stream, args...);
}

inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(host::shared.data());
}

inline uint16_t to_bf16(float value) {
  const uint32_t bits = host::bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) {
  return to_bf16(low) | static_cast<uint32_t>(to_bf16(high)) << 16;
}
inline float low_bf16(uint32_t pair) { return host::from_bits(pair << 16); }
inline float high_bf16(uint32_t pair) { return host::from_bits(pair & 0xffff0000u); }

// The layout of the operands is that of the PTX manual, mma.m16n8k16.
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::Warp& warp = host::warp();
  const int lane = host::lane();
  std::memcpy(warp.sent[lane], a, sizeof a);
  warp.sent[lane][4] = b0;
  warp.sent[lane][5] = b1;
  host::meet(warp.meeting);
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    double sum = 0;
    for (int k = 0; k < 16; k += 2) {
      const int part = k % 8 / 2;
      const uint32_t x = warp.sent[row % 8 * 4 + part][row / 8 + 2 * (k / 8)];
      const uint32_t y = warp.sent[column * 4 + part][4 + k / 8];
      sum += static_cast<double>(low_bf16(x)) * low_bf16(y) +
             static_cast<double>(high_bf16(x)) * high_bf16(y);
    }
    c[e] = static_cast<float>(c[e] + sum);
  }
  host::meet(warp.meeting);
}

template <bool Transposed>
void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  host::Warp& warp = host::warp();
  const int lane = host::lane(), i = lane / 4, j = 2 * (lane % 4);
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  warp.rows[lane] = row;
  host::meet(warp.meeting);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* const* rows = warp.rows + 8 * matrix;
    const uint32_t low = Transposed ? rows[j][i] : rows[i][j];
    const uint32_t high = Transposed ? rows[j + 1][i] : rows[i][j + 1];
    r[matrix] = low | high << 16;
  }
  host::meet(warp.meeting);
}

inline float shuffle_xor(float value, int mask) {
  host::Warp& warp = host::warp();
  warp.sent[host::lane()][0] = host::bits_of(value);
  host::meet(warp.meeting);
  const float found = host::from_bits(warp.sent[host::lane() ^ mask][0]);
  host::meet(warp.meeting);
  return found;
}

// A copy comes as late as it may.
inline void copy_later(float* into, const float* from) {
  host::fibers[host::current].copies.emplace_back(into, from);
}
inline void wait_for_copies() {
  auto& copies = host::fibers[host::current].copies;
  for (auto [into, from] : copies) *into = *from;
  copies.clear();
}

inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_tanh(float x) { return std::tanh(x); }

}  // namespace fmft::cuda
