"""The error of few Euler steps with a trained field, next to the bound that theory puts on it.

x' = u(t, x) is the exact flow, psi(t) its solution, and phi_j are Euler's states with the trained
field v on the times t_0 < ... < t_N, tau_j = t_{j+1} - t_j. The error e_j = psi(t_j) - phi_j obeys

    e_{j+1} = e_j + tau_j (u(t_j, psi(t_j)) - u(t_j, phi_j))     growth
                  + tau_j (u(t_j, phi_j) - v(t_j, phi_j))        field term, <= tau_j delta_j
                  + psi(t_{j+1}) - psi(t_j) - tau_j psi'(t_j)    step term, <= M_j tau_j^2 / 2

so that |e_{j+1}| <= g_j |e_j| + tau_j delta_j + M_j tau_j^2 / 2 with either of

    g_j = 1 + tau_j L_j                                L_j: Lipschitz constant of u(t_j, .)
    g_j = sqrt(1 + 2 tau_j mu_j + tau_j^2 L_j^2)       mu_j: one-sided constant; never larger

on the segment between psi(t_j) and phi_j. Writing the largest constants for all, and exp for the
products, gives Theorem 3.1 of the paper:

    |e_N| <= exp(L (t_N - t_1)) sum_j (tau_j delta + M tau_j^2 / 2) + exp(L (t_N - t_0)) |e_0|.

Where this deviates from the theorem as it is usually summarised:

- delta is needed at the N points (t_j, phi_j) of the numerical solution alone, where it can be
  evaluated; a supremum over space is not. (With L of v instead of u it would be needed on psi.)
- The exponent t_{N-1} is t_N - t_1 when the steps are equal. On other grids the product of the
  factors gives t_N - t_1, which stands here.
- The initial error is multiplied by exp(L) as well: + |e_0| alone is false.
- It speaks of explicit Euler. For another one-step method the same argument holds with its own
  local error C tau^(p+1) and the Lipschitz constant of its increment; delta is then needed at its
  stages. Nothing of that kind is offered here.

Source: "Fine-Tuning Flow Matching via Maximum Likelihood Estimation of Reconstructions"
(arXiv 2510.02081), Theorem 3.1; Hairer, Norsett & Wanner, Solving ODEs I, sections I.7 and I.10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fmft_fast.analysis.curvature import ROWS, acceleration, evaluate, in_double, slopes, summary
from fmft_fast.errors import InputError
from fmft_fast.solvers import solve
from fmft_fast.solvers.grids import make_grid

Field = Callable[[Tensor, Tensor], Tensor]
Kind = Literal["theorem", "lipschitz", "one_sided"]
KINDS: tuple[Kind, ...] = ("theorem", "lipschitz", "one_sided")
NAMES = {
    "theorem": "Theorem 3.1",
    "lipschitz": "with 1 + tau L of each step",
    "one_sided": "with one-sided constants",
}
REFERENCE_STEPS = 1000


@dataclass(frozen=True)
class ExactPath:
    """Trajectories of the reference field, accurate enough to count as exact.

    Attributes:
        t: times, [F + 1].
        x: states, [F + 1, batch, *state].
        acceleration: |d^2 psi / dt^2| at these times, [F + 1, batch].
        accuracy: largest distance, over the batch, of the end from that of half as many steps;
            an estimate (from above, once the steps are small) of how exact the path is.
    """

    t: Tensor
    x: Tensor
    acceleration: Tensor
    accuracy: float


def exact_path(reference: Field, x0: Tensor, steps: int | Tensor = REFERENCE_STEPS) -> ExactPath:
    """Solve the reference by rk4 in float64, and measure its acceleration along the way.

    Args:
        reference: exact field `u(t, x)`, each row by itself; t is 0-d or [rows].
        x0: noise, [batch, *state].
        steps: number of equal steps, or the grid [F + 1] of times.
    """
    reference, x0 = in_double(reference), x0.detach().double()
    solution = solve(reference, x0, method="rk4", steps=steps, gradient="none", save="all")
    t = solution.t.to(x0.device)
    half = torch.cat([t[:-1:2], t[-1:]])
    rough = solve(reference, x0, method="rk4", steps=half, gradient="none").y
    rows = t.repeat_interleave(len(x0))
    parts = [
        acceleration(reference, at, x).flatten(1).norm(dim=1)
        for at, x in zip(rows.split(ROWS), solution.y.flatten(0, 1).split(ROWS), strict=True)
    ]
    gap = (solution.y[-1] - rough).flatten(1).norm(dim=1)
    return ExactPath(t, solution.y, torch.cat(parts).view(len(t), -1), float(gap.max()))


@dataclass(frozen=True)
class ErrorBound:
    """Everything that the bound is made of, per sample, and what was measured.

    `delta` is exact, being evaluated where it is needed. `lipschitz`, `one_sided` and `curvature`
    are the largest of finitely many samples, and so lower estimates of the true suprema. Among
    the samples are the slopes between the two trajectories and the step terms that occurred,
    which makes the bounds hold for these very samples; for others, take `safety` > 1.

    Attributes:
        t: times of the Euler steps, [N + 1].
        delta: |v - u| at (t_j, phi_j), [N, batch].
        lipschitz: L_j, [N, batch].
        one_sided: mu_j, [N, batch].
        curvature: M_j, the largest |d^2 psi / dt^2| in the step, [N, batch].
        initial: |e_0|, [batch].
        error: measured |psi(1) - phi_N|, [batch].
        field_error: what v in place of u changes after N steps, |phi_N(u) - phi_N(v)|, [batch].
        step_error: what N steps cost with u itself, |psi(1) - phi_N(u)|, [batch].
        accuracy: of the trajectories taken for exact (see `ExactPath`).
        safety: factor by which L and M were raised, and mu by (safety - 1) L.
    """

    t: Tensor
    delta: Tensor
    lipschitz: Tensor
    one_sided: Tensor
    curvature: Tensor
    initial: Tensor
    error: Tensor
    field_error: Tensor
    step_error: Tensor
    accuracy: float
    safety: float

    @property
    def tau(self) -> Tensor:
        """Give the sizes of the steps, [N, 1]."""
        return self.t.diff().unsqueeze(1)

    @property
    def steps(self) -> int:
        """Give N."""
        return len(self.t) - 1

    def growth(self, kind: Kind = "lipschitz") -> Tensor:
        """Give the factor g_j by which each step may multiply an error, [N, batch]."""
        if kind == "theorem":
            return torch.exp(self.tau * self.lipschitz.amax(0))
        linear = self.tau * self.lipschitz
        if kind == "lipschitz":
            return 1 + linear
        return (1 + 2 * self.tau * self.one_sided + linear.square()).clamp_min(0).sqrt()

    def amplification(self, kind: Kind = "theorem") -> Tensor:
        """Give the factor that the error of the first step may be multiplied by, [batch]."""
        return self.growth(kind)[1:].prod(0)

    def field_term(self, kind: Kind = "theorem") -> Tensor:
        """Give the bound's part that comes from delta, [batch]."""
        return self._accumulate(self.tau * self._delta(kind), kind)

    def step_term(self, kind: Kind = "theorem") -> Tensor:
        """Give the bound's part that comes from the discretisation, [batch]."""
        return self._accumulate(self.tau.square() * self._curvature(kind) / 2, kind)

    def initial_term(self, kind: Kind = "theorem") -> Tensor:
        """Give the bound's part that comes from the initial error, [batch]."""
        return _scaled(self.initial, self.growth(kind).prod(0))

    def bound(self, kind: Kind = "theorem") -> Tensor:
        """Give the bound on |e_N| of each sample, [batch]; infinite where it overflows float64."""
        return self.field_term(kind) + self.step_term(kind) + self.initial_term(kind)

    @property
    def uniform_log10(self) -> float:
        """Give log10 of Theorem 3.1 with the largest delta, L and M of all samples."""
        tau = self.tau
        constant = float(self.lipschitz.max())
        terms = float((tau * self.delta.max() + tau.square() * self.curvature.max() / 2).sum())
        start = float(self.initial.max())
        if terms == 0 and start == 0:
            return -math.inf
        first = float(self.t[1] - self.t[0])
        whole = float(self.t[-1] - self.t[0])
        # The exponent is taken out: it may lie beyond what float64 can hold.
        inner = terms * math.exp(-constant * first) + start
        return (constant * whole + math.log(inner)) / math.log(10) if inner > 0 else math.inf

    def holds(self, kind: Kind = "theorem") -> Tensor:
        """Tell for each sample whether the measured error is within the bound, [batch].

        As much as the trajectories may be wrong (`accuracy`), and rounding, is allowed for.
        """
        bound = self.bound(kind)
        return self.error <= bound * (1 + 1e-9) + self.accuracy + 1e-12

    def to_dict(self) -> dict[str, Any]:
        """Give N, and for each number its mean, median, 95 % quantile and largest value."""
        numbers = {
            "error": self.error,
            "field_error": self.field_error,
            "step_error": self.step_error,
            "delta": self.delta.amax(0),
            "lipschitz": self.lipschitz.amax(0),
            "one_sided": self.one_sided.amax(0),
            "curvature": self.curvature.amax(0),
        }
        bounds, uniform = {}, self.uniform_log10
        for kind in KINDS:
            # Logarithms, since the bounds range over hundreds of powers of ten.
            log10 = {
                "bound": self.bound(kind),
                "amplification": self.amplification(kind),
                "field_term": self.field_term(kind),
                "step_term": self.step_term(kind),
            }
            bounds[kind] = {f"{key}_log10": _summary_log10(x) for key, x in log10.items()}
            bounds[kind]["holds"] = float(self.holds(kind).double().mean())
        return {
            "steps": self.steps,
            "samples": len(self.error),
            **{name: summary(values) for name, values in numbers.items()},
            "bounds": bounds,
            "uniform_log10": uniform if math.isfinite(uniform) else None,
            "accuracy": self.accuracy,
            "safety": self.safety,
        }

    def __str__(self) -> str:
        """Give a table of medians and largest values."""
        rows = [
            ("measured error", self.error),
            ("  of v in place of u", self.field_error),
            ("  of the steps, with u", self.step_error),
            *((f"bound {NAMES[kind]}", self.bound(kind)) for kind in reversed(KINDS)),
            ("delta, largest on the way", self.delta.amax(0)),
            ("L, likewise", self.lipschitz.amax(0)),
            ("mu, likewise", self.one_sided.amax(0)),
            ("M, likewise", self.curvature.amax(0)),
        ]
        head = f"N = {self.steps}, {len(self.error)} samples"
        lines = [f"{head:36}{'median':>12}{'95 %':>12}{'largest':>12}"]
        for text, values in rows:
            found = summary(values)
            numbers = "".join(f"{found[key]:12.3g}" for key in ("median", "q95", "max"))
            lines.append(f"{text:36}{numbers}")
        kept = ", ".join(f"{int(self.holds(k).sum())} ({NAMES[k]})" for k in reversed(KINDS))
        lines.append(f"bounds hold for {kept} of {len(self.error)} samples; safety {self.safety}")
        return "\n".join(lines)

    def _delta(self, kind: Kind) -> Tensor:
        return self.delta.amax(0, keepdim=True) if kind == "theorem" else self.delta

    def _curvature(self, kind: Kind) -> Tensor:
        return self.curvature.amax(0, keepdim=True) if kind == "theorem" else self.curvature

    def _accumulate(self, source: Tensor, kind: Kind) -> Tensor:
        """Give e_N of the recursion e_{j+1} = g_j e_j + source_j, e_0 = 0, [batch].

        For the theorem every term is multiplied by the factor of the first.
        """
        growth = self.growth(kind)
        if kind == "theorem":
            return _scaled(source.expand_as(self.delta).sum(0), growth[1:].prod(0))
        total = torch.zeros_like(self.initial)
        for g, s in zip(growth, source, strict=True):
            total = g * total + s
        return total


