// Step control as in fmft_fast/solvers/adaptive.py.
#pragma once
#include <algorithm>
#include <cmath>

#include "trajectory.h"

namespace fmft::cpu {

struct StepControl : Control {
  int order;

  StepControl(const Control& control, int order) : Control(control), order(order) {}

  double clamp(double h) const { return std::min(std::max(h, min_step), max_step); }

  double next_size(double h, double ratio) const {
    double factor = ifactor;
    if (!std::isfinite(ratio)) {
      factor = dfactor;
    } else if (ratio != 0) {
      const double lowest = ratio < 1 ? 1.0 : dfactor;
      factor = std::min(ifactor, std::max(safety / std::pow(ratio, 1.0 / order), lowest));
    }
    return clamp(h * factor);
  }

  // The first step: a guess from the sizes of the state and its slope, and a better one from the
  // change of slope (over the guess) as well.
  static double guess(double d0, double d1) {
    return d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1;
  }
  double first_size(double h0, double d1, double d2) const {
    if (!std::isfinite(d2)) return h0 * 1e-3;
    const double steepest = std::max(d1, d2);
    const double h1 = steepest <= 1e-15 ? std::max(1e-6, h0 * 1e-3)
                                        : std::pow(0.01 / steepest, 1.0 / order);
    return std::min(100 * h0, h1);
  }
};

}  // namespace fmft::cpu
