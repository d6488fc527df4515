// A block of samples of the trajectory kernels: what it keeps in shared memory, and the field on it.
#pragma once
#include "activations.h"
#include "tile.h"
#include "trajectory.h"

namespace fmft::cuda {

// What a step reads of a hidden layer. It lies in shared memory, where it takes a few cycles: numbers of
// `Field` that are found at run time take tens of cycles each.
struct alignas(16) Ahead {
  int wait, tiles, first, activation;
  int source, source_tiles, weights, value;  // of the first term
  int vectors, by_time, derivative;
  float slope;
  int rare;  // whether there is more to it
};

// Likewise of the gradient of a value; of that of a layer's input, if it is no state.
struct alignas(16) Back {
  int wait, tiles, first, delta;
  int reader, reader_tiles, weights, derivative;  // of the first layer that reads the value
  int vectors, by_time, table;
  int rare;
  int first_term;  // of the layer that comes next
};
// Likewise of the gradient of a matrix, and of the vectors of its layer.
struct alignas(16) Outer {
  int sums, source, source_tiles, delta;
  int tiles, first, items, inverse;  // inverse: 2^16 / tiles, rounded up
  int layer, vectors;  // vectors: 0 if there is nothing to do
};
static_assert(sizeof(Ahead) == 64 && sizeof(Back) == 64 && sizeof(Outer) == 48,
              "cuda_plan.py leaves room for them");

// The first of the items that `one` of `all` works on when the item 0 goes to `first`.
FMFT_DEVICE int first_item(int one, int all, int first) {
  const int distance = one - first;
  return distance < 0 ? distance + all : distance;
}

// What the kernels share: M tiles of 16 samples, which have one time or, if ByRow, each its own. A team of
// warps works on every tile. If W > 0, all hidden layers have W tiles of columns and a team has W warps, see
// has_common_tiles(): what is known beforehand takes less time.
template <int T, int M, bool ByRow = false, int W = 0>
struct Block {
  static constexpr int kRows = 16 * M;
  static constexpr int kPartialStride = kRows + 4;  // of what lanes write, 4 x 8 numbers hit all banks

  const Field& field;
  const Solve& solve;
  int64_t row0 = 0;  // first sample of the block
  int rows = 0;      // how many there are
  const int own_part = find_part();

  FMFT_DEVICE int team() const { return W > 0 ? W : warps() / M; }
  FMFT_DEVICE int row_tile() const { return M > 1 && warp() >= team() ? 1 : 0; }
  FMFT_DEVICE int member() const { return warp() - row_tile() * team(); }

  FMFT_DEVICE const Ahead& ahead(int layer) const {
    return reinterpret_cast<const Ahead*>(dynamic_shared() + field.records_at)[layer];
  }
  FMFT_DEVICE const Outer& outer(int term) const {
    return reinterpret_cast<const Outer*>(&ahead(field.layers))[term];
  }
  FMFT_DEVICE const Back& back(int value) const {
    return reinterpret_cast<const Back*>(&outer(field.terms))[value];
  }

  FMFT_DEVICE int value_place(int v) const {
    return v == 0 ? field.state_value : field.layer[v - 1].value;
  }
  FMFT_DEVICE int value_tiles(int v) const {
    return v == 0 ? field.state_tiles : field.layer[v - 1].tiles;
  }
  FMFT_DEVICE int value_width(int v) const {
    return v == 0 ? field.state : field.layer[v - 1].width;
  }
  FMFT_DEVICE Staged value(int v) const { return staged(value_place(v), kRows, value_tiles(v)); }
  FMFT_DEVICE Staged delta(int i) const {
    return staged(field.layer[i].delta, kRows, field.layer[i].tiles);
  }
  FMFT_DEVICE Staged weights(const FieldTerm& term) const {
    return staged(term.packed, 16 * field.layer[term.layer].tiles, value_tiles(term.source));
  }
  // The team's rows.
  FMFT_DEVICE Staged own(Staged of_block) const {
    of_block.at += 16 * row_tile() * of_block.stride;
    return of_block;
  }
  FMFT_DEVICE float4* own_tile(int place, int column_tile) const {
    return lane_order(place, column_tile * M + row_tile());
  }

  FMFT_DEVICE void begin_rows(int64_t first) {
    row0 = first;
    const int64_t left = solve.batch - first;
    rows = left < kRows ? static_cast<int>(left) : kRows;
  }
  FMFT_DEVICE bool exists(int row) const { return row < rows; }

