// From Python's numbers to a Field and a Solve.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "../cuda/trajectory.h"
#include "step_call.h"

namespace fmft {

// Reads the plan of a field in the order of its members: head, layers, terms, lists.
inline cuda::Field planned_field(const std::vector<int>& head,
                                 const std::vector<std::vector<int>>& layers,
                                 const std::vector<std::vector<int>>& terms,
                                 const std::vector<int>& skips, const std::vector<int>& skippers,
                                 const std::vector<int>& consumers) {
  using namespace cuda;
  Field field{};
  auto copy = [](void* into, const std::vector<int>& from, size_t bytes, bool whole) {
    if (whole ? from.size() * sizeof(int) != bytes : from.size() * sizeof(int) > bytes)
      throw std::invalid_argument("expected a plan of " + std::to_string(bytes / sizeof(int)) +
                                  " numbers, got " + std::to_string(from.size()));
    std::memcpy(into, from.data(), from.size() * sizeof(int));
  };
  if (layers.size() > kMaxLayers || terms.size() > kMaxTerms)
    throw std::invalid_argument("expected at most 12 layers of at most 24 terms");
  copy(&field, head, offsetof(Field, layer), true);
  for (size_t i = 0; i < layers.size(); ++i)
    copy(&field.layer[i], layers[i], sizeof(FieldLayer), true);
  for (size_t i = 0; i < terms.size(); ++i) copy(&field.term[i], terms[i], sizeof(FieldTerm), true);
  copy(field.skip, skips, sizeof field.skip, false);
  copy(field.skipper, skippers, sizeof field.skipper, false);
  copy(field.consumer, consumers, sizeof field.consumer, false);
  return field;
}

using Addresses = std::vector<Address>;

// The tensors in groups: [y0, out, kept, grad, grad_y0, partials], [times, h, first, dense, row_times,
// row_h], parameters, tables, conds, gradients of conds, values and deltas.
inline cuda::Solve solve_call(const std::vector<Addresses>& at, const std::vector<int>& columns,
                              const std::vector<int>& parameter_at,
                              const std::vector<int64_t>& table_at, int64_t gradient_size,
                              const std::vector<Numbers>& a, const Numbers& b, int64_t batch,
                              int steps) {
  using namespace cuda;
  if (b.size() > kMaxSolveStages || a.size() != b.size())
    throw std::invalid_argument("expected at most 7 stages, got " + std::to_string(b.size()));
  if (at.size() != 8 || at[0].size() != 6 || at[1].size() != 6)
    throw std::invalid_argument("expected 8 groups of addresses");
  auto fill = [](auto* into, const auto& from, size_t limit) {
    using To = std::remove_reference_t<decltype(*into)>;
    if (from.size() > limit)
      throw std::invalid_argument("expected at most " + std::to_string(limit) + " tensors, got " +
                                  std::to_string(from.size()));
    for (size_t i = 0; i < from.size(); ++i) {
      if constexpr (std::is_pointer_v<To>)
        into[i] = reinterpret_cast<To>(from[i]);
      else
        into[i] = static_cast<To>(from[i]);
    }
  };
  auto read = [](Address x) { return reinterpret_cast<const float*>(x); };
  auto write = [](Address x) { return reinterpret_cast<float*>(x); };
  Solve solve{};
  solve.y0 = read(at[0][0]);
  solve.out = write(at[0][1]);
  solve.kept = write(at[0][2]);
  solve.grad = read(at[0][3]);
  solve.grad_y0 = write(at[0][4]);
  solve.partials = write(at[0][5]);
  solve.times = read(at[1][0]);
  solve.h = read(at[1][1]);
  solve.first = reinterpret_cast<const int*>(at[1][2]);
  solve.dense = read(at[1][3]);
  solve.row_times = read(at[1][4]);
  solve.row_h = read(at[1][5]);
  solve.batch = batch;
  solve.gradient_size = gradient_size;
  solve.steps = steps;
  solve.stages = static_cast<int>(b.size());
  for (size_t i = 0; i < b.size(); ++i) {
    fill(solve.a[i], a[i], kMaxSolveStages);
    solve.b[i] = static_cast<float>(b[i]);
  }
  fill(solve.parameter, at[2], kMaxParameters);
  fill(solve.columns, columns, kMaxParameters);
  fill(solve.parameter_at, parameter_at, kMaxParameters);
  fill(solve.table, at[3], kMaxTables);
  fill(solve.table_at, table_at, kMaxTables);
  fill(solve.cond, at[4], kMaxConds);
  fill(solve.grad_cond, at[5], kMaxConds);
  fill(solve.values, at[6], kMaxLayers);
  fill(solve.deltas, at[7], kMaxLayers);
  return solve;
}

// Bounds: rtol, atol, safety, ifactor, dfactor, min_step, max_step, first step or NaN. Numbers: most
// attempts, order, direction, whether to meet the times, kept stages, times. Addresses: t, progress, states,
// partials.
inline cuda::Control control_call(const Numbers& bounds, const std::vector<int64_t>& numbers,
                                  const Numbers& c, const Numbers& b_err,
                                  const std::vector<Numbers>& dense, const Addresses& at) {
  using namespace cuda;
  const size_t stages = c.size();
  if (bounds.size() != 8 || numbers.size() != 6 || at.size() != 4 || stages > kMaxSolveStages ||
      b_err.size() != stages || dense.size() != stages)
    throw std::invalid_argument("expected 8 bounds, 6 numbers, 4 addresses and at most 7 stages");
  Control control{};
  control.rtol = bounds[0];
  control.atol = bounds[1];
  control.safety = bounds[2];
  control.ifactor = bounds[3];
  control.dfactor = bounds[4];
  control.min_step = bounds[5];
  control.max_step = bounds[6];
  control.first_step = bounds[7];
  for (size_t i = 0; i < stages; ++i) {
    control.c[i] = c[i];
    control.b_err[i] = static_cast<float>(b_err[i]);
    if (dense[i].size() != 4 || dense[i][0] != (i == 0))
      throw std::invalid_argument("expected quartics whose slope at 0 is the first stage");
    for (int j = 0; j < 3; ++j) control.dense[i][j] = dense[i][j + 1];
  }
  control.max_attempts = numbers[0];
  control.order = static_cast<int>(numbers[1]);
  control.direction = static_cast<int>(numbers[2]);
  control.meet = static_cast<int>(numbers[3]);
  control.kept_stages = static_cast<int>(numbers[4]);
  control.times = static_cast<int>(numbers[5]);
  control.t = reinterpret_cast<const double*>(at[0]);
  control.progress = reinterpret_cast<Progress*>(at[1]);
  control.states = reinterpret_cast<float*>(at[2]);
  control.partials = reinterpret_cast<double*>(at[3]);
  return control;
}

inline void bind_trajectory(pybind11::module_& module) {
  namespace py = pybind11;
  using namespace cuda;
  // Local, so that the kernels built for the host in tests can be loaded beside those of the GPU.
  py::class_<Field>(module, "Field", py::module_local()).def(py::init(&planned_field));
  py::class_<Solve>(module, "Solve", py::module_local()).def(py::init(&solve_call));
  module.def("trajectory_shared_memory", &trajectory_shared_memory);
  module.def("multiprocessors", &multiprocessors);
  py::class_<Control>(module, "Control", py::module_local()).def(py::init(&control_call));
  py::enum_<Pass>(module, "Pass", py::module_local())
      .value("forward", Pass::forward)
      .value("backward", Pass::backward)
      .value("adaptive", Pass::adaptive)
      .value("by_row", Pass::by_row)
      .value("by_row_backward", Pass::by_row_backward);
  static_assert(sizeof(Progress) == 56 && offsetof(Progress, accepted) == 40);
  module.def("trajectory_capacity", &trajectory_capacity);
  // `log`: the addresses of nodes and sizes, with room for `room` steps from `first` on.
  module.def("trajectory_adaptive", [](const Field& field, const Solve& solve, Control control,
                                       const Addresses& log, int first, int room, bool by_row,
                                       int blocks, int device, Address stream) {
    control.nodes = reinterpret_cast<double*>(log.at(0));
    control.sizes = reinterpret_cast<double*>(log.at(1));
    control.first_number = first;
    control.room = room;
    py::gil_scoped_release release;
    trajectory_adaptive(field, solve, control, by_row, blocks,
                        {device, reinterpret_cast<void*>(stream)});
  });
  module.def("trajectory_forward", [](const Field& field, const Solve& solve, int blocks,
                                      int device, Address stream) {
    py::gil_scoped_release release;
    trajectory_forward(field, solve, blocks, {device, reinterpret_cast<void*>(stream)});
  });
  module.def("trajectory_backward", [](const Field& field, const Solve& solve, int blocks,
                                       Address gradients, int device, Address stream) {
    py::gil_scoped_release release;
    trajectory_backward(field, solve, blocks, reinterpret_cast<float*>(gradients),
                        {device, reinterpret_cast<void*>(stream)});
  });
}

}  // namespace fmft
