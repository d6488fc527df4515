// fmft_fast._cpu: step ops and whole trajectories on raw pointers. The caller owns every check of
// shapes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "../cpu/step.h"
#include "../cpu/threads.h"
#include "repeated.h"
#include "step_call.h"
#include "trajectory_call.h"
#include "unchanged.h"

namespace py = pybind11;
using namespace fmft;

namespace {

void rk_combine(Address out, Address y, const std::vector<Address>& k, double h, const Numbers& w,
                int64_t size, int type, int k_type, int threads) {
  StepCall call = step_call(out, y, k, size, type, k_type);
  call.h = h;
  set_weights(call.w, w, call.stages);
  py::gil_scoped_release release;
  cpu::rk_combine(call, threads);
}

void rk_finish(Address out, Address ratio, Address y, const std::vector<Address>& k, double h,
               const Numbers& b, const Numbers& b_err, double rtol, double atol, int64_t size,
               int type, int k_type, int threads) {
  StepCall call = step_call(out, y, k, size, type, k_type);
  call.h = h;
  set_weights(call.w, b, call.stages);
  set_weights(call.w_err, b_err, call.stages);
  const ErrorCall error{rtol, atol, nullptr, reinterpret_cast<void*>(ratio)};
  py::gil_scoped_release release;
  cpu::rk_finish(call, error, threads);
}

void dense_eval(Address out, Address y, const std::vector<Address>& k, double h,
                const std::vector<Numbers>& p, Address theta, int64_t thetas, int64_t size, int type,
                int k_type, int threads) {
  StepCall call = step_call(out, y, k, size, type, k_type);
  call.h = h;
  const DenseCall dense = dense_call(call, p, theta, thetas);
  py::gil_scoped_release release;
  cpu::dense_eval(call, dense, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Step ops and whole trajectories on the CPU, on raw pointers.";
  module.def("rk_combine", &rk_combine);
  module.def("rk_finish", &rk_finish);
  module.def("dense_eval", &dense_eval);
  bind_trajectories(module);
  bind_per_sample(module);
  bind_repeated(module);
  bind_unchanged(module);
  module.def("same_bytes", [](const Addresses& a, const Addresses& b,
                              const std::vector<size_t>& sizes) {
    py::gil_scoped_release release;
    for (size_t i = 0; i < sizes.size(); ++i)
      if (memcmp(pointer<const void>(a.at(i)), pointer<const void>(b.at(i)), sizes[i])) return false;
    return true;
  });
  module.def("memory_use", [] {
    const cpu::MemoryUse use = cpu::memory_use();
    return py::make_tuple(use.live, use.scratch, use.peak);
  });
  module.def("reset_memory_peak", &cpu::reset_memory_peak);
  module.def("instruction_sets", &cpu::instruction_sets);
  module.def("instruction_set", &cpu::instruction_set);
  module.def("use_instruction_set", &cpu::use_instruction_set);
}