  // Calls f(e, row, d) for the numbers of the state that this thread owns; they are all of own_row().
  template <class F>
  FMFT_DEVICE void for_state(F&& f) const {
#pragma unroll 1
    for (int e = threadIdx.x; e < kRows * field.state; e += blockDim.x)
      f(e, static_cast<unsigned>(e) % kRows, static_cast<unsigned>(e) / kRows);
  }

  FMFT_DEVICE int own_row() const { return threadIdx.x % kRows; }
  // The times of the rows, where they differ: what a thread writes, others see after a barrier.
  FMFT_DEVICE float* row_times() const { return floats(field.row_times_at); }

  // Begins to fetch row q of the tables; it is there after wait_for_copies() and a barrier.
  FMFT_DEVICE void fetch_tables(int64_t q) const {
    if (solve.table[0] == nullptr || q < 0 || q >= static_cast<int64_t>(solve.steps) * solve.stages) return;
    for (int i = 0; i < field.layers; ++i) {
      const FieldLayer& layer = field.layer[i];
      if (layer.table < 0) continue;
      float* into = table_row(layer, q);
      const float* from = solve.table[layer.table] + q * layer.width;
      for (int c = threadIdx.x; c < layer.width; c += blockDim.x) copy_later(into + c, from + c);
    }
  }
  FMFT_DEVICE float* table_row(const FieldLayer& layer, int64_t q) const {
    const int row = (layer.time >= 0 ? 2 : 1) + static_cast<int>(q & 1);
    return floats(layer.vectors) + 16 * layer.tiles * row;
  }

  // What the block reads in all steps: weights in bf16 terms, vectors, zeros.
  FMFT_DEVICE void load() const {
    for (int i = field.zero_begin / 16 + threadIdx.x; i < field.zero_end / 16; i += blockDim.x)
      reinterpret_cast<float4*>(dynamic_shared())[i] = make_float4(0, 0, 0, 0);
    describe();
    for (int j = 0; j < field.terms; ++j) load_weights(field.term[j]);
    for (int i = warp(); i < field.layers; i += warps()) {
      const FieldLayer& layer = field.layer[i];
      const bool bias = layer.bias >= 0, time = layer.time >= 0, table = layer.table >= 0;
      const float* of_bias = bias ? solve.parameter[layer.bias] : nullptr;
      const float* of_time = time ? solve.parameter[layer.time] + layer.time_column : nullptr;
      const int64_t columns = time ? solve.columns[layer.time] : 0;
      float* into = floats(layer.vectors);
#pragma unroll 4
      for (int c = lane(); c < 16 * layer.tiles; c += 32) {
        const bool real = c < layer.width;
        into[c] = bias && real ? of_bias[c] : 0.0f;
        if (time) into[16 * layer.tiles + c] = real ? of_time[c * columns] : 0.0f;
        if (table) table_row(layer, 0)[c] = table_row(layer, 1)[c] = 0.0f;
      }
    }
  }

