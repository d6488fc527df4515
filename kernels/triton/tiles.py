"""Loads, stores, activations and their derivatives on tiles of float32, for generated kernels.

Sizes are padded to powers of two of at least 16; padded places of every tile hold zeros.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of(p, rows, batch, STRIDE: tl.constexpr, N: tl.constexpr, PN: tl.constexpr):
    """Load N columns of a matrix [batch, STRIDE] as [rows, PN]."""
    at = tl.arange(0, PN)
    inside = (rows[:, None] < batch) & (at[None, :] < N)
    return tl.load(p + rows[:, None] * STRIDE + at[None, :], mask=inside, other=0.0)


@triton.jit
def put_rows(p, rows, batch, x, STRIDE: tl.constexpr, N: tl.constexpr, PN: tl.constexpr):
    """Store a tile [rows, PN] in N columns of a matrix [batch, STRIDE]."""
    at = tl.arange(0, PN)
    inside = (rows[:, None] < batch) & (at[None, :] < N)
    tl.store(p + rows[:, None] * STRIDE + at[None, :], x, mask=inside)


@triton.jit
def matrix(
    p,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PN: tl.constexpr,
    PK: tl.constexpr,
):
    """Load a matrix [N, K] as [PN, PK]; one element of it follows another after STRIDE."""
    n = tl.arange(0, PN)[:, None]
    k = tl.arange(0, PK)[None, :]
    if N == PN and K == PK:
        return tl.load(p + n * STRIDE + k)
    else:
        return tl.load(p + n * STRIDE + k, mask=(n < N) & (k < K), other=0.0)


@triton.jit
def transposed(
    p,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PN: tl.constexpr,
    PK: tl.constexpr,
):
    """Load the transpose of a matrix [N, K] as [PK, PN]."""
    n = tl.arange(0, PN)[None, :]
    k = tl.arange(0, PK)[:, None]
    if N == PN and K == PK:
        return tl.load(p + n * STRIDE + k)
    else:
        return tl.load(p + n * STRIDE + k, mask=(n < N) & (k < K), other=0.0)


@triton.jit
def add_product(
    p,
    x,
    y,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PN: tl.constexpr,
    PK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add transposed x times y to a matrix [N, K] that only this program uses."""
    n = tl.arange(0, PN)[:, None]
    k = tl.arange(0, PK)[None, :]
    inside = (n < N) & (k < K)
    tl.debug_barrier()  # another thread may have stored what this one loads
    total = tl.load(p + n * STRIDE + k, mask=inside, other=0.0)
    total = tl.dot(tl.trans(x), y, acc=total, input_precision=PRECISION)
    tl.store(p + n * STRIDE + k, total, mask=inside)


@triton.jit
def vector(p, N: tl.constexpr, STRIDE: tl.constexpr, PN: tl.constexpr):
    """Load a vector [N] as [PN]."""
    n = tl.arange(0, PN)
    return tl.load(p + n * STRIDE, mask=n < N, other=0.0)


@triton.jit
def put_vector(p, x, N: tl.constexpr, STRIDE: tl.constexpr, PN: tl.constexpr):
    """Store the part [N] of a tile [PN]."""
    n = tl.arange(0, PN)
    tl.store(p + n * STRIDE, x, mask=n < N)


@triton.jit
def add_vector(p, x, N: tl.constexpr, PN: tl.constexpr):
    """Add the part [N] of a tile [PN] to a vector that only this program uses."""
    n = tl.arange(0, PN)
    tl.debug_barrier()  # another thread may have stored what this one loads
    before = tl.load(p + n, mask=n < N, other=0.0)
    tl.store(p + n, before + x, mask=n < N)


@triton.jit
def expm1(z):
    """exp(z) - 1 for z <= 0: near zero a polynomial, where the difference would lose digits."""
    near = 1.0 / 720 + z * (1.0 / 5040)
    near = 1.0 / 24 + z * (1.0 / 120 + z * near)
    near = z + z * z * (0.5 + z * (1.0 / 6 + z * near))
    return tl.where(z > -0.4, near, tl.exp(z) - 1.0)


