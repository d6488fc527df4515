"""Couplings q(x0, x1): which noise is paired with which data.

The minimiser of the reconstruction loss is E[x1 | x0], so the coupling decides what fine-tuning
can reach: independent pairs pull every sample to the mean, a (nearly) deterministic pairing keeps
the distribution. Every coupling is used the same way:

    coupling = make_coupling("ot-semidiscrete").fit(x1, cond, field=field, generator=generator)
    pairs = coupling.sample(256, generator=generator)

and those with `per_batch = True` can also pair a batch that a DataLoader brings:
`coupling.pair(x1, generator=generator)`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fmft_fast.errors import CouplingWarning, InputError
from fmft_fast.flow.pairing import (
    Coupling,
    KeptPairs,
    Pairs,
    check_at_least,
    check_data,
    choose_rows,
    draw_rows,
)
from fmft_fast.flow.paths import check_share, noise_like
from fmft_fast.flow.sampling import integrate
from fmft_fast.flow.transport import (
    chunks,
    features,
    first_of_missing_groups,
    optimal_permutation,
    split_weight,
)

COND_WEIGHT = 100.0
# Policies that lack .13 (Push-T) and .23 (kitchen) of the variance became better by such pairs.
BORNE_SHARE = 0.25


class Independent(Coupling):
    """Noise drawn without regard to the data."""

    name, per_batch = "independent", True

    def pair(
        self, x1: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Pairs:
        """Pair a batch with fresh noise."""
        return Pairs(noise_like(x1, generator), x1, cond)

    def check_reconstruction(self, x1: Tensor, cond: Tensor | None = None) -> None:
        """Estimate the share of variance that E[x1 | cond] lacks; warn beyond a quarter."""
        lost = 1.0 if cond is None else _unexplained_variance(x1, cond)
        if lost > BORNE_SHARE:
            warnings.warn(
                f"independent pairs pull every sample to E[x1 | cond], which lacks {lost:.0%} of "
                "the data's variance; use 'ot-semidiscrete', 'ot-fixed' or 'inversion' instead",
                CouplingWarning,
                stacklevel=2,
            )


@dataclass
class OTMinibatch(Coupling):
    """Optimal transport inside each batch: an exact permutation, no draw with replacement.

    Args:
        cond_weight: weight w of |c - c'|^2 in the cost, for conditions of about unit variance (too
            small a weight makes noise depend on conditions); `math.inf` pairs only equal
            conditions, as is always done for conditions of an integer dtype (labels).
    """

    cond_weight: float = COND_WEIGHT
    name: ClassVar[str] = "ot-minibatch"
    per_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_at_least("cond_weight", self.cond_weight, 0)

    def pair(
        self, x1: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Pairs:
        """Pair a batch with fresh noise by exact optimal transport."""
        return pair_by_ot(noise_like(x1, generator), x1, cond, self.cond_weight)


@dataclass
class OTFixed(KeptPairs):
    """One exact optimal-transport pairing of K noise and K data points, made once.

    Args:
        size: K, at most the number of data. The cost matrix takes 8 K^2 bytes.
        cond_weight: as in `OTMinibatch`.
        refresh: share s of new noise in every draw (see `refreshed`), so that no pair is learnt by
            heart; 0 gives the K noise points themselves.
    """

    size: int = 4096
    cond_weight: float = COND_WEIGHT
    refresh: float = 0.0
    name: ClassVar[str] = "ot-fixed"

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("refresh", self.refresh)
        check_at_least("size", self.size, 1)
        check_at_least("cond_weight", self.cond_weight, 0)

    def _learn(
        self, x1: Tensor, cond: Tensor | None, field: Any, generator: torch.Generator | None
    ) -> None:
        """Choose K rows, draw K noise points and pair them."""
        rows = choose_rows(len(x1), self.size, x1.device, generator)
        x1, cond = x1[rows], None if cond is None else cond[rows]
        self._data = (x1, cond)
        self._pairs = pair_by_ot(noise_like(x1, generator), x1, cond, self.cond_weight)


@dataclass
class OTSemidiscrete(Coupling):
    """Optimal transport from the whole noise distribution to the data.

    Fresh noise x0 falls into the power cell of the anchor j, the one of K data points a_j that
    maximises v_j - |x0 - a_j|^2, and is paired with a random data point of those nearest to a_j.
    The potentials v are fitted by averaged stochastic gradient ascent on the semi-dual until each
    cell holds its share of the data. So no noise point can be learnt by heart, and the masses of
    the modes are those of all the data, not of a subset.

    Args:
        size: K, number of anchors; from the number of data on, each data point is its own.
        fit_steps: steps of the ascent; the second half of them is averaged.
        fit_batch: noise points per step.
        cond_weight: as in `OTMinibatch`; noise gets the condition of a random data row.

    Source: Genevay et al. 2016 (arXiv 1605.08527), section 4.
    """

    size: int = 2048
    fit_steps: int = 2000
    fit_batch: int = 512
    cond_weight: float = COND_WEIGHT
    name: ClassVar[str] = "ot-semidiscrete"

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("size", "fit_steps", "fit_batch"):
            check_at_least(option, getattr(self, option), 1)
        check_at_least("cond_weight", self.cond_weight, 0)

    def _learn(
        self, x1: Tensor, cond: Tensor | None, field: Any, generator: torch.Generator | None
    ) -> None:
        """Choose the anchors, share the data out among them and fit their potentials."""
        self._codes, finite = split_weight(cond, self.cond_weight)
        target = features(x1, finite, self.cond_weight)
        rows = choose_rows(len(x1), self.size, x1.device, generator)
        if self._codes is not None:
            rows = torch.cat([rows, first_of_missing_groups(self._codes, rows)])
        self._anchors, self._v = target[rows], torch.zeros_like(target[rows, 0])
        self._anchor_codes = None if self._codes is None else self._codes[rows]
        cell = torch.cat(
            [
                self._cell(t, None if self._codes is None else self._codes[i])
                for i, t in chunks(target)
            ]
        )
        self._count = torch.bincount(cell, minlength=len(rows))
        self._start = self._count.cumsum(0) - self._count
        self._members = cell.argsort()
        # An anchor so near another one that rounding left it without data must win no noise.
        self._v = self._v.masked_fill(self._count == 0, -math.inf)
        self._v = self._ascend(generator)

    def sample(self, batch: int, *, generator: torch.Generator | None = None) -> Pairs:
        """Draw fresh noise and the data points whose cells it falls into."""
        x1, cond = self._fitted()
        x0, j = self._draw(batch, generator)
        place = x1.device if generator is None else generator.device
        u = torch.rand(batch, generator=generator, device=place, dtype=torch.float64).to(x1.device)
        row = self._members[self._start[j] + (u * self._count[j]).long()]
        return Pairs(x0, x1[row], None if cond is None else cond[row])

    def _draw(self, batch: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw noise [batch, *state] and give the number of its cell [batch]."""
        x1, cond = self._fitted()
        rows = draw_rows(len(x1), batch, x1.device, generator)
        x0 = noise_like(x1[rows], generator)
        if self._codes is not None:
            return x0, self._cell(features(x0, None, 0.0), self._codes[rows])
        source = features(x0, None if cond is None else cond[rows], self.cond_weight)
        return x0, self._cell(source, None)

    def _cell(self, source: Tensor, codes: Tensor | None) -> Tensor:
        """Give the anchor of most v_j - |source - a_j|^2, in the same group if there are groups."""
        offset = self._v - self._anchors.square().sum(1)
        score = torch.addmm(offset, source, self._anchors.T, alpha=2)
        if codes is not None:
            score.masked_fill_(codes[:, None] != self._anchor_codes, -math.inf)
        return score.argmax(1)

    def _ascend(self, generator: torch.Generator | None) -> Tensor:
        """Raise v_j where cells get too little mass, lower it where they get too much."""
        mass = self._count.to(self._v) / self._count.sum()
        # Larger first steps leave the potentials of light cells (outliers) too high.
        scale = 0.1 * float(self._anchors.var(dim=0, correction=0).sum()) * math.sqrt(len(mass))
        v, mean = self._v, torch.zeros_like(self._v)
        averaged = self.fit_steps - self.fit_steps // 2
        for step in range(self.fit_steps):
            self._v = v
            _, j = self._draw(self.fit_batch, generator)
            got = torch.bincount(j, minlength=len(mass)).to(v) / self.fit_batch
            v = v + scale / math.sqrt(1 + step / 20) * (mass - got)
            if step >= self.fit_steps // 2:
                mean += v / averaged
        return mean


