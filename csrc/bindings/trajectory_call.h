// Whole trajectories in Python: the field and the method are prepared once, tensors come as addresses.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "../cpu/per_sample.h"
#include "step_call.h"

namespace fmft {

namespace py = pybind11;
using Addresses = std::vector<Address>;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
std::vector<T*> pointers(const Addresses& addresses) {
  std::vector<T*> found;
  found.reserve(addresses.size());
  for (Address address : addresses) found.push_back(pointer<T>(address));
  return found;
}

// (width, [(source, parameter, column)], bias, time, time column, table, cond, activation, its
// parameter, skips), with -1 for what is absent.
using LayerTuple = std::tuple<int64_t, std::vector<std::tuple<int, int, int64_t>>, int, int, int64_t,
                              int, int, int, double, std::vector<int>>;

inline cpu::Field make_field(int64_t state, const std::vector<LayerTuple>& layers) {
  if (layers.empty() || layers.size() > kMaxLayers)
    throw std::invalid_argument("expected 1 to " + std::to_string(kMaxLayers) + " layers, got " +
                                std::to_string(layers.size()));
  cpu::Field field;
  field.state = state;
  for (const LayerTuple& tuple : layers) {
    Layer layer;
    std::vector<Term> terms;
    std::vector<std::tuple<int, int, int64_t>> given;
    std::vector<int> skips;
    int activation;
    std::tie(layer.width, given, layer.bias, layer.time, layer.time_column, layer.table, layer.cond,
             activation, layer.parameter, skips) = tuple;
    layer.activation = static_cast<Activation>(activation);
    layer.live = false;
    for (const auto& [source, parameter, column] : given) {
      Term term;
      term.source = source;
      term.parameter = parameter;
      term.column = column;
      terms.push_back(term);
    }
    field.layers.push_back(layer);
    field.terms.push_back(std::move(terms));
    field.skips.push_back(std::move(skips));
  }
  field.layers.back().live = true;
  for (size_t l = layers.size(); l-- > 0;) {
    if (!field.layers[l].live) continue;
    for (const Term& term : field.terms[l])
      if (term.source) field.layers[term.source - 1].live = true;
    for (int skip : field.skips[l])
      if (skip) field.layers[skip - 1].live = true;
  }
  return field;
}

inline cpu::Method make_method(const std::vector<Numbers>& a, const Numbers& b) {
  cpu::Method method;
  method.stages = static_cast<int>(b.size());
  if (b.empty() || b.size() > kMaxStages || a.size() != b.size())
    throw std::invalid_argument("expected 1 to 16 stages with a row of a for each");
  method.a.assign(b.size() * b.size(), 0);
  for (size_t i = 0; i < a.size(); ++i)
    for (size_t j = 0; j < std::min(a[i].size(), i); ++j) method.a[i * b.size() + j] = a[i][j];
  method.b = b;
  return method;
}

// The tensors of a solve: y0, then parameters with their leading dimensions, tables, conds.
inline cpu::Solve make_solve(const cpu::Field& field, const cpu::Method& method, int type,
                             bool shared, int threads, int64_t batch, int64_t steps, Address times,
                             Address h,
                             std::vector<int64_t> outputs, Address weights, Address y0,
                             const Addresses& parameters, std::vector<int64_t> leading,
                             const Addresses& tables, const Addresses& conds) {
  cpu::Solve solve;
  solve.field = &field;
  solve.method = &method;
  solve.type = number_type(type);
  solve.shared = shared;
  solve.threads = threads;
  solve.batch = batch;
  solve.steps = steps;
  solve.times = pointer<const double>(times);
  solve.h = pointer<const double>(h);
  solve.outputs = std::move(outputs);
  solve.weights = pointer<const double>(weights);
  solve.y0 = pointer<const void>(y0);
  solve.parameters = pointers<const void>(parameters);
  solve.leading = std::move(leading);
  solve.tables = pointers<const void>(tables);
  solve.conds = pointers<const void>(conds);
  return solve;
}

inline cpu::Control make_control(const Numbers& control, int64_t max_num_steps) {
  if (control.size() != 9)
    throw std::invalid_argument("expected 9 numbers of step control, got " +
                                std::to_string(control.size()));
  return {control[0], control[1],    control[2], control[3], control[4],
          control[5], control[6], max_num_steps, control[7], control[8] != 0};
}

// Whether Ctrl-C, or another signal whose handler raises, came meanwhile. Only the main thread is told.
inline bool has_signal() {
  py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// Runs work without Python; what a signal's handler has raised goes on from here.
template <class Work>
auto interruptible(Work work) {
  try {
    py::gil_scoped_release release;
    return work();
  } catch (const cpu::Interrupted&) {
    throw py::error_already_set();
  }
}

// (outcome, times, steps, outputs, their weights, rejected steps, evaluations, kept)
inline py::tuple solve_adaptively(const cpu::Solve& solve, const Numbers& c, const Numbers& b_err,
                                  const Numbers& dense, int order, const Numbers& control,
                                  int64_t max_num_steps, const Numbers& t, int keep, Address out) {
  const cpu::Control numbers = make_control(control, max_num_steps);
  cpu::Steps steps = interruptible([&] {
    return cpu::trajectory_adaptive(solve, c, b_err, dense, order, numbers, t,
                                    static_cast<cpu::Keep>(keep), pointer(out), &has_signal);
  });
  return py::make_tuple(static_cast<int>(steps.outcome), steps.times, steps.h, steps.outputs,
                        steps.weights, steps.rejected, steps.evaluations, std::move(steps.kept));
}

// Where the gradients go: y0, parameters with their sizes and leading dimensions, tables, conds.
inline cpu::Gradients make_gradients(Address y0, const Addresses& parameters,
                                     std::vector<int64_t> sizes, std::vector<int64_t> leading,
                                     const Addresses& tables, const Addresses& conds) {
  return {pointer(y0),          pointers<void>(parameters), pointers<void>(tables),
          pointers<void>(conds), std::move(sizes),           std::move(leading)};
}

// Writes the numbers of accepted and rejected steps [2, rows]; the first row that failed, or -1.
inline int64_t row_counts(const cpu::PerSample& kept, Address counts) {
  int64_t* accepted = pointer<int64_t>(counts);
  const int64_t rows = static_cast<int64_t>(kept.rows.size());
  int64_t failed = -1;
  for (int64_t i = 0; i < rows; ++i) {
    const cpu::RowSolve& row = kept.rows[i];
    accepted[i] = static_cast<int64_t>(row.h.size());
    accepted[rows + i] = row.rejected;
    if (failed < 0 && row.outcome != cpu::Outcome::done) failed = i;
  }
  return failed;
}

inline void bind_per_sample(py::module_& module) {
  py::class_<cpu::PerSample>(module, "PerSample")
      .def("counts", &row_counts)
      .def("ended", [](const cpu::PerSample& kept, size_t row) {
        return py::make_tuple(static_cast<int>(kept.rows.at(row).outcome),
                              kept.rows.at(row).last_ratio);
      })
      .def("steps", [](const cpu::PerSample& kept, size_t row) {
        return py::make_tuple(kept.rows.at(row).starts, kept.rows.at(row).h);
      });
  module.def("per_sample_forward",
             [](const cpu::Solve& solve, const Numbers& c, const Numbers& b_err, int order,
                const Numbers& control, int64_t max_num_steps, double t0, double t1, int keep,
                Address out) {
               const cpu::Control numbers = make_control(control, max_num_steps);
               return interruptible([&] {
                 return cpu::per_sample_forward(solve, c, b_err, order, numbers, t0, t1,
                                                static_cast<cpu::Keep>(keep), pointer(out),
                                                &has_signal);
               });
             });
  module.def("per_sample_backward",
             [](const cpu::Solve& solve, const cpu::PerSample& kept, Address grad, Address y0,
                const Addresses& parameters, std::vector<int64_t> sizes,
                std::vector<int64_t> leading, const Addresses& tables, const Addresses& conds) {
               const cpu::Gradients gradients = make_gradients(
                   y0, parameters, std::move(sizes), std::move(leading), tables, conds);
               py::gil_scoped_release release;
               cpu::per_sample_backward(solve, kept, pointer<const void>(grad), gradients);
             });
}

// (source, weight, bias, activation, its parameter, inputs, outputs), with -1 for what is absent.
using LinkTuple = std::tuple<int, int, int, int, double, int64_t, int64_t>;

struct Links {
  std::vector<Link> links;
};

inline Links make_links(const std::vector<LinkTuple>& given) {
  Links made;
  for (const auto& [source, weight, bias, activation, parameter, inputs, outputs] : given)
    made.links.push_back({source, weight, bias, static_cast<Activation>(activation), parameter,
                          inputs, outputs});
  return made;
}

// `values` are the addresses of the input and of every link's value; where there is none, the value
// lies in the memory that is given back.
inline cpu::Memory run_links(const std::vector<Link>& links, Type type, int64_t rows,
                             const Addresses& parameters, const std::vector<int64_t>& leading,
                             std::vector<void*>& values) {
  const auto tensors = pointers<const void>(parameters);
  const int64_t row = rows * (type == Type::f64 ? 8 : 4);
  int64_t bytes = 0;
  for (const Link& link : links) bytes += link.outputs * row;
  cpu::Memory memory(bytes);
  char* next = static_cast<char*>(memory.data());
  for (size_t l = 0; l < links.size(); next += links[l++].outputs * row)
    if (!values.at(l + 1)) values[l + 1] = next;
  Chain chain;
  chain.type = type;
  chain.rows = rows;
  chain.links = links.data();
  chain.count = static_cast<int>(links.size());
  chain.parameters = tensors.data();
  chain.leading = leading.data();
  chain.values = values.data();
  cpu::kernels_in_use().chain(chain);
  return memory;
}

inline void run_chain(const Links& made, int type, int64_t rows, const Addresses& parameters,
                      const std::vector<int64_t>& leading, const Addresses& values) {
  auto room = pointers<void>(values);
  py::gil_scoped_release release;
  run_links(made.links, number_type(type), rows, parameters, leading, room);
}

inline void bind_trajectories(py::module_& module) {
  py::class_<Links>(module, "Chain")
      .def(py::init(&make_links))
      .def("run", &run_chain);
  py::class_<cpu::Field>(module, "Field").def(py::init(&make_field));
  py::class_<cpu::Method>(module, "Method").def(py::init(&make_method));
  py::class_<cpu::Solve>(module, "Solve")
      .def(py::init(&make_solve), py::keep_alive<1, 2>(), py::keep_alive<1, 3>());
  py::class_<cpu::Kept>(module, "Kept");
  module.def("trajectory_forward", [](const cpu::Solve& solve, int keep, Address out) {
    py::gil_scoped_release release;
    return cpu::trajectory_forward(solve, static_cast<cpu::Keep>(keep), pointer(out));
  });
  module.def("trajectory_adaptive", &solve_adaptively);
  module.def("trajectory_backward",
             [](const cpu::Solve& solve, const cpu::Kept& kept, Address grad, Address y0,
                const Addresses& parameters, std::vector<int64_t> sizes,
                std::vector<int64_t> leading, const Addresses& tables, const Addresses& conds) {
               const cpu::Gradients gradients = make_gradients(
                   y0, parameters, std::move(sizes), std::move(leading), tables, conds);
               py::gil_scoped_release release;
               cpu::trajectory_backward(solve, kept, pointer<const void>(grad), gradients);
             });
}

}  // namespace fmft
