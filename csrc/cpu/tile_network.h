// The network on a tile: weights packed for the products, values, deltas, and sums for the weights.
#pragma once
#include "activation.h"
#include "gemm.h"
#include "tile.h"

namespace fmft {
inline namespace FMFT_ISA {

// [k, n] of strides (row, column) into panels, padded with zeros.
template <class T>
void pack_matrix(T* to, const T* from, int64_t row, int64_t column, int64_t k, int64_t n,
                 int64_t vectors) {
  constexpr int64_t L = Lanes<T>::count;
  // Where columns lie apart, so many rows at a time, which are next to each other: whole lines.
  constexpr int64_t kLines = 2 * 64 / sizeof(T);
  for (int64_t v = 0; v < vectors; v += kBlockVectors) {
    const int64_t width = (vectors - v < kBlockVectors ? vectors - v : kBlockVectors) * L;
    const int64_t filled = n - v * L < width ? n - v * L : width;
    for (int64_t p = 0; p < k; p += kLines) {
      const int64_t rows = k - p < kLines ? k - p : kLines;
      const T* line = from + p * row + v * L * column;
      for (int64_t q = 0; q < rows && column == 1; ++q)
        memcpy(to + q * width, line + q * row, filled * sizeof(T));
      for (int64_t j = 0; j < filled && column != 1; ++j)
        for (int64_t q = 0; q < rows; ++q) to[q * width + j] = line[j * column + q * row];
      for (int64_t q = 0; q < rows; ++q)
        for (int64_t j = filled; j < width; ++j) to[q * width + j] = 0;
      to += rows * width;
    }
  }
}

template <class T>
void pack_all(const Job& job) {
  T* packs = static_cast<T*>(job.packs);
  for (int l = 0; l < job.layer_count; ++l) {
    const Layer& layer = job.layers[l];
    const Value& out = job.values[l + 1];
    for (int i = 0; i < layer.term_count; ++i) {
      const Term& term = layer.terms[i];
      if (term.parameter < 0) continue;
      const Value& in = job.values[term.source];
      const T* w = static_cast<const T*>(job.parameters[term.parameter]) + term.column;
      const int64_t ld = job.leading[term.parameter];
      if (term.forward >= 0)
        pack_matrix(packs + term.forward, w, 1, ld, in.width, out.width, out.vectors);
      if (term.backward >= 0)
        pack_matrix(packs + term.backward, w, ld, 1, out.width, in.width, in.vectors);
    }
    const auto pack_row = [&](int64_t offset, const T* from, int64_t stride) {
      for (int64_t j = 0; j < out.ld; ++j)
        packs[offset + j] = j < out.width ? from[j * stride] : T(0);
    };
    if (layer.bias_row >= 0)
      pack_row(layer.bias_row, static_cast<const T*>(job.parameters[layer.bias]), 1);
    if (layer.time_row >= 0)
      pack_row(layer.time_row,
               static_cast<const T*>(job.parameters[layer.time]) + layer.time_column,
               job.leading[layer.time]);
  }
}

// bias + t w_t + table[q] of a layer, or nullptr; without t w_t if the rows' times differ.
template <class T>
const T* first_row_of(const Tile<T>& tile, const Layer& layer, const Value& out, int64_t q,
                      double t) {
  const T* bias = layer.bias_row >= 0 ? tile.pack(layer.bias_row) : nullptr;
  const bool timed = layer.time_row >= 0 && !tile.times;
  if (!timed && layer.table < 0) return bias;
  T* row = tile.scratch + tile.job.row;
  const T* time = timed ? tile.pack(layer.time_row) : nullptr;
  const T* table = layer.table >= 0
                       ? static_cast<const T*>(tile.job.tables[layer.table]) + q * out.width
                       : nullptr;
  each_vector<T>(out.ld, [&](int64_t i, auto part) {
    Vector<T> x = bias ? get(bias + i, part) : Vector<T>{};
    if (time) x += static_cast<T>(t) * get(time + i, part);
    put<T>(row + i, x, part);
  });
  if (table)
    for (int64_t j = 0; j < out.width; ++j) row[j] += table[j];
  return row;
}

template <class T>
void add_term(const Tile<T>& tile, const Term& term, const Value& out, const T* x, T* z,
              const T* first_row, bool add) {
  const Job& job = tile.job;
  const Value& in = job.values[term.source];
  if (job.direct) {
    const T* w = static_cast<const T*>(job.parameters[term.parameter]) + term.column;
    const Weights<T> weights{w, job.leading[term.parameter], out.width, in.width};
    return dot_weights(x, in.ld, weights, z, out.ld, !out.narrow, tile.rows, first_row, add);
  }
  if (!out.narrow)
    return multiply(x, in.ld, tile.pack(term.forward), in.width, out.vectors, z, out.ld, tile.rows,
                    first_row, add);
  if (!in.narrow)
    return dot_products(x, in.ld, tile.pack(term.backward), in.vectors,
                        static_cast<int>(out.width), z, tile.rows, first_row, add);
  const T* w = static_cast<const T*>(job.parameters[term.parameter]) + term.column;
  const int64_t ld = job.leading[term.parameter];
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t i = 0; i < out.width; ++i) {
      T total = add ? z[r * out.ld + i] : first_row ? first_row[i] : T(0);
      for (int64_t j = 0; j < in.width; ++j) total += x[r * in.ld + j] * w[i * ld + j];
      z[r * out.ld + i] = total;
    }
}

template <class T>
void activate_tile(const Layer& layer, const Value& out, int64_t rows, T* z, T* slope) {
  const T parameter = static_cast<T>(layer.parameter);
  with_activation(layer.activation, [=, &out](auto kind) {
    constexpr Activation A = decltype(kind)::value;
    if (slope)
      each_entry<T>(out, rows, [=](int64_t i, auto part) {
        Vector<T> d;
        put<T>(z + i, activate<A, true>(get(z + i, part), parameter, d), part);
        put<T>(slope + i, d, part);
      });
    else if constexpr (A != Activation::identity)
      each_entry<T>(out, rows, [=](int64_t i, auto part) {
        Vector<T> d;
        put<T>(z + i, activate<A, false>(get(z + i, part), parameter, d), part);
      });
  });
}

// The values of stage q from its input; the velocity goes to `velocity`, or nowhere.
template <class T>
void evaluate(const Tile<T>& tile, int64_t q, double t, T* velocity) {
  const Job& job = tile.job;
  for (int l = 0; l < job.layer_count; ++l) {
    const Layer& layer = job.layers[l];
    const bool last = l + 1 == job.layer_count;
    if (!layer.live || (last && !velocity)) continue;
    const Value& out = job.values[l + 1];
    T* z = last ? velocity : tile.value(l + 1, q);
    const T* first_row = first_row_of(tile, layer, out, q, t);
    bool add = false;
    for (int i = 0; i < layer.term_count; ++i) {
      const Term& term = layer.terms[i];
      if (term.parameter < 0) continue;
      add_term(tile, term, out, static_cast<const T*>(tile.value(term.source, q)), z,
               add ? nullptr : first_row, add);
      add = true;
    }
    if (!add)
      for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t j = 0; j < out.ld; ++j) z[r * out.ld + j] = first_row ? first_row[j] : T(0);
    for (int i = 0; i < layer.term_count; ++i)
      if (layer.terms[i].parameter < 0)
        accumulate<T>(out, tile.rows, z, tile.value(layer.terms[i].source, q), true);
    if (layer.time_row >= 0 && tile.times) {
      const T* time = tile.pack(layer.time_row);
      for (int64_t r = 0; r < tile.rows; ++r)
        each_vector<T>(out.ld, [&](int64_t i, auto part) {
          T* to = z + r * out.ld + i;
          put<T>(to, get(to, part) + static_cast<T>(tile.times[r]) * get(time + i, part), part);
        });
    }
    if (layer.cond >= 0) {
      const T* cond = static_cast<const T*>(job.conds[layer.cond]) + tile.first * out.width;
      for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t j = 0; j < out.width; ++j) z[r * out.ld + j] += cond[r * out.width + j];
    }
    activate_tile(layer, out, tile.rows, z,
                  layer.slope.offset >= 0 ? tile.at(layer.slope, out.ld, q) : nullptr);
    for (int i = 0; i < layer.skip_count; ++i)
      accumulate<T>(out, tile.rows, z, tile.value(layer.skips[i], q), true);
  }
}

