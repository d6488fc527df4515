// A thread carries as many rows as a tile has, its lanes, from step to step. When a row has come to
// its end, the next row of the thread's share of the batch takes its lane, or at last the last lane
// moves there, so that no row waits for another one.
#include "per_sample.h"

#include <cmath>
#include <cstring>
#include <numeric>

#include "step_control.h"
#include "trajectory_plan.h"

namespace fmft::cpu {
namespace {

// The rows that a thread solves.
struct Share {
  int64_t first, end;

  Share(const Solve& solve, const Kept& shape, int part)
      : first(solve.batch * part / shape.parts), end(solve.batch * (part + 1) / shape.parts) {}
};

// Rows of the condition of a layer, gathered for the lanes.
struct LaneRows {
  int64_t bytes = 0;
  std::vector<char> lanes;

  char* at(int64_t lane) { return lanes.data() + lane * bytes; }
};

// What both passes have of a thread's lanes: the solve as the kernels see it, with conditions lane
// by lane, and memory.
class Lanes {
 public:
  Lanes(const Solve& solve, const Plan& plan, const Kept& shape, int matrices)
      : job(plan.job),
        number(number_size(solve.type)),
        width(solve.field->state * number),
        line(plan.values[0].ld * number),
        most(shape.tile_rows),
        solve_(solve),
        kept_(plan.kept.size() * number),
        state_(matrices * most * line),
        times_(job.stages * most),
        h_(most),
        conds_(solve.conds.size()),
        grad_conds_(solve.conds.size()) {
    for (const Layer& layer : plan.layers) {
      if (layer.cond < 0) continue;
      for (auto* rows : {&conds_, &grad_conds_}) {
        LaneRows& cond = (*rows)[layer.cond];
        cond.bytes = layer.width * number;
        cond.lanes.resize(most * cond.bytes);
      }
    }
    for (size_t i = 0; i < conds_.size(); ++i) {
      cond_lanes_.push_back(conds_[i].lanes.data());
      const bool wanted = plan.job.grad_conds && plan.job.grad_conds[i];
      grad_lanes_.push_back(wanted ? grad_conds_[i].lanes.data() : nullptr);
    }
    all_grad_conds_ = plan.job.grad_conds;
    job.conds = cond_lanes_.data();
    job.grad_conds = grad_lanes_.data();
    memset(kept_.data(), 0, kept_.bytes());
    chunk_ = kept_.data();
    memory.kept = &chunk_;
    memory.state = state_.data();
    memory.scratch = scratch_memory(plan.scratch.size() * number);
    input_offset_ = plan.values[0].value.offset * number;
    attempt.times = times_.data();
    attempt.row_h = h_.data();
  }
  Lanes(const Lanes&) = delete;

  // A lane's row of one of the matrices of the state.
  char* state(int matrix, int64_t lane) const {
    return static_cast<char*>(memory.state) + (matrix * most + lane) * line;
  }
  // Of a stage of this step, the input in a lane.
  char* input(int stage, int64_t lane) const {
    return static_cast<char*>(chunk_) + input_offset_ + (stage * memory.rows + lane) * line;
  }
  void set_steps(int64_t lane, double h) { h_[lane] = h; }
  void set_time(int stage, int64_t lane, double t) { times_[stage * most + lane] = t; }

  void begin(int64_t lane, int64_t row) {
    for (size_t i = 0; i < conds_.size(); ++i) {
      LaneRows& cond = conds_[i];
      if (!cond.bytes) continue;
      memcpy(cond.at(lane), static_cast<const char*>(solve_.conds[i]) + row * cond.bytes,
             cond.bytes);
      memset(grad_conds_[i].at(lane), 0, cond.bytes);
    }
  }
  void write_grad_conds(int64_t lane, int64_t row) {
    for (size_t i = 0; i < conds_.size(); ++i)
      if (grad_lanes_[i])
        memcpy(static_cast<char*>(all_grad_conds_[i]) + row * conds_[i].bytes,
               grad_conds_[i].at(lane), conds_[i].bytes);
  }
  // The lane's conditions to another lane.
  void move(int64_t from, int64_t to) {
    for (auto* rows : {&conds_, &grad_conds_})
      for (LaneRows& cond : *rows)
        if (cond.bytes) memcpy(cond.at(to), cond.at(from), cond.bytes);
  }
  // A row of the state's width into a row that is padded.
  void pad(char* to, const void* from) const {
    memcpy(to, from, width);
    memset(to + width, 0, line - width);
  }

  Job job;
  TileMemory memory;
  Attempt attempt;
  const int64_t number, width, line, most;

