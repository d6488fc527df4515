// Device code of a solve of fixed steps.
#pragma once
#include "trajectory_block.h"

namespace fmft::cuda {

template <int T, int M>
FMFT_KERNEL __launch_bounds__(32 * kMaxWarps, 1) forward_kernel(const FMFT_GRID_CONSTANT Field field,
                                                             const FMFT_GRID_CONSTANT Solve solve) {
  constexpr int kRows = Block<T, M>::kRows;
  Block<T, M> block{field, solve};
  block.load();
  const int size = kRows * field.state, stages = solve.stages;
  float* const y = floats(field.stages_at);
  float* const k = y + size;
  const Staged x = block.value(0);
  for (block.row0 = static_cast<int64_t>(blockIdx.x) * kRows; block.row0 < solve.batch;
       block.row0 += static_cast<int64_t>(gridDim.x) * kRows) {
    __syncthreads();  // for what load() wrote and the last stage of the former rows still read
    block.fetch_tables(0);
    block.load_conds();
    auto place = [&](int64_t n, int row, int d) {
      return (n * solve.batch + block.row0 + row) * field.state + d;
    };
    block.for_state([&](int e, int row, int d) {
      y[e] = block.exists(row) ? solve.y0[place(0, row, d)] : 0.0f;
    });
    for (int n = 0;; ++n) {
      if (solve.dense == nullptr)
        for (int o = solve.first[n]; o < solve.first[n + 1]; ++o)
          block.for_state([&](int e, int row, int d) {
            if (block.exists(row)) solve.out[place(o, row, d)] = y[e];
          });
      if (n == solve.steps) break;
      const float h = solve.h[n];
      for (int s = 0; s < stages; ++s) {
        const int64_t q = static_cast<int64_t>(n) * stages + s;
        const float t = solve.times[q];
        block.for_state([&](int e, int row, int d) {
          float sum = 0.0f;
          for (int j = 0; j < s; ++j) sum += solve.a[s][j] * k[j * size + e];
          const float input = y[e] + h * sum;
          store_one<T>(x, row, d, input);
          if (solve.kept != nullptr && block.exists(row)) solve.kept[place(q, row, d)] = input;
        });
        wait_for_copies();
        __syncthreads();
        block.fetch_tables(q + 1);
        block.velocity(t, q, k + s * size);
      }
      if (solve.dense != nullptr)
        for (int o = solve.first[n]; o < solve.first[n + 1]; ++o)
          block.for_state([&](int e, int row, int d) {
            float sum = 0.0f;
            for (int j = 0; j < stages; ++j) sum += solve.dense[o * stages + j] * k[j * size + e];
            if (block.exists(row)) solve.out[place(o, row, d)] = y[e] + h * sum;
          });
      block.for_state([&](int e, int row, int d) {
        float sum = 0.0f;
        for (int j = 0; j < stages; ++j) sum += solve.b[j] * k[j * size + e];
        y[e] += h * sum;
      });
    }
  }
}

}  // namespace fmft::cuda