@dataclass
class Inversion(KeptPairs):
    """Noise that the pre-trained field itself carries to x1: its reverse-time solve of x1.

    It removes the error of few steps and nothing else, and never collapses.

    Args:
        steps: steps of the reverse solve.
        method: its method.
        batch: rows solved at a time.
        refresh: as in `OTFixed`.
    """

    steps: int = 50
    method: str = "rk4"
    batch: int = 4096
    refresh: float = 0.0
    name: ClassVar[str] = "inversion"

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("refresh", self.refresh)
        check_at_least("steps", self.steps, 1)
        check_at_least("batch", self.batch, 1)

    def _learn(
        self, x1: Tensor, cond: Tensor | None, field: Any, generator: torch.Generator | None
    ) -> None:
        """Solve every x1 back to t = 0 under `field`."""
        if field is None:
            raise InputError("'inversion' needs the pre-trained field: fit(x1, field=field)")
        x0 = integrate(
            field,
            x1,
            t0=1.0,
            t1=0.0,
            steps=self.steps,
            method=self.method,
            cond=cond,
            batch=self.batch,
        )
        if not bool(torch.isfinite(x0).all()):
            raise InputError(
                f"the reverse solve left the finite numbers; raise steps (now {self.steps})"
            )
        self._pairs = Pairs(x0, x1, cond)