 private:
  const Solve& solve_;
  Memory kept_, state_;
  std::vector<double> times_, h_;
  std::vector<LaneRows> conds_, grad_conds_;
  std::vector<const void*> cond_lanes_;
  std::vector<void*> grad_lanes_;
  void* const* all_grad_conds_ = nullptr;
  void* chunk_ = nullptr;
  int64_t input_offset_ = 0;
};

class Forward {
 public:
  Forward(const Solve& solve, const Plan& plan, PerSample& kept, const std::vector<double>& b_err,
          const StepControl& control, double t0, double t1, bool keeps, void* out,
          Interruption& interruption, int part)
      : solve_(solve),
        plan_(plan),
        kept_(kept),
        kernels_(*kept.shape.kernels),
        control_(control),
        keeps_(keeps),
        stages_(solve.method->stages),
        direction_(t1 >= t0 ? 1 : -1),
        begin_(direction_ * t0),
        target_(direction_ * t1),
        out_(static_cast<char*>(out)),
        interruption_(interruption),
        share_(solve, kept.shape, part),
        lanes_(solve, plan, kept.shape, stages_ + 2),
        slopes_((share_.end - share_.first) * lanes_.line),
        first_h_(share_.end - share_.first, std::fabs(control.first_step)),
        sums_(2 * lanes_.most),
        next_row_(share_.first) {
    Attempt& attempt = lanes_.attempt;
    attempt.b_err = b_err.data();
    attempt.rtol = control.rtol;
    attempt.atol = control.atol;
    for (int i = 0; i < stages_; ++i) attempt.k[i] = i + 2;
  }

  void run() {
    for (int64_t row = share_.first; row < share_.end; row += lanes_.most)
      start(row, std::min(lanes_.most, share_.end - row));
    while (static_cast<int64_t>(at_.size()) < lanes_.most && next_row_ < share_.end) {
      at_.emplace_back();
      load(at_.size() - 1);
    }
    for (;;) {
      for (size_t lane = 0; lane < at_.size();)
        if (prepare(lane)) ++lane;
        else retire(lane);
      if (at_.empty() || interruption_.stops()) return;
      lanes_.memory.rows = at_.size();
      kernels_.attempt(lanes_.job, lanes_.memory, lanes_.attempt, sums_.data());
      for (size_t lane = 0; lane < at_.size(); ++lane) judge(lane);
    }
  }

 private:
  // A row under way; times run as s = direction t and grow.
  struct At {
    int64_t row, attempts;
    double s, h, end;
  };

  double norm(const double* sum) const {
    return std::sqrt(*sum / static_cast<double>(solve_.field->state));
  }

  // The first slopes and steps of rows that lie next to each other.
  void start(int64_t first, int64_t rows) {
    TileMemory memory = lanes_.memory;
    memory.first = first;
    memory.rows = rows;
    Attempt attempt = lanes_.attempt;
    attempt.row_h = nullptr;
    const double t0 = direction_ * begin_;
    attempt.times = &t0;
    kernels_.start(plan_.job, memory, attempt, sums_.data());
    for (int64_t r = 0; r < rows; ++r) memcpy(slope(first + r), lanes_.state(2, r), lanes_.line);
    if (!std::isnan(control_.first_step)) return;
    std::vector<double> d1(rows), h0(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const double d0 = norm(&sums_[r]);
      d1[r] = norm(&sums_[lanes_.most + r]);
      if (!std::isfinite(d0 + d1[r])) kept_.rows[first + r].outcome = Outcome::not_finite;
      h0[r] = StepControl::guess(d0, d1[r]);
      lanes_.set_steps(r, direction_ * h0[r]);
      lanes_.set_time(0, r, direction_ * (begin_ + h0[r]));
    }
    kernels_.probe(plan_.job, memory, lanes_.attempt, sums_.data());
    for (int64_t r = 0; r < rows; ++r)
      first_h_[first + r - share_.first] =
          control_.first_size(h0[r], d1[r], norm(&sums_[r]) / h0[r]);
  }

  char* slope(int64_t row) {
    return static_cast<char*>(slopes_.data()) + (row - share_.first) * lanes_.line;
  }

  // The next row of the share into a lane.
  void load(size_t lane) {
    const int64_t row = next_row_++;
    at_[lane] = {row, 0, begin_, first_h_[row - share_.first], begin_};
    lanes_.pad(lanes_.state(0, lane), static_cast<const char*>(solve_.y0) + row * lanes_.width);
    memcpy(lanes_.state(2, lane), slope(row), lanes_.line);
    lanes_.begin(lane, row);
  }

