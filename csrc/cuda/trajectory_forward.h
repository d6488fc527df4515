// Device code of a solve of fixed steps.
#pragma once
#include "trajectory_block.h"

namespace fmft::cuda {

template <int T, int M, int W = 0>
FMFT_KERNEL __launch_bounds__(32 * kMaxWarps, 1) forward_kernel(const FMFT_GRID_CONSTANT Field field,
                                                             const FMFT_GRID_CONSTANT Solve solve) {
  constexpr int kRows = Block<T, M, false, W>::kRows;
  Block<T, M, false, W> block{field, solve};
  block.load();
  const int state = field.state, size = kRows * state, stages = solve.stages;
  const int64_t plane = solve.batch * state;
  const bool dense = solve.dense != nullptr;
  float* const y = floats(field.stages_at);
  float* const k = y + size;
  const Staged x = block.value(0);
  for (block.begin_rows(static_cast<int64_t>(blockIdx.x) * kRows); block.rows > 0;
       block.begin_rows(block.row0 + static_cast<int64_t>(gridDim.x) * kRows)) {
    __syncthreads();  // for what load() wrote and the last stage of the former rows still read
    block.fetch_tables(0);
    block.load_conds();
    const int64_t own = block.row0 * state;
    float* const out = solve.out + own;
    float* kept = solve.kept == nullptr ? nullptr : solve.kept + own;  // of the next stage
    // Between two stages, and two steps, each thread goes on with its own numbers alone.
    auto begin_stage = [&](int row, int d, float input) {
      store_one<T>(x, row, d, input);
      if (kept != nullptr && block.exists(row)) kept[row * state + d] = input;
    };
    auto write = [&](int from, int end, int row, int d, auto value) {
#pragma unroll 1
      for (int o = from; o < end; ++o)
        if (block.exists(row)) out[o * plane + row * state + d] = value(o);
    };
    const int first_output = solve.first[0], no_output = dense ? 0 : solve.first[1];
    block.for_state([&](int e, int row, int d) {
      const float start = block.exists(row) ? solve.y0[own + row * state + d] : 0.0f;
      y[e] = start;
      write(first_output, no_output, row, d, [&](int) { return start; });
      if (solve.steps > 0) begin_stage(row, d, start);
    });
    int64_t q = 0;
#pragma unroll 1
    for (int n = 0; n < solve.steps; ++n) {
      const float h = solve.h[n];
      const int from = solve.first[dense ? n : n + 1], end = solve.first[dense ? n + 1 : n + 2];
#pragma unroll 1
      for (int s = 0; s < stages; ++s, ++q) {
        const float t = solve.times[q];
        if (kept != nullptr) kept += plane;
        wait_for_copies();
        __syncthreads();
        block.fetch_tables(q + 1);
        block.velocity(t, q, [&](int e, int row, int d, float slope) {
          k[s * size + e] = slope;
          // The sum of the stages so far with weights that weight(j) tells.
          auto after = [&](auto weight) {
            float sum = 0.0f;
#pragma unroll 1
            for (int j = 0; j < s; ++j) sum += weight(j) * k[j * size + e];
            return y[e] + h * (sum + weight(s) * slope);
          };
          if (s + 1 < stages)
            return begin_stage(row, d, after([&](int j) { return solve.a[s + 1][j]; }));
          if (dense)
            write(from, end, row, d, [&](int o) {
              return after([&](int j) { return solve.dense[o * stages + j]; });
            });
          const float next = after([&](int j) { return solve.b[j]; });
          y[e] = next;
          if (!dense) write(from, end, row, d, [&](int) { return next; });
          if (n + 1 < solve.steps) begin_stage(row, d, next);
        });
      }
    }
  }
}

}  // namespace fmft::cuda
