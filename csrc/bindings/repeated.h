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

// A solve that is asked for again and again, with other tensors of the same shapes, which are
// contiguous: y0, the parameters, tables and conditions. With links these are computed here, from
// the condition of the user's and the parameters of the links, which come in their place; nothing
// is kept then.
class Repeated {
 public:
  struct Run {
    cpu::Solve solve;
    cpu::Kept kept;
    bool finite;  // whether the last output is
  };

  Repeated(const cpu::Solve& like, std::vector<int64_t> sizes, const Links* links,
           std::vector<int64_t> link_leading, std::vector<int> wanted)
      : like_(like), sizes_(std::move(sizes)), link_leading_(std::move(link_leading)),
        wanted_(std::move(wanted)) {
    if (links) links_ = *links;
  }

  Run forward(int keep, int threads, Address out, const Addresses& tensors) const {
    check(tensors);
    Run run{like_, {}, true};
    run.solve.threads = threads;
    run.solve.y0 = pointer<const void>(tensors[0]);
    auto next = tensors.begin() + 1;
    for (auto* into : {&run.solve.parameters, &run.solve.tables})
      for (const void*& x : *into) x = pointer<const void>(*next++);
    cpu::Memory computed;
    if (!links_.links.empty())
      computed = compute_conditions({next, tensors.end()}, run.solve);
    else
      for (const void*& x : run.solve.conds) x = pointer<const void>(*next++);
    run.kept = cpu::trajectory_forward(run.solve, static_cast<cpu::Keep>(keep), pointer(out));
    const int64_t size = like_.batch * like_.field->state;
    const int64_t bytes = size * (like_.type == Type::f64 ? 8 : 4);
    const Address last = out + (like_.outputs.size() - 1) * bytes;
    run.finite = all_finite(last, size, static_cast<int>(like_.type));
    return run;
  }

  // Where the gradients of the tensors go, 0 where they are not wanted.
  void backward(const Run& run, Address grad, const Addresses& gradients) const {
    check(gradients);
    const auto parameters = gradients.begin() + 1, tables = parameters + like_.parameters.size(),
               conds = tables + like_.tables.size();
    cpu::trajectory_backward(run.solve, run.kept, pointer<const void>(grad),
                             make_gradients(gradients[0], {parameters, tables}, sizes_,
                                            run.solve.leading, {tables, conds},
                                            {conds, gradients.end()}));
  }

 private:
  void check(const Addresses& tensors) const {
    const size_t own = like_.parameters.size(), tables = like_.tables.size();
    const size_t of_cond = links_.links.empty() ? like_.conds.size() : 1 + link_leading_.size();
    const size_t expected = 1 + own + tables + of_cond;
    if (tensors.size() != expected)
      throw std::invalid_argument("expected " + std::to_string(expected) + " tensors, got " +
                                  std::to_string(tensors.size()));
  }

  // The memory of the conditions, to which the solve then points.
  cpu::Memory compute_conditions(const Addresses& given, cpu::Solve& solve) const {
    std::vector<void*> values(links_.links.size() + 1, nullptr);
    values[0] = pointer(given[0]);
    cpu::Memory memory = run_links(links_.links, like_.type, like_.batch,
                                   {given.begin() + 1, given.end()}, link_leading_, values);
    for (size_t i = 0; i < wanted_.size(); ++i) solve.conds.at(i) = values.at(wanted_[i]);
    return memory;
  }

  cpu::Solve like_;
  std::vector<int64_t> sizes_;
  Links links_;
  std::vector<int64_t> link_leading_;
  std::vector<int> wanted_;
};

inline void bind_repeated(py::module_& module) {
  using Free = py::call_guard<py::gil_scoped_release>;
  py::class_<Repeated::Run>(module, "Run").def_readonly("finite", &Repeated::Run::finite);
  py::class_<Repeated>(module, "Repeated")
      .def(py::init<const cpu::Solve&, std::vector<int64_t>, const Links*, std::vector<int64_t>,
                    std::vector<int>>(),
           py::keep_alive<1, 2>())
      .def("forward", &Repeated::forward, Free())
      .def("backward", &Repeated::backward, Free());
  module.def("all_finite", &all_finite, Free());
}

}  // namespace fmft
