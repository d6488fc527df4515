"""Fixed grids: one loop for explicit Runge-Kutta, implicit and Adams methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteWarning
from ..ops.backend import StepKernels
from ..ops.contract import is_traced
from .events import bisect_event
from .grids import equal_times
from .inputs import FixedOptions, NormalisedField, Problem, shift_time
from .tableau import Tableau

Step = float | Tensor
MAX_EVENT_STEPS = 20_000
MAX_LAYOUTS = 64


class Stepper(Protocol):
    """One step of a fixed-grid method.

    Attributes:
        history: what a step needs besides the state; it may be read and put back between steps.
    """

    history: tuple[Tensor, ...]

    def step(self, t0: Tensor, t1: Tensor, h: Step, y: Tensor) -> tuple[Tensor, Tensor]:
        """From (t0, y) to t1 = t0 + h: the new state and the slope at (t0, y)."""
        ...


def rk_step(
    field: Callable[..., Tensor],
    tableau: Tableau,
    kernels: StepKernels,
    times: Sequence[Tensor],
    h: Step,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """One explicit Runge-Kutta step over stage times [s] of 0-d tensors; returns (y1, k_1)."""
    k: list[Tensor] = []
    for t, row in zip(times, tableau.a, strict=True):
        k.append(field(t, kernels.rk_combine(y, k, h, row) if k else y))
    return kernels.rk_combine(y, k, h, tableau.b), k[0]


def stage_times(tableau: Tableau, t: Tensor, dtype: torch.dtype, perturb: bool = False) -> Tensor:
    """Times of all stages of all steps on the grid t [N + 1]: [N, s], in `dtype`.

    A stage with c = 1 lies exactly on the grid. With `perturb` the first stage moves one
    representable value into the step, and stages at its end one back.
    """
    t0, t1 = t[:-1], t[1:]
    columns = []
    for c in tableau.c:
        at = t0 if c == 0 else t1 if c == 1 else torch.add(t0, t1 - t0, alpha=c)
        columns.append(at.to(dtype))
    if perturb:
        start, end = t0.to(dtype), t1.to(dtype)
        columns = [
            shift_time(at, end) if i == 0 else shift_time(at, start) if c == 1 else at
            for i, (at, c) in enumerate(zip(columns, tableau.c, strict=True))
        ]
    return torch.stack(columns, dim=1)


class Layout(NamedTuple):
    """Equal steps of an explicit method.

    Attributes:
        grid: [N + 1] float64 times of their ends.
        table: [N, s] times of their stages.
        h: [N] signed steps.
    """

    grid: Tensor
    table: Tensor
    h: Sequence[float]


_layouts: dict[tuple, Layout] = {}


def equal_steps(tableau: Tableau, t0: float, t1: float, count: int, dtype: torch.dtype) -> Layout:
    """Equal steps on the host, with stage times of a dtype; remembered, and then copied.

    To lay them out takes as long as a step of a small network.
    """
    key = (tableau.name, tableau.stages, t0, t1, count, dtype)
    layout = _layouts.get(key)
    if layout is None:
        grid = torch.tensor(equal_times(t0, t1, count), dtype=torch.float64)
        h: Any = step_sizes(grid)
        layout = Layout(grid, stage_times(tableau, grid, dtype), h)
        if len(_layouts) >= MAX_LAYOUTS:
            _layouts.clear()
        _layouts[key] = layout
    return Layout(layout.grid.clone(), layout.table.clone(), layout.h)


class RKStepper:
    """Explicit Runge-Kutta steps."""

    history: tuple[Tensor, ...] = ()

    def __init__(
        self, field: NormalisedField, tableau: Tableau, kernels: StepKernels, perturb: bool = False
    ):
        self.field = field
        self.tableau = tableau.advancing
        self.kernels = kernels
        self.perturb = perturb

    def at(self, times: Sequence[Tensor], h: Step, y: Tensor) -> tuple[Tensor, Tensor]:
        """A step whose stage times are known."""
        return rk_step(self.field, self.tableau, self.kernels, times, h, y)

    def stage_times(self, t: Tensor) -> Tensor:
        """Stage times [N, s] on the grid t [N + 1]."""
        return stage_times(self.tableau, t, self.field.time_dtype, self.perturb)

    def step(self, t0: Tensor, t1: Tensor, h: Step, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `Stepper`."""
        return self.at(self.stage_times(torch.stack((t0, t1)))[0].unbind(), h, y)


