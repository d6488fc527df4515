// The words of CUDA that csrc/cuda uses, on the host. Every CUDA thread of a block is a fiber. A warp runs
// until all of it waits for the block, then the next one, so that a result which needs a barrier that is
// not there comes out wrong. The blocks run one after the other, or, launched together, side by side. This shows the arithmetic, the indexing,
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

#include "watch.h"

#define FMFT_KERNEL inline void
#define FMFT_DEVICE inline
#define FMFT_SHARED static  // blocks take turns, so that one copy serves them all (not those launched together)
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
  // What came before a round, and that before the next one; lanes of a warp tell each other nothing.
  bool orders = true;
  int64_t places[2] = {};
};

struct Fiber {
  ucontext_t context;
  void* watched = nullptr;
  std::unique_ptr<char[]> stack{new char[kStack]};
  const Meeting* meeting = nullptr;
  unsigned long round = 0;
  bool done = false, vote = false;
  std::vector<std::pair<float*, const float*>> copies;
};

// What the lanes of a warp hand to each other.
struct Warp {
  Meeting meeting;
  uint32_t sent[32][8];
  const uint16_t* rows[32];
};

struct Block {
  dim3 index;
  Meeting meeting;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<float4> shared;  // begins as NaN
};

inline ucontext_t scheduler;
inline void* watched_scheduler = nullptr;
inline int64_t begin, end;  // of a launch, to whom watches
inline Block* block = nullptr;  // that runs
inline unsigned current = 0;    // thread of it
inline Meeting grid;
inline std::function<void()> body;

FMFT_HOST_UNWATCHED inline Fiber& fiber() { return block->fibers[current]; }
FMFT_HOST_UNWATCHED inline Warp& warp() { return block->warps[current / 32]; }
FMFT_HOST_UNWATCHED inline int lane() { return static_cast<int>(current % 32); }

FMFT_HOST_UNWATCHED inline void leave() {
  watch::run(watched_scheduler);
  swapcontext(&fiber().context, &scheduler);
}

FMFT_HOST_UNWATCHED inline void meet(Meeting& meeting) {
  int64_t* const place = &meeting.places[meeting.round % 2];
  const bool orders = meeting.orders && !watch::deaf();
  if (orders) watch::tell(place);
  if (++meeting.arrived == meeting.count) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    fiber().meeting = &meeting;
    fiber().round = meeting.round;
    leave();
  }
  if (orders) watch::hear(place);
}

FMFT_HOST_UNWATCHED inline void run_fiber() {
  watch::hear(&begin);
  body();
  watch::tell(&end);
  fiber().done = true;
  leave();
}

