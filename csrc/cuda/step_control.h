// Step control as in fmft_fast/solvers/adaptive.py. All threads of a solve do it alike, in float64.
#pragma once
#include <cmath>

#include "device.h"
#include "trajectory.h"

namespace fmft::cuda {

FMFT_DEVICE bool is_finite(double x) { return x - x == 0.0; }

FMFT_DEVICE double clamp_step(const Control& control, double h) {
  return fmin(fmax(h, control.min_step), control.max_step);
}

FMFT_DEVICE double next_step(const Control& control, double h, double ratio) {
  double factor = control.ifactor;
  if (!is_finite(ratio)) {
    factor = control.dfactor;
  } else if (ratio != 0.0) {
    const double lowest = ratio < 1.0 ? 1.0 : control.dfactor;
    factor = fmin(factor, fmax(control.safety / pow(ratio, 1.0 / control.order), lowest));
  }
  return clamp_step(control, h * factor);
}

// The first step: a guess from the sizes of the state and its slope, and a better one from the change of
// the slope (over the guess) as well.
FMFT_DEVICE double guess_step(double d0, double d1) {
  return d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1;
}
FMFT_DEVICE double first_step(const Control& control, double h0, double d1, double d2) {
  if (!is_finite(d2)) return h0 * 1e-3;
  const double steepest = fmax(d1, d2);
  const double h1 = steepest <= 1e-15 ? fmax(1e-6, h0 * 1e-3)
                                      : pow(0.01 / steepest, 1.0 / control.order);
  return fmin(100.0 * h0, h1);
}

// A step that is tried, from Progress::s; size 0 if there is none.
struct Attempt {
  double h = 0.0, end = 0.0;

  FMFT_DEVICE float time(const Control& control, double s, int stage) const {
    const double c = control.c[stage];
    return static_cast<float>(control.direction * (c == 1.0 ? end : s + c * h));
  }
};

FMFT_DEVICE Attempt prepare(const Control& control, Progress& p) {
  while (p.next < control.times && !(control.direction * control.t[p.next] > p.s))
    ++p.next, p.attempts = 0;
  if (p.next == control.times) {
    p.outcome = Outcome::done;
    return {};
  }
  if (p.accepted == control.first_number + control.room) return {};
  if (p.attempts++ >= control.max_attempts) {
    p.outcome = Outcome::too_many_steps;
    return {};
  }
  Attempt tried;
  tried.h = clamp_step(control, p.h);
  tried.end = p.s + tried.h;
  if (!(tried.end > p.s)) {
    p.outcome = Outcome::underflow;
    return {};
  }
  const double target = control.direction * control.t[p.next];
  if (control.meet && target < tried.end) {
    tried.end = target;
    tried.h = tried.end - p.s;
  }
  return tried;
}

// Accepts or rejects; `bad_start`: whether the state or its slope was not finite before.
FMFT_DEVICE bool judge(const Control& control, Progress& p, const Attempt& tried, double ratio,
                       bool bad_start) {
  const bool smallest = tried.h <= control.min_step;
  if (!is_finite(ratio) && (bad_start || smallest)) {
    p.outcome = Outcome::not_finite;
    return false;
  }
  p.ratio = ratio;
  p.h = next_step(control, tried.h, ratio);
  if (!(ratio <= 1.0) && !smallest) {
    ++p.rejected;
    return false;
  }
  p.s = tried.end;
  ++p.accepted;
  return true;
}

}  // namespace fmft::cuda
