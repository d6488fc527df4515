// Device code of the trajectory kernels: T bf16 terms of a float32, M tiles of 16 rows in a block.
//
// A lane of a warp holds, of a tile of 16 rows and 8 columns, the rows lane / 4 and that + 8 and the
// columns 2 (lane % 4) and that + 1: this is how the tensor cores return a product.
#pragma once
#include "activations.h"
#include "trajectory.h"

namespace fmft::cuda {

constexpr int kMaxWarps = 8;

// A matrix in shared memory as T bf16 matrices; rows are padded so that eight of them hit all banks.
struct Staged {
  uint16_t* at;
  int stride;  // of a row
  int term;    // distance of the terms
};

FMFT_DEVICE Staged staged(int place, int rows, int tiles) {
  const int stride = 16 * tiles + 8;
  return {reinterpret_cast<uint16_t*>(dynamic_shared() + place), stride, rows * stride};
}

FMFT_DEVICE float* floats(int place) { return reinterpret_cast<float*>(dynamic_shared() + place); }

FMFT_DEVICE int lane() { return threadIdx.x % 32; }
FMFT_DEVICE int warp() { return threadIdx.x / 32; }
FMFT_DEVICE int warps() { return blockDim.x / 32; }

// The tile that a warp begins with when tile 0 goes to warp `first`.
FMFT_DEVICE int first_item(int first) {
  const int distance = warp() - first;
  return distance < 0 ? distance + warps() : distance;
}

template <int T>
FMFT_DEVICE void store_pair(const Staged& into, int row, int column, float low, float high) {
  uint16_t* at = into.at + row * into.stride + column;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const uint32_t pair = pack_bf16(low, high);
    *reinterpret_cast<uint32_t*>(at + t * into.term) = pair;
    low -= low_bf16(pair);
    high -= high_bf16(pair);
  }
}

template <int T>
FMFT_DEVICE void store_one(const Staged& into, int row, int column, float value) {
  uint16_t* at = into.at + row * into.stride + column;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const uint32_t pair = pack_bf16(value, 0.0f);
    at[t * into.term] = static_cast<uint16_t>(pair);
    value -= low_bf16(pair);
  }
}

// The numbers of one lane in M x 2 tiles of [16 x 8].
template <int M>
struct Tile {
  float at[M][2][4];
};

template <int M>
FMFT_DEVICE void fill(Tile<M>& tile, float value) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < 8; ++i) tile.at[m][i / 4][i % 4] = value;
}

// Row and first column of the pair tile.at[m][n][2 i ..] in a tile of columns 16 `column_tile`.
FMFT_DEVICE int row_of(int m, int i) { return 16 * m + 8 * i + lane() / 4; }
FMFT_DEVICE int column_of(int column_tile, int n) {
  return 16 * column_tile + 8 * n + 2 * (lane() % 4);
}

// Calls f(m, n, i, row, column) for all pairs of neighbours that the lane holds.
template <int M, class F>
FMFT_DEVICE void for_pairs(int column_tile, F&& f) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) f(m, n, i, row_of(m, i), column_of(column_tile, n));
}

// Tiles in the order of the lanes: 16 bytes of every lane follow each other, and only the warp that
// wrote a tile reads it.
template <int M>
FMFT_DEVICE float4* lane_order(int place, int tile) {
  return reinterpret_cast<float4*>(dynamic_shared() + place) + (tile * M * 2 * 32 + lane());
}

template <int M>
FMFT_DEVICE void save(float4* into, const Tile<M>& tile) {
#pragma unroll
  for (int j = 0; j < 2 * M; ++j) {
    const float(&v)[4] = tile.at[j / 2][j % 2];
    into[32 * j] = make_float4(v[0], v[1], v[2], v[3]);
  }
}

template <int M, class F>
FMFT_DEVICE void with_saved(const float4* from, F&& f) {
#pragma unroll
  for (int j = 0; j < 2 * M; ++j) {
    const float4 v = from[32 * j];
    f(j / 2, j % 2, 0, v.x), f(j / 2, j % 2, 1, v.y);
    f(j / 2, j % 2, 2, v.z), f(j / 2, j % 2, 3, v.w);
  }
}

template <int M>
FMFT_DEVICE void add_saved(Tile<M>& tile, const float4* from) {
  with_saved<M>(from, [&](int m, int n, int e, float v) { tile.at[m][n][e] += v; });
}