@triton.jit
def logistic(z):
    """1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def hyperbolic_tangent(z):
    """tanh(z)."""
    e = expm1(-2.0 * tl.abs(z))
    magnitude = -e / (2.0 + e)
    return tl.where(z < 0, -magnitude, magnitude)


@triton.jit
def area_sine(z):
    """asinh(z): near zero a polynomial; far out the square would overflow, and its root is |z|."""
    size = tl.abs(z)
    square = z * z
    near = -0.0433755554 + square * 0.021600537
    near = z + z * square * (-0.166666195 + square * (0.0749386176 + square * near))
    is_far = size > 8192.0
    root = tl.where(is_far, size, tl.sqrt(square + 1.0))
    log = tl.log(tl.where(is_far, size, size + root)) + tl.where(is_far, 0.6931471805599453, 0.0)
    return tl.where(size < 0.5, near, tl.where(z < 0, -log, log))


@triton.jit
def clipped(z):
    """The nearest number in [-1, 1]."""
    return tl.where(z > 1.0, 1.0, tl.where(z < -1.0, -1.0, z))


@triton.jit
def activate(z, NAME: tl.constexpr, SLOPE: tl.constexpr):
    """The activation; comparisons are such that NaN goes through."""
    if NAME == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif NAME == "leaky_relu":
        return tl.where(z <= 0, z * SLOPE, z)
    elif NAME == "elu":
        return tl.where(z <= 0, SLOPE * expm1(z), z)
    elif NAME == "selu":
        return 1.0507009873554805 * tl.where(z <= 0, 1.6732632423543772 * expm1(z), z)
    elif NAME == "silu":
        return z * logistic(z)
    elif NAME == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        return 0.5 * z * (1.0 + hyperbolic_tangent(inner))
    elif NAME == "tanh":
        return hyperbolic_tangent(z)
    elif NAME == "sigmoid":
        return logistic(z)
    elif NAME == "softplus":
        scaled = z * SLOPE
        u = tl.exp(-tl.abs(scaled))
        w = 1.0 + u
        log1p = tl.log(w) - ((w - 1.0) - u) / w
        soft = (tl.where(scaled <= 0, 0.0, scaled) + log1p) / SLOPE
        return tl.where(scaled > 20.0, z, soft)
    elif NAME == "softsign":
        return z / (1.0 + tl.abs(z))
    elif NAME == "asinh":
        return area_sine(z)
    elif NAME == "clipped_cube":
        inner = clipped(z)
        return inner * inner * inner + 3.0 * (z - inner)
    else:
        return z


@triton.jit
def derivative(z, a, NAME: tl.constexpr, SLOPE: tl.constexpr):
    """The derivative of the activation at z, from its value `a` alone where that is enough."""
    if NAME == "relu":
        return tl.where(a > 0, 1.0, 0.0)
    elif NAME == "leaky_relu":
        return tl.where((a if SLOPE >= 0 else z) > 0, 1.0, SLOPE)
    elif NAME == "elu":
        return tl.where((a if SLOPE >= 0 else z) > 0, 1.0, a + SLOPE)
    elif NAME == "selu":
        return tl.where(a > 0, 1.0507009873554805, a + 1.7580993408473766)
    elif NAME == "silu":
        s = logistic(z)
        return s + a * (1.0 - s)
    elif NAME == "gelu":
        phi = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
        return phi + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        t = hyperbolic_tangent(inner)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * z * z)
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * slope
    elif NAME == "tanh":
        return 1.0 - a * a
    elif NAME == "sigmoid":
        return a * (1.0 - a)
    elif NAME == "softplus":
        return tl.where(z * SLOPE > 20.0, 1.0, logistic(z * SLOPE))
    elif NAME == "softsign":
        rest = 1.0 - tl.abs(a)
        return rest * rest
    elif NAME == "asinh":
        return 1.0 / tl.sqrt(1.0 + z * z)
    elif NAME == "clipped_cube":
        return 3.0 * clipped(z) * clipped(z)
    else:
        return tl.full(z.shape, 1.0, tl.float32)