@dataclass(frozen=True)
class Grid:
    """The steps of a solve.

    Attributes:
        t: [N + 1] times of the step ends.
        h: N signed steps; floats where the times are on the host and need no gradient, so that no
            step reads a tensor, and 0-d tensors on the device otherwise, so that no step syncs.
        outputs: for every step, the requested times that it reaches as pairs (index, whether that
            time is the end of the step).
    """

    t: Tensor
    h: Sequence[Step]
    outputs: list[list[tuple[int, bool]]]

    def steps_of(self, stepper: Stepper) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """The steps in order, each as a function of the state; stage times are laid out once."""
        if isinstance(stepper, RKStepper):
            for times, h in zip(stepper.stage_times(self.t).unbind(), self.h, strict=True):
                yield partial(stepper.at, times.unbind(), h)
        else:
            nodes = self.t.unbind()
            for t0, t1, h in zip(nodes[:-1], nodes[1:], self.h, strict=True):
                yield partial(stepper.step, t0, t1, h)


def make_grid(problem: Problem, options: FixedOptions) -> Grid:
    """The grid that the options ask for and the outputs of each of its steps."""
    t = problem.t
    if options.step_size is None and options.grid_constructor is None:
        return Grid(t, step_sizes(t), [[(i, True)] for i in range(1, len(t))])
    if options.grid_constructor is not None:
        grid = options.grid_constructor(problem.field, problem.y0, t).to(t)
    else:
        grid = _uniform_grid(t, float(options.step_size or 0), problem.field.direction)
    return Grid(grid, step_sizes(grid), _match_outputs(grid, t, problem.field.direction))


def step_sizes(t: Tensor) -> Sequence[Step]:
    """Signed steps of the grid t [N + 1] (see `Grid.h`)."""
    h = t[1:] - t[:-1]
    on_host = t.device.type == "cpu" and not h.requires_grad
    if on_host and not torch.compiler.is_compiling():
        return h.tolist()
    return h.unbind()


def _uniform_grid(t: Tensor, step_size: float, direction: int) -> Tensor:
    if not step_size > 0:
        raise InputError(f"step_size must be positive, got {step_size}")
    span = (t[-1] - t[0]).detach().abs()
    count = int(torch.ceil(span / step_size + 1))  # sync: the host needs the number of steps
    grid = torch.arange(count, dtype=t.dtype, device=t.device) * (direction * step_size) + t[0]
    return torch.cat((grid[:-1], t[-1:]))


def _match_outputs(grid: Tensor, t: Tensor, direction: int) -> list[list[tuple[int, bool]]]:
    ends, wanted = grid.tolist(), t.tolist()  # sync: once per solve
    if ends[0] != wanted[0] or ends[-1] != wanted[-1]:
        raise InputError(
            f"the grid must begin and end with t: expected {wanted[0]} .. {wanted[-1]}, "
            f"got {ends[0]} .. {ends[-1]}"
        )
    outputs = []
    j = 1
    for end in ends[1:]:
        reached = []
        while j < len(wanted) and direction * (end - wanted[j]) >= 0:
            reached.append((j, wanted[j] == end))
            j += 1
        outputs.append(reached)
    return outputs


