// Compiled once per instruction set like kernels.cpp, and as free of the standard library.
#include "tile_network.h"

#define FMFT_JOIN_(a, b) a##b
#define FMFT_JOIN(a, b) FMFT_JOIN_(a, b)
#define FMFT_TEXT_(a) #a
#define FMFT_TEXT(a) FMFT_TEXT_(a)

namespace fmft {
inline namespace FMFT_ISA {

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

template <class T>
void chain_of(const Chain& chain) {
  for (int l = 0; l < chain.count; ++l) {
    const Link& link = chain.links[l];
    const T* from = static_cast<const T*>(chain.values[link.source]);
    T* to = static_cast<T*>(chain.values[l + 1]);
    if (link.weight >= 0) {
      const T* w = static_cast<const T*>(chain.parameters[link.weight]);
      const T* bias =
          link.bias < 0 ? nullptr : static_cast<const T*>(chain.parameters[link.bias]);
      const Weights<T> weights{w, chain.leading[link.weight], link.outputs, link.inputs};
      dot_weights(from, link.inputs, weights, to, link.outputs, false, chain.rows, bias, false);
      continue;
    }
    const T parameter = static_cast<T>(link.parameter);
    with_activation(link.activation, [=, &link, &chain](auto kind) {
      each_vector<T>(chain.rows * link.outputs, [=](int64_t i, auto part) {
        Vector<T> slope;
        put<T>(to + i, activate<decltype(kind)::value, false>(get(from + i, part), parameter, slope),
               part);
      });
    });
  }
}

void chain(const Chain& call) {
  call.type == Type::f64 ? chain_of<double>(call) : chain_of<float>(call);
}

constexpr TrajectoryKernels kTrajectoryKernels{
    FMFT_TEXT(FMFT_ISA), kVectorBytes, kBlockRows, kBlockVectors, pack,        forward,
    backward,            start,        probe,      attempt,       interpolate, step_back,
    chain};

}  // namespace FMFT_ISA

// A reference, because a copy would be moved in wide registers out of sight of the dispatch.
const TrajectoryKernels& FMFT_JOIN(trajectory_, FMFT_ISA)() { return kTrajectoryKernels; }

}  // namespace fmft