def error_bound(
    field: Field,
    reference: Field,
    x0: Tensor,
    steps: int | Tensor,
    *,
    start: Tensor | None = None,
    path: ExactPath | None = None,
    segment: int = 9,
    safety: float = 1.0,
) -> ErrorBound:
    """Measure the error of Euler steps with a field, and every term of the bound on it.

    All is computed in float64 and for all samples at once. Modules are copied for it.

    Args:
        field: trained field `v(t, x)`, each row by itself; t is 0-d or [rows].
        reference: exact field `u(t, x)`, such as a `fmft_fast.flow.GaussianMixture`.
        x0: noise, [batch, *state], where the exact trajectories begin at t = 0.
        steps: number N of equal Euler steps, or the grid [N + 1] of their times from 0 to 1.
        start: where the numerical solution begins, [batch, *state]; x0 unless given.
        path: the exact trajectories from x0, if they are known already; its times must include
            those of the steps.
        segment: points between the two trajectories at which slopes of u are taken, >= 2.
        safety: at least 1; raises the sampled constants (see `ErrorBound`).

    Raises:
        InputError: times do not run from 0 to 1, shapes differ, or `path` lacks a time.
        NonFiniteError: a solve left the finite numbers.

    Example:
        >>> from fmft_fast.flow import GaussianMixture
        >>> exact = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.3)
        >>> found = error_bound(lambda t, x: exact(t, x) + 0.1, exact, torch.randn(9, 1), 10)
        >>> round(float(found.delta.max()), 6), bool(found.holds("one_sided").all())
        (0.1, True)
    """
    if segment < 2 or not safety >= 1:
        raise InputError(f"expected segment >= 2 and safety >= 1, got {segment} and {safety}")
    field, reference = in_double(field), in_double(reference)
    x0 = x0.detach().double()
    start = x0 if start is None else start.detach().double()
    if start.shape != x0.shape or x0.ndim < 2:
        raise InputError(
            f"x0 and start must be [batch, *state], got {list(x0.shape)} and {list(start.shape)}"
        )
    t = make_grid(0.0, 1.0, steps).to(x0.device)
    if t[0] != 0 or t[-1] != 1:
        raise InputError(f"the steps must run from 0 to 1, got {float(t[0])} to {float(t[-1])}")
    path = exact_path(reference, x0, refine(t)) if path is None else path
    at = _positions(path, t, x0)
    psi = path.x[at]
    phi, ideal = (
        solve(f, start, steps=t, gradient="none", save="all").y for f in (field, reference)
    )
    gap = psi - phi
    delta = _norm(_at(field, t, phi) - _at(reference, t, phi))
    lipschitz, one_sided = _segment_slopes(reference, t, phi, gap, segment)
    curvature = _step_curvature(reference, path, at, t, psi)
    return ErrorBound(
        t=t,
        delta=delta,
        lipschitz=safety * lipschitz,
        one_sided=one_sided + (safety - 1) * lipschitz,
        curvature=safety * curvature,
        initial=_norm(gap[:1])[0],
        error=_norm(gap[-1:])[0],
        field_error=_norm(ideal[-1:] - phi[-1:])[0],
        step_error=_norm(psi[-1:] - ideal[-1:])[0],
        accuracy=path.accuracy,
        safety=safety,
    )


