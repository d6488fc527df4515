"""Generalised artificial viscosity: a residual field that contracts by construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmft_fast.errors import CertificateError, InputError
from fmft_fast.ops.cayley import cayley

from .branches import CONSTRUCTIONS, Branch, Metric, Weights
from .certificate import Certificate, Sector, Verification, certify, measure
from .contraction import BRANCH_ACTIVATIONS, positive, skew

WIDTH = 128
_CENTERS = (None, "learned", "condition")
STRETCH = 10.0  # bound of the eigenvalues of a learned metric and of their inverses


class GAV(nn.Module):
    """Residual field delta(x) = A_0 (x - b) + sum_j A_j (f_j(D_j (x - b) + s_j) - f_j(s_j)).

    The weights are derived from free parameters in such a way that the Jacobian J satisfies
    P J + J^T P <= -2 c P at every x, with c >= `rate`: two solutions of x' = delta(x) approach each
    other at least like exp(-c t) in the norm (x^T P x)^1/2. The field does not depend on the time,
    vanishes at the centre b, and is close to zero at first. Added to a velocity field v it lowers
    the one-sided Lipschitz constant of v by c; the sum need not contract.

    A_0 = P^-1 (K - R R^T) - c I with K skew; the branches follow from the construction:

    - "collocated": A_j = -P^-1 D_j^T Lambda_j, D_j [width, dim] free, any increasing f_j.
    - "lmi": A_j and D_j free, and A_0 damps as much as the slope bound of f_j asks for.
    - "schur-cayley": A_j = Q T Q^T Hurwitz and D_j = -Lambda_j^-1 A_j^T P; width = dim.
    - "schur-cayley-free": D_j free. This one guarantees nothing; it is there to be compared.

    Args:
        dim: size of a state, or its shape; states are flattened.
        branches: number of branches.
        width: units per branch; by default max(128, 2 dim), with a rank 128, and for the
            schur-cayley kinds dim.
        construction: as above.
        activation: a name in `BRANCH_ACTIVATIONS`, or one per branch.
        rate: smallest contraction rate c, per unit of flow time.
        metric: "identity" (P = I) or "learned" (full P with eigenvalues in [0.1, 10]).
        center: b as a tensor, "learned", "condition" (a linear map of the condition; contraction
            holds at a fixed condition), or None for 0.
        rank: of K = U V^T - V U^T and R, so that A_0 costs O(dim rank), for images; None for full
            matrices. A learned metric is a full matrix in any case.
        cond_dim: size of a condition, for center = "condition".
        offsets: whether the units have offsets s_j; without them delta(b - y) = -delta(b + y) for
            odd f_j.
        turning: whether A_0 has a skew part K. Without one, and with P = I, a collocated field is
            minus the gradient of a strongly convex function.

    Raises:
        InputError: for sizes, names or a centre that do not fit.

    Source: ControlSynth Neural ODEs, arXiv 2411.02292 (the form); Lurie systems with sector-bounded
        slopes (the constructions).

    Example:
        >>> field = GAV(2, activation=("tanh", "asinh"))
        >>> field(torch.tensor(0.5), torch.ones(7, 2)).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        branches: int = 2,
        width: int | None = None,
        *,
        construction: str = "collocated",
        activation: str | Sequence[str] = "tanh",
        rate: float = 1e-3,
        metric: str = "identity",
        center: Tensor | str | None = None,
        rank: int | None = None,
        cond_dim: int = 0,
        offsets: bool = True,
        turning: bool = True,
    ) -> None:
        super().__init__()
        shape = tuple(dim) if isinstance(dim, Sequence) else (dim,)
        self.shape = tuple(_whole("dim", size) for size in shape)
        branches, cond_dim = _whole("branches", branches, 0), _whole("cond_dim", cond_dim, 0)
        width = None if width is None else _whole("width", width)
        rank = None if rank is None else _whole("rank", rank)
        self.dim = n = math.prod(self.shape)
        names = (activation,) * branches if isinstance(activation, str) else tuple(activation)
        kind = _checked(self.shape, branches, width, construction, names, rate, metric, rank)
        self.rate, self.rank, self.cond_dim, self.construction = rate, rank, cond_dim, construction
        wide = max(WIDTH, 2 * n) if rank is None else WIDTH
        m = width or (n if construction.startswith("schur") else wide)
        r = rank or n
        self.branches = nn.ModuleList(kind(n, m, name, offsets) for name in names)
        self.excess_rate = nn.Parameter(torch.zeros(()))
        self.damping = nn.Parameter(0.01 * torch.randn(n, r))
        self.skew = nn.Parameter(torch.zeros(n, r)) if turning else None
        # With V = 0 the skew part starts at zero, and U gives V a gradient.
        partner = torch.randn(n, r) / math.sqrt(n) if turning and rank else None
        self.skew_partner = None if partner is None else nn.Parameter(partner)
        learned = metric == "learned"
        self.metric_turn = nn.Parameter(torch.zeros(n, n)) if learned else None
        self.metric_stretch = nn.Parameter(torch.zeros(n)) if learned else None
        self._set_center(center)

    def _set_center(self, center: Tensor | str | None) -> None:
        n = self.dim
        tensor = isinstance(center, Tensor)
        if not tensor and (center not in _CENTERS or (center == "condition" and not self.cond_dim)):
            raise InputError(
                'center must be a tensor, "learned", None, or "condition" together with '
                f"cond_dim > 0, got {center!r} with cond_dim = {self.cond_dim}"
            )
        self.center_map = None
        if tensor:
            if center.numel() != n:
                raise InputError(f"center must have {n} entries, got shape {list(center.shape)}")
            self.register_buffer("center", center.detach().clone().reshape(n))
            return
        self.center = None if center is None else nn.Parameter(torch.zeros(n))
        if center == "condition":
            self.center_map = nn.Parameter(torch.zeros(n, self.cond_dim))

    def metric(self) -> Metric | None:
        """The metric P = U diag(p) U^T with U orthogonal, or None for the identity."""
        if self.metric_turn is None or self.metric_stretch is None:
            return None
        u = cayley(skew(self.metric_turn))
        p = torch.exp(math.log(STRETCH) * torch.tanh(self.metric_stretch))
        return (u * p) @ u.T, (u / p) @ u.T

    def weights(self) -> list[Weights]:
        """The derived weights of the branches."""
        metric, weights = self.metric(), []
        for branch in self.branches:  # no comprehension: the tracer of fields refuses iterators
            weights.append(branch.weights(metric))  # type: ignore[operator]
        return weights

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """A_0 [n, n] and None; or with a rank, two factors of A_0 + c I, [n, k] and [k, n]."""
        metric = self.metric()
        factors: list[Tensor] = [self.damping]
        for branch in self.branches:
            factor = branch.excess()  # type: ignore[operator]
            if factor is not None:
                factors.append(factor)
        r = torch.cat(factors, 1) if len(factors) > 1 else factors[0]
        u, v = self.skew_partner, self.skew
        if self.rank is not None:
            left, right = -r, r.T
            if u is not None and v is not None:
                left, right = torch.cat([u, -v, -r], 1), torch.cat([v, u, r], 1).T
            return (left if metric is None else metric[1] @ left), right
        inner = -(r @ r.T) if v is None else skew(v) - r @ r.T
        one = torch.eye(self.dim, dtype=r.dtype, device=r.device)
        return (inner if metric is None else metric[1] @ inner) - self.least_rate() * one, None

    def least_rate(self) -> Tensor:
        """The rate c of the construction, 0-d; `certificate` tells the one that holds."""
        return positive(self.excess_rate, least=self.rate)

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return delta(x), of the shape of x.

        Args:
            t: flow time, which has no influence.
            x: states, [batch, *shape].
            cond: conditions [batch, cond_dim]; ignored unless the centre depends on them.
        """
        delta = self.evaluate(self.relative(x, cond))
        return delta if len(self.shape) == 1 else delta.reshape(x.shape)

    def relative(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """X - b of states [batch, *shape], flattened to [batch, dim]."""
        if tuple(x.shape[-len(self.shape) :]) != self.shape:
            raise InputError(f"x must be [batch, {_shown(self.shape)}], got {list(x.shape)}")
        y = x if len(self.shape) == 1 else x.flatten(-len(self.shape))
        if self.center_map is None:
            return y if self.center is None else y - self.center
        if cond is None or cond.shape[-1] != self.cond_dim:
            got = "none" if cond is None else list(cond.shape)
            raise InputError(f"cond must be [batch, {self.cond_dim}], got {got}")
        return y - F.linear(cond, self.center_map, self.center)

    def evaluate(self, y: Tensor) -> Tensor:
        """Delta as a function of y = x - b, both [batch, dim]."""
        weights = self.weights()
        left, right = self.linear()
        if right is None:
            delta = F.linear(y, left)
        else:
            delta = F.linear(F.linear(y, right), left) - y * self.least_rate()
        for j, branch in enumerate(self.branches):
            delta = delta + branch(weights[j], y)
        return delta

    @torch.no_grad()
    def certificate(self) -> Certificate:
        """What is guaranteed of this field with its present weights; O(dim^3).

        Raises:
            CertificateError: the construction guarantees nothing, or the rounding of the weights
                to their dtype is larger than the rate; names the parameter to look at.
        """
        if not all(branch.guaranteed for branch in self._branches()):
            raise CertificateError(
                f"{self.construction} guarantees nothing: A_j Hurwitz does not make A_j f(D_j x) "
                'contract for a free D_j; choose "schur-cayley", "collocated" or "lmi"'
            )
        a0, sectors, p = self.exact()
        found = certify(a0, sectors, p)
        if not found.rate > 0:
            name, size = max(self.sizes().items(), key=lambda item: item[1])
            raise CertificateError(
                f"expected a positive contraction rate, got {found.rate:.3g} where exact weights "
                f"give at least {float(self.least_rate()):.3g}: rounding to {self.damping.dtype} "
                f"took it away; the largest parameter is {name} (norm {size:.3g}): make it "
                "smaller, raise `rate`, or use float64"
            )
        return found

    def verify(self, samples: Tensor, cond: Tensor | None = None) -> Verification:
        """Measure Jacobians at states [batch, *shape] and compare them with the certificate.

        Raises:
            CertificateError: as `certificate`.
            InputError: no sample, or one with a Jacobian that is not finite.
        """
        return measure(self.jacobian(samples, cond), self.certificate())

    @torch.no_grad()
    def jacobian(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """The Jacobian in x, [batch, dim, dim], in float64 for the weights as they are."""
        y = self.relative(x, cond).double().reshape(-1, self.dim)
        a0, sectors, _ = self.exact()
        jacobian = a0.expand(len(y), -1, -1)
        for branch, (a, d, _, _) in zip(self._branches(), sectors, strict=True):
            z = y @ d.T if branch.offset is None else y @ d.T + branch.offset.double()
            jacobian = jacobian + (a * branch.slopes(z)[:, None, :]) @ d
        return jacobian

    def exact(self) -> tuple[Tensor, list[Sector], Tensor | None]:
        """The weights that `forward` uses as float64: A_0, the branches, and P."""
        for name, p in chain(self.named_parameters(), self.named_buffers()):
            if not torch.isfinite(p).all():
                raise CertificateError(f"{name} has NaN or infinite entries; restore a checkpoint")
        left, right = self.linear()
        a0 = left.double()
        if right is not None:
            one = torch.eye(self.dim, dtype=torch.float64, device=a0.device)
            a0 = a0 @ right.double() - self.least_rate().double() * one
        sectors = []
        for branch, (a, d, gain) in zip(self._branches(), self.weights(), strict=True):
            sectors.append(Sector(a.double(), d.double(), gain.double(), branch.slope))
        if (metric := self.metric()) is None:
            return a0, sectors, None
        p = metric[0].double()
        return a0, sectors, (p + p.T) / 2  # the product of three was rounded on each side

    def _branches(self) -> list[Branch]:
        return list(self.branches)  # type: ignore[arg-type]

    def sizes(self) -> dict[str, float]:
        """Norms of the parameters as they enter the weights, by name."""
        squared = ("damping", "directions", "outputs", "triangle")
        sizes = {}
        for name, p in self.named_parameters():
            if not name.endswith(("offset", "center", "center_map")):
                norm = float(p.double().norm())
                sizes[name] = norm**2 if name.endswith(squared) else norm
        return sizes

    def extra_repr(self) -> str:
        """Show what cannot be seen from the branches."""
        return (
            f"shape={self.shape}, construction={self.construction!r}, rate={self.rate}, "
            f"rank={self.rank}, cond_dim={self.cond_dim}"
        )


def _checked(
    shape: tuple[int, ...],
    branches: int,
    width: int | None,
    construction: str,
    names: tuple[str, ...],
    rate: float,
    metric: str,
    rank: int | None,
) -> type[Branch]:
    n = math.prod(shape)
    if not shape:
        raise InputError("dim must be a size or a shape of at least one axis, got ()")
    if construction not in CONSTRUCTIONS:
        known = ", ".join(CONSTRUCTIONS)
        raise InputError(f"unknown construction {construction!r}; choose one of {known}")
    if construction.startswith("schur") and width not in (None, n):
        raise InputError(
            f"{construction} has square A_j, so that width must be {n} or None, got {width}"
        )
    if len(names) != branches:
        raise InputError(
            f"expected one activation or one per branch ({branches}), got {len(names)}"
        )
    for name in names:
        if name not in BRANCH_ACTIVATIONS:
            known = ", ".join(sorted(BRANCH_ACTIVATIONS))
            raise InputError(f"unknown activation {name!r}; choose one of {known}")
    if not isinstance(rate, Real) or not 0 < rate < math.inf:
        raise InputError(f"rate must be positive and finite, got {rate!r}")
    if metric not in ("identity", "learned"):
        raise InputError(f'metric must be "identity" or "learned", got {metric!r}')
    if rank is not None and rank > n:
        raise InputError(f"rank must be in [1, {n}] or None, got {rank}")
    return CONSTRUCTIONS[construction]


def _whole(name: str, value: Any, least: int = 1) -> int:
    """A size as an int, whatever kind of whole number it was."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number, at least {least}, got {value!r}")
    return int(value)


def _shown(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
