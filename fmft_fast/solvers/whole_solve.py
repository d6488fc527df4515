"""Whole solves in one kernel call: which ones, by which kernels, and their place in autograd.

`find_route` is the only judge: it gives a `Route`, or a `NotFusable` that says what stands in the
way. A route computes what the generic steps compute, to rounding, with the same gradient.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..fusion import NotFusable, Plan, find_plan
from ..ops.backend import choose_trajectory
from ..ops.capture import place
from ..ops.contract import is_traced
from ..ops.network import Inputs, Network
from ..ops.trajectory import Keep, Program, TrajectoryKernels, flatten, rebuild, run
from .fixed import Grid, make_grid, stage_times
from .inputs import Problem, real_dtype
from .stats import SolveStats, report
from .tableau import Tableau

Mode = Literal["auto", "off", "require"]
MODES = ("auto", "off", "require")
# Activations of so many bytes are kept even where memory O(steps x state) is promised: they fit
# the caches, and computing them again would cost a third of the backward pass.
SMALL_KEEP = 8 << 20
MAX_PROGRAMS = 128

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
        plan: the field as a network.
        kernels: of the backend that was chosen.
        cond: condition of the field, or None.
    """

    plan: Plan
    kernels: TrajectoryKernels
    cond: Tensor | None

    def solve(self, program: Program, y0: Tensor, low_memory: bool) -> Tensor:
        """The outputs [K, *state] of a program.

        Args:
            program: the steps.
            y0: initial state.
            low_memory: keep stage inputs only, unless the activations are few.
        """
        lead = y0.shape[:-1]
        times = None
        if self.plan.needs_tables:
            times = place(program.times.reshape(-1).to(y0.dtype), y0.device)
        inputs = self.plan.bind(times, self.cond, lead)
        inputs.y0 = flat = self.plan.flatten(y0)
        tensors = flatten(inputs)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            keep = _what_to_keep(program, flat, low_memory)
            out = FusedSolve.apply(self.kernels, program, inputs, keep, *tensors)
            assert isinstance(out, Tensor)
        else:
            out, _ = self.kernels.forward(program, inputs, "nothing")
        return self.plan.restore(out, lead)


def find_route(
    field: Callable[..., Tensor],
    y0: Tensor,
    stages: int,
    backend: str = "auto",
    cond: Tensor | None = None,
) -> Route | NotFusable:
    """How the solve runs in one kernel call, or why it does not.

    Args:
        field: the user's callable.
        y0: initial state.
        stages: of one step of the method.
        backend: as in `solve`.
        cond: condition of the field, or None.
    """
    if fusion_mode() == "off":
        return NotFusable('fusion is off: fused("off") or FMFT_FUSED=0')
    if is_traced():
        return NotFusable("torch traces, compiles or transforms the call")
    if type(y0) is not Tensor or y0.dtype not in (torch.float32, torch.float64):
        return NotFusable(
            f"the state is a {type(y0).__name__} of {y0.dtype}, not a plain float32 "
            "or float64 tensor"
        )
    if y0.numel() == 0:
        return NotFusable("the state is empty")
    plan = find_plan(field, y0, cond)
    if isinstance(plan, NotFusable):
        return plan
    rows = y0.numel() // plan.network.state
    kernels = choose_trajectory(plan.network, stages, rows, y0, backend)
    return NotFusable(kernels) if isinstance(kernels, str) else Route(plan, kernels, cond)


def route_or_none(found: Route | NotFusable) -> Route | None:
    """The route, if there is one; with fused("require") raise if there is none."""
    if isinstance(found, Route):
        return found
    if fusion_mode() == "require":
        raise InputError(f'fused("require") was asked for, but the solve cannot be fused: {found}')
    return None


class FusedSolve(torch.autograd.Function):
    """A whole solve. Inputs: kernels, program, inputs, what to keep, and all tensors of inputs."""

    @staticmethod
    def forward(ctx, kernels, program, inputs, keep, *tensors):
        """Run all steps."""
        plain = rebuild(inputs, [x.detach() for x in tensors])
        out, ctx.kept = kernels.forward(program, plain, keep)
        ctx.kernels, ctx.program, ctx.counts = kernels, program, _counts(inputs)
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the discrete adjoint, or differentiate plain torch where it is to be repeated."""
        tensors = ctx.saved_tensors
        wants = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            out = run(ctx.program, rebuild(ctx.counts, list(tensors)))
            asked = [x for x, wanted in zip(tensors, wants, strict=True) if wanted]
            found = iter(
                torch.autograd.grad(out, asked, grad, create_graph=True, allow_unused=True)
            )
            return None, None, None, None, *(next(found) if w else None for w in wants)
        plain = rebuild(ctx.counts, [x.detach() for x in tensors])
        wanted = rebuild(ctx.counts, list(wants))
        grads = ctx.kernels.backward(ctx.program, plain, ctx.kept, grad, wanted)
        return None, None, None, None, *flatten(grads)


def _counts(inputs: Inputs) -> Inputs:
    """The structure of inputs without its tensors."""
    return Inputs(
        None,
        [None] * len(inputs.parameters),
        [None] * len(inputs.tables),
        [None] * len(inputs.conds),
    )


def _what_to_keep(program: Program, y: Tensor, low_memory: bool) -> Keep:
    if not low_memory:
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


def is_finite(state: Tensor) -> bool:
    """Whether a state on the host is finite, and so is its sum: one pass, at the least cost."""
    return math.isfinite(state.detach().sum().item())


def obstacle(problem: Problem) -> str | None:
    """What of the call of `odeint`, apart from the field, stands in the way."""
    if problem.shapes is not None:
        return "the state is a tuple"
    if problem.callbacks:
        return f"the field has {', '.join(problem.callbacks)}"
    if problem.y0.dtype != problem.field.dtype:
        return f"the field works in {problem.field.dtype}"
    if torch.is_grad_enabled() and problem.t.requires_grad:
        return "t requires grad"
    if problem.spec.family != "fixed":
        return f"{problem.method} is no explicit Runge-Kutta method with fixed steps"
    if problem.options.perturb:
        return "option perturb moves the times"
    if problem.options.interp != "linear":
        return f'option interp is "{problem.options.interp}"'
    return None


def integrate_fused(problem: Problem) -> Tensor | None:
    """The states at problem.t, [T, *state], of fixed steps in one call.

    None if that is impossible, or if a state is not finite: the single steps find out where.
    """
    if torch.compiler.is_compiling():
        return None
    reason = obstacle(problem)
    if reason is not None:
        route_or_none(NotFusable(reason))
        return None
    assert problem.spec.tableau is not None
    tableau, options, y0 = problem.spec.tableau.advancing, problem.options, problem.y0
    route = route_or_none(find_route(problem.field.base, y0, tableau.stages))
    if route is None:
        return None
    if options.step_size is None and options.grid_constructor is None:
        grid, nodes, wanted = None, problem.t.tolist(), tuple(range(len(problem.t)))
    else:
        grid = make_grid(problem, options)
        nodes, wanted = grid.t.tolist(), _states_between(grid)
    program = make_program(
        route.plan.network, tableau, nodes, problem.t.dtype, problem.field.time_dtype, wanted
    )
    states = route.solve(program, y0, low_memory=False)
    solution = states if grid is None else _interpolate(states, wanted, grid, problem.t)
    if y0.device.type == "cpu" and not is_finite(states[-1]):
        return None
    count = program.steps * program.stages
    report(SolveStats(problem.method, count, program.steps, 0, abs(float(program.h[-1]))))
    return solution


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