def refine(t: Tensor, steps: int = REFERENCE_STEPS) -> Tensor:
    """Divide each step of a grid evenly, into about `steps` in all, and 8 or more each.

    Example:
        >>> len(refine(torch.linspace(0, 1, 11, dtype=torch.float64), 1000))
        1001
    """
    whole = float(t[-1] - t[0])
    parts = []
    for a, b in zip(t[:-1].tolist(), t[1:].tolist(), strict=True):
        count = max(8, math.ceil(steps * (b - a) / whole - 1e-9))
        parts.append(a + (b - a) * torch.arange(count, dtype=t.dtype, device=t.device) / count)
    return torch.cat([*parts, t[-1:]])


def _positions(path: ExactPath, t: Tensor, x0: Tensor) -> Tensor:
    """Find the steps' times among those of the path."""
    at = torch.searchsorted(path.t, t - 1e-9).clamp_max(len(path.t) - 1)
    if path.x.shape[1:] != x0.shape or (path.t[at] - t).abs().max() > 1e-9:
        raise InputError(
            f"path must start at x0 {list(x0.shape)} and contain every time of the steps, got "
            f"{len(path.t)} times of states {list(path.x.shape[1:])}; leave it out"
        )
    return at


def _at(field: Field, t: Tensor, x: Tensor) -> Tensor:
    """Give the field at the beginnings of all steps, [N, batch, *state], from x [N + 1, ...]."""
    with torch.no_grad():
        rows = t[:-1].repeat_interleave(x.shape[1])
        parts = zip(rows.split(ROWS), x[:-1].flatten(0, 1).split(ROWS), strict=True)
        return torch.cat([evaluate(field, a, b) for a, b in parts]).view_as(x[:-1])


