// Adaptive solves: the step control of fmft_fast/solvers/adaptive.py around tiles of the batch.
#include <cmath>
#include <cstring>

#include "step_control.h"
#include "trajectory_plan.h"

namespace fmft::cpu {
namespace {

// The kept memory grows by about so much.
constexpr int64_t kChunkBytes = 16 << 20;

class Adaptive {
 public:
  Adaptive(const Solve& solve, const std::vector<double>& c, const std::vector<double>& b_err,
           const std::vector<double>& dense, int order, const Control& control, Keep keep)
      : solve_(solve),
        c_(c),
        dense_(dense),
        control_(control, order),
        stages_(solve.method->stages),
        size_(number_size(solve.type)) {
    steps_.kept.keep = keep;
    solve_.shared = true;
    solve_.steps = 1;
    choose_tiles(solve_, stages_, steps_.kept);
    tiles_ = (solve.batch + steps_.kept.tile_rows - 1) / steps_.kept.tile_rows;
    sums_.resize(2 * tiles_ * steps_.kept.tile_rows);
    times_.resize(stages_);
    attempt_.times = times_.data();
    attempt_.b_err = b_err.data();
    attempt_.rtol = control.rtol;
    attempt_.atol = control.atol;
    for (int i = 0; i < stages_; ++i) attempt_.k[i] = i + 2;
    // Two slots at least, for the first slope and that of the first guess at a step.
    steps_.kept.slots = stages_;
    const int64_t stage = tiles_ * make_plan(solve_, steps_.kept, nullptr).kept.size() / stages_;
    steps_.kept.slots = std::clamp<int64_t>(kChunkBytes / std::max<int64_t>(stage * size_, 1),
                                            stages_, 64 * stages_);
    plan_ = std::make_unique<Plan>(make_plan(solve_, steps_.kept, nullptr));
    make_room(1);
    state_bytes_ = (stages_ + 2) * steps_.kept.tile_rows * plan_->values[0].ld * size_;
    state_ = Memory(tiles_ * state_bytes_);
    packs_ = Memory(plan_->packs.size() * size_);
    plan_->job.packs = packs_.data();
    steps_.kept.kernels->pack(plan_->job);
  }

  Steps run(const std::vector<double>& t, void* out, bool (*asks)()) {
    Interruption interruption(asks);
    const size_t row = solve_.batch * solve_.field->state * size_;
    const auto row_of = [&](size_t j) { return static_cast<char*>(out) + j * row; };
    direction_ = t.back() >= t.front() ? 1 : -1;
    s_ = direction_ * t[0];
    memcpy(out, solve_.y0, row);
    steps_.outputs.push_back(0);
    steps_.weights.assign(stages_, 0);
    if (!start()) return finish(Outcome::not_finite);
    for (size_t j = 1; j < t.size(); ++j) {
      target_ = direction_ * t[j];
      for (int64_t attempts = 0; target_ > s_; ++attempts) {
        if (attempts >= control_.max_num_steps) return finish(Outcome::too_many_steps);
        if (interruption.stops()) throw Interrupted{};
        const Outcome outcome = attempt();
        if (outcome != Outcome::done) return finish(outcome);
      }
      interpolate(t[j], row_of(j));
    }
    return finish(Outcome::done);
  }

 private:
  Steps finish(Outcome outcome) {
    steps_.outcome = outcome;
    return std::move(steps_);
  }

  // Room for this slot.
  void make_room(int64_t slot) {
    Kept& kept = steps_.kept;
    while (static_cast<int64_t>(kept.chunks.size()) * kept.slots <= slot)
      kept.chunks.emplace_back(tiles_ * plan_->kept.size() * size_);
  }

  template <class Run>
  void each(Run run) {
    each_tile(solve_, *plan_, steps_.kept, [&](TileMemory memory, int64_t tile, int) {
      memory.state = static_cast<char*>(state_.data()) + tile * state_bytes_;
      run(memory, tile);
    });
  }

  double* sums(int64_t tile) { return &sums_[2 * tile * steps_.kept.tile_rows]; }

  // The root mean square whose squares were summed row by row.
  double norm(int which) {
    const int64_t rows = steps_.kept.tile_rows;
    double total = 0;
    for (int64_t row = 0; row < solve_.batch; ++row)
      total += sums(row / rows)[which * rows + row % rows];
    const double entries = static_cast<double>(solve_.batch * solve_.field->state);
    return entries > 0 ? std::sqrt(total / entries) : 0;
  }

