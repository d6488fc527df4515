// Device code of solves with step control: all samples share their steps, or each has its own (ByRow). What a
// rejected attempt has written, its outputs and the inputs of its stages, the next one overwrites.
#pragma once
#include "step_control.h"
#include "trajectory_block.h"

namespace fmft::cuda {

template <int T, int M, bool ByRow>
struct Stepper : Block<T, M, ByRow> {
  using Base = Block<T, M, ByRow>;
  using Base::exists;
  using Base::field;
  using Base::for_state;
  using Base::kRows;
  using Base::row0;
  using Base::solve;

  const Control& control;
  int64_t loaded = -1;  // the samples whose conditions are in shared memory

  FMFT_DEVICE int size() const { return kRows * field.state; }
  FMFT_DEVICE float* y() const { return floats(field.stages_at); }
  FMFT_DEVICE float* k(int stage) const { return y() + (1 + stage) * size(); }
  FMFT_DEVICE int64_t place(int64_t n, int row, int d) const {
    return (n * solve.batch + row0 + row) * field.state + d;
  }
  // A state and its slope: each thread reads what it has written itself.
  FMFT_DEVICE float& state(int which, int part, int row, int d) const {
    return control.states[place(2 * which + part, row, d)];
  }
  FMFT_DEVICE double scale(float value) const {
    return control.atol + control.rtol * fabs(static_cast<double>(value));
  }

  // Calls f() for the blocks of samples that are this block's work.
  template <class F>
  FMFT_DEVICE void each_tile(F&& f) {
    for (this->begin_rows(static_cast<int64_t>(blockIdx.x) * kRows); this->rows > 0;
         this->begin_rows(row0 + static_cast<int64_t>(gridDim.x) * kRows)) {
      if (loaded != row0) this->load_conds();
      loaded = row0;
      f();
    }
  }

  // The slope at input(e, row, d) and the time of own_row().
  template <class F>
  FMFT_DEVICE void evaluate(float t, int stage, F&& input) const {
    const Staged x = this->value(0);
    for_state([&](int e, int row, int d) { store_one<T>(x, row, d, input(e, row, d)); });
    if (ByRow && threadIdx.x < kRows) this->row_times()[threadIdx.x] = t;
    __syncthreads();
    float* const into = k(stage);
    this->velocity(t, 0, [&](int e, int, int, float slope) { into[e] = slope; });
  }

  FMFT_DEVICE void load_state(int which) const {
    for_state([&](int e, int row, int d) {
      y()[e] = exists(row) ? state(which, 0, row, d) : 0.0f;
      k(0)[e] = exists(row) ? state(which, 1, row, d) : 0.0f;
    });
  }

  // The first slope; adds the squares of the sizes of the state and of the slope.
  FMFT_DEVICE void start(double& d0, double& d1) const {
    for_state([&](int e, int row, int d) {
      y()[e] = exists(row) ? solve.y0[place(0, row, d)] : 0.0f;
    });
    evaluate(static_cast<float>(control.t[0]), 0, [&](int e, int, int) { return y()[e]; });
    for_state([&](int e, int row, int d) {
      if (!exists(row)) return;
      state(0, 0, row, d) = y()[e];
      state(0, 1, row, d) = k(0)[e];
      const double of_state = y()[e] / scale(y()[e]), of_slope = k(0)[e] / scale(y()[e]);
      d0 += of_state * of_state;
      d1 += of_slope * of_slope;
    });
  }

  // Adds the squares of the change of the slope over a first guess h0 at the step.
  FMFT_DEVICE void probe(double h0, double& d2) const {
    load_state(0);
    const float h = static_cast<float>(control.direction * h0);
    const double s = control.direction * control.t[0];
    evaluate(static_cast<float>(control.direction * (s + h0)), 1,
             [&](int e, int, int) { return y()[e] + h * k(0)[e]; });
    for_state([&](int e, int row, int) {
      const double change = (k(1)[e] - k(0)[e]) / scale(y()[e]);
      if (exists(row)) d2 += change * change;
    });
  }

