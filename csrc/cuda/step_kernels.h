// Device code of the step ops. N neighbours per thread move by one load; the tail of the state that
// fills no pack goes to the first threads of the grid.
#pragma once
#include "../core/step.h"
#include "device.h"

namespace fmft::cuda {

constexpr int kThreads = 256;

FMFT_DEVICE int64_t first_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

FMFT_DEVICE int64_t grid_size() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

template <int S, int N, class T, class K>
FMFT_KERNEL combine_kernel(const Step<T, K> step) {
  const T h = step_size(step);
  const int64_t packs = step.size / N;
  for (int64_t i = first_index(); i < packs; i += grid_size()) combine_at<S, N>(step, h, i);
  const int64_t tail = packs * N + first_index();
  if (N > 1 && tail < step.size) combine_at<S, 1>(step, h, tail);
}

// Sums one number per thread of the block; the result is valid in thread 0.
FMFT_DEVICE double block_sum(double value) {
  FMFT_SHARED double sums[kThreads];
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

template <class T, int N>
FMFT_DEVICE double squares(const Pack<T, N>& errors) {
  double total = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) total += static_cast<double>(errors.at[j]) * errors.at[j];
  return total;
}

// Writes y1 and one sum of squares per block.
template <int S, int N, class T, class K>
FMFT_KERNEL finish_kernel(const Step<T, K> step, T rtol, T atol, double* partials) {
  const T h = step_size(step);
  const int64_t packs = step.size / N;
  double total = 0;
  for (int64_t i = first_index(); i < packs; i += grid_size())
    total += squares(finish_at<S, N>(step, h, rtol, atol, i));
  const int64_t tail = packs * N + first_index();
  if (N > 1 && tail < step.size) total += squares(finish_at<S, 1>(step, h, rtol, atol, tail));
  total = block_sum(total);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// One block adds the sums of all blocks in a fixed order.
template <class T>
FMFT_KERNEL ratio_kernel(const double* partials, int blocks, int64_t size, T* ratio) {
  double total = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) total += partials[i];
  total = block_sum(total);
  if (threadIdx.x == 0) *ratio = static_cast<T>(sqrt(total / static_cast<double>(size)));
}

// Every block of a column of the grid takes chunks of kThetaChunk rows of the output.
template <int N, class T, class K>
FMFT_KERNEL dense_kernel(const Step<T, K> step, const DenseCall dense) {
  FMFT_SHARED T q[kThetaChunk][kMaxStages];
  const T h = step_size(step);
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThetaChunk;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kThetaChunk; row < dense.thetas; row += stride) {
    const int64_t rest = dense.thetas - row;
    const int count = rest < kThetaChunk ? static_cast<int>(rest) : kThetaChunk;
    __syncthreads();  // the chunk before is done with q
    for (int i = threadIdx.x; i < kThetaChunk * kMaxStages; i += kThreads) {
      const int m = i / kMaxStages, s = i % kMaxStages;
      double weight = 0;
      if (m < count && s < step.stages)
        weight = stage_weight(dense.p[s], dense.degree, dense.theta[row + m]);
      q[m][s] = static_cast<T>(weight);
    }
    __syncthreads();
    for (int64_t i = first_index(); i < step.size / N; i += grid_size())
      dense_at<N>(step, h, q, count, row, i);
  }
}

}  // namespace fmft::cuda
