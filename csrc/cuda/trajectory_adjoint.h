// Device code of the adjoint of a solve: stage by stage backwards, the values of the layers are computed
// again from the stage's input. The gradients of weights are added up in shared memory by one block and
// over the blocks by a kernel of its own, both in a fixed order.
#pragma once
#include "trajectory_block.h"

namespace fmft::cuda {

template <int T, int M, bool ByRow, int W>
struct Adjoint : Block<T, M, ByRow, W> {
  using Base = Block<T, M, ByRow, W>;
  using Base::field;
  using Base::kRows;
  using Base::row0;
  using Base::row_times;
  using Base::solve;

  float* partials = nullptr;  // of this block; null if no gradient of a parameter is wanted
  bool first = true;          // whether nothing has been written there yet

  // The gradient of a value in the tile of columns 16 c, from parts of the layers `from` ... that read it;
  // k as in multiply_part.
  FMFT_DEVICE void add_consumers(Tile<>& sum, int from, int end, int c, int& k, int parts) const {
    for (int j = from; j < end; ++j) {
      const FieldTerm& term = field.term[field.consumer[j]];
      Staged w = this->weights(term);
      w.at += 16 * c;
      this->template multiply_part<true>(sum, left<false>(this->own(this->delta(term.layer))),
                                         right<true>(w), field.layer[term.layer].tiles, k, parts);
    }
  }
  FMFT_DEVICE void add_skippers(Tile<>& sum, int from, int count, int c) const {
    for (int j = from; j < from + count; ++j)
      add_saved(sum, this->own_tile(field.layer[field.skipper[j]].gradient, c));
  }

  // What few layers need for the gradient of their value.
  FMFT_DEVICE void add_rare(Tile<>& g, const FieldLayer& layer, int c) const {
    int k = 0;
    add_consumers(g, layer.first_consumer + 1, layer.first_consumer + layer.consumers, c, k, 1);
    add_skippers(g, layer.first_skipper, layer.skippers, c);
    if (layer.gradient >= 0) save(this->own_tile(layer.gradient, c), g.at[0]);
  }
  // And with the gradient of their activation's input.
  FMFT_DEVICE void keep_rare(const Tile<>& g, const FieldLayer& layer, int64_t q, int c) const {
    if (layer.cond >= 0) {
      float4* sums = this->own_tile(layer.cond_sums, c);
      Tile<> total = g;
      add_saved(total, sums);
      save(sums, total.at[0]);
    }
    if (layer.kept >= 0) this->keep(solve.deltas[layer.kept], layer.width, q, c, g);
  }

  // The gradient of the input of the activation of layer i. `meet` is called where others must have come so
  // far; what needs no other warp comes before. If K > 0, the first layer that reads the value has K tiles.
  template <int K, class F>
  FMFT_DEVICE void hidden_gradient(const Back layer, int i, float t, int64_t q, F&& meet) const {
    const int tiles = W > 0 ? W : layer.tiles, reader_tiles = K > 0 ? K : layer.reader_tiles;
    const Staged into = staged(layer.delta, kRows, tiles);
    const Factor from = left<false>(this->own(staged(layer.reader, kRows, reader_tiles)));
    int c = W > 0 ? this->member() : first_item(this->member(), this->team(), layer.first);
    Staged weights = staged(layer.weights, 16 * reader_tiles, tiles);
    weights.at += 16 * c;
    Factor w = right<true>(weights);
    uint16_t* at = first_pair(into, this->row_tile(), c);
    float4* derivative = this->own_tile(layer.derivative, c);
    meet();
#pragma unroll 1
    while (W > 0 || c < tiles) {
      Tile<> g;
      fill(g, 0.0f);
      multiply<T, 1, false, true>(g, from, w, reader_tiles);
      if (layer.rare) add_rare(g, field.layer[i], c);
      with_saved(derivative, [&](int n, int e, float slope) { g.at[0][n][e] *= slope; });
      store_tile<T>(into, at, g);
      if (layer.rare) keep_rare(g, field.layer[i], q, c);
      if (layer.vectors >= 0) sum_rows(g, layer, t, c);
      if (W > 0) return;
      const int next = this->team();
      c += next;
      w.at += 16 * next;
      at += 16 * next;
      derivative += 64 * M * next;
    }
  }

  // The sums of a team's gradients of a layer's vectors: of the bias, of the column of the time if there is
  // one, and what a stage adds to them, if a table has to know it.
  FMFT_DEVICE float* team_sums(int place, int tiles, bool by_time, int team) const {
    return floats(place) + 16 * tiles * (by_time ? 3 : 2) * team;
  }

