"""Adaptive explicit Runge-Kutta: step control on the host, one device sync per attempt."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, MaxStepsError, NonFiniteError, StepUnderflowError
from ..ops.backend import StepKernels
from .dense import DenseSolution
from .events import bisect_event
from .inputs import AdaptiveOptions, Norm, NormalisedField, Perturb, Problem, rms_norm
from .stats import SolveStats
from .tableau import Tableau


@dataclass(frozen=True)
class Tolerance:
    """When an error is small enough: norm(error / (atol + rtol max(|y|, |y1|))) <= 1."""

    rtol: float | Tensor
    atol: float | Tensor
    norm: Norm | None

    @property
    def plain(self) -> bool:
        """True when the fused `rk_finish` computes this ratio."""
        return self.norm is None and not any(
            isinstance(tol, Tensor) for tol in (self.rtol, self.atol)
        )

    def measure(self, x: Tensor) -> Tensor:
        """The norm as a 0-d tensor."""
        return torch.as_tensor((self.norm or rms_norm)(x)).abs()

    def scale(self, *states: Tensor) -> Tensor:
        """The allowed error of every entry: atol + rtol max |state|."""
        size = states[0].abs()
        for state in states[1:]:
            size = torch.maximum(size, state.abs())
        return self.atol + self.rtol * size


@dataclass(frozen=True)
class StepControl:
    """The elementary controller h_next = h min(ifactor, max(safety ratio^(-1/order), dfactor)).

    Source: Hairer, Norsett, Wanner, volume I, section II.4.
    """

    order: int
    safety: float
    ifactor: float
    dfactor: float
    min_step: float
    max_step: float

    def clamp(self, h: float) -> float:
        """Keep h within the bounds."""
        return min(max(h, self.min_step), self.max_step)

    def next_size(self, h: float, ratio: float) -> float:
        """Size of the next step after one of size h with this error ratio."""
        if ratio == 0:
            factor = self.ifactor
        elif not math.isfinite(ratio):
            factor = self.dfactor
        else:
            lowest = 1.0 if ratio < 1 else self.dfactor
            factor = min(self.ifactor, max(self.safety / ratio ** (1 / self.order), lowest))
        return self.clamp(h * factor)


@dataclass(frozen=True)
class AcceptedStep:
    """An accepted step: from s0 to s1 (times in the direction of integration) with its stages."""

    s0: float
    s1: float
    h: float
    y0: Tensor
    k: Sequence[Tensor]


def initial_step(
    field: Callable[..., Tensor],
    time: Callable[[float], Tensor],
    s0: float,
    direction: int,
    y0: Tensor,
    f0: Tensor,
    order: int,
    tolerance: Tolerance,
) -> float:
    """First step size from the sizes of y, y' and y''.

    Source: Hairer, Norsett, Wanner, volume I, section II.4, "Starting step size".
    """
    with torch.no_grad():
        scale = tolerance.scale(y0)
        d0, d1 = (float(tolerance.measure(x / scale)) for x in (y0, f0))
        if not math.isfinite(d0 + d1):
            if bool((torch.isfinite(y0) & ~(scale > 0)).any()):
                raise InputError(
                    f"atol + rtol |y| must be positive everywhere, got rtol = {tolerance.rtol}, "
                    f"atol = {tolerance.atol} and a smallest |y| of {float(y0.abs().min())}: give "
                    "atol > 0"
                )
            _raise_non_finite(field, s0 * direction, 0, y0, f0)
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        f1 = field(time(s0 + h0), y0 + (direction * h0) * f0)
        d2 = float(tolerance.measure((f1 - f0) / scale)) / h0
    if not math.isfinite(d2):
        return h0 * 1e-3
    steepest = max(d1, d2)
    h1 = max(1e-6, h0 * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / (order + 1))
    return min(100 * h0, h1)


def _raise_non_finite(field: Any, t: float, step: int, y: Tensor, f: Tensor) -> None:
    what = "state" if not bool(torch.isfinite(y).all()) else "field"
    raise NonFiniteError(
        f"non-finite values in {what} `{'y' if what == 'state' else 'f(t, y)'}` at t = {t}, "
        f"step {step}: expected finite numbers. Check the field at this time and state, or its "
        "parameters (a diverged training run?)"
    )


class AdaptiveSolver:
    """Takes accepted steps one by one and interpolates within the last one.

    Time runs as s = direction * t, so that it always grows here; sizes h are positive.

    Args:
        problem: what to solve.
        kernels: the step ops.
        options: the user's options.
        strict: plain Runge-Kutta steps. False does as torchdiffeq: stages at the end of a step are
            evaluated just before it, in case of a discontinuity there, and the last stage is the
            first slope of the next step even when the method is not FSAL (adaptive_heun,
            fehlberg2).
    """

    def __init__(
        self,
        problem: Problem,
        kernels: StepKernels,
        options: AdaptiveOptions,
        strict: bool = False,
    ):
        assert problem.spec.tableau is not None
        self.tableau: Tableau = problem.spec.tableau
        self.problem = problem
        self.kernels = kernels
        self.field: NormalisedField = problem.field
        self.direction = problem.field.direction
        self.strict = strict
        self.reuse_slope = self.tableau.fsal or not strict
        self.tolerance = Tolerance(problem.rtol, problem.atol, problem.norm)
        self.max_num_steps = int(options.max_num_steps)
        self.control = StepControl(
            self.tableau.order,
            *(float(x) for x in (options.safety, options.ifactor, options.dfactor)),
            *(float(x) for x in (options.min_step, options.max_step)),
        )
        self.time_dtype = torch.promote_types(options.dtype, problem.y0.abs().dtype)
        self.t0 = problem.t[0]
        self.s = self.direction * self._round(
            float(self.t0.detach())
        )  # sync: control is on the host
        self.stops = self._stops(options.step_t, options.jump_t)
        self.jumps = set(self._sorted_times(options.jump_t))
        self.accepted = self.rejected = 0
        self.last: AcceptedStep | None = None
        self.last_ratio = 0.0
        self.y = problem.y0
        self.f = self.field(self.time(self.s), self.y)
        if options.first_step is None:
            self.h = initial_step(
                self.field,
                self.time,
                self.s,
                self.direction,
                self.y,
                self.f,
                self.tableau.order - 1,
                self.tolerance,
            )
        else:
            self.h = abs(float(options.first_step))

    def _round(self, x: float) -> float:
        if self.time_dtype == torch.float64:
            return x
        return torch.tensor(x, dtype=self.time_dtype).item()

    def _sorted_times(self, times: Any) -> list[float]:
        if times is None:
            return []
        values = torch.as_tensor(times, dtype=torch.float64).reshape(-1).tolist()
        return sorted(s for s in (self.direction * self._round(t) for t in values) if s >= self.s)

    def _stops(self, step_t: Any, jump_t: Any) -> list[float]:
        stops = sorted(self._sorted_times(step_t) + self._sorted_times(jump_t))
        if len(set(stops)) < len(stops):
            raise InputError(
                "`step_t` and `jump_t` must not have any repeated elements between them."
            )
        return stops

    def time(self, s: float) -> Tensor:
        """The time t of s as a 0-d tensor that carries the gradient of the initial time."""
        t = self.direction * s
        if torch.is_grad_enabled() and self.t0.requires_grad:
            start = self.t0.to(self.time_dtype)
            return start + (t - start.detach())
        return torch.full((), t, dtype=self.time_dtype, device=self.y.device)

    def attempt(self) -> bool:
        """Try one step; True if it was accepted."""
        s0, y0, h = self.s, self.y, self.control.clamp(self.h)
        self._call_back("callback_step", s0, y0, h)
        s1 = self._round(s0 + h)
        if not s1 > s0:
            self._raise_underflow(h)
        stop = bisect_right(self.stops, s0)
        if stop < len(self.stops) and self.stops[stop] < s1:
            s1 = self.stops[stop]
            h = s1 - s0
        y1, k, ratio = self._evaluate(s0, s1, h)
        if not math.isfinite(ratio):
            self._check_start(h, k)
        self.last_ratio = ratio
        accept = ratio <= 1 or h <= self.control.min_step
        if accept:
            self._call_back("callback_accept_step", s0, y0, h)
            self.accepted += 1
            self.last = AcceptedStep(s0, s1, h, y0, k)
            self.s, self.y = s1, y1
            self.f = k[-1] if self.reuse_slope else self.field(self.time(s1), y1)
            if s1 in self.jumps:
                # The next step begins on the far side of the discontinuity.
                self.f = self.field(self.time(s1), y1, Perturb.NEXT)
        else:
            self._call_back("callback_reject_step", s0, y0, h)
            self.rejected += 1
        self.h = self.control.next_size(h, ratio)
        return accept

    def _evaluate(self, s0: float, s1: float, h: float) -> tuple[Tensor, list[Tensor], float]:
        """Solution, stages and error ratio of the step."""
        tableau, kernels, y0 = self.tableau, self.kernels, self.y
        step = self.direction * h
        k = [self.f]
        y = y0
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            y = kernels.rk_combine(y0, k, step, row)
            at_end = c == 1
            t = self.time(s1 if at_end else s0 + c * h)
            before = at_end and not self.strict
            k.append(self.field(t, y, Perturb.PREV if before else Perturb.NONE))
        if not tableau.fsal:
            y = kernels.rk_combine(y0, k, step, tableau.b)
        with torch.no_grad():
            tol, b_err = self.tolerance, tableau.b_err
            assert b_err is not None
            if tol.plain:
                _, ratio = kernels.rk_finish(y0, k, step, tableau.b, b_err, tol.rtol, tol.atol)
            else:
                error = kernels.rk_combine(torch.zeros_like(y0), k, step, b_err)
                ratio = tol.measure(error / tol.scale(y0, y))
        return y, k, float(ratio)  # sync: accept or reject is host control flow

    def _check_start(self, h: float, k: Sequence[Tensor]) -> None:
        """A non-finite attempt is retried with a smaller step unless its start is at fault."""
        start_bad = not bool(torch.isfinite(k[0]).all() & torch.isfinite(self.y).all())
        if start_bad or h <= self.control.min_step:
            t = self.direction * self.s
            _raise_non_finite(self.field, t, self.accepted, self.y, k[0])

    def _raise_underflow(self, h: float) -> None:
        t, ratio = self.direction * self.s, self.last_ratio
        at = f"at t = {t}, step {self.accepted} ({self.rejected} rejected so far)"
        if not math.isfinite(ratio):
            raise NonFiniteError(
                f"underflow in dt {h} {at}: every smaller step gave NaN or infinite values. The "
                "field has a singularity there, or the solution blows up"
            )
        causes = ["the field may be discontinuous there (name the time in options jump_t)"]
        eps = torch.finfo(self.y.dtype).eps
        rtol = self.tolerance.rtol
        if isinstance(rtol, float) and rtol < 4 * eps:
            causes.insert(0, f"rtol = {rtol} is below the resolution {eps:.1e} of {self.y.dtype}")
        if self.time_dtype != torch.float64:
            causes.insert(0, f"times have the resolution of {self.time_dtype} (option dtype)")
        raise StepUnderflowError(
            f"underflow in dt {h} {at}, last error ratio {ratio:.3g}: {'; '.join(causes)}. Loosen "
            "rtol and atol, integrate in float64, or bound the steps with min_step"
        )

    def _call_back(self, name: str, s: float, y: Tensor, h: float) -> None:
        callback = self.problem.callbacks.get(name)
        if callback is not None:
            dt = torch.full((), h, dtype=self.time_dtype, device=y.device)
            callback(self.time(s), y, dt)

    def advance_past(self, s: float) -> None:
        """Step until s is reached or passed."""
        attempts = 0
        while s > self.s:
            self.count(attempts)
            self.attempt()
            attempts += 1

    def count(self, attempts: int) -> None:
        """Raise if so many attempts are too many."""
        if attempts >= self.max_num_steps:
            raise MaxStepsError(
                f"max_num_steps exceeded ({attempts}>={self.max_num_steps}) at "
                f"t = {self.direction * self.s}: loosen rtol and atol or raise max_num_steps"
            )

    def interpolate(self, t: Tensor) -> Tensor:
        """The state at t (0-d) within the last accepted step."""
        last = self.last
        if last is None:
            return self.y
        dense, step = self.tableau.dense, self.direction * last.h
        if torch.is_grad_enabled() and (t.requires_grad or self.t0.requires_grad):
            theta = (t.to(self.time_dtype) - self.time(last.s0)) / step
            return self.kernels.dense_eval(last.y0, last.k, step, dense, theta[None])[0]
        theta = (
            float(t.detach()) - self.direction * last.s0
        ) / step  # sync: only if t is on a device
        weights = tuple(sum(p * theta ** (j + 1) for j, p in enumerate(row)) for row in dense)
        return self.kernels.rk_combine(last.y0, last.k, step, weights)

    def coefficients(self) -> Tensor:
        """[5, *state] coefficients of the last accepted step's dense output."""
        last = self.last
        assert last is not None
        zero, step = torch.zeros_like(last.y0), self.direction * last.h
        columns = zip(*self.tableau.dense, strict=True)
        powers = [self.kernels.rk_combine(zero, last.k, step, w) for w in columns]
        return torch.stack((last.y0, *powers))

    def stats(self) -> SolveStats:
        """Statistics so far."""
        last_step = self.last.h if self.last else None
        return SolveStats(
            self.problem.method, self.field.evaluations, self.accepted, self.rejected, last_step
        )