  void retire(size_t lane) {
    const int64_t row = at_[lane].row;
    memcpy(out_ + row * lanes_.width, lanes_.state(0, lane), lanes_.width);
    kept_.rows[row].starts.push_back(direction_ * at_[lane].s);
    if (next_row_ < share_.end) return load(lane);
    const size_t last = at_.size() - 1;
    if (lane != last) {
      at_[lane] = at_[last];
      for (int matrix : {0, 2})
        memcpy(lanes_.state(matrix, lane), lanes_.state(matrix, last), lanes_.line);
      lanes_.move(last, lane);
    }
    at_.pop_back();
  }

  // Sets the next step of a lane; false if there is none.
  bool prepare(size_t lane) {
    At& at = at_[lane];
    Outcome& outcome = kept_.rows[at.row].outcome;
    if (outcome != Outcome::done || !(target_ > at.s)) return false;
    if (at.attempts++ >= control_.max_num_steps) {
      outcome = Outcome::too_many_steps;
      return false;
    }
    at.h = control_.clamp(at.h);
    at.end = at.s + at.h;
    if (!(at.end > at.s)) {
      outcome = Outcome::underflow;
      return false;
    }
    if (target_ < at.end) {
      at.end = target_;
      at.h = at.end - at.s;
    }
    lanes_.set_steps(lane, direction_ * at.h);
    for (int i = 0; i < stages_; ++i)
      lanes_.set_time(
          i, lane, direction_ * (kept_.c[i] == 1 ? at.end : at.s + kept_.c[i] * at.h));
    return true;
  }

  void judge(size_t lane) {
    At& at = at_[lane];
    RowSolve& row = kept_.rows[at.row];
    const double ratio = norm(&sums_[lane]);
    if (!std::isfinite(ratio) && (!starts_finite(lane) || at.h <= control_.min_step)) {
      row.outcome = Outcome::not_finite;
      return;
    }
    row.last_ratio = ratio;
    if (ratio <= 1 || at.h <= control_.min_step) {
      accept(lane, row);
    } else {
      ++row.rejected;
    }
    at.h = control_.next_size(at.h, ratio);
  }

  void accept(size_t lane, RowSolve& row) {
    At& at = at_[lane];
    row.starts.push_back(direction_ * at.s);
    row.h.push_back(direction_ * at.h);
    if (keeps_) {
      const auto append = [&](const char* from) {
        row.inputs.insert(row.inputs.end(), from, from + lanes_.width);
      };
      append(lanes_.state(0, lane));
      for (int i = 1; i < stages_ - 1; ++i) append(lanes_.input(i, lane));
    }
    memcpy(lanes_.state(0, lane), lanes_.state(1, lane), lanes_.line);
    memcpy(lanes_.state(2, lane), lanes_.state(stages_ + 1, lane), lanes_.line);
    at.s = at.end;
  }

  bool starts_finite(size_t lane) const {
    return solve_.type == Type::f64 ? starts_finite<double>(lane) : starts_finite<float>(lane);
  }
  template <class T>
  bool starts_finite(size_t lane) const {
    bool finite = true;
    for (int matrix : {0, 2}) {
      const T* from = reinterpret_cast<const T*>(lanes_.state(matrix, lane));
      for (int64_t i = 0; i < solve_.field->state; ++i) finite = finite && std::isfinite(from[i]);
    }
    return finite;
  }

  const Solve& solve_;
  const Plan& plan_;
  PerSample& kept_;
  const TrajectoryKernels& kernels_;
  const StepControl& control_;
  const bool keeps_;
  const int stages_, direction_;
  const double begin_, target_;
  char* out_;
  Interruption& interruption_;
  Share share_;
  Lanes lanes_;
  Memory slopes_;
  std::vector<double> first_h_, sums_;
  std::vector<At> at_;
  int64_t next_row_;
};

class Backward {
 public:
  Backward(const Solve& solve, const Plan& plan, const PerSample& kept, const void* grad,
           void* gradients, int part)
      : kept_(kept),
        kernels_(*kept.shape.kernels),
        slots_(solve.method->stages - 1),
        grad_(static_cast<const char*>(grad)),
        grad_y0_(static_cast<char*>(plan.job.grad_y0)),
        lanes_(solve, plan, kept.shape, 1) {
    lanes_.memory.gradients = gradients;
    const Share share(solve, kept.shape, part);
    queue_.resize(share.end - share.first);
    std::iota(queue_.begin(), queue_.end(), share.first);
    // Rows of many steps come first, so that few lanes are left alone at the end.
    std::stable_sort(queue_.begin(), queue_.end(), [&](int64_t a, int64_t b) {
      return kept.rows[a].h.size() > kept.rows[b].h.size();
    });
  }