  // Adds the sums over the 16 rows of a tile.
  FMFT_DEVICE void sum_rows(const Tile<>& g, const Back& layer, float t, int c) const {
    const float first = ByRow ? row_times()[row_of(0, 0)] : 0.0f;
    const float second = ByRow ? row_times()[row_of(0, 1)] : 0.0f;
    float2* const sums = reinterpret_cast<float2*>(
        team_sums(layer.vectors, layer.tiles, layer.by_time, this->row_tile()) + column_of(c, 0));
    float2* const by_time = sums + 8 * layer.tiles;
    const bool writes = lane() < 4;
    float2 old[2], old_by_time[2];
    if (writes) old[0] = sums[0], old[1] = sums[4];
    if (writes && layer.by_time) old_by_time[0] = by_time[0], old_by_time[1] = by_time[4];
    float now[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float(&v)[4] = g.at[0][n];
      now[n][0] = v[0] + v[2], now[n][1] = v[1] + v[3];
      now[n][2] = first * v[0] + second * v[2], now[n][3] = first * v[1] + second * v[3];
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (ByRow || i % 4 < 2) now[i / 4][i % 4] += shuffle_xor(now[i / 4][i % 4], mask);
    if (!writes) return;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float(&add)[4] = now[n];
      sums[4 * n] = {old[n].x + add[0], old[n].y + add[1]};
      if (layer.by_time)
        by_time[4 * n] = {old_by_time[n].x + (ByRow ? add[2] : t * add[0]),
                          old_by_time[n].y + (ByRow ? add[3] : t * add[1])};
      if (layer.table) (layer.by_time ? by_time + 8 * layer.tiles : by_time)[4 * n] = {add[0], add[1]};
    }
  }

  // Adds this stage to the gradients of a table and of the vectors of the last layer.
  FMFT_DEVICE void add_vectors(int i, float t, int64_t q) const {
    const FieldLayer& layer = field.layer[i];
    const bool by_time = layer.time >= 0;
    float* const sums = team_sums(layer.vector_sums, layer.tiles, by_time, 0);
    float* const now = sums + 16 * layer.tiles * (by_time ? 2 : 1);
    if (i == field.layers - 1) {
      const float* slopes = floats(field.slopes_at);
      for (int d = warp(); d < field.state; d += warps()) {
        float sum = lane() < kRows ? slopes[d * kRows + lane()] : 0.0f;
        float sum_by_time = ByRow && lane() < kRows ? row_times()[lane()] * sum : 0.0f;
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) {
          sum += shuffle_xor(sum, mask);
          if (ByRow) sum_by_time += shuffle_xor(sum_by_time, mask);
        }
        if (lane() > 0) continue;
        sums[d] += sum;
        if (by_time) sums[16 * layer.tiles + d] += ByRow ? sum_by_time : t * sum;
        if (this->table_wanted(layer)) add_to_table(layer, q, d, sum);
      }
      return;
    }
    for (int c = threadIdx.x; c < layer.width; c += blockDim.x) {
      float sum = now[c];
      if (M > 1) sum += team_sums(layer.vector_sums, layer.tiles, by_time, 1)[c + (now - sums)];
      add_to_table(layer, q, c, sum);
    }
  }
  FMFT_DEVICE void add_to_table(const FieldLayer& layer, int64_t q, int c, float sum) const {
    float& at = partials[solve.table_at[layer.table] + q * layer.width + c];
    at = first ? sum : at + sum;
  }

  // Calls f(in, out) for the parts of the gradient of a matrix that this warp adds up: input tiles 2 in and
  // 2 in + 1, output tile out.
  template <class F>
  FMFT_DEVICE void for_sums(const Outer& term, F&& f) const {
#pragma unroll 1
    for (int item = first_item(warp(), warps(), term.first); item < term.items; item += warps()) {
      const int in = item * term.inverse >> 16;
      f(in, item - in * term.tiles);
    }
  }

  template <int Inputs>
  FMFT_DEVICE void add_product(const Outer& term, Staged x, Staged g, int in, int out) const {
    Tile<Inputs> sum;
    float4* const at = lane_order(term.sums, 2 * in * term.tiles + out);
    const int next = 64 * term.tiles;  // float4 of a row of tiles
#pragma unroll
    for (int m = 0; m < Inputs; ++m)
      with_saved(at + m * next, [&](int n, int e, float v) { sum.at[m][n][e] = v; });
    x.at += 32 * in;
    g.at += 16 * out;
    multiply<T, Inputs, true, true>(sum, left<true>(x), right<true>(g), M);
#pragma unroll
    for (int m = 0; m < Inputs; ++m) save(at + m * next, sum.at[m]);
  }

  // Adds this stage to the gradients of a matrix and of the vectors of its layer.
  FMFT_DEVICE void add_term(const Outer term, float t, int64_t q) const {
    const Staged x = staged(term.source, kRows, term.source_tiles);
    const Staged g = staged(term.delta, kRows, term.tiles);
    for_sums(term, [&](int in, int out) {
      if (2 * in + 1 < term.source_tiles)
        add_product<2>(term, x, g, in, out);
      else
        add_product<1>(term, x, g, in, out);
    });
    if (term.vectors) add_vectors(term.layer, t, q);
  }