  bool start() {
    times_[0] = direction_ * s_;
    each([&](const TileMemory& memory, int64_t tile) {
      steps_.kept.kernels->start(plan_->job, memory, attempt_, sums(tile));
    });
    ++steps_.evaluations;
    if (!std::isnan(control_.first_step)) {
      h_ = std::fabs(control_.first_step);
      return true;
    }
    const double d0 = norm(0), d1 = norm(1);
    if (!std::isfinite(d0 + d1)) return false;
    const double h0 = StepControl::guess(d0, d1);
    times_[0] = direction_ * (s_ + h0);
    attempt_.h = direction_ * h0;
    each([&](const TileMemory& memory, int64_t tile) {
      steps_.kept.kernels->probe(plan_->job, memory, attempt_, sums(tile));
    });
    ++steps_.evaluations;
    h_ = control_.first_size(h0, d1, norm(0) / h0);
    return true;
  }

  Outcome attempt() {
    double h = control_.clamp(h_), s1 = s_ + h;
    if (!(s1 > s_)) return Outcome::underflow;
    if (control_.meet && target_ < s1) {
      s1 = target_;
      h = s1 - s_;
    }
    const int64_t n = static_cast<int64_t>(steps_.h.size());
    attempt_.step = steps_.kept.keep == Keep::nothing ? 0 : n;
    make_room((attempt_.step + 1) * (stages_ - 1));
    attempt_.h = direction_ * h;
    for (int i = 0; i < stages_; ++i)
      times_[i] = direction_ * (c_[i] == 1 ? s1 : s_ + c_[i] * h);
    each([&](const TileMemory& memory, int64_t tile) {
      steps_.kept.kernels->attempt(plan_->job, memory, attempt_, sums(tile));
    });
    steps_.evaluations += stages_ - 1;
    const double ratio = norm(0);
    if (!std::isfinite(ratio) && (!starts_finite() || h <= control_.min_step))
      return Outcome::not_finite;
    steps_.last_ratio = ratio;
    if (ratio <= 1 || h <= control_.min_step) {
      steps_.times.insert(steps_.times.end(), times_.begin(), times_.end());
      steps_.h.push_back(attempt_.h);
      s0_ = s_;
      s_ = s1;
      accepted_ = attempt_;
      // The stages of this step stay until the next one is accepted.
      std::swap(attempt_.y, attempt_.next);
      std::swap(attempt_.k[0], attempt_.k[stages_ - 1]);
    } else {
      ++steps_.rejected;
    }
    h_ = control_.next_size(h, ratio);
    return Outcome::done;
  }

  bool starts_finite() {
    bool finite = true;
    const Value& state = plan_->values[0];
    const int64_t rows = steps_.kept.tile_rows;
    const auto check = [&](const auto* numbers) {
      for (int number : {attempt_.y, attempt_.k[0]})
        for (int64_t tile = 0; tile < tiles_; ++tile) {
          const int64_t count = std::min(rows, solve_.batch - tile * rows);
          const auto* from =
              numbers + tile * state_bytes_ / size_ + number * rows * state.ld;
          for (int64_t r = 0; r < count; ++r)
            for (int64_t i = 0; i < state.width; ++i)
              finite = finite && std::isfinite(from[r * state.ld + i]);
        }
    };
    if (solve_.type == Type::f64)
      check(static_cast<const double*>(state_.data()));
    else
      check(static_cast<const float*>(state_.data()));
    return finite;
  }

  void interpolate(double t, void* out) {
    const double theta = (t - direction_ * s0_) / accepted_.h;
    const size_t first = steps_.weights.size();
    const size_t degree = dense_.size() / stages_;
    for (int i = 0; i < stages_; ++i) {
      double weight = 0;
      for (size_t j = degree; j-- > 0;) weight = (weight + dense_[i * degree + j]) * theta;
      if (theta == 1) weight = solve_.method->b[i];
      steps_.weights.push_back(weight);
    }
    steps_.outputs.push_back(static_cast<int64_t>(steps_.h.size()) - 1);
    each([&](const TileMemory& memory, int64_t) {
      steps_.kept.kernels->interpolate(plan_->job, memory, accepted_, &steps_.weights[first], out);
    });
  }

  Solve solve_;
  const std::vector<double>&c_, &dense_;
  StepControl control_;
  int stages_;
  int64_t size_;
  int64_t tiles_ = 0, state_bytes_ = 0;
  std::unique_ptr<Plan> plan_;
  Memory packs_, state_;
  std::vector<double> sums_, times_;
  Attempt attempt_, accepted_;
  int direction_ = 1;
  double s_ = 0, s0_ = 0, h_ = 0, target_ = 0;
  Steps steps_;
};

}  // namespace

Steps trajectory_adaptive(const Solve& solve, const std::vector<double>& c,
                          const std::vector<double>& b_err, const std::vector<double>& dense,
                          int order, const Control& control, const std::vector<double>& t,
                          Keep keep, void* out, bool (*asks)()) {
  return Adaptive(solve, c, b_err, dense, order, control, keep).run(t, out, asks);
}

}  // namespace fmft::cpu
