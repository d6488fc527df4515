"""Whole solves in one kernel call: which ones, by which kernels, and their place in autograd.

`find_route` is the only judge: it gives a `Route`, or a `NotFusable` that says what stands in the
way. A route computes what the generic steps compute, to rounding, with the same gradient.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..errors import InputError
from ..fusion import NotFusable, Plan, find_plan, open_condition
from ..ops.backend import choose_trajectory
from ..ops.capture import place
from ..ops.finite import seems_finite
from ..ops.network import Inputs, Network
from ..ops.trajectory import (
    AdaptiveKernels,
    AdaptiveSolve,
    Control,
    Keep,
    Program,
    TrajectoryKernels,
)
from .attached import Solved, attach, wants_gradient
from .fixed import Grid, make_grid, stage_times
from .grids import equal_times
from .inputs import Problem, find_callbacks, real_dtype
from .methods import METHODS, find_method
from .recorded_solve import with_recordings
from .repeated import PLAIN_TENSORS, odeint_kind, remember, repeat, solve_kind
from .single_steps import remember_steps
from .stats import SolveStats, report
from .tableau import Tableau

Mode = Literal["auto", "off", "require"]
MODES = ("auto", "off", "require")
# Activations of so many bytes are kept even where memory O(steps x state) is promised: they fit
# the caches, and computing them again would cost a third of the backward pass.
SMALL_KEEP = 8 << 20
MAX_PROGRAMS = 128

_FIXED = {name for name, method in METHODS.items() if method.family == "fixed"}

_mode: ContextVar[Mode] = ContextVar("fusion_mode", default="auto")


@contextmanager
def fused(mode: Mode = "auto") -> Iterator[None]:
    """Choose within the block whether solves run as whole-trajectory kernels.

    Args:
        mode: "auto": where it is possible; "off": never; "require": raise an `InputError` with the
            reason where it is not. The environment variable FMFT_FUSED=0 turns them off for a
            whole process.

    Example:
        >>> import torch
        >>> from fmft_fast import fused, solve
        >>> from fmft_fast.fields import MLP
        >>> with fused("require"):
        ...     y = solve(MLP(2), torch.ones(3, 2), steps=4).y
    """
    if mode not in MODES:
        raise InputError(f"mode must be one of {MODES}, got {mode!r}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def fusion_mode() -> Mode:
    """The mode in force."""
    mode = _mode.get()
    return "off" if mode == "auto" and os.environ.get("FMFT_FUSED") == "0" else mode


@dataclass(frozen=True)
class Route:
    """A field and the kernels that solve it.

    Attributes:
        field: the user's callable, or its like whose condition is an argument.
        plan: the field as a network.
        kernels: of the backend that was chosen.
        cond: condition of the field, or None.
    """

    field: Callable[..., Tensor]
    plan: Plan
    kernels: TrajectoryKernels
    cond: Tensor | None

    def solve(self, program: Program, y0: Tensor, low_memory: bool) -> Tensor | None:
        """The outputs [K, *state] of fixed steps, the final state among them.

        None if that is not finite, on the host: the single steps find out where.

        Args:
            program: the steps.
            y0: initial state.
            low_memory: keep stage inputs only, unless the activations are few.
        """
        inputs, keep = self.prepare(program, y0, low_memory)
        kernels = with_recordings(self.kernels, self.plan, y0.device)
        with torch.set_grad_enabled(False):
            out, kept = kernels.forward(program, inputs, keep)
        if not _ends_finite(out):
            return None
        if keep != "nothing":
            out = attach(Solved(kernels, program, out, kept, inputs), inputs)
        return self.plan.restore(out, y0.shape[:-1])

    def prepare(self, program: Program, y0: Tensor, low_memory: bool) -> tuple[Inputs, Keep]:
        """The tensors of `solve`, and what of the activations its backward pass wants."""
        inputs = self.bind(y0, program)
        wants_grad = wants_gradient(inputs)
        return inputs, _what_to_keep(program, inputs, low_memory) if wants_grad else "nothing"

    def solve_adaptively(
        self, problem: Problem, low_memory: bool, meet: bool
    ) -> tuple[Tensor, AdaptiveSolve] | None:
        """The states at problem.t, [T, *state], with step control.

        None if it ended early, or in what is not finite.

        Args:
            problem: what to solve.
            low_memory: keep stage inputs only.
            meet: end a step at every time; otherwise the states are interpolated.
        """
        y0, tableau, control = problem.y0, problem.spec.tableau, step_control(problem, meet)
        inputs = self.bind(y0, None)
        wants_grad = wants_gradient(inputs)
        keep = ("inputs" if low_memory else "activations") if wants_grad else "nothing"
        with torch.no_grad():
            found = cast(AdaptiveKernels, self.kernels).adaptive(
                self.plan.network, tableau, control, inputs, problem.t.tolist(), keep
            )
        out = found.out
        if found.outcome != "done" or not _ends_finite(out):
            return None
        if wants_grad:
            out = attach(Solved(self.kernels, found.program, out, found.kept, inputs), inputs)
        return self.plan.restore(out, y0.shape[:-1]), found

    def bind(self, y0: Tensor, program: Program | None) -> Inputs:
        """The tensors of a solve; the times of a program are only read for tables."""
        times = None
        if self.plan.needs_tables:
            assert program is not None
            times = place(program.flat_times(y0.dtype), y0.device)
        inputs = self.plan.bind(times, self.cond, y0.shape[:-1])
        inputs.y0 = self.plan.flatten(y0)
        return inputs


def find_route(
    field: Callable[..., Tensor],
    y0: Tensor,
    stages: int,
    backend: str = "auto",
    cond: Tensor | None = None,
    adaptive: bool = False,
    anew: bool = False,
) -> Route | NotFusable:
    """How the solve runs in one kernel call, or why it does not.

    Args:
        field: the user's callable.
        y0: initial state.
        stages: of one step of the method.
        backend: as in `solve`.
        cond: condition of the field, or None.
        adaptive: whether the kernels have to control the steps.
        anew: look at a field again that was not fusable lately (see `find_plan`).
    """
    mode = fusion_mode()
    if mode == "off":
        return NotFusable('fusion is off: fused("off") or FMFT_FUSED=0')
    plan, trusting = None, mode == "auto" and not anew
    if cond is None and (opened := open_condition(field, y0)) is not None:
        plan = find_plan(opened[0], y0, opened[1], trusting)
        if isinstance(plan, Plan):
            field, cond = opened
    if not isinstance(plan, Plan):
        plan = find_plan(field, y0, cond, trusting)
    if isinstance(plan, NotFusable):
        return plan
    rows = y0.numel() // plan.network.state
    kernels = choose_trajectory(plan.network, stages, rows, y0, backend)
    if isinstance(kernels, str):
        return NotFusable(kernels)
    if adaptive and plan.needs_tables:
        return NotFusable("the times of adaptive steps are not known before, but time is embedded")
    if adaptive and not hasattr(kernels, "adaptive"):
        return NotFusable(f"the kernels of backend {kernels.name} have no step control")
    return Route(field, plan, kernels, cond)


def route_or_none(found: Route | NotFusable) -> Route | None:
    """The route, if there is one; with fused("require") raise if there is none."""
    if isinstance(found, Route):
        return found
    if fusion_mode() == "require":
        why = str(found).removeprefix("not fused: ")
        raise InputError(f'fused("require") was asked for, but the solve cannot be fused: {why}')
    return None


def _what_to_keep(program: Program, inputs: Inputs, low_memory: bool) -> Keep:
    y = inputs.y0
    if not low_memory or y is None:
        return "activations"
    width = sum(layer.width for layer in program.network.layers)
    size = program.steps * program.stages * y.shape[0] * width * y.element_size()
    return "activations" if size <= SMALL_KEEP else "inputs"


_programs: OrderedDict[tuple, Program] = OrderedDict()


def make_program(
    network: Network,
    tableau: Tableau,
    grid: Sequence[float],
    time_dtype: torch.dtype,
    dtype: torch.dtype,
    outputs: tuple[int, ...],
) -> Program:
    """The program of fixed steps; the last ones are remembered.

    Args:
        network: the field.
        tableau: explicit, without a FSAL stage.
        grid: [N + 1] times.
        time_dtype: dtype in which the times are kept and h is their difference.
        dtype: of the times that the field gets.
        outputs: numbers of the wanted states.
    """
    # The id is the network's own for as long as the program, which holds it, is remembered.
    key = (id(network), tableau.name, tuple(grid), time_dtype, dtype, outputs)
    program = _programs.get(key)
    if program is None:
        t = torch.tensor(grid, dtype=time_dtype)
        times = stage_times(tableau, t, real_dtype(dtype)).to(torch.float64)
        h = (t[1:] - t[:-1]).to(torch.float64)
        program = Program(network, tableau.a, tableau.b, times, h, outputs)
        _programs[key] = program
        if len(_programs) > MAX_PROGRAMS:
            _programs.popitem(last=False)
    return program


def _ends_finite(out: Tensor) -> bool:
    """Whether the final state on a host is finite, and so is its sum if it is a large one."""
    if out.device.type != "cpu":
        return True
    return seems_finite(out if out.shape[0] == 1 else out[-1])


def obstacle(problem: Problem) -> str | None:
    """What of the call of `odeint`, apart from the field, stands in the way."""
    options, family = problem.options, problem.spec.family
    if problem.shapes is not None:
        return "the state is a tuple"
    if problem.callbacks:
        return f"the field has {', '.join(problem.callbacks)}"
    if problem.y0.dtype != problem.field.dtype:
        return f"the field works in {problem.field.dtype}"
    if torch.is_grad_enabled() and problem.t.requires_grad:
        return "t requires grad"
    if family == "fixed":
        if options.perturb:
            return "option perturb moves the times"
        if options.interp != "linear":
            return f'option interp is "{options.interp}"'
        return None
    if family != "adaptive":
        return f"{problem.method} is no explicit Runge-Kutta method"
    assert problem.spec.tableau is not None
    if not problem.spec.tableau.fsal:
        return f"the last stage of {problem.method} is not the first one of the next step"
    if problem.norm is not None or any(isinstance(x, Tensor) for x in (problem.rtol, problem.atol)):
        return "the error has a norm or tolerances of its own"
    if options.step_t is not None or options.jump_t is not None:
        return "option step_t or jump_t is given"
    if options.dtype != torch.float64:
        return f"option dtype is {options.dtype}"
    return None


def final_state(
    field: Callable[..., Tensor],
    x0: Tensor,
    times: tuple[float, float],
    steps: int,
    method: str,
    backend: str = "auto",
    cond: Tensor | None = None,
) -> Tensor | None:
    """Where equal steps of an explicit method lead from x0, in one kernel call or asked for again.

    To be called without gradient. That is what `solve` finds, without what goes with it. None where
    kernels do not take it, or the result is not finite: single steps find out where.
    """
    kind, mode = None, fusion_mode()
    if backend == "auto" and type(x0) in PLAIN_TENSORS and x0.is_cpu and mode != "off":
        kind = solve_kind(times, steps, method, "none", "final")
        if kind and (again := repeat(field, kind, (x0,), cond, mode == "auto")) is not None:
            return again[0]
    tableau = find_method(method).tableau
    if tableau is None or not tableau.explicit:
        route_or_none(NotFusable(f"{method} is no explicit Runge-Kutta method"))
        return None
    tableau = tableau.advancing
    route = route_or_none(found := find_route(field, x0, tableau.stages, backend, cond))
    if route is None:
        if kind is not None:
            remember_steps(kind, field, found, x0, cond)
        return None
    network, grid = route.plan.network, equal_times(*times, steps)
    program = make_program(network, tableau, grid, torch.float64, x0.dtype, (steps,))
    states = route.solve(program, x0, low_memory=False)
    if states is None:
        return None
    stats = SolveStats(method, steps * program.stages, steps, 0, program.last_step)
    report(stats)
    if kind is not None:
        remember(kind, (x0,), route, program, False, stats, final=True)
    return states[0]


def integrate_fused(problem: Problem) -> Tensor | None:
    """The states at problem.t, [T, *state], in one call.

    None if that is impossible, or if the solve does not end well: the single steps find out where.
    """
    if torch.compiler.is_compiling():
        return None
    reason = obstacle(problem)
    if reason is not None:
        route_or_none(NotFusable(reason))
        return None
    tableau, fixed = problem.spec.tableau, problem.spec.family == "fixed"
    assert tableau is not None
    stages = tableau.advancing.stages if fixed else tableau.stages
    route = route_or_none(find_route(problem.field.base, problem.y0, stages, adaptive=not fixed))
    if route is None:
        return None
    integrate = _integrate_fixed if fixed else _integrate_adaptive
    return integrate(problem, route, tableau)


def _integrate_adaptive(problem: Problem, route: Route, tableau: Tableau) -> Tensor | None:
    found = route.solve_adaptively(problem, low_memory=False, meet=False)
    if found is None:
        return None
    out, solve = found
    report(stats_of(problem.method, solve))
    return out


def step_control(problem: Problem, meet: bool) -> Control:
    """The step control for kernels, see `Control`."""
    options = problem.options
    assert isinstance(problem.rtol, float) and isinstance(problem.atol, float)
    sizes = (options.safety, options.ifactor, options.dfactor, options.min_step, options.max_step)
    return Control(
        problem.rtol,
        problem.atol,
        *(float(x) for x in sizes),
        max_num_steps=int(options.max_num_steps),
        first_step=None if options.first_step is None else abs(float(options.first_step)),
        meet=meet,
    )


def stats_of(method: str, solve: AdaptiveSolve) -> SolveStats:
    """The statistics of an adaptive solve."""
    steps, last = solve.program.steps, solve.program.last_step
    return SolveStats(method, solve.evaluations, steps, solve.rejected, last)


def _integrate_fixed(problem: Problem, route: Route, tableau: Tableau) -> Tensor | None:
    tableau, options, y0 = tableau.advancing, problem.options, problem.y0
    if options.step_size is None and options.grid_constructor is None:
        grid, nodes, wanted = None, problem.t.tolist(), tuple(range(len(problem.t)))
    else:
        grid = make_grid(problem, options)
        nodes, wanted = grid.t.tolist(), _states_between(grid)
    program = make_program(
        route.plan.network, tableau, nodes, problem.t.dtype, problem.field.time_dtype, wanted
    )
    states = route.solve(program, y0, low_memory=False)
    if states is None:
        return None
    count = program.steps * program.stages
    stats = SolveStats(problem.method, count, program.steps, 0, program.last_step)
    report(stats)
    if grid is not None:
        return _interpolate(states, wanted, grid, problem.t)
    kind = odeint_kind(problem.method, nodes)
    remember(kind, (y0, problem.t), route, program, False, stats)
    return states


def odeint_again(func: Callable, y0: Any, t: Any, method: Any) -> Tensor | None:
    """The states at t, [T, *state], if all of this was asked for before, with default options."""
    if type(method) is not str or method not in _FIXED or type(y0) not in PLAIN_TENSORS:
        return None
    if type(t) is not Tensor or t.ndim != 1 or not (t.is_cpu and y0.is_cpu):
        return None
    if fusion_mode() == "off" or find_callbacks(func):
        return None
    found = repeat(func, odeint_kind(method, t.tolist()), (y0, t), None, False)
    return None if found is None else found[0]


def _states_between(grid: Grid) -> tuple[int, ...]:
    """The states from which the outputs of a grid are interpolated."""
    wanted = {0, len(grid.h)}
    for n, reached in enumerate(grid.outputs):
        for _, at_end in reached:
            wanted |= {n + 1} if at_end else {n, n + 1}
    return tuple(sorted(wanted))


def _interpolate(states: Tensor, wanted: tuple[int, ...], grid: Grid, t: Tensor) -> Tensor:
    """The solution at t by straight lines between the states of the grid."""
    place = {n: states[i] for i, n in enumerate(wanted)}
    solution = [states[0]] * len(t)
    for n, reached in enumerate(grid.outputs):
        for j, at_end in reached:
            if at_end:
                solution[j] = place[n + 1]
            else:
                t0, t1 = grid.t[n], grid.t[n + 1]
                solution[j] = place[n] + (t[j] - t0) / (t1 - t0) * (place[n + 1] - place[n])
    return torch.stack(solution)
