// Activations and their derivatives, in the order of ACTIVATIONS in fmft_fast/ops/network.py.
#pragma once
#include <cmath>

#include "mma.h"

namespace fmft::cuda {

template <auto V>
struct Constant {
  static constexpr auto value = V;
};

enum class Activation : int {
  identity, relu, leaky_relu, elu, selu, silu, gelu, gelu_tanh, tanh, sigmoid, softplus,
  softsign, asinh, clipped_cube
};

// Fast is for products of single bf16 numbers: an error of 2^-11 is theirs too. Else the error is that
// of float32: where exp enters a sigmoid, its |x| ulp are multiplied by s (1 - s).
template <bool Fast>
FMFT_DEVICE float sigmoid_of(float x) {
  return fast_reciprocal(1.0f + fast_exp(-x));
}

// Without a branch, to 4e-7 of the value: near 0 the polynomial of least relative error.
template <bool Fast>
FMFT_DEVICE float tanh_of(float x) {
  if constexpr (Fast) return fast_tanh(x);
  const float size = fabsf(x), square = x * x;
  const float far = 1.0f - 2.0f * fast_reciprocal(1.0f + fast_exp(2.0f * size));
  float near = -0.00589515036f;
  near = fmaf(near, square, 0.0207959637f);
  near = fmaf(near, square, -0.0537838265f);
  near = fmaf(near, square, 0.133319244f);
  near = fmaf(near, square, -0.333332986f);
  return size < 0.6f ? fmaf(near * square, x, x) : copysignf(far, x);
}

// exp(x) - 1 where x is negative, likewise.
template <bool Fast>
FMFT_DEVICE float minus_one_exp(float x) {
  const float far = fast_exp(x) - 1.0f;
  if constexpr (Fast) return far;
  float near = 0.00103564514f;
  near = fmaf(near, x, 0.00807314087f);
  near = fmaf(near, x, 0.0415768884f);
  near = fmaf(near, x, 0.166652918f);
  near = fmaf(near, x, 0.499999315f);
  return x > -0.7f ? fmaf(near * x, x, x) : far;
}

// Returns the value at z and, in `slope`, the derivative; `p` is the layer's own number.
template <Activation A, bool Fast>
FMFT_DEVICE float activation(float z, float p, float& slope) {
  if constexpr (A == Activation::relu) {
    slope = z > 0 ? 1.0f : 0.0f;
    return z > 0 || z != z ? z : 0.0f;
  } else if constexpr (A == Activation::leaky_relu) {
    slope = z > 0 ? 1.0f : p;
    return slope * z;
  } else if constexpr (A == Activation::elu || A == Activation::selu) {
    constexpr bool scaled = A == Activation::selu;
    const float scale = scaled ? 1.0507009873554804934193349852946f : 1.0f;
    const float alpha = scaled ? scale * 1.6732632423543772848170429916717f : p;
    const float below = alpha * minus_one_exp<Fast>(z);
    slope = z > 0 ? scale : below + alpha;
    return z > 0 ? scale * z : below;
  } else if constexpr (A == Activation::silu) {
    const float s = sigmoid_of<Fast>(z);
    slope = s * (1.0f + z * (1.0f - s));
    return z * s;
  } else if constexpr (A == Activation::gelu) {
    const float cdf = 0.5f * (1.0f + erff(0.70710678118654752440f * z));
    slope = cdf + z * 0.39894228040143267794f * fast_exp(-0.5f * z * z);
    return z * cdf;
  } else if constexpr (A == Activation::gelu_tanh) {
    constexpr float k = 0.79788456080286535588f, c = 0.044715f;
    const float t = tanh_of<Fast>(k * (z + c * z * z * z));
    slope = 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * k * (1.0f + 3.0f * c * z * z);
    return 0.5f * z * (1.0f + t);
  } else if constexpr (A == Activation::tanh) {
    const float t = tanh_of<Fast>(z);
    slope = 1.0f - t * t;
    return t;
  } else if constexpr (A == Activation::sigmoid) {
    const float s = sigmoid_of<Fast>(z);
    slope = s * (1.0f - s);
    return s;
  } else if constexpr (A == Activation::softplus) {
    const float x = p * z;
    const bool linear = x > 20.0f;  // as torch
    slope = linear ? 1.0f : sigmoid_of<Fast>(x);
    return linear ? z : log1pf(expf(x)) / p;
  } else if constexpr (A == Activation::softsign) {
    const float r = 1.0f / (1.0f + fabsf(z));
    slope = r * r;
    return z * r;
  } else if constexpr (A == Activation::asinh) {
    slope = rsqrtf(fmaf(z, z, 1.0f));
    return asinhf(z);
  } else if constexpr (A == Activation::clipped_cube) {
    const float c = z > 1.0f ? 1.0f : z < -1.0f ? -1.0f : z;
    slope = 3.0f * c * c;
    return c * c * c + 3.0f * (z - c);
  } else {
    slope = 1.0f;
    return z;
  }
}

// Calls f with the activation as a type, so that the choice is made once per tile. A table of jumps takes
// long, hence some are asked for before.
template <class F>
FMFT_DEVICE void with_activation(int code, F&& f) {
  if (code == static_cast<int>(Activation::selu)) return f(Constant<Activation::selu>{});
  if (code == static_cast<int>(Activation::silu)) return f(Constant<Activation::silu>{});
  if (code == static_cast<int>(Activation::tanh)) return f(Constant<Activation::tanh>{});
#define FMFT_CASE(name)               \
  case static_cast<int>(Activation::name): \
    return f(Constant<Activation::name>{})
  switch (code) {
    FMFT_CASE(relu);
    FMFT_CASE(leaky_relu);
    FMFT_CASE(elu);
    FMFT_CASE(gelu);
    FMFT_CASE(gelu_tanh);
    FMFT_CASE(sigmoid);
    FMFT_CASE(softplus);
    FMFT_CASE(softsign);
    FMFT_CASE(asinh);
    FMFT_CASE(clipped_cube);
    default:
      return f(Constant<Activation::identity>{});
  }
#undef FMFT_CASE
}

}  // namespace fmft::cuda
