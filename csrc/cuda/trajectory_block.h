// A block of samples of the trajectory kernels: what it keeps in shared memory, and the field on it.
#pragma once
#include "activations.h"
#include "tile.h"
#include "trajectory.h"

namespace fmft::cuda {

// The first tile of an inner dimension, of which `done` tiles went before, that belongs to `part`.
FMFT_DEVICE int first_of_part(int part, int parts, int done) {
  const int first = part - done % parts;
  return first < 0 ? first + parts : first;
}

// What the kernels share: one block of `rows` samples, which have one time or, if ByRow, each its own.
template <int T, int M, bool ByRow = false>
struct Block {
  static constexpr int kRows = 16 * M;

  const Field& field;
  const Solve& solve;
  int64_t row0 = 0;  // first sample of the block

  FMFT_DEVICE Staged value(int v) const {
    return v == 0 ? staged(field.state_value, kRows, field.state_tiles)
                  : staged(field.layer[v - 1].value, kRows, field.layer[v - 1].tiles);
  }
  FMFT_DEVICE int value_tiles(int v) const {
    return v == 0 ? field.state_tiles : field.layer[v - 1].tiles;
  }
  FMFT_DEVICE int value_width(int v) const {
    return v == 0 ? field.state : field.layer[v - 1].width;
  }
  FMFT_DEVICE Staged delta(int i) const {
    return staged(field.layer[i].delta, kRows, field.layer[i].tiles);
  }
  FMFT_DEVICE Staged weights(const FieldTerm& term) const {
    return staged(term.packed, 16 * field.layer[term.layer].tiles, value_tiles(term.source));
  }
  FMFT_DEVICE bool exists(int row) const { return row0 + row < solve.batch; }

  // Calls f(e, row, d) for the numbers of the state that this thread owns; they are all of own_row().
  template <class F>
  FMFT_DEVICE void for_state(F&& f) const {
    for (int e = threadIdx.x; e < kRows * field.state; e += blockDim.x) f(e, e % kRows, e / kRows);
  }

  FMFT_DEVICE int own_row() const { return threadIdx.x % kRows; }
  // The times of the rows, where they differ: what a thread writes, others see after a barrier.
  FMFT_DEVICE float* row_times() const { return floats(field.row_times_at); }

  // Begins to fetch row q of the tables; it is there after wait_for_copies() and a barrier.
  FMFT_DEVICE void fetch_tables(int64_t q) const {
    if (q < 0 || q >= static_cast<int64_t>(solve.steps) * solve.stages) return;
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
    for (int j = 0; j < field.terms; ++j) {
      const FieldTerm& term = field.term[j];
      const Staged w = weights(term);
      const int outs = field.layer[term.layer].width, ins = value_width(term.source);
      const int rows = 16 * field.layer[term.layer].tiles, padded = 16 * value_tiles(term.source);
      const bool identity = term.weight < 0;
      const float* from = identity ? nullptr : solve.parameter[term.weight] + term.column;
      const int64_t columns = identity ? 0 : solve.columns[term.weight];
      constexpr int kFlying = 16;  // loads that are under way together
      for (int column = lane(); column < padded; column += 32)
        for (int first = warp(); first < rows; first += kFlying * warps()) {
          float values[kFlying];
#pragma unroll
          for (int u = 0; u < kFlying; ++u) {
            const int row = first + u * warps();
            values[u] = 0.0f;
            if (row < outs && column < ins)
              values[u] = identity ? static_cast<float>(row == column) : from[row * columns + column];
          }
#pragma unroll
          for (int u = 0; u < kFlying; ++u) {
            const int row = first + u * warps();
            if (row < rows) store_one<T>(w, row, column, values[u]);
          }
        }
    }
    for (int i = 0; i < field.layers; ++i) {
      const FieldLayer& layer = field.layer[i];
      float* into = floats(layer.vectors);
      for (int c = threadIdx.x; c < 16 * layer.tiles; c += blockDim.x) {
        const bool real = c < layer.width;
        into[c] = real && layer.bias >= 0 ? solve.parameter[layer.bias][c] : 0.0f;
        if (layer.table >= 0) table_row(layer, 0)[c] = table_row(layer, 1)[c] = 0.0f;
        if (layer.time < 0) continue;
        const float* from = solve.parameter[layer.time] + layer.time_column;
        into[16 * layer.tiles + c] =
            real ? from[static_cast<int64_t>(c) * solve.columns[layer.time]] : 0.0f;
      }
    }
  }