inline Block make_block(dim3 index, unsigned threads, size_t bytes) {
  Block made{index, {static_cast<int>(threads)}, {}, {}, {}};
  made.fibers.resize(threads);
  made.warps.assign((threads + 31) / 32, Warp{{32, 0, 0, false}, {}, {}});
  made.shared.assign(bytes / sizeof(float4) + 1, {NAN, NAN, NAN, NAN});
  for (Fiber& fiber : made.fibers) {
    fiber.watched = watch::make();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  return made;
}

// Runs the threads first ... first + 31 of a block until each waits for others; returns whether one ran.
FMFT_HOST_UNWATCHED inline bool run_warp(Block& of, unsigned first) {
  const unsigned threads = static_cast<unsigned>(of.fibers.size());
  bool any = false;
  for (bool ran = true; ran;) {
    ran = false;
    for (unsigned t = first; t < std::min(first + 32, threads); ++t) {
      Fiber& fiber = of.fibers[t];
      if (fiber.done || (fiber.meeting && fiber.meeting->round == fiber.round)) continue;
      fiber.meeting = nullptr;
      block = &of;
      blockIdx = of.index;
      current = t;
      threadIdx = dim3(t);
      watch::run(fiber.watched);
      swapcontext(&scheduler, &fiber.context);
      any = ran = true;
    }
  }
  return any;
}

// FMFT_HOST_ORDER=reverse lets the last warp of the last block run ahead instead of the first.
inline void run_blocks(std::vector<Block>& blocks) {
  const char* order = std::getenv("FMFT_HOST_ORDER");
  const bool reverse = order && !std::strcmp(order, "reverse");
  std::vector<std::pair<Block*, unsigned>> warps;
  for (Block& of : blocks)
    for (unsigned i = 0; i < of.warps.size(); ++i) warps.emplace_back(&of, 32 * i);
  if (reverse) std::reverse(warps.begin(), warps.end());
  watched_scheduler = watch::current();
  watch::tell(&begin);
  for (bool any = true; any;) {
    any = false;
    for (auto [of, first] : warps) any |= run_warp(*of, first);
  }
  watch::hear(&end);
  for (const Block& of : blocks)
    for (const Fiber& fiber : of.fibers) {
      if (!fiber.done) std::abort();  // it waits for threads that have left
      watch::end(fiber.watched);
    }
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

inline void __syncthreads() { host::meet(host::block->meeting); }

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

template <class... Params, class... Args>
void launch_with(size_t bytes, void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t,
                 const Args&... args) {
  gridDim = grid;
  blockDim = dim3(threads);
  host::body = [&] { kernel(args...); };
  for (unsigned b = 0; b < grid.x * grid.y; ++b) {
    std::vector<host::Block> alone;
    alone.push_back(host::make_block(dim3(b % grid.x, b / grid.x), threads, bytes));
    host::run_blocks(alone);
  }
}

template <class... Params, class... Args>
void launch_together(size_t bytes, void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t,
                     const Args&... args) {
  gridDim = grid;
  blockDim = dim3(threads);
  host::body = [&] { kernel(args...); };
  host::grid = {static_cast<int>(grid.x) * threads};
  std::vector<host::Block> blocks;
  for (unsigned b = 0; b < grid.x; ++b) blocks.push_back(host::make_block(dim3(b), threads, bytes));
  host::run_blocks(blocks);
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, Args... args) {
  launch_with(0, kernel, grid, threads, stream, args...);
}

inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(host::block->shared.data());
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
FMFT_HOST_UNWATCHED inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
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
FMFT_HOST_UNWATCHED void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  host::Warp& warp = host::warp();
  const int lane = host::lane(), i = lane / 4, j = 2 * (lane % 4);
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  warp.rows[lane] = row;
  host::meet(warp.meeting);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* const* rows = warp.rows + 8 * matrix;
    const uint16_t* const low = Transposed ? &rows[j][i] : &rows[i][j];
    const uint16_t* const high = Transposed ? &rows[j + 1][i] : &rows[i][j + 1];
    host::watch::read(low);
    host::watch::read(high);
    r[matrix] = *low | static_cast<uint32_t>(*high) << 16;
  }
  host::meet(warp.meeting);
}

template <class Number>
FMFT_HOST_UNWATCHED Number shuffle_xor(Number value, int mask) {
  host::Warp& warp = host::warp();
  std::memcpy(warp.sent[host::lane()], &value, sizeof value);
  host::meet(warp.meeting);
  Number found;
  std::memcpy(&found, warp.sent[host::lane() ^ mask], sizeof found);
  host::meet(warp.meeting);
  return found;
}

FMFT_HOST_UNWATCHED inline bool any_thread(bool yes) {
  host::Block& block = *host::block;
  host::fiber().vote = yes;
  __syncthreads();
  bool any = false;
  for (const host::Fiber& fiber : block.fibers) any |= fiber.vote;
  __syncthreads();
  return any;
}

inline void meet_all_blocks() { host::meet(host::grid); }

// A copy comes as late as it may.
inline void copy_later(float* into, const float* from) {
  host::fiber().copies.emplace_back(into, from);
}
inline void wait_for_copies() {
  auto& copies = host::fiber().copies;
  for (auto [into, from] : copies) *into = *from;
  copies.clear();
}

inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_tanh(float x) { return std::tanh(x); }

}  // namespace fmft::cuda