@dataclass
class Reflow(KeptPairs):
    """Fresh noise, and where the pre-trained field carries it: its solves replace the data.

    Like `Inversion` it removes the error of few steps and nothing else, so no mode is lost, but
    each condition comes with several noise points instead of one. What the field has not learnt
    of the data, it cannot teach.

    Args:
        steps: steps of the solves.
        method: their method.
        copies: noise points for each data point.
        batch: rows solved at a time.

    Source: Liu et al. 2022, Flow Straight and Fast (arXiv 2209.03003), whose reflow regresses
    velocities on such pairs.
    """

    steps: int = 16
    method: str = "euler"
    copies: int = 4
    batch: int = 4096
    name: ClassVar[str] = "reflow"

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("steps", "copies", "batch"):
            check_at_least(option, getattr(self, option), 1)

    def _learn(
        self, x1: Tensor, cond: Tensor | None, field: Any, generator: torch.Generator | None
    ) -> None:
        """Solve noise for every data point's condition under `field`."""
        if field is None:
            raise InputError("'reflow' needs the pre-trained field: fit(x1, field=field)")
        x0 = torch.cat([noise_like(x1, generator) for _ in range(self.copies)])
        told = None if cond is None else torch.cat([cond] * self.copies)
        ends = integrate(
            field, x0, steps=self.steps, method=self.method, cond=told, batch=self.batch
        )
        if not bool(torch.isfinite(ends).all()):
            raise InputError(f"the solve left the finite numbers; raise steps (now {self.steps})")
        self._pairs = Pairs(x0, ends, told)


COUPLINGS: dict[str, type[Coupling]] = {
    cls.name: cls for cls in (Independent, OTMinibatch, OTFixed, OTSemidiscrete, Inversion, Reflow)
}


def make_coupling(name: str, /, **options: Any) -> Coupling:
    """Make a coupling by name with its options.

    Raises:
        InputError: the name or an option is not known, or a value is out of range.

    Example:
        >>> make_coupling("ot-fixed", size=512)
        OTFixed(size=512, cond_weight=100.0, refresh=0.0)
    """
    if name not in COUPLINGS:
        raise InputError(f"unknown coupling {name!r}; choose one of {', '.join(sorted(COUPLINGS))}")
    known = list(inspect.signature(COUPLINGS[name]).parameters)
    for option in options:
        if option not in known:
            raise InputError(
                f"coupling {name!r} has no option {option!r}; it takes {', '.join(known) or 'none'}"
            )
    return COUPLINGS[name](**options)


def pair_by_ot(
    x0: Tensor, x1: Tensor, cond: Tensor | None, cond_weight: float = COND_WEIGHT
) -> Pairs:
    """Give x1 and cond in their order with the noise rows permuted to the least total cost.

    The cost is |x0 - x1|^2 + w |c - c'|^2, where each noise row carries the condition of the data
    row at its place: noise and conditions stay independent, and a large w keeps that so.
    """
    check_data(x1, cond)
    if x0.shape != x1.shape:
        raise InputError(f"x0 and x1 must share one shape, got {x0.shape} and {x1.shape}")
    groups, finite = split_weight(cond, cond_weight)
    source, target = features(x0, finite, cond_weight), features(x1, finite, cond_weight)
    if groups is None:
        return Pairs(x0[optimal_permutation(target, source)], x1, cond)
    order = torch.empty(len(x1), dtype=torch.long, device=x1.device)
    for code in groups.unique():
        rows = (groups == code).nonzero().squeeze(1)
        order[rows] = rows[optimal_permutation(target[rows], source[rows])]
    return Pairs(x0[order], x1, cond)


def _unexplained_variance(x1: Tensor, cond: Tensor) -> float:
    """Estimate E Var(x1 | cond) / Var(x1) from nearest neighbours in cond, on 2048 rows at most."""
    keep = torch.linspace(0, len(x1) - 1, min(len(x1), 2048), device=x1.device).long()
    x, c = x1[keep].flatten(1), cond[keep].reshape(len(keep), -1).to(x1)
    if len(x) < 2:
        return 0.0
    distance = torch.cdist(c, c).fill_diagonal_(math.inf)
    gap = x - x[distance.argmin(1)]
    return float(gap.square().sum() / 2 / (x - x.mean(0)).square().sum().clamp_min(1e-30))