def integrate_adaptive(problem: Problem, solver: AdaptiveSolver) -> Tensor:
    """States at problem.t, [T, *state]: the dense output of the step that reaches each time."""
    solution = [problem.y0]
    values = problem.t.tolist()  # sync: once per solve
    for t, value in zip(problem.t[1:].unbind(), values[1:], strict=True):
        solver.advance_past(solver.direction * value)
        solution.append(solver.interpolate(t))
    return torch.stack(solution)


def integrate_adaptive_until_event(
    problem: Problem, solver: AdaptiveSolver
) -> tuple[Tensor, Tensor]:
    """Step until the event function changes sign; returns (event time, states [2, *state])."""
    event_fn = problem.event_fn
    assert event_fn is not None
    sign = torch.sign(event_fn(solver.time(solver.s), solver.y))
    if bool(sign == 0):
        return solver.time(solver.s), torch.stack([problem.y0, solver.y])
    attempts = 0
    while bool(torch.sign(event_fn(solver.time(solver.s), solver.y)) == sign):
        solver.count(attempts)
        solver.attempt()
        attempts += 1
    last = solver.last
    assert last is not None
    event_t, y = bisect_event(
        solver.interpolate,
        sign,
        solver.time(last.s0).detach(),
        solver.time(last.s1).detach(),
        event_fn,
        problem.atol,
    )
    return event_t, torch.stack([problem.y0, y])


def integrate_adaptive_dense(problem: Problem, solver: AdaptiveSolver) -> DenseSolution:
    """The dense output of a whole solve to problem.t[-1]."""
    end = problem.t[-1].item()
    nodes, pieces = [solver.time(solver.s)], []
    while solver.direction * end > solver.s:
        solver.count(solver.accepted + solver.rejected)
        if solver.attempt():
            nodes.append(solver.time(solver.s))
            pieces.append(solver.coefficients())
    t = torch.stack(nodes).to(torch.float64)
    return DenseSolution(t, torch.stack(pieces), end)