// delta *= slope, and the sums of its columns.
template <class T, class Slope>
void finish_delta(const Value& out, int64_t rows, T* delta, T* sums, Slope slope) {
  constexpr int L = Lanes<T>::count;
  if (out.narrow) {
    each_vector<T>(rows * out.ld, [=](int64_t i, auto part) {
      put<T>(delta + i, get(delta + i, part) * slope(i, part), part);
    });
    if (!sums) return;
    for (int64_t j = 0; j < out.width; ++j) sums[j] = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < out.width; ++j) sums[j] += delta[r * out.ld + j];
    return;
  }
  int64_t v = 0;
  const auto columns = [&](auto count) {
    constexpr int C = decltype(count)::value;
    Vector<T> total[C] = {};
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const int64_t i = r * out.ld + (v + c) * L;
        const Vector<T> x = load(delta + i) * slope(i, Whole{});
        store<T>(delta + i, x);
        total[c] += x;
      }
    if (sums)
      for (int c = 0; c < C; ++c) store<T>(sums + (v + c) * L, total[c]);
  };
  for (; v + 4 <= out.vectors; v += 4) columns(Count<4>{});
  for (; v < out.vectors; ++v) columns(Count<1>{});
}

template <class T>
void finish_delta(const Tile<T>& tile, int l, int64_t q, T* delta, T* sums) {
  const Layer& layer = tile.job.layers[l];
  const Value& out = tile.job.values[l + 1];
  if (layer.slope.offset >= 0) {
    const T* slope = tile.at(layer.slope, out.ld, q);
    return finish_delta(out, tile.rows, delta, sums,
                        [=](int64_t i, auto part) { return get(slope + i, part); });
  }
  if (layer.activation == Activation::identity && !sums) return;
  const T parameter = static_cast<T>(layer.parameter);
  const T* value = out.value.offset >= 0 ? tile.value(l + 1, q) : nullptr;
  with_activation(layer.activation, [&](auto kind) {
    constexpr Activation A = decltype(kind)::value;
    finish_delta(out, tile.rows, delta, sums, [=](int64_t i, auto part) {
      if constexpr (A == Activation::identity) return broadcast(T(1));
      else return slope_of<A>(get(value + i, part), parameter);
    });
  });
}