def integrate_fixed(
    problem: Problem, make_stepper: Callable[[], Stepper], options: FixedOptions
) -> tuple[Tensor, Grid]:
    """Run the steps; returns the states at problem.t, [T, *state], and the grid."""
    grid = make_grid(problem, options)
    nodes = grid.t.unbind()
    callback = problem.callbacks.get("callback_step")
    y = problem.y0
    solution = [y] * len(problem.t)
    for n, take_step in enumerate(grid.steps_of(make_stepper())):
        t0, t1 = nodes[n], nodes[n + 1]
        if callback is not None:
            callback(t0, y, (t1 - t0).abs())
        y1, f0 = take_step(y)
        for j, at_end in grid.outputs[n]:
            if options.interp == "cubic":
                f1 = problem.field(t1, y1)
                solution[j] = hermite(t0, y, f0, t1, y1, f1, problem.t[j])
            elif at_end:
                solution[j] = y1
            else:
                solution[j] = y + (problem.t[j] - t0) / (t1 - t0) * (y1 - y)
        y = y1
    warn_non_finite(problem, make_stepper, grid, y)
    return torch.stack(solution), grid


@torch.no_grad()
def warn_non_finite(
    problem: Problem, make_stepper: Callable[[], Stepper], grid: Grid, end: Tensor
) -> None:
    """Where the final state is not finite, on the host, repeat the solve to name the step."""
    if end.device.type != "cpu" or is_traced() or bool(torch.isfinite(end).all()):
        return
    y, where = problem.y0, "somewhere (a second run stayed finite: is the field random?)"
    if not bool(torch.isfinite(y).all()):
        where = "in y0 already"
    else:
        for n, take_step in enumerate(grid.steps_of(make_stepper())):
            y, f0 = take_step(y)
            if not bool(torch.isfinite(y).all()):
                source = "state" if bool(torch.isfinite(f0).all()) else "field at its start"
                t0, t1 = grid.t[n].item(), grid.t[n + 1].item()
                where = f"in step {n} of {len(grid.h)}, from t = {t0} to {t1} ({source})"
                break
    warnings.warn(
        f"{problem.method}: the solution became NaN or infinite {where}. Check the field there, or "
        "take smaller steps.",
        NonFiniteWarning,
        stacklevel=6,
    )


def hermite(
    t0: Tensor, y0: Tensor, f0: Tensor, t1: Tensor, y1: Tensor, f1: Tensor, t: Tensor
) -> Tensor:
    """Cubic Hermite interpolation between (t0, y0, f0) and (t1, y1, f1) at t."""
    h = t1 - t0
    x = (t - t0) / h
    inner = (1 - 2 * x) * (y1 - y0) + h * ((x - 1) * f0 + x * f1)
    return (1 - x) * y0 + x * y1 + x * (x - 1) * inner


def integrate_fixed_until_event(
    problem: Problem, stepper: Stepper, options: FixedOptions
) -> tuple[Tensor, Tensor]:
    """Step until the event function changes sign; returns (event time, states [2, *state])."""
    if options.step_size is None:
        raise InputError(
            "Event handling for fixed step solvers currently requires `step_size` to be provided "
            "in options."
        )
    event_fn = problem.event_fn
    assert event_fn is not None
    h = torch.as_tensor(options.step_size, dtype=problem.t.dtype, device=problem.t.device)
    h = h * problem.field.direction
    t0, y0 = problem.t[0], problem.y0
    sign = torch.sign(event_fn(t0, y0))
    if bool(sign == 0):  # sync: whether to stop is host control flow
        return t0, torch.stack([y0, y0])
    for _ in range(MAX_EVENT_STEPS):
        t1 = t0 + h
        y1, f0 = stepper.step(t0, t1, h, y0)
        if bool(torch.sign(event_fn(t1, y1)) != sign):  # sync: likewise
            break
        t0, y0 = t1, y1
    else:
        raise RuntimeError(
            f"Reached maximum number of iterations {MAX_EVENT_STEPS} before the event at "
            f"t = {t0.item()}: take a larger step_size or check event_fn"
        )
    f1 = problem.field(t1, y1) if options.interp == "cubic" else None

    def interpolate(t: Tensor) -> Tensor:
        if f1 is None:
            return y0 + (t - t0) / (t1 - t0) * (y1 - y0)
        return hermite(t0, y0, f0, t1, y1, f1, t)

    event_t, y = bisect_event(interpolate, sign, t0, t1, event_fn, problem.atol)
    return event_t, torch.stack([problem.y0, y])
