"""The branches A f(D y + s) of a GAV: how each construction ties A to D.

A branch derives its weights from free parameters and a metric P (None: the identity). With the
multipliers Lambda = diag(gain) and S = P A + D^T Lambda, `collocated` and `schur-cayley` make S
zero; `lmi` leaves A and D free and asks A_0 to damp what S can do (see `excess`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmft_fast.ops.cayley import cayley

from .contraction import BRANCH_ACTIVATIONS, positive, quasi_triangular
from .contraction import skew as skew_of

LEAST_GAIN = 1e-4  # of schur-cayley, which divides by gains


# Plain tuples, because the tracer of fields refuses calls that it cannot look into.
Metric = tuple[Tensor, Tensor]  # a positive definite P [n, n] and its inverse
Weights = tuple[Tensor, Tensor, Tensor]  # A [n, m], D [m, n] and the positive gains Lambda [m]


class Branch(nn.Module):
    """What the constructions share: an activation and offsets.

    Args:
        n: size of a state.
        m: number of units.
        activation: a name in `BRANCH_ACTIVATIONS`.
        offsets: whether every unit has an offset of its own.
    """

    guaranteed = True

    def __init__(self, n: int, m: int, activation: str, offsets: bool) -> None:
        super().__init__()
        self.n, self.m, self.activation = n, m, activation
        self.offset = nn.Parameter(torch.randn(m)) if offsets else None

    @property
    def slope(self) -> float:
        """The largest slope of the activation."""
        return BRANCH_ACTIVATIONS[self.activation].slope

    def weights(self, metric: Metric | None) -> Weights:
        """The derived weights."""
        raise NotImplementedError

    def excess(self) -> Tensor | None:
        """A factor E [n, m] such that P A_0 <= ... - E E^T makes the branch harmless, or None."""
        return None

    def forward(self, weights: Weights, y: Tensor) -> Tensor:
        """A f(D y + s) - A f(s), which is zero at y = 0."""
        a, d, _ = weights
        f = BRANCH_ACTIVATIONS[self.activation].f
        if self.offset is None:
            return F.linear(f(F.linear(y, d)), a)
        return F.linear(f(F.linear(y, d, self.offset)), a, -(a @ f(self.offset)))

    @torch.enable_grad()
    def slopes(self, z: Tensor) -> Tensor:
        """f'(z), of the shape of z."""
        z = z.detach().requires_grad_()
        return torch.autograd.grad(BRANCH_ACTIVATIONS[self.activation].f(z).sum(), z)[0]

    def extra_repr(self) -> str:
        """Show what cannot be seen from the parameters."""
        return f"n={self.n}, m={self.m}, activation={self.activation!r}"


class Collocated(Branch):
    """A = -P^-1 D^T Lambda with D free: what is measured by D is damped where it is measured."""

    def __init__(self, n: int, m: int, activation: str, offsets: bool) -> None:
        super().__init__(n, m, activation, offsets)
        self.directions = nn.Parameter(torch.randn(m, n) / math.sqrt(n))
        self.gain = nn.Parameter(torch.zeros(m))

    def weights(self, metric: Metric | None) -> Weights:
        """The derived weights; gains are in units of n / m, so that width does not matter."""
        gain = positive(self.gain, min(1.0, self.n / self.m))
        a = -(self.directions * gain[:, None]).T
        return (a if metric is None else metric[1] @ a), self.directions, gain


class Lmi(Collocated):
    """A and D free; A_0 pays for what is not collocated, given the slope bound of f.

    A is written as P^-1 (B Lambda^1/2 - D^T Lambda) with B free: then S Lambda^-1 S^T = B B^T, in
    which a small gain does no harm.
    """

    def __init__(self, n: int, m: int, activation: str, offsets: bool) -> None:
        super().__init__(n, m, activation, offsets)
        self.outputs = nn.Parameter(torch.zeros(n, m))

    def weights(self, metric: Metric | None) -> Weights:
        """The derived weights."""
        gain = positive(self.gain, min(1.0, self.n / self.m))
        a = self.outputs * torch.sqrt(gain) - (self.directions * gain[:, None]).T
        return (a if metric is None else metric[1] @ a), self.directions, gain

    def excess(self) -> Tensor | None:
        """E = S (slope / (4 Lambda))^1/2, from the Schur complement of the LMI."""
        return self.outputs * (math.sqrt(self.slope) / 2)


class SchurCayley(Branch):
    """A = Q T Q^T Hurwitz by its real Schur form, and D = -Lambda^-1 A^T P."""

    def __init__(self, n: int, m: int, activation: str, offsets: bool) -> None:
        super().__init__(n, m, activation, offsets)
        self.rotation = nn.Parameter(torch.zeros(n, n))
        self.triangle = nn.Parameter(torch.zeros(n, n))
        self.diagonal = nn.Parameter(torch.zeros(n))
        self.gain = nn.Parameter(torch.zeros(n))

    def hurwitz(self) -> Tensor:
        """The matrix A [n, n]."""
        q = cayley(skew_of(self.rotation))
        diagonal = positive(self.diagonal, least=LEAST_GAIN)
        return q @ quasi_triangular(self.triangle, diagonal) @ q.T

    def weights(self, metric: Metric | None) -> Weights:
        """The derived weights."""
        a, gain = self.hurwitz(), positive(self.gain, least=LEAST_GAIN)
        pa = a if metric is None else metric[0] @ a
        return a, -pa.T / gain[:, None], gain


class SchurCayleyFree(SchurCayley):
    """A = Q T Q^T Hurwitz and D free: guarantees nothing, kept for comparison.

    The Jacobian A G D of a Hurwitz A need not be Hurwitz for slopes 0 <= G <= 1.
    """

    guaranteed = False

    def __init__(self, n: int, m: int, activation: str, offsets: bool) -> None:
        super().__init__(n, m, activation, offsets)
        self.directions = nn.Parameter(torch.eye(n) + 0.01 * torch.randn(n, n))
        del self.gain

    def weights(self, metric: Metric | None) -> Weights:
        """The derived weights; the gains are ones, as nothing depends on them."""
        a = self.hurwitz()
        return a, self.directions, torch.ones_like(self.diagonal)


CONSTRUCTIONS: dict[str, type[Branch]] = {
    "collocated": Collocated,
    "lmi": Lmi,
    "schur-cayley": SchurCayley,
    "schur-cayley-free": SchurCayleyFree,
}