  // The bias of every sample, read once per solve.
  FMFT_DEVICE void load_conds() const {
    for (int i = 0; i < field.layers; ++i) {
      const FieldLayer& layer = field.layer[i];
      if (layer.cond < 0) continue;
      const float* from = solve.cond[layer.cond] + row0 * layer.width;
      for (int c = first_item(layer.first_warp); c < layer.tiles; c += warps()) {
        Tile<M> tile;
        for_pairs<M>(c, [&](int m, int n, int i, int row, int column) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const bool real = exists(row) && column + e < layer.width;
            tile.at[m][n][2 * i + e] =
                real ? from[static_cast<int64_t>(row) * layer.width + column + e] : 0.0f;
          }
        });
        save(lane_order<M>(layer.cond_at, c), tile);
      }
    }
  }

  // What is added to column c of a layer at the time t of stage q.
  FMFT_DEVICE float vector_at(const FieldLayer& layer, float t, int64_t q, int c) const {
    const float* vectors = floats(layer.vectors);
    float sum = vectors[c];
    if (layer.time >= 0) sum += t * vectors[16 * layer.tiles + c];
    if (layer.table >= 0) sum += table_row(layer, q)[c];
    return sum;
  }

  // Evaluates a hidden layer from staged values; `Backward` also saves the derivative.
  template <bool Backward>
  FMFT_DEVICE void hidden_layer(const FieldLayer& layer, float t, int64_t q) const {
    const Staged into = staged(layer.value, kRows, layer.tiles);
    for (int c = first_item(layer.first_warp); c < layer.tiles; c += warps()) {
      Tile<M> z;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float sum = vector_at(layer, ByRow ? 0.0f : t, q, column_of(c, n) + e);
#pragma unroll
          for (int m = 0; m < M; ++m) z.at[m][n][e] = z.at[m][n][2 + e] = sum;
        }
      if (ByRow && layer.time >= 0) {
        const float* by_time = floats(layer.vectors) + 16 * layer.tiles;
        for_pairs<M>(c, [&](int m, int n, int i, int row, int column) {
          const float own = row_times()[row];
          z.at[m][n][2 * i] += own * by_time[column];
          z.at[m][n][2 * i + 1] += own * by_time[column + 1];
        });
      }
      if (layer.cond >= 0) add_saved(z, lane_order<M>(layer.cond_at, c));
      for (int j = layer.first_term; j < layer.first_term + layer.terms; ++j) {
        const FieldTerm& term = field.term[j];
        Staged w = weights(term);
        w.at += 16 * c * w.stride;
        multiply<T, M, false, false>(z, value(term.source), w, 0, value_tiles(term.source));
      }
      Tile<M> slopes;
      with_activation(layer.activation, [&](auto which) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& x = z.at[m][i / 4][i % 4];
            x = activation<decltype(which)::value, T == 1>(x, layer.slope,
                                                           slopes.at[m][i / 4][i % 4]);
          }
      });
      if constexpr (Backward) save(lane_order<M>(layer.derivative, c), slopes);
      for (int j = layer.first_skip; j < layer.first_skip + layer.skips; ++j) {
        const Staged from = value(field.skip[j]);
        for_pairs<M>(c, [&](int m, int n, int i, int row, int column) {
#pragma unroll
          for (int term = T - 1; term >= 0; --term) {
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(
                from.at + row * from.stride + column + term * from.term);
            z.at[m][n][2 * i] += low_bf16(pair);
            z.at[m][n][2 * i + 1] += high_bf16(pair);
          }
        });
      }
      for_pairs<M>(c, [&](int m, int n, int i, int row, int column) {
        store_pair<T>(into, row, column, z.at[m][n][2 * i], z.at[m][n][2 * i + 1]);
      });
      if constexpr (Backward)
        if (layer.kept >= 0) keep(solve.values[layer.kept], layer.width, q, c, z);
    }
  }

  // Writes a tile to row q of a tensor [stages of the solve, batch, width].
  FMFT_DEVICE void keep(float* into, int width, int64_t q, int c, const Tile<M>& tile) const {
    into += (q * solve.batch + row0) * width;
    for_pairs<M>(c, [&](int m, int n, int i, int row, int column) {
      if (!exists(row)) return;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column + e < width)
          into[static_cast<int64_t>(row) * width + column + e] = tile.at[m][n][2 * i + e];
    });
  }

  template <bool Backward>
  FMFT_DEVICE void hidden_layers(float t, int64_t q) const {
    for (int i = 0; i < field.layers - 1; ++i) {
      if (field.layer[i].wait) __syncthreads();
      hidden_layer<Backward>(field.layer[i], t, q);
    }
  }

  // Computes a [rows, state] tile by parts: f(tile, column tile, part, parts) adds one part.
  template <class F>
  FMFT_DEVICE void partial_products(F&& f) const {
    const int tiles = field.state_tiles, parts = field.splits, stride = 16 * tiles + 2;
    float* into = floats(field.partial);
    for (int item = warp(); item < parts * tiles; item += warps()) {
      const int c = item % tiles, part = item / tiles;
      Tile<M> sum;
      fill(sum, 0.0f);
      f(sum, c, part, parts);
      for_pairs<M>(c, [&](int m, int n, int i, int row, int column) {
        float2* at = reinterpret_cast<float2*>(into + (part * kRows + row) * stride + column);
        *at = make_float2(sum.at[m][n][2 * i], sum.at[m][n][2 * i + 1]);
      });
    }
    __syncthreads();
  }

  FMFT_DEVICE float sum_of_parts(int row, int d) const {
    const int stride = 16 * field.state_tiles + 2;
    const float* from = floats(field.partial) + row * stride + d;
    float sum = 0.0f;
    for (int part = 0; part < field.splits; ++part) sum += from[part * kRows * stride];
    return sum;
  }

  // Writes the velocity at the staged input to k; t is the time of own_row().
  FMFT_DEVICE void velocity(float t, int64_t q, float* k) const {
    const FieldLayer& last = field.layer[field.layers - 1];
    hidden_layers<false>(t, q);
    if (field.wait_last) __syncthreads();
    partial_products([&](Tile<M>& sum, int c, int part, int parts) {
      for (int j = last.first_term, done = 0; j < last.first_term + last.terms; ++j) {
        const FieldTerm& term = field.term[j];
        const int tiles = value_tiles(term.source);
        Staged w = weights(term);
        w.at += 16 * c * w.stride;
        multiply<T, M, false, false>(sum, value(term.source), w, first_of_part(part, parts, done),
                                     tiles, parts);
        done += tiles;
      }
    });
    for_state([&](int e, int row, int d) { k[e] = sum_of_parts(row, d) + vector_at(last, t, q, d); });
  }
};

}  // namespace fmft::cuda