  // Stages a matrix, tile by tile.
  FMFT_DEVICE void load_weights(const FieldTerm& term) const {
    const Staged into = weights(term);
    const int outs = field.layer[term.layer].width, ins = value_width(term.source);
    const int out_tiles = field.layer[term.layer].tiles, in_tiles = value_tiles(term.source);
    const bool identity = term.weight < 0;
    const float* from = identity ? nullptr : solve.parameter[term.weight] + term.column;
    const int64_t columns = identity ? 0 : solve.columns[term.weight];
    const int inverse = (65535 + in_tiles) / in_tiles;
    constexpr int kFlying = 4;  // tiles whose loads are under way together
    for (int first = warp(); first < out_tiles * in_tiles; first += kFlying * warps()) {
      Tile<> tiles[kFlying];
      uint16_t* at[kFlying];
#pragma unroll
      for (int u = 0; u < kFlying; ++u) {
        const int item = first + u * warps(), out = item * inverse >> 16, in = item - out * in_tiles;
        at[u] = out < out_tiles ? first_pair(into, out, in) : nullptr;
        for_pairs(out, in, [&](int n, int i, int row, int column) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& number = tiles[u].at[0][n][2 * i + e];
            number = identity && row == column + e ? 1.0f : 0.0f;
            if (!identity && row < outs && column + e < ins) number = from[row * columns + column + e];
          }
        });
      }
#pragma unroll
      for (int u = 0; u < kFlying; ++u)
        if (at[u] != nullptr) store_tile<T>(into, at[u], tiles[u]);
    }
  }

  FMFT_DEVICE bool table_wanted(const FieldLayer& layer) const {
    return layer.table >= 0 && solve.table_at[layer.table] >= 0;
  }

  // Writes what steps read of the layers.
  FMFT_DEVICE void describe() const {
    for (int i = threadIdx.x; i < field.layers; i += blockDim.x) {
      const FieldLayer& x = field.layer[i];
      const FieldTerm& term = field.term[x.first_term];
      const bool more = x.table >= 0 || x.cond >= 0 || x.kept >= 0;
      const Ahead record{x.wait,
                         x.tiles,
                         x.first_warp,
                         x.activation,
                         value_place(term.source),
                         value_tiles(term.source),
                         term.packed,
                         x.value,
                         x.vectors,
                         x.time >= 0,
                         x.derivative,
                         x.slope,
                         more || x.terms > 1 || x.skips > 0};
      const_cast<Ahead&>(ahead(i)) = record;
    }
    for (int v = threadIdx.x; v < field.layers; v += blockDim.x) {
      const FieldLayer& x = field.layer[v > 0 ? v - 1 : 0];
      const int consumers = v > 0 ? x.consumers : field.consumers;
      const int first = v > 0 ? x.first_consumer : field.first_consumer;
      const int skippers = v > 0 ? x.skippers : field.skippers;
      const FieldTerm& reader = field.term[consumers > 0 ? field.consumer[first] : 0];
      const bool more = v > 0 && (x.gradient >= 0 || x.cond >= 0 || x.kept >= 0);
      const Back record{x.wait_backward,
                        value_tiles(v),
                        x.first_warp,
                        x.delta,
                        field.layer[reader.layer].delta,
                        consumers > 0 ? field.layer[reader.layer].tiles : 0,
                        reader.packed,
                        x.derivative,
                        solve.partials == nullptr ? -1 : x.vector_sums,
                        x.time >= 0,
                        table_wanted(x),
                        more || consumers > 1 || skippers > 0,
                        field.layer[v].first_term};
      const_cast<Back&>(back(v)) = record;
    }
    for (int j = threadIdx.x; j < field.terms; j += blockDim.x) {
      const FieldTerm& term = field.term[j];
      const FieldLayer& layer = field.layer[term.layer];
      const int ins = value_tiles(term.source);
      const bool any = solve.partials != nullptr;
      const bool wanted =
          any && !field.deferred && term.weight >= 0 && solve.parameter_at[term.weight] >= 0;
      const bool vectors = any && layer.vector_sums >= 0 && j == layer.first_term &&
                           (table_wanted(layer) || term.layer == field.layers - 1);
      const Outer record{term.sums,
                         value_place(term.source),
                         ins,
                         layer.delta,
                         layer.tiles,
                         term.first_warp,
                         wanted ? (ins + 1) / 2 * layer.tiles : 0,
                         (65535 + layer.tiles) / layer.tiles,
                         term.layer,
                         vectors};
      const_cast<Outer&>(outer(j)) = record;
    }
  }

  // The bias of every sample, read once per solve.
  FMFT_DEVICE void load_conds() const {
    if (solve.cond[0] == nullptr) return;
    for (int i = 0; i < field.layers; ++i) {
      const FieldLayer& layer = field.layer[i];
      if (layer.cond < 0) continue;
      const float* from = solve.cond[layer.cond] + row0 * layer.width;
      for (int c = first_item(member(), team(), layer.first_warp); c < layer.tiles; c += team()) {
        float tile[2][4];
        for_pairs(row_tile(), c, [&](int n, int i, int row, int column) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            tile[n][2 * i + e] = exists(row) && column + e < layer.width
                                     ? from[static_cast<int64_t>(row) * layer.width + column + e]
                                     : 0.0f;
        });
        save(own_tile(layer.cond_at, c), tile);
      }
    }
  }

  // The input of a layer's activation before any product.
  FMFT_DEVICE void begin(Tile<>& z, const Ahead& layer, int i, float t, int64_t q, int c) const {
    const float* vectors = floats(layer.vectors);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = column_of(c, n);
      const float2 bias = *reinterpret_cast<const float2*>(vectors + column);
      float(&at)[4] = z.at[0][n];
      at[0] = at[2] = bias.x, at[1] = at[3] = bias.y;
      if (!layer.by_time) continue;
      const float2 by_time =
          *reinterpret_cast<const float2*>(vectors + 16 * layer.tiles + column);
      const float first = ByRow ? row_times()[row_of(0, 0)] : t;
      const float second = ByRow ? row_times()[row_of(0, 1)] : t;
      at[0] += first * by_time.x, at[1] += first * by_time.y;
      at[2] += second * by_time.x, at[3] += second * by_time.y;
    }
    if (!layer.rare) return;
    const FieldLayer& all = field.layer[i];
    if (all.table >= 0)
      for_pairs(0, c, [&](int n, int i, int, int column) {
        z.at[0][n][2 * i] += table_row(all, q)[column];
        z.at[0][n][2 * i + 1] += table_row(all, q)[column + 1];
      });
    if (all.cond >= 0) add_saved(z, own_tile(all.cond_at, c));
  }

  // The products of the other terms.
  FMFT_DEVICE void add_terms(Tile<>& z, const FieldLayer& layer, int c) const {
    for (int j = layer.first_term + 1; j < layer.first_term + layer.terms; ++j) {
      const FieldTerm& term = field.term[j];
      Staged w = weights(term);
      w.at += 16 * c * w.stride;
      multiply<T, 1, false, false>(z, left<false>(own(value(term.source))), right<false>(w),
                                   value_tiles(term.source));
    }
  }
  // The values that are added after the activation.
  FMFT_DEVICE void add_skips(Tile<>& z, const FieldLayer& layer, int c) const {
    for (int j = layer.first_skip; j < layer.first_skip + layer.skips; ++j) {
      const Staged from = value(field.skip[j]);
      for_pairs(row_tile(), c, [&](int n, int i, int row, int column) {
#pragma unroll
        for (int term = T - 1; term >= 0; --term) {
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(
              from.at + row * from.stride + column + term * from.term);
          z.at[0][n][2 * i] += low_bf16(pair);
          z.at[0][n][2 * i + 1] += high_bf16(pair);
        }
      });
    }
  }
  // Evaluates layer i from staged values; `Backward` also saves the derivative. All that needs no other
  // warp comes before the barrier. If K > 0, it reads K tiles.
  template <bool Backward, int K>
  FMFT_DEVICE void hidden_layer(const Ahead layer, int i, float t, int64_t q) const {
    const int tiles = W > 0 ? W : layer.tiles, source_tiles = K > 0 ? K : layer.source_tiles;
    int c = W > 0 ? member() : first_item(member(), team(), layer.first);
    Tile<> z;
    if (W > 0 || c < tiles) begin(z, layer, i, t, q, c);
    const Factor x = left<false>(own(staged(layer.source, kRows, source_tiles)));
    const Staged weights = staged(layer.weights, 16 * tiles, source_tiles);
    const Staged into = staged(layer.value, kRows, tiles);
    Factor w = right<false>(weights);
    w.at += 16 * c * weights.stride;
    uint16_t* at = first_pair(into, row_tile(), c);
    float4* derivative = own_tile(layer.derivative, c);
    if (layer.wait) __syncthreads();
    if (W == 0 && c >= tiles) return;
#pragma unroll 1
    for (;;) {
      multiply<T, 1, false, false>(z, x, w, source_tiles);
      if (layer.rare) add_terms(z, field.layer[i], c);
      Tile<> slopes;
      with_activation(layer.activation, [&](auto which) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& number = z.at[0][j / 4][j % 4];
          number = activation<decltype(which)::value, T == 1>(number, layer.slope,
                                                              slopes.at[0][j / 4][j % 4]);
        }
      });
      if (Backward) save(derivative, slopes.at[0]);
      if (layer.rare) finish_rare<Backward>(z, field.layer[i], q, c);
      store_tile<T>(into, at, z);
      c += team();
      if (W > 0 || c >= tiles) return;
      w.at += 16 * team() * weights.stride;
      at += 16 * team();
      derivative += 64 * M * team();
      begin(z, layer, i, t, q, c);
    }
  }

  template <bool Backward>
  FMFT_DEVICE void finish_rare(Tile<>& z, const FieldLayer& layer, int64_t q, int c) const {
    add_skips(z, layer, c);
    if (Backward && layer.kept >= 0) keep(solve.values[layer.kept], layer.width, q, c, z);
  }

  // Writes a tile to row q of a tensor [stages of the solve, batch, width].
  FMFT_DEVICE void keep(float* into, int width, int64_t q, int c, const Tile<>& tile) const {
    into += (q * solve.batch + row0) * width;
    for_pairs(row_tile(), c, [&](int n, int i, int row, int column) {
      if (!exists(row)) return;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column + e < width)
          into[static_cast<int64_t>(row) * width + column + e] = tile.at[0][n][2 * i + e];
    });
  }

  template <bool Backward>
  FMFT_DEVICE void hidden_layers(float t, int64_t q) const {
    if (W > 0) hidden_layer<Backward, 1>(ahead(0), 0, t, q);
#pragma unroll 1
    for (int i = W > 0 ? 1 : 0; i < field.layers - 1; ++i) hidden_layer<Backward, W>(ahead(i), i, t, q);
  }

  // The part of an inner dimension that this warp works on in partial_products.
  FMFT_DEVICE int find_part() const {
    int part = 0;
    while (part + 1 < field.splits && (part + 1) * field.state_tiles <= member()) ++part;
    return part;
  }

  // Computes a [rows, state] tile by parts: f(tile, column tile, part, parts) adds one part.
  template <class F>
  FMFT_DEVICE void partial_products(F&& f) const {
    const int tiles = field.state_tiles, parts = field.splits, part = own_part;
    float* into = floats(field.partial) + part * 16 * tiles * kPartialStride;
    for (int c = member() - part * tiles; c < tiles; c += team()) {
      Tile<> sum;
      fill(sum, 0.0f);
      f(sum, c, part, parts);
      for_pairs(row_tile(), c, [&](int n, int i, int row, int column) {
        if (column >= field.state) return;
        float* at = into + column * kPartialStride + row;
        at[0] = sum.at[0][n][2 * i];
        at[kPartialStride] = sum.at[0][n][2 * i + 1];
      });
    }
    __syncthreads();
  }

  // Adds the products of every `step`th tile from the tile k of the inner dimension on; k goes on to count
  // from its end.
  template <bool TurnB>
  FMFT_DEVICE void multiply_part(Tile<>& sum, Factor a, Factor b, int count, int& k, int step) const {
    Tile<> small;
    fill(small, 0.0f);
    a.at += k * a.next;
    b.at += k * b.next;
    a.next *= step;
    b.next *= step;
#pragma unroll 1
    for (; k < count; k += step) multiply_tiles<T, 1, false, TurnB, 1>(sum, small, a, b);
    k -= count;
    add(sum, small);
  }

  FMFT_DEVICE float sum_of_parts(int row, int d) const {
    const float* from = floats(field.partial) + d * kPartialStride + row;
    const int next = 16 * field.state_tiles * kPartialStride;
    int part = field.splits;
    float sum = 0.0f;
#pragma unroll 1
    for (; part >= 4; part -= 4, from += 4 * next)
      sum = (((sum + from[0]) + from[next]) + from[2 * next]) + from[3 * next];
#pragma unroll 1
    for (; part > 0; --part, from += next) sum += from[0];
    return sum;
  }

  // Calls f(e, row, d, slope) with the velocity at the staged input; t is the time of own_row().
  template <class F>
  FMFT_DEVICE void velocity(float t, int64_t q, F&& f) const {
    hidden_layers<false>(t, q);
    const int number = field.layers - 1;
    const Ahead last = ahead(number);
    const Factor x = left<false>(own(staged(last.source, kRows, last.source_tiles)));
    const Staged weights_of_first = staged(last.weights, 16 * last.tiles, last.source_tiles);
    if (last.wait) __syncthreads();
    partial_products([&](Tile<>& sum, int c, int part, int parts) {
      int k = part;
      Staged w = weights_of_first;
      w.at += 16 * c * w.stride;
      multiply_part<false>(sum, x, right<false>(w), last.source_tiles, k, parts);
      if (!last.rare) return;
      const FieldLayer& all = field.layer[number];
      for (int j = all.first_term + 1; j < all.first_term + all.terms; ++j) {
        const FieldTerm& term = field.term[j];
        w = weights(term);
        w.at += 16 * c * w.stride;
        multiply_part<false>(sum, left<false>(own(value(term.source))), right<false>(w),
                             value_tiles(term.source), k, parts);
      }
    });
    const float* vectors = floats(last.vectors);
    for_state([&](int e, int row, int d) {
      float slope = sum_of_parts(row, d) + vectors[d];
      if (last.by_time) slope += t * vectors[16 * last.tiles + d];
      if (last.rare && field.layer[number].table >= 0) slope += table_row(field.layer[number], q)[d];
      f(e, row, d, slope);
    });
  }
};

}  // namespace fmft::cuda