  // One step; adds the squares of its error over what is allowed. `bad` tells whether its start is not finite.
  FMFT_DEVICE void attempt(const Progress& p, const Attempt& tried, double& error, double& bad) const {
    const int which = p.accepted % 2, stages = solve.stages;
    const float h = static_cast<float>(control.direction * tried.h);
    const bool moves = tried.h != 0.0;
    const int64_t first = static_cast<int64_t>(p.accepted - control.first_number) * control.kept_stages;
    auto keep = [&](int s, int row, int d, float input) {
      if (s < control.kept_stages && moves && exists(row)) solve.kept[place(first + s, row, d)] = input;
    };
    load_state(which);
    for_state([&](int e, int row, int d) {
      if (!is_finite(y()[e]) || !is_finite(k(0)[e])) bad = 1.0;
      keep(0, row, d, y()[e]);
    });
    for (int s = 1; s < stages; ++s)
      evaluate(tried.time(control, p.s, s), s, [&](int e, int row, int d) {
        float sum = 0.0f;
        for (int j = 0; j < s; ++j) sum += solve.a[s][j] * k(j)[e];
        const float input = y()[e] + h * sum;
        keep(s, row, d, input);
        return input;
      });
    for_state([&](int e, int row, int d) {
      if (!moves || !exists(row)) return;
      float step = 0.0f, wrong = 0.0f;
      for (int j = 0; j < stages; ++j) {
        step += solve.b[j] * k(j)[e];
        wrong += control.b_err[j] * k(j)[e];
      }
      const float next = y()[e] + h * step;
      state(1 - which, 0, row, d) = next;
      state(1 - which, 1, row, d) = k(stages - 1)[e];
      const double ratio = h * wrong / fmax(scale(y()[e]), scale(next));
      error += ratio * ratio;
    });
    if constexpr (!ByRow) outputs(p, tried, h);
  }

  // The states at the times inside an attempted step.
  FMFT_DEVICE void outputs(const Progress& p, const Attempt& tried, float h) const {
    for (int o = p.next; o < control.times; ++o) {
      const double end = control.direction * control.t[o];
      if (end > tried.end) return;
      const double theta = (end - p.s) / tried.h;
      for_state([&](int e, int row, int d) {
        float sum = 0.0f;
        for (int j = 0; j < solve.stages; ++j) {
          const double(&c)[3] = control.dense[j];
          const double inside = theta * ((j == 0) + theta * (c[0] + theta * (c[1] + theta * c[2])));
          sum += (end == tried.end ? solve.b[j] : static_cast<float>(inside)) * k(j)[e];
        }
        if (exists(row)) solve.out[place(o, row, d)] = y()[e] + h * sum;
      });
    }
  }

  // Writes an accepted step of size h from s to the column `row` of `rows`.
  FMFT_DEVICE void note(int64_t row, int64_t rows, const Progress& p, double s, double h) const {
    const int64_t at = (p.accepted - 1 - control.first_number) * rows + row;
    control.nodes[at] = s;
    control.nodes[at + rows] = p.s;
    control.sizes[at] = h;
  }