  void run() {
    while (static_cast<int64_t>(at_.size()) < lanes_.most && next_ < queue_.size()) {
      at_.emplace_back();
      load(at_.size() - 1);
    }
    for (;;) {
      for (size_t lane = 0; lane < at_.size();)
        if (at_[lane].step > 0) ++lane;
        else retire(lane);
      if (at_.empty()) return;
      lanes_.memory.rows = at_.size();
      for (size_t lane = 0; lane < at_.size(); ++lane) gather(lane);
      kernels_.step_back(lanes_.job, lanes_.memory, lanes_.attempt);
    }
  }

 private:
  struct At {
    int64_t row;
    size_t step;  // steps that are left
  };

  void load(size_t lane) {
    const int64_t row = queue_[next_++];
    at_[lane] = {row, kept_.rows[row].h.size()};
    lanes_.pad(lanes_.state(0, lane), grad_ + row * lanes_.width);
    lanes_.begin(lane, row);
  }

  void retire(size_t lane) {
    const int64_t row = at_[lane].row;
    if (grad_y0_) memcpy(grad_y0_ + row * lanes_.width, lanes_.state(0, lane), lanes_.width);
    lanes_.write_grad_conds(lane, row);
    if (next_ < queue_.size()) return load(lane);
    const size_t last = at_.size() - 1;
    if (lane != last) {
      at_[lane] = at_[last];
      memcpy(lanes_.state(0, lane), lanes_.state(0, last), lanes_.line);
      lanes_.move(last, lane);
    }
    at_.pop_back();
  }

  // The stage inputs and times of a lane's step.
  void gather(size_t lane) {
    At& at = at_[lane];
    const RowSolve& row = kept_.rows[at.row];
    const size_t n = --at.step;
    lanes_.set_steps(lane, row.h[n]);
    for (int i = 0; i < slots_; ++i) {
      const double c = kept_.c[i];
      lanes_.set_time(i, lane, c == 1 ? row.starts[n + 1] : row.starts[n] + c * row.h[n]);
      lanes_.pad(lanes_.input(i, lane), row.inputs.data() + (n * slots_ + i) * lanes_.width);
    }
  }

  const PerSample& kept_;
  const TrajectoryKernels& kernels_;
  const int slots_;
  const char* grad_;
  char* grad_y0_;
  Lanes lanes_;
  std::vector<int64_t> queue_;
  size_t next_ = 0;
  std::vector<At> at_;
};

// The solve as the plan has to see it: one step, whose last stage is shared.
Solve of_one_step(Solve solve) {
  solve.shared = true;
  solve.steps = 1;
  return solve;
}

// Steps that a solve is likely to take at least, from which the number of threads follows.
constexpr int64_t kLikelySteps = 4;

}  // namespace

PerSample per_sample_forward(const Solve& given, const std::vector<double>& c,
                             const std::vector<double>& b_err, int order, const Control& control,
                             double t0, double t1, Keep keep, void* out, bool (*asks)()) {
  const Solve solve = of_one_step(given);
  PerSample kept;
  kept.c = c;
  kept.rows.resize(solve.batch);
  kept.shape.keep = Keep::inputs;
  kept.shape.slots = solve.method->stages;
  choose_tiles(solve, kLikelySteps * solve.method->stages, kept.shape);
  kept.shape.direct = false;  // the bits of a row must not depend on the number of rows
  Plan plan = make_plan(solve, kept.shape, nullptr);
  const Memory packs(plan.packs.size() * number_size(solve.type));
  plan.job.packs = packs.data();
  kept.shape.kernels->pack(plan.job);
  const StepControl numbers(control, order);
  Interruption interruption(asks);
  in_threads(kept.shape.parts, [&](int part) {
    Forward(solve, plan, kept, b_err, numbers, t0, t1, keep != Keep::nothing, out, interruption, part)
        .run();
  });
  if (interruption.stops()) throw Interrupted{};
  if (keep == Keep::nothing) kept.shape.keep = keep;
  return kept;
}

void per_sample_backward(const Solve& given, const PerSample& kept, const void* grad,
                         const Gradients& gradients) {
  const Solve solve = of_one_step(given);
  const auto run = [&](const Plan& plan, char* parts, int64_t bytes) {
    in_threads(kept.shape.parts, [&](int part) {
      Backward(solve, plan, kept, grad, parts + part * bytes, part).run();
    });
  };
  int64_t steps = 0;
  for (const RowSolve& row : kept.rows) steps += row.h.size();
  add_up_gradients(solve, kept.shape, grad, gradients, steps * solve.method->stages, run);
}

}  // namespace fmft::cpu
