// Whole trajectories that are asked for again and again.
#pragma once
#include <cstdint>

#include "trajectory_call.h"

namespace fmft {

// By the bits of the exponent, which compilers turn into vector instructions.
template <class Bits>
bool are_finite(const Bits* x, int64_t size, Bits exponent) {
  Bits found = 0;
  for (int64_t i = 0; i < size; ++i) found |= (x[i] & exponent) == exponent;
  return !found;
}

inline bool all_finite(Address x, int64_t size, int type) {
  if (number_type(type) == Type::f64)
    return are_finite<uint64_t>(pointer<const uint64_t>(x), size, 0x7ffull << 52);
  return are_finite<uint32_t>(pointer<const uint32_t>(x), size, 0xffu << 23);
}

// A solve that is asked for again and again, with other tensors of the same shapes: y0 and the
// parameters, which are contiguous.
class Repeated {
 public:
  struct Run {
    cpu::Solve solve;
    cpu::Kept kept;
    bool finite;  // whether the last output is
  };

  Repeated(const cpu::Solve& like, std::vector<int64_t> sizes)
      : like_(like), sizes_(std::move(sizes)) {}

  // The tensors are y0 and the parameters.
  Run forward(int keep, int threads, Address out, const Addresses& tensors) const {
    if (tensors.size() != like_.parameters.size() + 1)
      throw std::invalid_argument("expected y0 and " + std::to_string(like_.parameters.size()) +
                                  " parameters, got " + std::to_string(tensors.size()));
    Run run{like_, {}, true};
    run.solve.threads = threads;
    run.solve.y0 = pointer<const void>(tensors[0]);
    for (size_t i = 1; i < tensors.size(); ++i)
      run.solve.parameters[i - 1] = pointer<const void>(tensors[i]);
    run.kept = cpu::trajectory_forward(run.solve, static_cast<cpu::Keep>(keep), pointer(out));
    const int64_t size = like_.batch * like_.field->state;
    const int64_t bytes = size * (like_.type == Type::f64 ? 8 : 4);
    const Address last = out + (like_.outputs.size() - 1) * bytes;
    run.finite = all_finite(last, size, static_cast<int>(like_.type));
    return run;
  }

  // Where the gradients of the tensors go, 0 where they are not wanted.
  void backward(const Run& run, Address grad, const Addresses& gradients) const {
    const Addresses parameters(gradients.begin() + 1, gradients.end());
    cpu::trajectory_backward(run.solve, run.kept, pointer<const void>(grad),
                             make_gradients(gradients.at(0), parameters, sizes_,
                                            run.solve.leading, {}, {}));
  }

 private:
  cpu::Solve like_;
  std::vector<int64_t> sizes_;
};

inline void bind_repeated(py::module_& module) {
  using Free = py::call_guard<py::gil_scoped_release>;
  py::class_<Repeated::Run>(module, "Run").def_readonly("finite", &Repeated::Run::finite);
  py::class_<Repeated>(module, "Repeated")
      .def(py::init<const cpu::Solve&, std::vector<int64_t>>(), py::keep_alive<1, 2>())
      .def("forward", &Repeated::forward, Free())
      .def("backward", &Repeated::backward, Free());
  module.def("all_finite", &all_finite, Free());
}

}  // namespace fmft
