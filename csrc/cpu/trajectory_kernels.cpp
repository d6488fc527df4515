// Compiled once per instruction set like kernels.cpp, and as free of the standard library.
#include "activation.h"
#include "gemm.h"
#include "trajectory.h"

#define FMFT_JOIN_(a, b) a##b
#define FMFT_JOIN(a, b) FMFT_JOIN_(a, b)
#define FMFT_TEXT_(a) #a
#define FMFT_TEXT(a) FMFT_TEXT_(a)

namespace fmft {
inline namespace FMFT_ISA {

template <class T>
struct Tile {
  const Job& job;
  int64_t first, rows;
  void* const* kept;
  int64_t kept_offset;
  T *scratch, *gradients;
  int64_t base;  // the stage that comes first in the scratch memory
  const double* times = nullptr;  // of every row, in place of a time that all rows share

  Tile(const Job& job, const TileMemory& memory)
      : job(job),
        first(memory.first),
        rows(memory.rows),
        kept(memory.kept),
        kept_offset(memory.kept_offset),
        scratch(static_cast<T*>(memory.scratch)),
        gradients(static_cast<T*>(memory.gradients)),
        base(0) {}

  T* at(const Buffer& buffer, int64_t ld, int64_t q) const {
    if (buffer.kept)
      return static_cast<T*>(kept[q / job.chunk]) + kept_offset + buffer.offset +
             q % job.chunk * rows * ld;
    return scratch + buffer.offset + (buffer.per_stage ? q - base : 0) * rows * ld;
  }
  T* value(int number, int64_t q) const {
    return at(job.values[number].value, job.values[number].ld, q);
  }
  T* delta(int number, int64_t q) const {
    return at(job.values[number].delta, job.values[number].ld, q);
  }
  const Value& state() const { return job.values[0]; }
  const Value& velocity() const { return job.values[job.layer_count]; }
  const T* pack(int64_t offset) const { return static_cast<const T*>(job.packs) + offset; }
};

// A whole vector or the rest of one, for loops over memory that may end within a vector.
struct Whole {};
struct Rest {
  int count;
};

template <class T>
inline Vector<T> get(const T* from, Whole) {
  return load(from);
}
template <class T>
inline Vector<T> get(const T* from, Rest rest) {
  return load(from, rest.count);
}
template <class T>
inline void put(T* to, Vector<T> v, Whole) {
  store(to, v);
}
template <class T>
inline void put(T* to, Vector<T> v, Rest rest) {
  store(to, v, rest.count);
}

template <class T, class Run>
inline void each_vector(int64_t size, Run run) {
  constexpr int L = Lanes<T>::count;
  int64_t i = 0;
  for (; i + L <= size; i += L) run(i, Whole{});
  if (i < size) run(i, Rest{static_cast<int>(size - i)});
}

// All vectors of a value's matrix; what pads the rows to `ld` is left out where it is long.
template <class T, class Run>
inline void each_entry(const Value& value, int64_t rows, Run run) {
  constexpr int L = Lanes<T>::count;
  if (value.narrow || value.ld == value.vectors * L) return each_vector<T>(rows * value.ld, run);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < value.vectors; ++v) run(r * value.ld + v * L, Whole{});
}

// to = from, or to += from.
template <class T>
void accumulate(const Value& value, int64_t rows, T* to, const T* from, bool add) {
  each_entry<T>(value, rows, [=](int64_t i, auto part) {
    const Vector<T> x = get(from + i, part);
    put<T>(to + i, add ? get(to + i, part) + x : x, part);
  });
}

// Rows between a tensor [.., width] and a tile.
template <class T>
void read_rows(const Value& value, int64_t rows, T* to, const void* tensor, int64_t first) {
  const T* from = static_cast<const T*>(tensor) + first * value.width;
  if (value.ld == value.width) {
    memcpy(to, from, rows * value.width * sizeof(T));
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(to + r * value.ld, from + r * value.width, value.width * sizeof(T));
    memset(to + r * value.ld + value.width, 0, (value.ld - value.width) * sizeof(T));
  }
}

template <class T>
void write_rows(const Value& value, int64_t rows, const T* from, void* tensor, int64_t first) {
  T* to = static_cast<T*>(tensor) + first * value.width;
  for (int64_t r = 0; r < rows; ++r)
    memcpy(to + r * value.width, from + r * value.ld, value.width * sizeof(T));
}

// A sum of states with weights: kept short by leaving out those of weight zero.
template <class T>
struct Sum {
  const T* x[2 * kMaxStages + 1];
  T w[2 * kMaxStages + 1];
  int count = 0;