  // Of all threads; it lies where the parts of a velocity do, which nobody reads by then.
  FMFT_DEVICE double* sums() const {
    return reinterpret_cast<double*>(dynamic_shared() + field.partial);
  }
  // The sum over the threads that have the same row.
  FMFT_DEVICE double row_sum(double value) const {
    __syncthreads();
    sums()[threadIdx.x] = value;
    __syncthreads();
    double total = 0.0;
    for (int i = this->own_row(); i < static_cast<int>(blockDim.x); i += kRows) total += sums()[i];
    return total;
  }
  FMFT_DEVICE static double warp_sum(double value) {
    for (int mask = 1; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
    return value;
  }
  // The sums over all threads of all blocks. Meetings take turns with two places for the blocks' sums: a
  // block writes to one only after all have read it.
  FMFT_DEVICE void total(double& first, double& second, int meeting) const {
    double* const of_blocks = control.partials + 2 * static_cast<int64_t>(gridDim.x) * (meeting % 2);
    first = warp_sum(first);
    second = warp_sum(second);
    __syncthreads();
    if (lane() == 0) {
      sums()[2 * warp()] = first;
      sums()[2 * warp() + 1] = second;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      double sum = 0.0;
      for (int w = 0; w < warps(); ++w) sum += sums()[2 * w + threadIdx.x];
      of_blocks[2 * blockIdx.x + threadIdx.x] = sum;
    }
    meet_all_blocks();
    first = second = 0.0;
    for (int b = lane(); b < static_cast<int>(gridDim.x); b += 32) {
      first += of_blocks[2 * b];
      second += of_blocks[2 * b + 1];
    }
    first = warp_sum(first);
    second = warp_sum(second);
  }
};

// One step size for the whole batch: all threads of all blocks find the same one from the same sums.
template <int T, int M>
FMFT_KERNEL __launch_bounds__(32 * kMaxWarps, 1) adaptive_kernel(const FMFT_GRID_CONSTANT Field field,
                                                              const FMFT_GRID_CONSTANT Solve solve,
                                                              const FMFT_GRID_CONSTANT Control control) {
  Stepper<T, M, false> block{{field, solve}, control};
  block.load();
  __syncthreads();  // what load() makes zero is written below by other threads
  Progress p = *control.progress;
  const double numbers = static_cast<double>(solve.batch * field.state);
  int meetings = 0;
  auto norms = [&](double& first, double& second) {
    block.total(first, second, meetings++);
    first = sqrt(first / numbers);
    second = sqrt(second / numbers);
  };
  if (p.outcome == Outcome::begun) {
    double d0 = 0.0, d1 = 0.0, d2 = 0.0, none = 0.0;
    block.each_tile([&] { block.start(d0, d1); });
    norms(d0, d1);
    p.outcome = Outcome::on_its_way;
    if (is_finite(control.first_step)) {
      p.h = control.first_step;
    } else if (!is_finite(d0 + d1)) {
      p.outcome = Outcome::not_finite;
    } else {
      const double h0 = guess_step(d0, d1);
      block.each_tile([&] { block.probe(h0, d2); });
      norms(d2, none);
      p.h = first_step(control, h0, d1, d2 / h0);
    }
  }
  while (p.outcome == Outcome::on_its_way) {
    const Attempt tried = prepare(control, p);
    if (tried.h == 0.0) break;
    double error = 0.0, bad = 0.0;
    block.each_tile([&] { block.attempt(p, tried, error, bad); });
    norms(error, bad);
    const double s = p.s;
    if (judge(control, p, tried, error, bad > 0.0) && blockIdx.x == 0 && threadIdx.x == 0)
      block.note(0, 1, p, s, tried.h);
  }
  meet_all_blocks();  // everybody has read what is written here
  if (blockIdx.x == 0 && threadIdx.x == 0) *control.progress = p;
}

// Steps of the samples' own. All threads of a row find the same step; a row that has come to its end waits
// for the others of its block.
template <int T>
FMFT_KERNEL __launch_bounds__(32 * kMaxWarps, 1) rows_kernel(const FMFT_GRID_CONSTANT Field field,
                                                          const FMFT_GRID_CONSTANT Solve solve,
                                                          const FMFT_GRID_CONSTANT Control control) {
  Stepper<T, 1, true> block{{field, solve}, control};
  block.load();
  __syncthreads();
  auto norm = [&](double sum) { return sqrt(block.row_sum(sum) / field.state); };
  block.each_tile([&] {
    const int64_t row = block.row0 + block.own_row();
    const bool real = row < solve.batch;
    Progress p = control.progress[real ? row : block.row0];
    if (p.outcome == Outcome::begun) {  // as all others
      double d0 = 0.0, d1 = 0.0, d2 = 0.0;
      block.start(d0, d1);
      d0 = norm(d0);
      d1 = norm(d1);
      const double h0 = guess_step(d0, d1);
      block.probe(h0, d2);
      d2 = norm(d2);
      const bool given = is_finite(control.first_step);
      p.h = given ? control.first_step : first_step(control, h0, d1, d2 / h0);
      p.outcome = given || is_finite(d0 + d1) ? Outcome::on_its_way : Outcome::not_finite;
    }
    for (;;) {
      Attempt tried;
      if (real && p.outcome == Outcome::on_its_way) tried = prepare(control, p);
      if (!any_thread(tried.h != 0.0)) break;
      double error = 0.0, bad = 0.0;
      block.attempt(p, tried, error, bad);
      error = norm(error);
      bad = block.row_sum(bad);
      if (tried.h != 0.0) {
        const double s = p.s;
        if (judge(control, p, tried, error, bad > 0.0) && threadIdx.x < block.kRows)
          block.note(row, solve.batch, p, s, tried.h);
      }
    }
    block.for_state([&](int, int row, int d) {
      if (block.exists(row)) solve.out[block.place(0, row, d)] = block.state(p.accepted % 2, 0, row, d);
    });
    if (real && threadIdx.x < block.kRows) control.progress[row] = p;
  });
}

}  // namespace fmft::cuda