def _segment_slopes(
    reference: Field, t: Tensor, phi: Tensor, gap: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Give L and mu, [N, batch]: their largest values at points of each segment phi .. psi."""
    share = torch.linspace(0, 1, count, dtype=t.dtype, device=t.device)
    points = phi[:-1] + share.view(-1, *[1] * phi.ndim) * gap[:-1]
    shape = points.shape[:3]
    times = t[:-1].view(1, -1, 1).expand(shape).flatten()
    found = slopes(reference, times, points.flatten(0, 2))
    lipschitz, one_sided = (part.view(shape).amax(0) for part in found)
    # The mean slope over the segment is a lower estimate of the supremum as well.
    rise = _at(reference, t, phi + gap) - _at(reference, t, phi)
    distance = _norm(gap[:-1])
    far = distance > 1e-9 * (1 + _norm(phi[:-1]))
    along = (rise * gap[:-1]).flatten(2).sum(2)
    lipschitz = torch.where(far, lipschitz.maximum(_norm(rise) / distance), lipschitz)
    return lipschitz, torch.where(far, one_sided.maximum(along / distance.square()), one_sided)


def _step_curvature(
    reference: Field, path: ExactPath, at: Tensor, t: Tensor, psi: Tensor
) -> Tensor:
    """Give M, [N, batch]: the largest |psi''| in each step, no less than its step term needs."""
    ends = zip(at[:-1].tolist(), at[1:].tolist(), strict=True)
    largest = torch.stack([path.acceleration[a : b + 1].amax(0) for a, b in ends])
    tau = t.diff().unsqueeze(1)
    straight = psi[:-1] + tau.view(-1, *[1] * (psi.ndim - 1)) * _at(reference, t, psi)
    return largest.maximum(2 * _norm(psi[1:] - straight) / tau.square())


def _scaled(term: Tensor, factor: Tensor) -> Tensor:
    """Multiply; a factor that overflowed says nothing of a term that is not there."""
    return torch.where(term == 0, term, factor * term)


def _norm(x: Tensor) -> Tensor:
    """Give the length of each state of x [n, batch, *state]."""
    return x.flatten(2).norm(dim=2)


def _summary_log10(values: Tensor) -> dict[str, float]:
    """Summarise logarithms, within what float64 can hold."""
    limits = torch.finfo(torch.float64)
    return summary(values.clamp(limits.tiny, limits.max).log10())
