// Device code of the adjoint of a solve: stage by stage backwards, the values of the layers are computed
// again from the stage's input. The gradients of weights are added up in shared memory by one block and
// over the blocks by a kernel of its own, both in a fixed order.
#pragma once
#include "trajectory_block.h"

namespace fmft::cuda {

template <int T, int M, bool ByRow>
struct Adjoint : Block<T, M, ByRow> {
  using Base = Block<T, M, ByRow>;
  using Base::field;
  using Base::kRows;
  using Base::row0;
  using Base::row_times;
  using Base::solve;

  float* partials = nullptr;  // of this block; null if no gradient of a parameter is wanted
  bool first = true;          // whether nothing has been written there yet

  // Adds the gradient of what a layer adds to column c: its sum over the samples, and that of it times
  // the time.
  FMFT_DEVICE void add_vector_sum(const FieldLayer& layer, int64_t q, int c, float sum,
                                  float sum_by_time) const {
    float* sums = floats(layer.vector_sums);
    sums[c] += sum;
    if (layer.time >= 0) sums[16 * layer.tiles + c] += sum_by_time;
    if (layer.table < 0 || solve.table_at[layer.table] < 0 || c >= layer.width) return;
    float& at = partials[solve.table_at[layer.table] + q * layer.width + c];
    at = first ? sum : at + sum;
  }

  // The gradient of value v in the tile of columns 16 c, from parts of the layers that read it.
  FMFT_DEVICE void add_consumers(Tile<M>& sum, int from, int count, int c, int part,
                                 int parts) const {
    for (int j = from, done = 0; j < from + count; ++j) {
      const FieldTerm& term = field.term[field.consumer[j]];
      const int tiles = field.layer[term.layer].tiles;
      Staged w = this->weights(term);
      w.at += 16 * c;
      multiply<T, M, false, true>(sum, this->delta(term.layer), w,
                                  first_of_part(part, parts, done), tiles, parts);
      done += tiles;
    }
  }
  FMFT_DEVICE void add_skippers(Tile<M>& sum, int from, int count, int c) const {
    for (int j = from; j < from + count; ++j)
      add_saved(sum, lane_order<M>(field.layer[field.skipper[j]].gradient, c));
  }

  // The gradient of a hidden layer's input.
  FMFT_DEVICE void hidden_gradient(const FieldLayer& layer, float t, int64_t q) const {
    const Staged into = staged(layer.delta, kRows, layer.tiles);
    for (int c = first_item(layer.first_warp); c < layer.tiles; c += warps()) {
      Tile<M> g;
      fill(g, 0.0f);
      add_consumers(g, layer.first_consumer, layer.consumers, c, 0, 1);
      add_skippers(g, layer.first_skipper, layer.skippers, c);
      if (layer.gradient >= 0) save(lane_order<M>(layer.gradient, c), g);
      with_saved<M>(lane_order<M>(layer.derivative, c),
                    [&](int m, int n, int e, float slope) { g.at[m][n][e] *= slope; });
      for_pairs<M>(c, [&](int m, int n, int i, int row, int column) {
        store_pair<T>(into, row, column, g.at[m][n][2 * i], g.at[m][n][2 * i + 1]);
      });
      if (layer.cond >= 0) {
        float4* sums = lane_order<M>(layer.cond_sums, c);
        Tile<M> total = g;
        add_saved(total, sums);
        save(sums, total);
      }
      if (layer.kept >= 0) this->keep(solve.deltas[layer.kept], layer.width, q, c, g);
      if (partials == nullptr || layer.vector_sums < 0) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float sum = 0.0f, by_time = 0.0f;
#pragma unroll
          for (int m = 0; m < M; ++m) {
            sum += g.at[m][n][e] + g.at[m][n][2 + e];
            if constexpr (ByRow)
              by_time += row_times()[row_of(m, 0)] * g.at[m][n][e] +
                         row_times()[row_of(m, 1)] * g.at[m][n][2 + e];
          }
          for (int mask = 4; mask < 32; mask *= 2) {
            sum += shuffle_xor(sum, mask);
            if constexpr (ByRow) by_time += shuffle_xor(by_time, mask);
          }
          if (lane() < 4)
            add_vector_sum(layer, q, column_of(c, n) + e, sum, ByRow ? by_time : t * sum);
        }
    }
  }

  // Calls f(term, i, o) for the parts of the gradients of a layer's matrices that this warp adds up: input
  // tiles 2 i and 2 i + 1, output tile o.
  template <class F>
  FMFT_DEVICE void for_sums(const FieldLayer& layer, F&& f) const {
    if (partials == nullptr || field.deferred) return;
    for (int j = layer.first_term; j < layer.first_term + layer.terms; ++j) {
      const FieldTerm& term = field.term[j];
      if (term.weight < 0 || solve.parameter_at[term.weight] < 0) continue;
      const int pairs = (this->value_tiles(term.source) + 1) / 2;
      for (int item = first_item(term.first_warp); item < pairs * layer.tiles; item += warps())
        f(term, item / layer.tiles, item % layer.tiles);
    }
  }