template <class T>
void pull_term(const Tile<T>& tile, const Term& term, const Value& out, const T* delta, T* to,
               bool add) {
  const Job& job = tile.job;
  const Value& in = job.values[term.source];
  if (!in.narrow)
    return multiply(delta, out.ld, tile.pack(term.backward), out.width, in.vectors, to, in.ld,
                    tile.rows, static_cast<const T*>(nullptr), add);
  if (!out.narrow)
    return dot_products(delta, out.ld, tile.pack(term.forward), out.vectors,
                        static_cast<int>(in.width), to, tile.rows,
                        static_cast<const T*>(nullptr), add);
  const T* w = static_cast<const T*>(job.parameters[term.parameter]) + term.column;
  const int64_t ld = job.leading[term.parameter];
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t j = 0; j < in.width; ++j) {
      T total = add ? to[r * in.ld + j] : T(0);
      for (int64_t i = 0; i < out.width; ++i) total += delta[r * out.ld + i] * w[i * ld + j];
      to[r * in.ld + j] = total;
    }
}

template <class T>
void add_row(Sums<T> to, const T* from, int64_t width, double weight) {
  const T w = static_cast<T>(weight);
  each_vector<T>(width, [=](int64_t i, auto part) { to.add(i, w * get(from + i, part), part); });
}

// The sums of the columns of delta, every row times its own time.
template <class T>
void sum_timed(const Tile<T>& tile, const Value& out, const T* delta, T* sums) {
  each_vector<T>(out.width, [&](int64_t i, auto part) {
    Vector<T> total{};
    for (int64_t r = 0; r < tile.rows; ++r)
      total += static_cast<T>(tile.times[r]) * get(delta + r * out.ld + i, part);
    put<T>(sums + i, total, part);
  });
}