  // From the gradient of a stage, staged as that of the last layer, to that of the stage's input.
  FMFT_DEVICE void stage(float t, int64_t q) const {
    this->template hidden_layers<true>(t, q);
    int done = field.terms;
    auto add_until = [&](int j) {
#pragma unroll 1
      while (done > j) add_term(this->outer(--done), t, q);
    };
    auto hidden = [&](int v, auto tiles) {
      const Back layer = this->back(v);
      hidden_gradient<decltype(tiles)::value>(layer, v - 1, t, q, [&] {
        if (layer.wait) __syncthreads();
      });
      if (layer.wait) add_until(layer.first_term);
    };
    int v = field.layers - 1;
    if (W > 0) hidden(v--, Constant<1>{});
#pragma unroll 1
    for (; v > 0; --v) hidden(v, Constant<W>{});
    const Back of_state = this->back(0);
    const Factor from =
        left<false>(this->own(staged(of_state.reader, kRows, of_state.reader_tiles)));
    const Staged weights = staged(of_state.weights, 16 * of_state.reader_tiles, of_state.tiles);
    __syncthreads();
    add_until(0);
    this->partial_products([&](Tile<>& sum, int c, int part, int parts) {
      int k = part;
      Staged w = weights;
      w.at += 16 * c;
      this->template multiply_part<true>(sum, from, right<true>(w), of_state.reader_tiles, k, parts);
      if (!of_state.rare) return;
      const int first = field.first_consumer;
      add_consumers(sum, first + 1, first + field.consumers, c, k, parts);
      if (part == 0) add_skippers(sum, field.first_skipper, field.skippers, c);
    });
  }