  template <int Inputs>
  FMFT_DEVICE void add_product(const FieldTerm& term, const FieldLayer& layer, Staged x, Staged g,
                               int i, int o) const {
    Tile<Inputs> sum;
#pragma unroll
    for (int m = 0; m < Inputs; ++m) {
      const float4* from = lane_order<1>(term.sums, (2 * i + m) * layer.tiles + o);
      with_saved<1>(from, [&](int, int n, int e, float v) { sum.at[m][n][e] = v; });
    }
    x.at += 32 * i;
    g.at += 16 * o;
    multiply<T, Inputs, true, true>(sum, x, g, 0, M);
#pragma unroll
    for (int m = 0; m < Inputs; ++m) {
      float4* into = lane_order<1>(term.sums, (2 * i + m) * layer.tiles + o);
      const float(&v)[2][4] = sum.at[m];
      into[0] = make_float4(v[0][0], v[0][1], v[0][2], v[0][3]);
      into[32] = make_float4(v[1][0], v[1][1], v[1][2], v[1][3]);
    }
  }

  // Adds this stage to the gradients of a layer's matrices.
  FMFT_DEVICE void add_weights(int i) const {
    const FieldLayer& layer = field.layer[i];
    for_sums(layer, [&](const FieldTerm& term, int in, int out) {
      const Staged x = this->value(term.source), g = this->delta(i);
      if (2 * in + 1 < this->value_tiles(term.source))
        add_product<2>(term, layer, x, g, in, out);
      else
        add_product<1>(term, layer, x, g, in, out);
    });
  }

  // From the gradient of a stage, staged as that of the last layer, to that of the stage's input.
  FMFT_DEVICE void stage(float t, int64_t q) const {
    this->template hidden_layers<true>(t, q);
    const FieldLayer& last = field.layer[field.layers - 1];
    const float* slopes = floats(field.slopes_at);
    if (partials != nullptr && last.vector_sums >= 0)
      for (int d = threadIdx.x; d < field.state; d += blockDim.x) {
        float sum = 0.0f, by_time = 0.0f;
        for (int row = 0; row < kRows; ++row) {
          sum += slopes[d * kRows + row];
          if constexpr (ByRow) by_time += row_times()[row] * slopes[d * kRows + row];
        }
        add_vector_sum(last, q, d, sum, ByRow ? by_time : t * sum);
      }
    int done = field.layers;
    for (int i = field.layers - 2; i >= 0; --i) {
      if (field.layer[i].wait_backward) {
        __syncthreads();
        while (done > i + 1) add_weights(--done);
      }
      hidden_gradient(field.layer[i], t, q);
    }
    __syncthreads();
    while (done > 0) add_weights(--done);
    this->partial_products([&](Tile<M>& sum, int c, int part, int parts) {
      add_consumers(sum, field.first_consumer, field.consumers, c, part, parts);
      if (part == 0) add_skippers(sum, field.first_skipper, field.skippers, c);
    });
  }

  // The gradients of the rows of `cond`, kept from stage to stage: zero them, or write them out.
  template <bool Write>
  FMFT_DEVICE void conds() const {
    for (int i = 0; i < field.layers; ++i) {
      const FieldLayer& layer = field.layer[i];
      if (layer.cond < 0) continue;
      for (int c = first_item(layer.first_warp); c < layer.tiles; c += warps()) {
        Tile<M> tile;
        fill(tile, 0.0f);
        float4* sums = lane_order<M>(layer.cond_sums, c);
        if constexpr (!Write) save(sums, tile);
        if (!Write || solve.grad_cond[layer.cond] == nullptr) continue;
        add_saved(tile, sums);
        this->keep(solve.grad_cond[layer.cond], layer.width, 0, c, tile);
      }
    }
  }

  // Writes the sums of the block to its row of `partials`.
  FMFT_DEVICE void finish() const {
    if (partials == nullptr) return;
    __syncthreads();
    for (int l = 0; l < field.layers; ++l) {
      const FieldLayer& layer = field.layer[l];
      for_sums(layer, [&](const FieldTerm& term, int in, int out) {
        float* into = partials + solve.parameter_at[term.weight] + term.column;
        const int64_t columns = solve.columns[term.weight];
        const int tiles = this->value_tiles(term.source), width = this->value_width(term.source);
        for (int i = 2 * in; i < 2 * in + 2 && i < tiles; ++i)
          with_saved<1>(lane_order<1>(term.sums, i * layer.tiles + out),
                        [&](int, int n, int e, float sum) {
                          const int row = 16 * i + row_of(0, e / 2);
                          const int column = column_of(out, n) + e % 2;
                          if (row < width && column < layer.width)
                            into[column * columns + row] = sum;
                        });
      });
      if (layer.vector_sums < 0) continue;
      const float* sums = floats(layer.vector_sums);
      for (int c = threadIdx.x; c < layer.width; c += blockDim.x) {
        if (layer.bias >= 0 && solve.parameter_at[layer.bias] >= 0)
          partials[solve.parameter_at[layer.bias] + c] = sums[c];
        if (layer.time >= 0 && solve.parameter_at[layer.time] >= 0)
          partials[solve.parameter_at[layer.time] + layer.time_column +
                   static_cast<int64_t>(c) * solve.columns[layer.time]] =
              sums[16 * layer.tiles + c];
      }
    }
  }
};