// The gradient of stage q's input into gx, from that of its velocity, which lies in its delta.
template <class T>
void pull_back(const Tile<T>& tile, int64_t q, double t, T* gx) {
  const Job& job = tile.job;
  bool written[kMaxLayers + 1];
  memset(written, 0, job.layer_count + 1);
  const auto into = [&](int number) { return number ? tile.delta(number, q) : gx; };
  for (int l = job.layer_count - 1; l >= 0; --l) {
    const Layer& layer = job.layers[l];
    if (!layer.live) continue;
    const Value& out = job.values[l + 1];
    T* delta = tile.delta(l + 1, q);
    const auto pass_on = [&](int number) {
      accumulate<T>(out, tile.rows, into(number), delta, written[number]);
      written[number] = true;
    };
    for (int i = 0; i < layer.skip_count; ++i) pass_on(layer.skips[i]);
    const bool summed = layer.bias_sum >= 0 || layer.time_sum >= 0 || layer.table_sum >= 0;
    T* sums = summed ? tile.scratch + job.sums : nullptr;
    finish_delta(tile, l, q, delta, sums);
    const T* sum = sums;
    if (layer.bias_sum >= 0) add_row(tile.gradients + layer.bias_sum, sum, out.width, 1);
    if (layer.table_sum >= 0)
      add_row(tile.gradients + (layer.table_sum + q * out.width), sum, out.width, 1);
    if (layer.time_sum >= 0 && tile.times) sum_timed(tile, out, delta, sums);
    if (layer.time_sum >= 0)
      add_row(tile.gradients + layer.time_sum, sum, out.width, tile.times ? 1 : t);
    if (layer.cond >= 0 && job.grad_conds[layer.cond]) {
      T* to = static_cast<T*>(job.grad_conds[layer.cond]) + tile.first * out.width;
      for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t j = 0; j < out.width; ++j) to[r * out.width + j] += delta[r * out.ld + j];
    }
    for (int i = 0; i < layer.term_count; ++i) {
      const Term& term = layer.terms[i];
      if (term.parameter < 0) {
        pass_on(term.source);
        continue;
      }
      pull_term(tile, term, out, static_cast<const T*>(delta), into(term.source),
                written[term.source]);
      written[term.source] = true;
    }
  }
  if (!written[0]) memset(gx, 0, tile.rows * tile.state().ld * sizeof(T));
}

// C[n, k] += A[m, n]^T B[m, k] of few columns, all dense.
template <class T>
void multiply_narrow(const T* a, int64_t n, const T* b, int64_t k, int64_t m, Sums<T> c) {
  for (int64_t p = 0; p < m; p += kSummedRows) {
    const int64_t end = m - p < kSummedRows ? m : p + kSummedRows;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        T total = 0;
        for (int64_t r = p; r < end; ++r) total += a[r * n + i] * b[r * k + j];
        c.add(i * k + j, broadcast(total), Rest{1});
      }
  }
}

// The gradients of the matrices from `count` stages that lie next to each other.
template <class T>
void weight_gradients(const Tile<T>& tile, int64_t q, int64_t count) {
  const Job& job = tile.job;
  const int64_t m = count * tile.rows;
  for (int l = 0; l < job.layer_count; ++l) {
    const Layer& layer = job.layers[l];
    const Value& out = job.values[l + 1];
    for (int i = 0; i < layer.term_count; ++i) {
      const Term& term = layer.terms[i];
      if (term.gradient < 0) continue;
      const Value& in = job.values[term.source];
      const Sums<T> to = tile.gradients + term.gradient;
      const T *delta = tile.delta(l + 1, q), *x = tile.value(term.source, q);
      constexpr int L = Lanes<T>::count;
      if (!in.narrow) {
        multiply_across(delta, out.ld, x, in.ld, m, out.width, in.vectors, to, in.vectors * L);
      } else if (!out.narrow) {
        multiply_across(x, in.ld, delta, out.ld, m, in.width, out.vectors, to, out.vectors * L);
      } else {
        multiply_narrow(delta, out.width, x, in.width, m, to);
      }
    }
  }
}

}  // namespace FMFT_ISA
}  // namespace fmft
