// From Python's numbers to the calls of core/step.h; addresses come as integers from data_ptr().
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/step.h"

namespace fmft {

using Address = uintptr_t;
using Numbers = std::vector<double>;

inline Type number_type(int code) {
  if (code < 0 || code > static_cast<int>(Type::bf16))
    throw std::invalid_argument("expected a number type 0..3, got " + std::to_string(code));
  return static_cast<Type>(code);
}

inline StepCall step_call(Address out, Address y, const std::vector<Address>& k, int64_t size,
                          int type, int k_type) {
  if (k.size() > kMaxStages)
    throw std::invalid_argument("expected at most 16 stages, got " + std::to_string(k.size()));
  StepCall call;
  call.out = reinterpret_cast<void*>(out);
  call.y = reinterpret_cast<const void*>(y);
  call.stages = static_cast<int>(k.size());
  for (size_t s = 0; s < k.size(); ++s) call.k[s] = reinterpret_cast<const void*>(k[s]);
  call.size = size;
  call.type = number_type(type);
  call.k_type = number_type(k_type);
  const bool mixed = call.type == Type::f32 && call.k_type != Type::f64;
  if (!mixed && (call.type != Type::f64 || call.k_type != Type::f64))
    throw std::invalid_argument("expected y in float32 or float64 and k of its type or lower");
  return call;
}

inline void set_weights(double (&into)[kMaxStages], const Numbers& w, int stages) {
  if (static_cast<int>(w.size()) != stages)
    throw std::invalid_argument("expected one weight per stage, got " + std::to_string(stages) +
                                " stages and " + std::to_string(w.size()) + " weights");
  for (int s = 0; s < stages; ++s) into[s] = w[s];
}

inline DenseCall dense_call(StepCall& call, const std::vector<Numbers>& p, Address theta,
                            int64_t thetas) {
  if (static_cast<int>(p.size()) != call.stages || p.empty() || p[0].size() > kMaxDegree)
    throw std::invalid_argument("expected a row of at most 8 coefficients per stage");
  DenseCall dense;
  dense.degree = static_cast<int>(p[0].size());
  for (int s = 0; s < call.stages; ++s) {
    if (p[s].size() != p[0].size()) throw std::invalid_argument("rows of p differ in length");
    for (int j = 0; j < dense.degree; ++j) dense.p[s][j] = p[s][j];
    call.w[s] = 1;  // every stage is read; its weight depends on theta
  }
  dense.theta = reinterpret_cast<const double*>(theta);
  dense.thetas = thetas;
  return dense;
}

}  // namespace fmft
