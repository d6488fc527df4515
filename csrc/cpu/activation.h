// Activations on vectors. Every exponential is of a number that is not positive, so none overflows.
#pragma once
#include <limits>

#include "activation_kind.h"
#include "vector.h"

namespace fmft {

inline namespace FMFT_ISA {

template <class T>
struct Constants;

// exp(r) = 1 + r + r^2 q(r) for |r| <= log(2) / 2; ln2_high has few bits: n ln2_high is exact.
// erfc(x) = t exp(-x^2) p(2 t - 1) with t = 1 / (1 + x / 2) for x >= 0.
// atanh(s) = s + s^3 g(s^2) for s <= 1/3. All by interpolation at Chebyshev nodes.
template <>
struct Constants<float> {
  static constexpr float shift = 0x1.8p23f, lowest = -87.33654f, log2e = 1.44269504f;
  static constexpr float ln2 = 0.693147181f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float exp[] = {0.5f, 0.16666577f, 0.0416665546f, 0.00836317905f, 0.00139261836f};
  static constexpr float erfc[] = {
      0.510791353f,    0.343580306f,    0.139735935f,   0.0182218641f,    -0.0107532958f,
      -0.00324423206f, 0.00153399689f,  0.000431822488f, -0.00030511538f, -3.71660531e-05f,
      4.45396396e-05f};
  static constexpr float atanh[] = {0.333331608f, 0.200122976f, 0.139825789f, 0.140788892f};
};

template <>
struct Constants<double> {
  static constexpr double shift = 0x1.8p52, lowest = -708.39, log2e = 1.4426950408889634;
  static constexpr double ln2 = 0.69314718055994531;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double exp[] = {
      0.5,                    0.16666666666666669,    0.041666666666624129,
      0.0083333333333300615,  0.0013888888917213717,  0.00019841269863053618,
      2.4801521295954376e-05, 2.7557268459997064e-06, 2.7620088445409746e-07,
      2.510038549551032e-08};
  static constexpr double erfc[] = {
      0.5107913526210115,      0.34358034220690586,    0.13973604627802788,
      0.018221115753374807,    -0.010755330944697059,  -0.0032395925317796246,
      0.00154530602711342,     0.00041864800028320513, -0.00033153670899623006,
      -1.7185464096963356e-05, 7.2234981347627739e-05, -1.7075719136611996e-05,
      -1.084599640863467e-05,  8.0645288427297136e-06, -5.7012206617221837e-07,
      -1.8303510386697313e-06, 1.018048912518323e-06,  1.0078399149757221e-08,
      -3.1248515238730434e-07, 1.5393469156697265e-07, 2.6415483669407121e-08,
      -5.3252695260137601e-08, 1.0353970865267596e-08, 6.9293142546033557e-09,
      -2.5816114417791724e-09};
  static constexpr double atanh[] = {
      0.33333333333333076,
      0.20000000000092874,
      0.14285714272727057,
      0.11111112040373837,
      0.090908704162524029,
      0.076933070211520044,
      0.066501870163373125,
      0.060550843640346089,
      0.0416225325593041,
      0.085220817813906988};
};

// From pairs of neighbours, so that fewer products wait for one another.
template <class V, class T, int N>
inline V polynomial(V x, const T (&c)[N]) {
  const V square = x * x;
  constexpr int last = (N - 1) / 2 * 2;
  const auto pair = [&](int i) { return x * c[i + 1] + c[i]; };
  V y = last + 1 < N ? square * pair(last) + pair(last - 2) : square * c[last] + pair(last - 2);
#pragma GCC unroll 32
  for (int i = last - 4; i >= 0; i -= 2) y = y * square + pair(i);
  return y;
}

// factor exp(x) in its parts, scale (1 + rest), where the factor is from 1 to 2, so that no scale is
// too small. Precise has log(2) in two parts; where 1 is subtracted, one part is enough.
template <class T, bool Precise>
struct Exponential {
  Vector<T> scale, rest;
  T factor;

  explicit Exponential(Vector<T> x, T factor = 1) : factor(factor) {
    using N = Constants<T>;
    using Bits = typename Lanes<T>::Mask;
    x = larger(broadcast(N::lowest), x);  // keeps NaN
    const Vector<T> shifted = x * N::log2e + N::shift;
    const Vector<T> n = shifted - N::shift;
    Vector<T> r = x - n * (Precise ? N::ln2_high : N::ln2);
    if (Precise) r -= n * N::ln2_low;
    rest = polynomial(r, N::exp) * (r * r) + r;
    const Bits bits = reinterpret_cast<Bits>(broadcast(factor));
    scale = reinterpret_cast<Vector<T>>((reinterpret_cast<Bits>(shifted) << N::mantissa) + bits);
  }
};

// factor (exp(x) - 1)
template <class T>
inline Vector<T> exp_minus_one(Vector<T> x, T factor = 1) {
  const Exponential<T, false> e(x, factor);
  return e.scale * e.rest + (e.scale - factor);
}

// Zero where the exponential is that small: it may be multiplied by a number that is that large.
template <class T>
inline Vector<T> exp_of(Vector<T> x) {
  const Exponential<T, true> e(x);
  return x < Constants<T>::lowest ? Vector<T>{} : e.scale * e.rest + e.scale;  // keeps NaN
}

template <class T>
inline Vector<T> negative_part(Vector<T> x) {
  return smaller(Vector<T>{}, x);  // keeps NaN
}

template <class T>
inline Vector<T> magnitude_of(Vector<T> x) {
  using Bits = typename Lanes<T>::Mask;
  constexpr auto most = std::numeric_limits<typename Lanes<T>::Bits>::max();
  return reinterpret_cast<Vector<T>>(reinterpret_cast<Bits>(x) & most);
}

// |x| with the sign of `like`.
template <class T>
inline Vector<T> with_sign(Vector<T> x, Vector<T> like) {
  using Bits = typename Lanes<T>::Mask;
  constexpr auto sign = std::numeric_limits<typename Lanes<T>::Bits>::min();
  const Bits magnitude = reinterpret_cast<Bits>(magnitude_of<T>(x));
  return reinterpret_cast<Vector<T>>(magnitude | (reinterpret_cast<Bits>(like) & sign));
}

template <class T>
inline Vector<T> tanh_of(Vector<T> x) {
  const Vector<T> e = exp_minus_one<T>(T(-2) * magnitude_of<T>(x));
  return with_sign<T>(e / (e + T(2)), x);
}

// log(1 + v) = 2 atanh(s) with s = v / (2 + v), for 0 <= v <= 1.
template <class T>
inline Vector<T> log_of_one_and(Vector<T> v) {
  const Vector<T> s = v / (v + T(2)), t = s * s;
  return v - s * (v - T(2) * t * polynomial(t, Constants<T>::atanh));
}

// asinh(x) = log(w) for w = 1 + v = |x| + root, where root = sqrt(1 + x^2): up to w = 2 as log(1 + v) from
// v, which is small where |x| is; beyond as k log(2) + log(1 + v) with w = 2^k (1 + v). Where x^2 could
// overflow, root is |x| to the last bit, and w / 2 is |x|.
template <class T>
inline Vector<T> asinh_of(Vector<T> x, Vector<T>& root) {
  using N = Constants<T>;
  using V = Vector<T>;
  using Bits = typename Lanes<T>::Mask;
  using Bit = typename Lanes<T>::Bits;
  constexpr T exact = static_cast<T>(Bit(1) << N::mantissa);
  constexpr T far = static_cast<T>(Bit(1) << (N::mantissa / 2 + 2));
  const V size = magnitude_of<T>(x);
  root = sqrt_of<T>(size * size + T(1));
  root = size > far ? size : root;
  V v = size * (size / (root + T(1))) + size;
  const V w = size > far ? size : v + T(1);
  const Bits bits = reinterpret_cast<Bits>(w);
  const Bits digits = bits & ((Bit(1) << N::mantissa) - 1);
  const V one = broadcast(T(1));
  // The exponent as a number: it is put into the last digits of 2^mantissa.
  V k = reinterpret_cast<V>((bits >> N::mantissa) | reinterpret_cast<Bits>(broadcast(exact)));
  k -= exact + N::bias;
  v = k > T(0) ? reinterpret_cast<V>(digits | reinterpret_cast<Bits>(one)) - T(1) : v;
  k = size > far ? k + T(1) : k;
  V y = k * N::ln2_high + (k * N::ln2_low + log_of_one_and<T>(v));
  y = size < std::numeric_limits<T>::infinity() ? y : size;  // keeps NaN
  return with_sign<T>(y, x);
}

// sigmoid(x) and 1 - sigmoid(x), both to full precision.
template <class T>
struct Sigmoid {
  Vector<T> value, rest;

  explicit Sigmoid(Vector<T> x) {
    const Vector<T> e = exp_of<T>(-magnitude_of<T>(x));
    const Vector<T> larger = T(1) / (e + T(1)), smaller = e * larger;
    value = x < T(0) ? smaller : larger;
    rest = x < T(0) ? larger : smaller;
  }
};

// The normal distribution function, and exp(-x^2 / 2) on the way.
template <class T>
inline Vector<T> normal_of(Vector<T> x, Vector<T>& bell) {
  const Vector<T> u = magnitude_of<T>(x) * T(0.70710678118654752);
  const Vector<T> t = T(1) / (u * T(0.5) + T(1));
  bell = exp_of<T>(x * x * T(-0.5));
  const Vector<T> tail = T(0.5) * t * bell * polynomial(t * T(2) - T(1), Constants<T>::erfc);
  return x < T(0) ? tail : T(1) - tail;
}

constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
constexpr double kSeluScale = 1.0507009873554804934193349852946;

// value = activation(z); with Slopes also its derivative.
template <Activation A, bool Slopes, class T>
inline Vector<T> activate(Vector<T> z, T parameter, Vector<T>& slope) {
  using V = Vector<T>;
  const V one = broadcast(T(1));
  if constexpr (A == Activation::identity) {
    slope = one;
    return z;
  } else if constexpr (A == Activation::relu) {
    if (Slopes) slope = z > T(0) ? one : V{};
    return z < T(0) ? V{} : z;
  } else if constexpr (A == Activation::leaky_relu) {
    if (Slopes) slope = z > T(0) ? one : broadcast(parameter);
    return z > T(0) ? z : z * parameter;
  } else if constexpr (A == Activation::elu) {
    const V e = parameter * exp_minus_one<T>(negative_part<T>(z));
    if (Slopes) slope = z > T(0) ? one : e + parameter;
    return z > T(0) ? z : e;
  } else if constexpr (A == Activation::selu) {
    constexpr T scale = static_cast<T>(kSeluScale), low = static_cast<T>(kSeluScale * kSeluAlpha);
    const V e = exp_minus_one<T>(negative_part<T>(z), low);
    if (Slopes) slope = z > T(0) ? broadcast(scale) : e + low;
    return larger(V{}, z) * scale + e;  // one of them is zero
  } else if constexpr (A == Activation::silu) {
    const Sigmoid<T> s(z);
    const V value = z * s.value;
    if (Slopes) slope = value * s.rest + s.value;
    return value;
  } else if constexpr (A == Activation::gelu) {
    V bell;
    const V normal = normal_of<T>(z, bell);
    if (Slopes) slope = z * bell * T(0.39894228040143268) + normal;
    return z * normal;
  } else if constexpr (A == Activation::gelu_tanh) {
    constexpr T b = static_cast<T>(0.79788456080286536), c = static_cast<T>(0.044715);
    const V square = z * z;
    // (1 + tanh u) / 2 is the sigmoid of 2 u.
    const Sigmoid<T> s(z * (square * c + T(1)) * (2 * b));
    const V value = z * s.value;
    if (Slopes) slope = value * s.rest * (square * (3 * c) + T(1)) * (2 * b) + s.value;
    return value;
  } else if constexpr (A == Activation::tanh) {
    const V y = tanh_of<T>(z);
    if (Slopes) slope = one - y * y;
    return y;
  } else if constexpr (A == Activation::sigmoid) {
    const Sigmoid<T> s(z);
    if (Slopes) slope = s.value * s.rest;
    return s.value;
  } else if constexpr (A == Activation::softsign) {
    const V r = T(1) / (magnitude_of<T>(z) + T(1));
    if (Slopes) slope = r * r;
    return z * r;
  } else if constexpr (A == Activation::asinh) {
    V root;
    const V y = asinh_of<T>(z, root);
    if (Slopes) slope = T(1) / root;
    return y;
  } else if constexpr (A == Activation::clipped_cube) {
    V c = z > T(1) ? one : z;
    c = c < T(-1) ? -one : c;
    const V square = c * c;
    if (Slopes) slope = T(3) * square;
    return square * c + T(3) * (z - c);
  } else {
    const V x = z * parameter;
    const V e = exp_of<T>(-magnitude_of<T>(x));
    if (Slopes) slope = x > T(20) ? one : (x < T(0) ? e : one) / (e + T(1));
    return x > T(20) ? z : ((x > T(0) ? x : V{}) + log_of_one_and<T>(e)) / parameter;
  }
}

// The derivative from the value, where slope_from_value().
template <Activation A, class T>
inline Vector<T> slope_of(Vector<T> value, T parameter) {
  using V = Vector<T>;
  const V one = broadcast(T(1));
  if constexpr (A == Activation::relu) {
    return value > T(0) ? one : V{};
  } else if constexpr (A == Activation::leaky_relu) {
    return value > T(0) ? one : broadcast(parameter);
  } else if constexpr (A == Activation::elu) {
    return value > T(0) ? one : value + parameter;
  } else if constexpr (A == Activation::selu) {
    constexpr T scale = static_cast<T>(kSeluScale), low = static_cast<T>(kSeluScale * kSeluAlpha);
    return value > T(0) ? broadcast(scale) : value + low;
  } else if constexpr (A == Activation::tanh) {
    return one - value * value;
  } else if constexpr (A == Activation::sigmoid) {
    return value - value * value;
  } else if constexpr (A == Activation::softsign) {
    const V r = one - magnitude_of<T>(value);
    return r * r;
  } else if constexpr (A == Activation::softplus) {
    const V x = value * parameter;
    return x > T(20) ? one : -exp_minus_one<T>(-x);
  } else {
    return one;
  }
}

template <Activation A>
struct Kind {
  static constexpr Activation value = A;
};

// Calls run(Kind<A>) with the activation as a compile-time constant.
template <class Run>
inline void with_activation(Activation activation, Run run) {
  switch (activation) {
    case Activation::identity: return run(Kind<Activation::identity>{});
    case Activation::relu: return run(Kind<Activation::relu>{});
    case Activation::leaky_relu: return run(Kind<Activation::leaky_relu>{});
    case Activation::elu: return run(Kind<Activation::elu>{});
    case Activation::selu: return run(Kind<Activation::selu>{});
    case Activation::silu: return run(Kind<Activation::silu>{});
    case Activation::gelu: return run(Kind<Activation::gelu>{});
    case Activation::gelu_tanh: return run(Kind<Activation::gelu_tanh>{});
    case Activation::tanh: return run(Kind<Activation::tanh>{});
    case Activation::sigmoid: return run(Kind<Activation::sigmoid>{});
    case Activation::softplus: return run(Kind<Activation::softplus>{});
    case Activation::softsign: return run(Kind<Activation::softsign>{});
    case Activation::asinh: return run(Kind<Activation::asinh>{});
    case Activation::clipped_cube: return run(Kind<Activation::clipped_cube>{});
  }
}

}  // namespace FMFT_ISA
}  // namespace fmft
