// fmft_fast._cuda: step ops and whole solves on a GPU, on raw pointers and torch's current stream. The caller owns
// every check of shapes and devices. `h_device`, when not 0, is the address of the step on the device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cuda/step.h"
#include "step_call.h"
#include "trajectory_cuda.h"

namespace py = pybind11;
using namespace fmft;

#define FMFT_TEXT_(a) #a
#define FMFT_TEXT(a) FMFT_TEXT_(a)

namespace {

void set_step(StepCall& call, double h, Address h_device, int h_type) {
  call.h = h;
  call.h_device = reinterpret_cast<const void*>(h_device);
  call.h_type = number_type(h_type);
}

cuda::Queue queue_of(int device, Address stream) {
  return {device, reinterpret_cast<void*>(stream)};
}

void rk_combine(Address out, Address y, const std::vector<Address>& k, double h, Address h_device,
                int h_type, const Numbers& w, int64_t size, int type, int k_type, int device,
                Address stream) {
  StepCall call = step_call(out, y, k, size, type, k_type);
  set_step(call, h, h_device, h_type);
  set_weights(call.w, w, call.stages);
  py::gil_scoped_release release;
  cuda::rk_combine(call, queue_of(device, stream));
}

void rk_finish(Address out, Address ratio, Address partials, Address y,
               const std::vector<Address>& k, double h, Address h_device, int h_type,
               const Numbers& b, const Numbers& b_err, double rtol, double atol, int64_t size,
               int type, int k_type, int device, Address stream) {
  StepCall call = step_call(out, y, k, size, type, k_type);
  set_step(call, h, h_device, h_type);
  set_weights(call.w, b, call.stages);
  set_weights(call.w_err, b_err, call.stages);
  const ErrorCall error{rtol, atol, reinterpret_cast<double*>(partials),
                        reinterpret_cast<void*>(ratio)};
  py::gil_scoped_release release;
  cuda::rk_finish(call, error, queue_of(device, stream));
}

void dense_eval(Address out, Address y, const std::vector<Address>& k, double h, Address h_device,
                int h_type, const std::vector<Numbers>& p, Address theta, int64_t thetas,
                int64_t size, int type, int k_type, int device, Address stream) {
  StepCall call = step_call(out, y, k, size, type, k_type);
  set_step(call, h, h_device, h_type);
  const DenseCall dense = dense_call(call, p, theta, thetas);
  py::gil_scoped_release release;
  cuda::dense_eval(call, dense, queue_of(device, stream));
}

// FMFT_CUDA_ARCHS is a list such as 80_86_90.
std::vector<std::string> architectures() {
  std::vector<std::string> found{""};
  for (char c : std::string(FMFT_TEXT(FMFT_CUDA_ARCHS))) {
    if (c == '_')
      found.emplace_back();
    else
      found.back() += c;
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Step ops and whole solves on a GPU, on raw pointers.";
  module.attr("PARTIALS") = cuda::kPartials;
  module.def("rk_combine", &rk_combine);
  module.def("rk_finish", &rk_finish);
  module.def("dense_eval", &dense_eval);
  bind_trajectory(module);
  module.def("architectures", &architectures);
  module.def("runtime_version", &cuda::runtime_version);
  module.def("device_count", &cuda::device_count);
}
