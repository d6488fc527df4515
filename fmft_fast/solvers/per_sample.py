"""Adaptive solves in which every row of the batch has its own steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import InputError, MaxStepsError, NonFiniteError, StepUnderflowError
from ..ops.network import Inputs, evaluate
from ..ops.trajectory import PerSampleSolve, Program, combine
from .attached import Solved, attach, wants_gradient
from .grids import make_grid
from .inputs import Problem, normalise
from .solution import Solution, SolveRequest
from .stats import SolveStats, report
from .whole_solve import Route, find_route, obstacle, step_control


@dataclass(frozen=True)
class PerSampleStats(SolveStats):
    """Statistics of a solve with steps per row; the numbers are those of the row with the most.

    Attributes:
        rows_evaluations: [rows] evaluations of the field on each row.
        rows_accepted: [rows] accepted steps.
        rows_rejected: [rows] rejected steps.
    """

    rows_evaluations: Tensor | None = dataclasses.field(default=None, compare=False)
    rows_accepted: Tensor | None = dataclasses.field(default=None, compare=False)
    rows_rejected: Tensor | None = dataclasses.field(default=None, compare=False)


@dataclass
class SolvedPerSample(Solved):
    """See `Solved`; the program names the field and the method, but has no steps."""

    nodes: tuple[float, ...]

    def run(self, inputs: Inputs) -> Tensor:
        """The final states in plain torch: rows that have no more steps take steps of size zero."""
        y: Any = inputs.y0
        rows = [self.kept.steps(r) for r in range(len(y))]

        def column(numbers: list[float]) -> Tensor:
            return torch.tensor(numbers, dtype=y.dtype, device=y.device)[:, None]

        for n in range(max(len(h) for _, h in rows)):
            h = column([h[n] if n < len(h) else 0.0 for _, h in rows])
            start, end = (column([t[min(n + i, len(t) - 1)] for t, _ in rows]) for i in (0, 1))
            k: list[Tensor] = []
            for c, weights in zip(self.nodes, self.program.a, strict=True):
                x = combine(y, k, h, weights)
                t = end if c == 1 else start + c * h
                k.append(evaluate(self.program.network, inputs, t, 0, x))
            y = combine(y, k, h, self.program.b)
        return y

    def pull_back(self, inputs: Inputs, grad: Tensor, wanted: Inputs) -> Inputs:
        """The gradients of the inputs from that of the final states."""
        return self.kernels.backward_per_sample(self.kept, grad, wanted)  # type: ignore


def solve_per_sample(request: SolveRequest) -> Solution:
    """Solve with step sizes, error norms and decisions of every row's own.

    The times of the solution are t0 and t1 alone, since the rows' steps end at different times.

    Raises:
        InputError: what the option does not go with.
        MaxStepsError, NonFiniteError, StepUnderflowError: the first row that did not reach the end.
    """
    grid = make_grid(request.t0, request.t1, request.steps)
    reason = _conflict(request, grid)
    if reason is not None:
        _refuse(reason)
    problem = normalise(
        request.call,
        request.x0,
        grid.detach(),
        rtol=request.tolerances["rtol"],
        atol=request.tolerances["atol"],
        method=request.method,
        options=request.options,
    )
    reason = obstacle(problem)
    if reason is not None:
        _refuse(reason)
    tableau = problem.spec.tableau
    assert tableau is not None
    route = find_route(
        request.field,
        request.x0,
        tableau.stages,
        request.backend,
        request.cond,
        adaptive=True,
        anew=True,
    )
    if not isinstance(route, Route):
        _refuse(str(route).removeprefix("not fused: "))
    if not hasattr(route.kernels, "adaptive_per_sample"):
        _refuse(f"the kernels of backend {route.kernels.name} do not have it")
    with torch.set_grad_enabled(request.keeps_graph):
        y, found = _run(route, problem)
    stats = PerSampleStats(
        request.method,
        *(int(x.max()) for x in (found.evaluations, found.accepted, found.rejected)),
        rows_evaluations=found.evaluations,
        rows_accepted=found.accepted,
        rows_rejected=found.rejected,
    )
    report(stats)
    return Solution(y, grid.detach(), stats)


def _run(route: Route, problem: Problem) -> tuple[Tensor, PerSampleSolve]:
    tableau = problem.spec.tableau
    kernels: Any = route.kernels
    assert tableau is not None
    inputs = route.bind(problem.y0, None)
    with_graph = wants_gradient(inputs)
    with torch.no_grad():
        found: PerSampleSolve = kernels.adaptive_per_sample(
            route.plan.network,
            tableau,
            step_control(problem, meet=True),
            inputs,
            *problem.t.tolist(),
            "inputs" if with_graph else "nothing",
        )
    if found.failed is not None:
        _raise(problem, found, found.failed)
    y = found.y
    if with_graph:
        method, none = tableau.advancing, torch.empty(0, dtype=torch.float64)
        program = Program(route.plan.network, method.a, method.b, none, none, ())
        y = attach(SolvedPerSample(kernels, program, y, found.kept, inputs, method.c), inputs)
    return route.plan.restore(y, problem.y0.shape[:-1]), found


def _conflict(request: SolveRequest, grid: Tensor) -> str | None:
    """What of the call, apart from the method and the field, does not go with the option."""
    if not request.adaptive:
        return "steps are given, but no tolerances"
    if request.gradient == "continuous":
        return 'gradient is "continuous"'
    if request.save != "final":
        return f'save is "{request.save}"'
    if request.steps is not None:
        return "a grid of times is given"
    if request.checkpoint_every:
        return "checkpoint_every is given"
    if torch.is_grad_enabled() and grid.requires_grad:
        return "the times require grad"
    return None


def _refuse(reason: str) -> NoReturn:
    raise InputError(
        "option per_sample expects rtol and atol, dopri5, tsit5, bosh3 or dopri8, the final "
        "state, and a field that can be fused (see `explain`): on a CPU in float32 or float64, on "
        "a GPU in float32 (CUDA kernels do not take dopri8, Triton does), "
        f"but {reason}. Change that, or leave the option out: all rows then share their steps"
    )


def _raise(problem: Problem, found: PerSampleSolve, row: int) -> NoReturn:
    """Say why a row did not reach the end."""
    (outcome, ratio), y = found.kept.ended(row), found.y[row]
    t = found.kept.steps(row)[0][-1]
    at = f"in row {row} at t = {t}, step {int(found.accepted[row])}"
    if outcome == "too many steps":
        raise MaxStepsError(
            f"max_num_steps exceeded ({problem.options.max_num_steps}) {at}: loosen rtol and atol "
            "or raise max_num_steps"
        )
    if outcome == "underflow" and math.isfinite(ratio):
        raise StepUnderflowError(
            f"underflow in dt {at}, last error ratio {ratio:.3g}: loosen rtol "
            "and atol, integrate in float64, or bound the steps with min_step"
        )
    if outcome == "underflow":
        raise NonFiniteError(
            f"underflow in dt {at}: every smaller step gave NaN or infinite values. The field has "
            "a singularity there, or the solution blows up"
        )
    if bool(torch.isfinite(y).all()) and not bool((problem.atol + problem.rtol * y.abs()).all()):
        raise InputError(
            f"atol + rtol |y| must be positive everywhere, got rtol = {problem.rtol}, atol = "
            f"{problem.atol} and a smallest |y| of 0 in row {row}: give atol > 0"
        )
    what = "the field" if bool(torch.isfinite(y).all()) else "the state"
    raise NonFiniteError(
        f"non-finite values in {what} {at}: expected finite numbers. Check the initial state, the "
        "field there, or its parameters (a diverged training run?)"
    )
