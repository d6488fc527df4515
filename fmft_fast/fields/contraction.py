"""Algebra by which weights keep a promise whatever their parameters are.

Every function here turns free parameters into matrices of a kind: skew, orthogonal, positive
definite, Hurwitz. A branch A f(D y + s) contracts through the tie between A and D, not through A
alone: with a slope matrix G >= 0, P A G D = -D^T Lambda G D <= 0 as soon as P A = -D^T Lambda.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmft_fast.ops.activations import clipped_cube

# An optimiser such as Adam moves a parameter by about its learning rate per step. With this factor
# a gain gets from softplus(-5) = 0.007 to softplus(0) = 0.7 in a thousand steps of 5e-4. The shift
# puts the small gain of the start at a parameter of 0, towards which weight decay pulls.
SHARPNESS, SHIFT = 10.0, -5.0


@dataclass(frozen=True)
class Activation:
    """A continuous increasing function of one variable with its largest slope.

    Attributes:
        f: the function.
        slope: every difference quotient lies in [0, slope].
    """

    f: Callable[[Tensor], Tensor]
    slope: float


BRANCH_ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(torch.tanh, 1.0),
    "softsign": Activation(F.softsign, 1.0),
    "leaky_relu": Activation(F.leaky_relu, 1.0),
    "asinh": Activation(torch.asinh, 1.0),
    "clipped_cube": Activation(clipped_cube, 3.0),
}


def positive(raw: Tensor, scale: float = 1.0, least: float = 0.0) -> Tensor:
    """Positive values least + scale softplus(10 raw - 5); raw = 0 gives about 0.007 scale."""
    return F.softplus(raw * SHARPNESS + SHIFT) * scale + least


def skew(raw: Tensor) -> Tensor:
    """The matrix raw - raw^T, skew to the last bit."""
    return raw - raw.T


def quasi_triangular(raw: Tensor, diagonal: Tensor) -> Tensor:
    """A Hurwitz matrix T [n, n], upper triangular but for 2 x 2 blocks on its diagonal.

    The block [[-a, u], [-s^2 u, -b]] has a negative trace and the determinant a b + s^2 u^2 > 0.

    Args:
        raw: [n, n]; what is above the diagonal is u and the rest of the triangle, the first, third,
            ... entry below it is s.
        diagonal: [n] positive, a and b.
    """
    n = len(raw)
    upper = torch.triu(raw, 1)
    if n == 1:
        return -diagonal[:, None]
    every_other = torch.arange(1, n, dtype=raw.dtype, device=raw.device) % 2
    s, u = torch.diagonal(raw, -1), torch.diagonal(raw, 1)
    return upper - torch.diag(diagonal) - torch.diag(every_other * s * s * u, -1)
