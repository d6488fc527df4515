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

MOST_STRETCHED = 1e12  # about the largest condition of P, and the largest friction


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
        friction = float(self.friction())
        # Units of x are those of w times a root of the Hessian: P may be too lopsided for float64.
        if max(friction, hessian.most, 1 / hessian.most) < MOST_STRETCHED:
            found = heavy_ball(hessian, friction)
            if found.rate > 0:
                return found
        sizes = {f"force.{name}": size for name, size in self.force.sizes().items()}
        sizes["excess_friction"] = abs(float(self.excess_friction))
        name = max(sizes, key=lambda name: sizes[name])
        raise CertificateError(
            "expected a contraction rate and a metric that float64 can show, got a Hessian from "
            f"{hessian.least:.3g} to {hessian.most:.3g} with the friction {friction:.3g}; the "
            f"largest parameter is {name} (norm {sizes[name]:.3g}): make it smaller, or raise "
            "`rate`"
        )

    def verify(self, samples: Tensor, cond: Tensor | None = None) -> Verification:
        """Measure Jacobians at states z [batch, ...] and compare them with the certificate.

        Raises:
            CertificateError: as `certificate`.
            InputError: no sample, or one with a Jacobian that is not finite.
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
    """The best certificate of x' = w, w' = -friction w - H x with 0 < least <= H <= most.

    P = [[b^2 + e, b], [b, 1]] is the identity in the coordinates (e^1/2 x, w + b x). There, in an
    eigenvector of H with the value h and with k = b (friction - b), the Jacobian is

        J_h = [[-b, e^1/2], [(k - h) / e^1/2, b - friction]],

    affine in h, so that the ends of the interval decide. The largest eigenvalue of its symmetric
    part is minus a quotient with k - m^2 above, m = (e + k - h) / (2 e^1/2): no friction, however
    large, cancels anything.
    """
    b, e = best_metric(hessian.least, hessian.most, friction)
    k, root, eps = b * (friction - b), math.sqrt(e), float(np.finfo(float).eps)
    ends = np.array([hessian.least, hessian.most])
    jacobians = [np.array([[-b, root], [(k - h) / root, b - friction]]) for h in ends]
    size = max(float(np.linalg.norm(j, 2)) for j in jacobians)
    # Rounding of P and of these numbers; and what of H is not symmetric, through its own rounding.
    blur = 16 * eps * (1 + b * b / e) * (e + k + hessian.most) / root
    m = float(np.abs(e + k - ends).max()) / (2 * root) + hessian.turning / (2 * root) + blur
    gap = k - m * m - 16 * eps * k
    rate = 2 * gap / (friction + math.hypot(friction - 2 * b, 2 * m))
    extra = hessian.turning / root + blur + 16 * eps * size
    step = 0.0
    if rate > 0:
        steps = [step_of(j, extra) for j in jacobians]
        step = max(min(steps), 2 * rate / (size + extra) ** 2)
    metric = torch.tensor([[b * b + e, b], [b, 1.0]], dtype=torch.float64)
    return Certificate(rate, metric, size + extra, step, extra)


def step_of(j: np.ndarray, extra: float) -> float:
    """A step h with h J^T J <= -(J + J^T), for all J within `extra` of j; 0 if none is found."""
    values, vectors = np.linalg.eigh(-(j + j.T))
    values = values - 2 * extra
    if not values[0] > 0:
        return 0.0
    theta = 1e-3  # parts j from what is near it
    scaled = vectors / np.sqrt(values)
    square = (1 + theta) * float(np.linalg.norm(j @ scaled, 2)) ** 2
    return 1 / (square + (1 + 1 / theta) * extra**2 / float(values[0]))


def best_metric(least: float, most: float, friction: float) -> tuple[float, float]:
    """B and e of P = [[b^2 + e, b], [b, 1]] with the largest rate for all h in an interval.

    With q = rate (friction - rate) and k = b (friction - b), P J_h + J_h^T P <= -2 rate P says that
    e^1/2 lies between |(h - q)^1/2 - (k - q)^1/2| and the sum of these roots. The intervals of both
    ends meet for some k <= friction^2 / 4 if and only if q <= least and
    4 q + ((most - q)^1/2 - (least - q)^1/2)^2 <= friction^2, the circle criterion.
    """
    square = friction * friction
    if square >= most + 3 * least:
        q = least
    else:
        low, high = math.sqrt(most) - math.sqrt(least), math.sqrt(most) + math.sqrt(least)
        q = (high * high - square) * (friction - low) * (friction + low)
        q /= 4 * (2 * (most + least) - square)
    q -= 1e-6 * abs(q)  # where the intervals meet in a point, e = 0 may be that point
    k = min(2 * most, square / 4)
    x, y, z = (math.sqrt(max(value - q, 0.0)) for value in (least, k, most))
    root = (max(abs(x - y), abs(z - y)) + x + y) / 2
    b = 2 * k / (friction + math.sqrt(max(square - 4 * k, 0.0)))
    return b, root * root