// The samples share their steps, or each has its own (ByRow): then a sample that has no step left takes one
// of size 0 from 0, which adds nothing to any gradient.
template <int T, int M, bool ByRow>
FMFT_KERNEL __launch_bounds__(32 * kMaxWarps, 1) backward_kernel(const FMFT_GRID_CONSTANT Field field,
                                                              const FMFT_GRID_CONSTANT Solve solve) {
  constexpr int kRows = 16 * M;
  Adjoint<T, M, ByRow> block{{field, solve}};
  if (solve.partials != nullptr) block.partials = solve.partials + blockIdx.x * solve.gradient_size;
  block.load();
  __syncthreads();  // what load() makes zero is written below by other threads
  const int size = kRows * field.state, stages = solve.stages;
  const int last = field.layers - 1;
  float* const gy = floats(field.stages_at);   // of the state after the step
  float* const gx = gy + size;                 // of the inputs of the stages
  float* const gk = floats(field.slopes_at);   // of a stage
  float* const input = floats(field.inputs_at);
  const Staged x = block.value(0), delta = block.delta(last);
  for (block.row0 = static_cast<int64_t>(blockIdx.x) * kRows; block.row0 < solve.batch;
       block.row0 += static_cast<int64_t>(gridDim.x) * kRows) {
    block.load_conds();
    block.template conds<false>();
    const int64_t own_row = block.row0 + block.own_row();
    auto place = [&](int64_t n, int row, int d) {
      return (n * solve.batch + block.row0 + row) * field.state + d;
    };
    auto step_size = [&](int n) {
      if constexpr (!ByRow) return solve.h[n];
      return own_row < solve.batch ? solve.row_h[n * solve.batch + own_row] : 0.0f;
    };
    // Adds the outputs of state n, or inside step n, with a weight that depends on their number.
    auto outputs = [&](int n, int row, int d, auto weight) {
      float sum = 0.0f;
      if (block.exists(row))
        for (int o = solve.first[n]; o < solve.first[n + 1]; ++o)
          sum += weight(o) * solve.grad[place(o, row, d)];
      return sum;
    };
    // Begins to fetch the inputs of a stage: each thread its own numbers.
    auto fetch_inputs = [&](int64_t q) {
      block.for_state([&](int e, int row, int d) {
        if (q >= 0 && block.exists(row)) copy_later(input + e, solve.kept + place(q, row, d));
      });
    };
    int steps = solve.steps;
    if constexpr (ByRow)
      while (steps > 0 && !any_thread(step_size(steps - 1) != 0.0f)) --steps;
    fetch_inputs(static_cast<int64_t>(steps) * stages - 1);
    block.fetch_tables(static_cast<int64_t>(steps) * stages - 1);
    auto one = [](int) { return 1.0f; };
    const bool dense = solve.dense != nullptr;
    block.for_state([&](int e, int row, int d) {
      gy[e] = dense ? 0.0f : outputs(solve.steps, row, d, one);
    });
    for (int n = steps - 1; n >= 0; --n) {
      const float h = step_size(n);
      const bool moves = !ByRow || h != 0.0f;
      for (int s = stages - 1; s >= 0; --s) {
        const int64_t q = static_cast<int64_t>(n) * stages + s;
        float t = 0.0f;
        if constexpr (!ByRow) t = solve.times[q];
        else if (moves) t = solve.row_times[q * solve.batch + own_row];
        wait_for_copies();
        block.for_state([&](int e, int row, int d) {
          float sum = solve.b[s] * gy[e];
          for (int j = s + 1; j < stages; ++j) sum += solve.a[j][s] * gx[j * size + e];
          if (dense)
            sum += outputs(n, row, d, [&](int o) { return solve.dense[o * stages + s]; });
          gk[e] = h * sum;
          store_one<T>(delta, row, d, h * sum);
          store_one<T>(x, row, d, block.exists(row) && moves ? input[e] : 0.0f);
          const int kept = field.layer[last].kept;
          if (kept >= 0 && block.exists(row)) solve.deltas[kept][place(q, row, d)] = h * sum;
        });
        if (ByRow && threadIdx.x < kRows) block.row_times()[threadIdx.x] = t;
        __syncthreads();
        fetch_inputs(q - 1);
        block.fetch_tables(q - 1);
        block.stage(t, q);
        block.for_state([&](int e, int row, int d) { gx[s * size + e] = block.sum_of_parts(row, d); });
      }
      block.for_state([&](int e, int row, int d) {
        float sum = gy[e] + outputs(n, row, d, one);
        for (int s = 0; s < stages; ++s) sum += gx[s * size + e];
        gy[e] = sum;
      });
    }
    block.for_state([&](int e, int row, int d) {
      if (solve.grad_y0 != nullptr && block.exists(row)) solve.grad_y0[place(0, row, d)] = gy[e];
    });
    block.template conds<true>();
    block.first = false;
  }
  block.finish();
}

}  // namespace fmft::cuda