  // The gradients of the rows of `cond`, kept from stage to stage: zero them, or write them out.
  template <bool Write>
  FMFT_DEVICE void conds() const {
    if (solve.cond[0] == nullptr) return;
    for (int i = 0; i < field.layers; ++i) {
      const FieldLayer& layer = field.layer[i];
      if (layer.cond < 0) continue;
      for (int c = first_item(this->member(), this->team(), layer.first_warp); c < layer.tiles;
           c += this->team()) {
        Tile<> tile;
        fill(tile, 0.0f);
        float4* sums = this->own_tile(layer.cond_sums, c);
        if constexpr (!Write) save(sums, tile.at[0]);
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
      for (int j = layer.first_term; j < layer.first_term + layer.terms; ++j) {
        const FieldTerm& term = field.term[j];
        if (this->outer(j).items == 0) continue;
        float* into = partials + solve.parameter_at[term.weight] + term.column;
        const int64_t columns = solve.columns[term.weight];
        const int tiles = this->value_tiles(term.source), width = this->value_width(term.source);
        for_sums(this->outer(j), [&](int in, int out) {
          for (int i = 2 * in; i < 2 * in + 2 && i < tiles; ++i)
            with_saved(lane_order(term.sums, i * layer.tiles + out), [&](int n, int e, float sum) {
              const int row = row_of(i, e / 2), column = column_of(out, n) + e % 2;
              if (row < width && column < layer.width) into[column * columns + row] = sum;
            });
        });
      }
      if (layer.vector_sums < 0) continue;
      const bool by_time = layer.time >= 0;
      const float* sums = team_sums(layer.vector_sums, layer.tiles, by_time, 0);
      const int other = M > 1 ? 16 * layer.tiles * (by_time ? 3 : 2) : 0;  // team's
      auto sum_at = [&](int c) { return M > 1 ? sums[c] + sums[other + c] : sums[c]; };
      for (int c = threadIdx.x; c < layer.width; c += blockDim.x) {
        if (layer.bias >= 0 && solve.parameter_at[layer.bias] >= 0)
          partials[solve.parameter_at[layer.bias] + c] = sum_at(c);
        if (layer.time >= 0 && solve.parameter_at[layer.time] >= 0)
          partials[solve.parameter_at[layer.time] + layer.time_column +
                   static_cast<int64_t>(c) * solve.columns[layer.time]] =
              sum_at(16 * layer.tiles + c);
      }
    }
  }
};

// The samples share their steps, or each has its own (ByRow): then a sample that has no step left takes one
// of size 0 from 0, which adds nothing to any gradient.
template <int T, int M, bool ByRow, int W = 0>
FMFT_KERNEL __launch_bounds__(32 * kMaxWarps, 1) backward_kernel(const FMFT_GRID_CONSTANT Field field,
                                                              const FMFT_GRID_CONSTANT Solve solve) {
  constexpr int kRows = 16 * M;
  Adjoint<T, M, ByRow, W> block{{field, solve}};
  if (solve.partials != nullptr) block.partials = solve.partials + blockIdx.x * solve.gradient_size;
  block.load();
  __syncthreads();  // what load() makes zero is written below by other threads
  const int state = field.state, size = kRows * state, stages = solve.stages;
  const int last = field.layers - 1, kept = field.layer[last].kept;
  float* const gy = floats(field.stages_at);   // of the state after the step
  float* const gx = gy + size;                 // of the inputs of the stages
  float* const gk = floats(field.slopes_at);   // of a stage
  float* const input = floats(field.inputs_at);
  const Staged x = block.value(0), delta = block.delta(last);
  const bool dense = solve.dense != nullptr;
  for (block.begin_rows(static_cast<int64_t>(blockIdx.x) * kRows); block.rows > 0;
       block.begin_rows(block.row0 + static_cast<int64_t>(gridDim.x) * kRows)) {
    block.load_conds();
    block.template conds<false>();
    const int64_t own_row = block.row0 + block.own_row();
    // A row of these samples in a tensor [..., batch, state].
    auto place = [&](int64_t n) { return (n * solve.batch + block.row0) * state; };
    auto step_size = [&](int n) {
      if constexpr (!ByRow) return solve.h[n];
      return own_row < solve.batch ? solve.row_h[n * solve.batch + own_row] : 0.0f;
    };
    // Adds the outputs from ... with a weight that depends on their number.
    auto outputs = [&](int from, int end, int at, auto weight) {
      float sum = 0.0f;
#pragma unroll 1
      for (int o = from; o < end; ++o) sum += weight(o) * solve.grad[place(o) + at];
      return sum;
    };
    // Begins to fetch the inputs of a stage: each thread its own numbers.
    auto fetch_inputs = [&](int64_t q) {
      if (q < 0) return;
      const float* from = solve.kept + place(q);
      block.for_state([&](int e, int row, int d) {
        if (block.exists(row)) copy_later(input + e, from + (row * state + d));
      });
    };
    int n = solve.steps;
    if constexpr (ByRow)
      while (n > 0 && !any_thread(step_size(n - 1) != 0.0f)) --n;
    auto one = [](int) { return 1.0f; };
    const int first_output = solve.first[solve.steps], no_output = solve.first[solve.steps + 1];
    block.for_state([&](int e, int row, int d) {
      const bool any = !dense && block.exists(row);
      gy[e] = any ? outputs(first_output, no_output, row * state + d, one) : 0.0f;
    });
    int64_t q = static_cast<int64_t>(n) * stages - 1;
    fetch_inputs(q);
    block.fetch_tables(q);
    while (--n >= 0) {
      const float h = step_size(n);
      const bool moves = !ByRow || h != 0.0f;
      const int from = solve.first[n], end = solve.first[n + 1];
#pragma unroll 1
      for (int s = stages - 1; s >= 0; --s, --q) {
        float t = 0.0f;
        if constexpr (!ByRow) t = solve.times[q];
        else if (moves) t = solve.row_times[q * solve.batch + own_row];
        wait_for_copies();
        block.for_state([&](int e, int row, int d) {
          const bool real = block.exists(row);
          const int at = row * state + d;
          float sum = solve.b[s] * gy[e];
#pragma unroll 1
          for (int j = s + 1; j < stages; ++j) sum += solve.a[j][s] * gx[j * size + e];
          if (dense && real)
            sum += outputs(from, end, at, [&](int o) { return solve.dense[o * stages + s]; });
          gk[e] = h * sum;
          store_one<T>(delta, row, d, h * sum);
          store_one<T>(x, row, d, real && moves ? input[e] : 0.0f);
          if (kept >= 0 && real) solve.deltas[kept][place(q) + at] = h * sum;
        });
        if (ByRow && threadIdx.x < kRows) block.row_times()[threadIdx.x] = t;
        __syncthreads();
        fetch_inputs(q - 1);
        block.fetch_tables(q - 1);
        block.stage(t, q);
        block.for_state([&](int e, int row, int d) {
          const float last_sum = block.sum_of_parts(row, d);
          gx[s * size + e] = last_sum;
          if (s > 0) return;
          float sum = gy[e];
          if (block.exists(row)) sum += outputs(from, end, row * state + d, one);
          sum += last_sum;
#pragma unroll 1
          for (int j = 1; j < stages; ++j) sum += gx[j * size + e];
          gy[e] = sum;
        });
      }
    }
    block.for_state([&](int e, int row, int d) {
      if (solve.grad_y0 != nullptr && block.exists(row))
        solve.grad_y0[place(0) + row * state + d] = gy[e];
    });
    block.template conds<true>();
    block.first = false;
  }
  block.finish();
}

}  // namespace fmft::cuda