// c += a b over the tiles first, first + step, ... < count of the inner dimension. a is stored as
// [rows][inner], or [inner][rows] if TurnA; b as [columns][inner], or [inner][columns] if TurnB; both
// begin at their corner. Products of the relative order 2^(-8 T) are left out: they are no larger than
// what the terms leave out. The smallest products are added up on their own: this is more accurate, and an
// instruction waits for fewer others.
template <int T, int M, bool TurnA, bool TurnB>
FMFT_DEVICE void multiply(Tile<M>& c, const Staged& a, const Staged& b, int first, int count,
                          int step = 1) {
  const int l = lane(), low = l % 8;
  const int rows_first = low + l % 16 / 8 * 8, rows_last = low + l / 16 * 8;
  const int column_last = l / 16 * 8, column_first = l % 16 / 8 * 8;
  const uint16_t* from_a =
      a.at + (TurnA ? rows_last * a.stride + column_first : rows_first * a.stride + column_last);
  const uint16_t* from_b =
      b.at + (TurnB ? rows_first * b.stride + column_last : rows_last * b.stride + column_first);
  const int a_m = TurnA ? 16 : 16 * a.stride;
  const int a_k = TurnA ? 16 * a.stride : 16, b_k = TurnB ? 16 * b.stride : 16;
  Tile<M> small;
  fill(small, 0.0f);
#pragma unroll 2
  for (int k = first; k < count; k += step) {
    uint32_t x[M][T][4], w[T][4];
#pragma unroll
    for (int t = 0; t < T; ++t) {
      load_matrices<TurnB>(w[t], from_b + k * b_k + t * b.term);
#pragma unroll
      for (int m = 0; m < M; ++m)
        load_matrices<TurnA>(x[m][t], from_a + k * a_k + m * a_m + t * a.term);
    }
#pragma unroll
    for (int order = T - 1; order >= 0; --order)
#pragma unroll
      for (int t = 0; t <= order; ++t)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            Tile<M>& into = T > 1 && order == T - 1 ? small : c;
            mma(into.at[m][n], x[m][t], w[order - t][2 * n], w[order - t][2 * n + 1]);
          }
  }
  if constexpr (T > 1) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i) c.at[m][i / 4][i % 4] += small.at[m][i / 4][i % 4];
  }
}

// What the forward and the backward kernel share: one block of `rows` samples.
template <int T, int M>
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

  // Calls f(e, row, d) for the numbers of the state that this thread owns.
  template <class F>
  FMFT_DEVICE void for_state(F&& f) const {
    for (int e = threadIdx.x; e < kRows * field.state; e += blockDim.x) f(e, e % kRows, e / kRows);
  }

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

  // What is added to column c of a layer at the time t of stage q for all samples.
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
          const float sum = vector_at(layer, t, q, column_of(c, n) + e);
#pragma unroll
          for (int m = 0; m < M; ++m) z.at[m][n][e] = z.at[m][n][2 + e] = sum;
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
};

// The first tile of an inner dimension, of which `done` tiles went before, that belongs to `part`.
FMFT_DEVICE int first_of_part(int part, int parts, int done) {
  const int first = part - done % parts;
  return first < 0 ? first + parts : first;
}

template <int T, int M>
FMFT_KERNEL __launch_bounds__(32 * kMaxWarps, 1) forward_kernel(const FMFT_GRID_CONSTANT Field field,
                                                             const FMFT_GRID_CONSTANT Solve solve) {
  constexpr int kRows = Block<T, M>::kRows;
  Block<T, M> block{field, solve};
  block.load();
  const int size = kRows * field.state, stages = solve.stages;
  const FieldLayer& last = field.layer[field.layers - 1];
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
        block.template hidden_layers<false>(t, q);
        if (field.wait_last) __syncthreads();
        block.partial_products([&](Tile<M>& sum, int c, int part, int parts) {
          for (int j = last.first_term, done = 0; j < last.first_term + last.terms; ++j) {
            const FieldTerm& term = field.term[j];
            const int tiles = block.value_tiles(term.source);
            Staged w = block.weights(term);
            w.at += 16 * c * w.stride;
            multiply<T, M, false, false>(sum, block.value(term.source), w,
                                         first_of_part(part, parts, done), tiles, parts);
            done += tiles;
          }
        });
        block.for_state([&](int e, int row, int d) {
          k[s * size + e] = block.sum_of_parts(row, d) + block.vector_at(last, t, q, d);
        });
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