  void add(const T* from, double weight) {
    if (weight == 0) return;
    x[count] = from;
    w[count++] = static_cast<T>(weight);
  }
  // to = y + scale sum; nullptr for y is zero and for scale one.
  void write(T* to, const T* y, int64_t size, const T* scale = nullptr) const {
    each_vector<T>(size, [&](int64_t i, auto part) {
      Vector<T> total = y && !scale ? get(y + i, part) : Vector<T>{};
      for (int j = 0; j < count; ++j) total += w[j] * get(x[j] + i, part);
      if (scale) {
        total *= get(scale + i, part);
        if (y) total += get(y + i, part);
      }
      put<T>(to + i, total, part);
    });
  }
};

// ---- packs

// [k, n] of strides (row, column) into panels, padded with zeros.
template <class T>
void pack_matrix(T* to, const T* from, int64_t row, int64_t column, int64_t k, int64_t n,
                 int64_t vectors) {
  constexpr int64_t L = Lanes<T>::count;
  for (int64_t v = 0; v < vectors; v += kBlockVectors) {
    const int64_t width = (vectors - v < kBlockVectors ? vectors - v : kBlockVectors) * L;
    const int64_t filled = n - v * L < width ? n - v * L : width;
    for (int64_t p = 0; p < k; ++p, to += width) {
      const T* line = from + p * row + v * L * column;
      if (column == 1)
        memcpy(to, line, filled * sizeof(T));
      else
        for (int64_t j = 0; j < filled; ++j) to[j] = line[j * column];
      for (int64_t j = filled; j < width; ++j) to[j] = 0;
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

// ---- the network

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
void add_row(T* to, const T* from, int64_t width, double weight) {
  const T w = static_cast<T>(weight);
  for (int64_t j = 0; j < width; ++j) to[j] += w * from[j];
}

// The gradient of stage q's input into gx, from that of its velocity, which lies in its delta.
template <class T>
void pull_back(const Tile<T>& tile, int64_t q, double t, T* gx) {
  const Job& job = tile.job;
  bool written[kMaxValues] = {};
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
    if (layer.bias_sum >= 0) add_row(tile.gradients + layer.bias_sum, sums, out.width, 1);
    if (layer.time_sum >= 0 && !tile.times)
      add_row(tile.gradients + layer.time_sum, sums, out.width, t);
    if (layer.time_sum >= 0 && tile.times)
      for (int64_t r = 0; r < tile.rows; ++r)
        add_row(tile.gradients + layer.time_sum, delta + r * out.ld, out.width, tile.times[r]);
    if (layer.table_sum >= 0)
      add_row(tile.gradients + layer.table_sum + q * out.width, sums, out.width, 1);
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
      T* to = tile.gradients + term.gradient;
      const T *delta = tile.delta(l + 1, q), *x = tile.value(term.source, q);
      constexpr int L = Lanes<T>::count;
      if (!in.narrow) {
        multiply_across(delta, out.ld, x, in.ld, m, out.width, in.vectors, to, in.vectors * L);
      } else if (!out.narrow) {
        multiply_across(x, in.ld, delta, out.ld, m, in.width, out.vectors, to, out.vectors * L);
      } else {
        for (int64_t r = 0; r < m; ++r)
          for (int64_t n = 0; n < out.width; ++n)
            for (int64_t j = 0; j < in.width; ++j)
              to[n * in.width + j] += delta[r * out.ld + n] * x[r * in.ld + j];
      }
    }
  }
}

// ---- the trajectory

template <class T>
void forward_tile(const Job& job, const TileMemory& memory) {
  const Tile<T> tile(job, memory);
  const Value& state = tile.state();
  const int64_t size = tile.rows * state.ld;
  const int s = job.stages;
  T* y = tile.scratch + job.y;
  read_rows(state, tile.rows, y, job.y0, tile.first);
  int64_t next = 0;
  const auto write = [&](const T* from) {
    write_rows(state, tile.rows, from, job.out, next++ * job.batch + tile.first);
  };
  const auto wanted = [&](int64_t n) { return next < job.outputs && job.output_at[next] == n; };
  if (!job.weights)
    while (wanted(0)) write(y);
  const bool velocity_kept = tile.velocity().value.offset >= 0;
  T* k[kMaxStages];
  for (int64_t n = 0; n < job.steps; ++n) {
    const double h = job.h[n];
    for (int i = 0; i < s; ++i) {
      const int64_t q = n * s + i;
      k[i] = velocity_kept ? tile.value(job.layer_count, q) : tile.scratch + job.k + i * size;
      if (!job.live[q]) continue;
      Sum<T> sum;
      for (int j = 0; j < i; ++j) sum.add(k[j], h * job.a[i * s + j]);
      sum.write(tile.value(0, q), y, size);
      evaluate(tile, q, job.times[q], k[i]);
    }
    if (job.weights)
      while (wanted(n)) {
        Sum<T> sum;
        for (int i = 0; i < s; ++i) sum.add(k[i], h * job.weights[next * s + i]);
        T* spare = tile.scratch + job.spare;
        sum.write(spare, y, size);
        write(spare);
      }
    Sum<T> sum;
    for (int i = 0; i < s; ++i) sum.add(k[i], h * job.b[i]);
    sum.write(y, y, size);
    if (!job.weights)
      while (wanted(n + 1)) write(y);
  }
}

template <class T>
void backward_tile(const Job& job, const TileMemory& memory) {
  Tile<T> tile(job, memory);
  const Value& state = tile.state();
  const int64_t size = tile.rows * state.ld;
  const int s = job.stages, slots = s - job.shared;
  T *gy = tile.scratch + job.gy, *spare = tile.scratch + job.spare;
  memset(gy, 0, size * sizeof(T));
  int64_t next = job.outputs;  // outputs from here on have been taken
  const auto read = [&](int64_t output) {
    read_rows(state, tile.rows, spare, job.grad, output * job.batch + tile.first);
  };
  const auto take_from = [&](int64_t n) {
    while (next > 0 && job.output_at[next - 1] >= n) {
      read(--next);
      accumulate<T>(state, tile.rows, gy, spare, true);
    }
  };
  T* gx[kMaxStages];
  for (int i = 0; i < slots; ++i) gx[i] = tile.scratch + job.gx + i * size;
  for (int64_t n = job.shared ? job.steps : job.steps - 1; n >= 0; --n) {
    const bool beyond = n == job.steps;
    const int64_t slot0 = n * slots;
    const double h = beyond ? 0 : job.h[n];
    tile.base = n / job.window * job.window * slots;
    if (!job.weights) take_from(n + 1);
    // delta += the gradients of the outputs of step m, whose stage i this is.
    const auto add_dense = [&](T* delta, int64_t m, int i) {
      int64_t output = next;
      while (output > 0 && job.output_at[output - 1] > m) --output;
      for (; output > 0 && job.output_at[output - 1] == m; --output) {
        const double w = job.weights[(output - 1) * s + i];
        if (w == 0) continue;
        read(output - 1);
        Sum<T> sum;
        sum.add(spare, job.h[m] * w);
        sum.write(delta, delta, size);
      }
    };
    for (int i = beyond ? 0 : slots - 1; i >= 0; --i) {
      if (!job.live[slot0 + i]) continue;
      T* delta = tile.delta(job.layer_count, slot0 + i);
      Sum<T> sum;
      if (!beyond) {
        sum.add(gy, h * job.b[i]);
        for (int j = i + 1; j < slots; ++j)
          if (job.live[slot0 + j]) sum.add(gx[j], h * job.a[j * s + i]);
      }
      sum.write(delta, nullptr, size);
      if (job.weights && !beyond) add_dense(delta, n, i);
      if (job.weights && job.shared && i == 0 && n > 0) add_dense(delta, n - 1, slots);
      const double t = beyond ? job.times[n * s - 1] : job.times[n * s + i];
      if (job.again) {
        const bool needed = tile.velocity().value.offset >= 0;
        evaluate(tile, slot0 + i, t, needed ? tile.value(job.layer_count, slot0 + i) : nullptr);
      }
      pull_back(tile, slot0 + i, t, gx[i]);
    }
    Sum<T> sum;
    for (int i = 0; i < (beyond ? 1 : slots); ++i)
      if (job.live[slot0 + i]) sum.add(gx[i], 1);
    sum.write(gy, gy, size);
    if (job.weights) take_from(n);
    if (slot0 == tile.base) {
      const int64_t last = job.steps * slots + job.shared;
      const int64_t end = slot0 + job.window * slots < last ? slot0 + job.window * slots : last;
      for (int64_t q = slot0; q < end;) {
        const int64_t from = q;
        const int64_t chunk_end = (from / job.chunk + 1) * job.chunk;
        while (q < end && q < chunk_end && job.live[q]) ++q;
        if (q > from) weight_gradients(tile, from, q - from);
        while (q < end && !job.live[q]) ++q;
      }
    }
  }
  if (!job.weights) take_from(0);
  if (job.grad_y0) write_rows(state, tile.rows, gy, job.grad_y0, tile.first);
}

// ---- adaptive steps

// The matrices of the state that adaptive steps carry on.
template <class T>
struct Carried {
  T *y, *next, *k[kMaxStages];
  int64_t size;

  Carried(const Tile<T>& tile, const TileMemory& memory, const Attempt& attempt)
      : size(tile.rows * tile.state().ld) {
    T* state = static_cast<T*>(memory.state);
    const int64_t matrix = tile.job.tile_rows * tile.state().ld;
    y = state + attempt.y * matrix;
    next = state + attempt.next * matrix;
    for (int i = 0; i < tile.job.stages; ++i) k[i] = state + attempt.k[i] * matrix;
  }
};

// The time of a stage: that of all rows, or into the tile those of every row.
template <class T>
double set_time(Tile<T>& tile, const Attempt& attempt, int stage) {
  if (!attempt.row_h) return attempt.times[stage];
  tile.times = attempt.times + stage * tile.job.tile_rows;
  return 0;
}

// The steps of every row, spread over the entries of its state; nullptr if the rows share one.
template <class T>
const T* spread_steps(const Tile<T>& tile, const Attempt& attempt) {
  if (!attempt.row_h) return nullptr;
  T* to = tile.scratch + tile.job.row_steps;
  const int64_t ld = tile.state().ld;
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t j = 0; j < ld; ++j) to[r * ld + j] = static_cast<T>(attempt.row_h[r]);
  return to;
}

template <class T>
void evaluate_into(const Tile<T>& tile, int64_t slot, double t, T* velocity, int64_t size) {
  evaluate(tile, slot, t, velocity);
  if (const Buffer& kept = tile.velocity().value; kept.offset >= 0)
    memcpy(tile.value(tile.job.layer_count, slot), velocity, size * sizeof(T));
}

// Of every row, the sum over its entries of (f(entry) / (atol + rtol max(|y|, |next|)))^2.
template <class T, class F>
void sum_errors(const Tile<T>& tile, const Attempt& attempt, const T* y, const T* next,
                double* sums, F f) {
  const Value& state = tile.state();
  const T rtol = static_cast<T>(attempt.rtol), atol = static_cast<T>(attempt.atol);
  for (int64_t r = 0; r < tile.rows; ++r) {
    double total = 0;
    for (int64_t i = r * state.ld; i < r * state.ld + state.width; ++i) {
      const T a = magnitude(y[i]), b = magnitude(next[i]);
      // A NaN in the next state makes the comparison false and so reaches the scale.
      const double error = f(i) / (atol + rtol * (a > b ? a : b));
      total += error * error;
    }
    sums[r] = total;
  }
}

template <class T>
void start_tile(const Job& job, const TileMemory& memory, const Attempt& attempt, double* sums) {
  const Tile<T> tile(job, memory);
  const Carried<T> x(tile, memory, attempt);
  read_rows(tile.state(), tile.rows, x.y, job.y0, tile.first);
  memcpy(tile.value(0, 0), x.y, x.size * sizeof(T));
  evaluate_into(tile, 0, attempt.times[0], x.k[0], x.size);
  sum_errors(tile, attempt, x.y, x.y, sums, [&](int64_t i) { return x.y[i]; });
  sum_errors(tile, attempt, x.y, x.y, sums + job.tile_rows, [&](int64_t i) { return x.k[0][i]; });
}

template <class T>
void probe_tile(const Job& job, const TileMemory& memory, const Attempt& attempt, double* sums) {
  Tile<T> tile(job, memory);
  const Carried<T> x(tile, memory, attempt);
  const T* steps = spread_steps(tile, attempt);
  Sum<T> step;
  step.add(x.k[0], steps ? 1 : attempt.h);
  step.write(tile.value(0, 1), x.y, x.size, steps);
  evaluate_into(tile, 1, set_time(tile, attempt, 0), x.k[1], x.size);
  sum_errors(tile, attempt, x.y, x.y, sums, [&](int64_t i) { return x.k[1][i] - x.k[0][i]; });
}

template <class T>
void attempt_tile(const Job& job, const TileMemory& memory, const Attempt& attempt, double* sums) {
  Tile<T> tile(job, memory);
  const Carried<T> x(tile, memory, attempt);
  const T* steps = spread_steps(tile, attempt);
  const double h = steps ? 1 : attempt.h;
  const int s = job.stages;
  for (int i = 1; i < s; ++i) {
    const int64_t slot = attempt.step * (s - 1) + i;
    T* input = tile.value(0, slot);
    Sum<T> step;
    for (int j = 0; j < i; ++j) step.add(x.k[j], h * job.a[i * s + j]);
    step.write(input, x.y, x.size, steps);
    if (i == s - 1) memcpy(x.next, input, x.size * sizeof(T));
    evaluate_into(tile, slot, set_time(tile, attempt, i), x.k[i], x.size);
  }
  Sum<T> errors;
  for (int i = 0; i < s; ++i) errors.add(x.k[i], h * attempt.b_err[i]);
  T* error = tile.scratch + job.spare;
  errors.write(error, nullptr, x.size, steps);
  sum_errors(tile, attempt, x.y, x.next, sums, [=](int64_t i) { return error[i]; });
}

// The gradient y of the rows' next states becomes that of their states, whose stage inputs are kept.
template <class T>
void step_back_tile(const Job& job, const TileMemory& memory, const Attempt& attempt) {
  Tile<T> tile(job, memory);
  const Carried<T> x(tile, memory, attempt);
  const T* steps = spread_steps(tile, attempt);
  const int s = job.stages, slots = s - job.shared;
  const bool needed = tile.velocity().value.offset >= 0;
  T* gx[kMaxStages];
  for (int i = slots - 1; i >= 0; --i) {
    gx[i] = tile.scratch + job.gx + i * x.size;
    Sum<T> sum;
    sum.add(x.y, job.b[i]);
    for (int j = i + 1; j < slots; ++j) sum.add(gx[j], job.a[j * s + i]);
    sum.write(tile.delta(job.layer_count, i), nullptr, x.size, steps);
    const double t = set_time(tile, attempt, i);
    evaluate(tile, i, t, needed ? tile.value(job.layer_count, i) : nullptr);
    pull_back(tile, i, t, gx[i]);
  }
  Sum<T> sum;
  for (int i = 0; i < slots; ++i) sum.add(gx[i], 1);
  sum.write(x.y, x.y, x.size);
  weight_gradients(tile, 0, slots);
}

template <class T>
void interpolate_tile(const Job& job, const TileMemory& memory, const Attempt& attempt,
                      const double* weights, void* out) {
  const Tile<T> tile(job, memory);
  const Carried<T> x(tile, memory, attempt);
  Sum<T> sum;
  for (int i = 0; i < job.stages; ++i) sum.add(x.k[i], attempt.h * weights[i]);
  T* spare = tile.scratch + job.spare;
  sum.write(spare, x.y, x.size);
  write_rows(tile.state(), tile.rows, spare, out, tile.first);
}

void pack(const Job& job) { job.type == Type::f64 ? pack_all<double>(job) : pack_all<float>(job); }

#define FMFT_BY_TYPE(name, ...)                                  \
  (job.type == Type::f64 ? name##_tile<double>(job, __VA_ARGS__) \
                         : name##_tile<float>(job, __VA_ARGS__))

void forward(const Job& job, const TileMemory& memory) { FMFT_BY_TYPE(forward, memory); }

void backward(const Job& job, const TileMemory& memory) { FMFT_BY_TYPE(backward, memory); }

void start(const Job& job, const TileMemory& memory, const Attempt& attempt, double* sums) {
  FMFT_BY_TYPE(start, memory, attempt, sums);
}

void probe(const Job& job, const TileMemory& memory, const Attempt& attempt, double* sums) {
  FMFT_BY_TYPE(probe, memory, attempt, sums);
}

void attempt(const Job& job, const TileMemory& memory, const Attempt& attempt, double* sums) {
  FMFT_BY_TYPE(attempt, memory, attempt, sums);
}

void step_back(const Job& job, const TileMemory& memory, const Attempt& attempt) {
  FMFT_BY_TYPE(step_back, memory, attempt);
}

void interpolate(const Job& job, const TileMemory& memory, const Attempt& attempt,
                 const double* weights, void* out) {
  FMFT_BY_TYPE(interpolate, memory, attempt, weights, out);
}

constexpr TrajectoryKernels kTrajectoryKernels{
    FMFT_TEXT(FMFT_ISA), kVectorBytes, kBlockRows, kBlockVectors, pack,        forward,
    backward,            start,        probe,      attempt,       interpolate, step_back};

}  // namespace FMFT_ISA

// A reference, because a copy would be moved in wide registers out of sight of the dispatch.
const TrajectoryKernels& FMFT_JOIN(trajectory_, FMFT_ISA)() { return kTrajectoryKernels; }

}  // namespace fmft
