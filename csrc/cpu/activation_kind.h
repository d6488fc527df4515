// The activations by number.
#pragma once

namespace fmft {

// In the order of ACTIVATIONS in fmft_fast/ops/network.py.
enum class Activation : int {
  identity,
  relu,
  leaky_relu,
  elu,
  selu,
  silu,
  gelu,
  gelu_tanh,
  tanh,
  sigmoid,
  softplus,
  softsign,
  asinh,
  clipped_cube,
};

// Whether the derivative is a function of the value, so that z need not be kept.
constexpr bool slope_from_value(Activation activation, double parameter) {
  switch (activation) {
    case Activation::silu:
    case Activation::gelu:
    case Activation::gelu_tanh:
    case Activation::asinh:
    case Activation::clipped_cube:
      return false;
    case Activation::leaky_relu:
    case Activation::elu:
      return parameter > 0;
    default:
      return true;
  }
}

}  // namespace fmft
