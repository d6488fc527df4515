"""A residual with a velocity of its own, which contracts: friction and a convex potential."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fmft_fast.errors import CertificateError, InputError

from .certificate import Bounds, Certificate, Verification, bounds, measure
from .contraction import positive
from .gav import GAV


class SecondOrderGAV(nn.Module):
    """Residual field of states z = (x, w): x' = w, w' = -gamma w - grad V(x).

    V is strongly convex, since grad V is minus a collocated `GAV` without a skew part: its Hessian
    lies between c and l, both known from the weights. The friction gamma > l^1/2 follows from the
    same parameters, so that some P (2 x 2) contracts for every Hessian in between (the condition
    is gamma > l^1/2 - c^1/2). Beside `Augmented(v)` it gives x' = v(t, x) + w: a correction with a
    memory, which starts at w = 0 and close to zero.

    Args:
        dim: size of x, or its shape; z has twice as many entries along the first axis of it.
        rate: smallest c. The contraction rate of z is about c / gamma.
        branches, width, activation, center, rank, cond_dim, offsets: of the potential, see `GAV`.

    Raises:
        InputError: for sizes, names or a centre that do not fit.

    Source: the condition is that of the circle criterion for heavy-ball flows; Lessard, Recht,
        Packard, "Analysis and design of optimization algorithms via integral quadratic
        constraints", SIAM J. Optim. 26 (2016).

    Example:
        >>> field = SecondOrderGAV(2)
        >>> field(torch.tensor(0.5), torch.ones(7, 4)).shape
        torch.Size([7, 4])
        >>> field.certificate().rate > 0
        True
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        branches: int = 2,
        width: int | None = None,
        *,
        activation: str | Sequence[str] = "tanh",
        rate: float = 1e-3,
        center: Tensor | str | None = None,
        rank: int | None = None,
        cond_dim: int = 0,
        offsets: bool = True,
    ) -> None:
        super().__init__()
        self.force = GAV(
            dim,
            branches,
            width,
            activation=activation,
            rate=rate,
            center=center,
            rank=rank,
            cond_dim=cond_dim,
            offsets=offsets,
            turning=False,
        )
        self.excess_friction = nn.Parameter(torch.zeros(()))
        self.shape, self.cond_dim = self.force.shape, cond_dim

    def friction(self) -> Tensor:
        """gamma, 0-d: above the square root of a bound (by the trace) of the Hessian."""
        bound = self.force.least_rate() + self.force.damping.square().sum()
        for branch in self.force.branches:
            _, d, gain = branch.weights(None)  # type: ignore[operator]
            bound = bound + branch.slope * (d.square().sum(1) * gain).sum()  # type: ignore[operator]
        return torch.sqrt(bound) + positive(self.excess_friction)

    def forward(self, t: Tensor, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return dz/dt, of the shape of z.

        Args:
            t: flow time, which has no influence.
            z: states [batch, 2 * shape[0], *shape[1:]], x first and w second.
            cond: conditions, see `GAV`.
        """
        x, w = halves(z, self.shape)
        return torch.cat([w, self.force(t, x, cond) - w * self.friction()], -len(self.shape))

    @torch.no_grad()
    def certificate(self) -> Certificate:
        """What is guaranteed of z with the present weights; the norm is that of P x I, P [2, 2].

        Raises:
            CertificateError: rounding is larger than the rate; names the parameter to look at.
        """
        hessian = bounds(*self.force.exact())
        if not hessian.rate > 0:
            self.force.certificate()  # which says why
        found = heavy_ball(hessian, float(self.friction()))
        if not found.rate > 0:
            name, size = max(self.force.sizes().items(), key=lambda item: item[1])
            raise CertificateError(
                f"expected a positive contraction rate, got {found.rate:.3g}: the Hessian reaches "
                f"from {hessian.least:.3g} to {hessian.most:.3g}, too far for float64; the largest "
                f"parameter is force.{name} (norm {size:.3g}): make it smaller, or raise `rate`"
            )
        return found

    def verify(self, samples: Tensor, cond: Tensor | None = None) -> Verification:
        """Measure Jacobians at states z [batch, ...] and compare them with the certificate.

        Raises:
            CertificateError: as `certificate`.
        """
        return measure(self.jacobian(samples, cond), self.certificate())

    @torch.no_grad()
    def jacobian(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """The Jacobian in z, [batch, 2 dim, 2 dim], in float64 for the weights as they are."""
        below = self.force.jacobian(halves(z, self.shape)[0], cond)
        one = torch.eye(self.force.dim, dtype=torch.float64, device=z.device).expand_as(below)
        above = torch.cat([torch.zeros_like(below), one], 2)
        return torch.cat([above, torch.cat([below, -self.friction().double() * one], 2)], 1)


class Augmented(nn.Module):
    """A field of x as one of z = (x, w): x' = v(t, x), w' = 0.

    Args:
        base: module `v(t, x)` or `v(t, x, cond)`.
        dim: size of x, or its shape.

    Example:
        >>> from fmft_fast.fields import MLP, Residual
        >>> field = Residual(Augmented(MLP(2), 2), SecondOrderGAV(2))
        >>> z = Augmented.start(torch.ones(7, 2))
        >>> field(torch.tensor(0.5), z).shape
        torch.Size([7, 4])
    """

    def __init__(self, base: nn.Module, dim: int | Sequence[int]) -> None:
        super().__init__()
        self.base = base
        self.shape = (dim,) if isinstance(dim, int) else tuple(dim)

    @staticmethod
    def start(x: Tensor) -> Tensor:
        """Z = (x, 0), joined along the first axis after the batch."""
        return torch.cat([x, torch.zeros_like(x)], 1)

    def position(self, z: Tensor) -> Tensor:
        """X of z."""
        return halves(z, self.shape)[0]

    def forward(self, t: Tensor, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return dz/dt, of the shape of z [batch, 2 * shape[0], *shape[1:]]."""
        x, w = halves(z, self.shape)
        v = self.base(t, x) if cond is None else self.base(t, x, cond)
        return torch.cat([v, torch.zeros_like(w)], -len(self.shape))


def halves(z: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """X and w of z.

    Raises:
        InputError: z does not have twice the entries of x along the first axis of its shape.
    """
    wanted = (2 * shape[0], *shape[1:])
    if tuple(z.shape[-len(shape) :]) != wanted:
        shown = ", ".join(map(str, wanted))
        raise InputError(f"z must be [batch, {shown}], got {list(z.shape)}")
    x, w = z.chunk(2, -len(shape))
    return x, w


def heavy_ball(hessian: Bounds, friction: float) -> Certificate:
    """The best certificate found for x' = w, w' = -friction w - H x with least <= H <= most.

    In the eigenvectors of H the Jacobian is J_h = [[0, 1], [-h, -friction]], affine in h, so that
    P J_h + J_h^T P <= -2 rate P has to hold at both ends of the interval only. Time is measured in
    units of most^-1/2 in between.
    """
    unit = math.sqrt(hessian.most)
    ends = np.array([hessian.least / hessian.most, 1.0])
    p = best_metric(ends, friction / unit)
    values, vectors = np.linalg.eigh(p)
    half = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    jacobians = [half @ np.array([[0, 1], [-h, -friction / unit]]) @ inverse for h in ends]
    # What of H is not symmetric through rounding, and the rounding of this function.
    twist = float(np.linalg.norm(half, 2) * np.linalg.norm(inverse, 2))
    size = max(float(np.linalg.norm(j, 2)) for j in jacobians)
    rounding = 64 * float(np.finfo(float).eps) * twist**2 * size
    extra = hessian.turning / hessian.most * twist + rounding
    rate = -max(float(np.linalg.eigvalsh(j + j.T)[-1]) / 2 for j in jacobians) - extra
    step = 0.0
    if rate > 0:
        # h J^T J <= -(J + J^T), convex in J; theta parts J from what is not symmetric.
        theta, one, steps = 1e-3, np.eye(2), []
        for j in jacobians:
            square = (1 + theta) * j.T @ j + (1 + 1 / theta) * extra**2 * one
            values, vectors = np.linalg.eigh(-(j + j.T) - 2 * extra * one)
            root = vectors / np.sqrt(np.maximum(values, 2 * rate))
            steps.append(1 / float(np.linalg.eigvalsh(root.T @ square @ root)[-1]))
        step = max(min(steps), 2 * rate / (size + extra) ** 2) / unit
    scale = np.diag([unit, 1.0])
    metric = torch.from_numpy(scale @ p @ scale)
    return Certificate(rate * unit, metric, (size + extra) * unit, step, extra * unit)


def best_metric(ends: np.ndarray, friction: float) -> np.ndarray:
    """P = [[a, b], [b, 1]] with nearly the largest rate for both ends h of an interval.

    For given b and rate, P J_h + J_h^T P <= -2 rate P holds for a in an interval, the roots of
    a quadratic; the rate is bisected for many b at a time.
    """
    b = friction * np.concatenate([np.linspace(0, 1, 402)[1:-1], np.geomspace(1e-9, 2e-3, 100)])
    low, high = np.zeros_like(b), np.full_like(b, friction)
    best = np.full_like(b, np.nan)
    for _ in range(60):
        rate = (low + high) / 2
        q = 2 * (friction - b - rate)
        lower, upper = b * b, np.full_like(b, np.inf)
        for h in ends:
            m = b * friction + h - 2 * rate * b
            middle = m - rate * q
            under = middle**2 - m**2 + 2 * b * h * q
            reach = np.sqrt(np.where((under >= 0) & (q > 0), under, np.nan))
            lower, upper = np.maximum(lower, middle - reach), np.minimum(upper, middle + reach)
        fits = lower < upper  # false where there is no root
        best = np.where(fits, (lower + upper) / 2, best)
        low, high = np.where(fits, rate, low), np.where(fits, high, rate)
    if np.isnan(best).all():
        return np.array([[1.0 + friction**2, friction / 2], [friction / 2, 1.0]])
    i = int(np.argmax(np.where(np.isnan(best), -1, low)))
    return np.array([[best[i], b[i]], [b[i], 1.0]])
