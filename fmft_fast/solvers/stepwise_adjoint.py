"""The exact gradient of steps that solve equations or look back, in memory O(steps x state).

A step takes z_n = (y_n, history of the stepper) to z_{n+1}. With lambda = dL/dz_{n+1},

    lambda <- (dz_{n+1}/dz_n)^T lambda      pbar <- pbar + (dz_{n+1}/dp)^T lambda

The forward pass keeps every z_n. The backward pass takes the steps once more, the last one first,
each with a graph of its own: the gradient is that of the iterations that solved the equations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import GradientError
from .fixed import Grid, Stepper, step_sizes, warn_non_finite
from .inputs import NormalisedField, Perturb, Problem
from .replay import GradientSums, KnownTensors, Surroundings, vjp, without_hooks
from .stats import SolveStats, report


@dataclass
class StepwisePlan:
    """A solve on the grid problem.t [N + 1], apart from the tensors that get gradients.

    Attributes:
        problem: the problem; its t is replaced by the argument of the solve.
        make_stepper: makes the steps of a problem's method.
    """

    problem: Problem
    make_stepper: Callable[[Problem], Stepper]


class StepwiseSolve(torch.autograd.Function):
    """Forward: steps without a graph. Backward: each step again, with one.

    Inputs: plan, x0 [*state], t [N + 1], and the other tensors that get gradients.
    """

    @staticmethod
    def forward(ctx, plan: StepwisePlan, x0, t, *params):
        """Run the steps; the first evaluation also looks for gradients that would be lost."""
        around = Surroundings(plan.problem.field.base, x0.device)
        field = _WatchedField(plan.problem.field, around, KnownTensors(params))
        stepper = plan.make_stepper(replace(plan.problem, field=field))
        y, nodes = x0.detach(), t.detach().unbind()
        starts, states = [], [y]
        for n, (t0, t1) in enumerate(zip(nodes[:-1], nodes[1:], strict=True)):
            if n:
                around.note(n, 0)
            starts.append((y, *stepper.history))
            y, _ = stepper.step(t0, t1, t1 - t0, y)
            states.append(y)
        around.end()
        plan.problem.field.evaluations = field.evaluations
        ctx.plan, ctx.around, ctx.starts, ctx.nodes = plan, around, starts, nodes
        ctx.params = params
        # Only so that torch refuses a backward pass after one of them was changed in place.
        ctx.save_for_backward(x0, *params)
        return torch.stack(states)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take the steps back."""
        if torch.is_grad_enabled():
            raise GradientError(
                "the discrete adjoint is differentiable once, but create_graph=True asks for more: "
                'use gradient="backprop" for second derivatives'
            )
        run = _Backward(ctx)
        with run.around.unchanged(), without_hooks(run.leaves), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say was said in the forward pass
            return run.run(grad)


class _Backward:
    """One backward pass through the steps of a `StepwiseSolve`."""

    def __init__(self, ctx: Any):
        self.plan: StepwisePlan = ctx.plan
        self.around: Surroundings = ctx.around
        self.starts: list[tuple[Tensor, ...]] = ctx.starts
        self.nodes: Sequence[Tensor] = ctx.nodes
        self.params: tuple[Tensor, ...] = ctx.params
        _ = ctx.saved_tensors  # raises if one was changed in place
        _, _, self.t_wanted, *self.params_wanted = ctx.needs_input_grad
        self.leaves = [p for p, w in zip(self.params, self.params_wanted, strict=True) if w]
        self.known = KnownTensors(self.leaves)
        self.sums = GradientSums(len(self.leaves))
        self.t_bars = [torch.zeros_like(t) for t in self.nodes]
        self.field = _RepeatedField(self.plan.problem.field)
        self.stepper = self.plan.make_stepper(replace(self.plan.problem, field=self.field))

    def run(self, grad: Tensor) -> tuple:
        """Gradients of all inputs of the forward pass."""
        bars: list[Tensor | None] = [grad[-1]]
        for n in range(len(self.starts) - 1, -1, -1):
            y_bar, *history_bars = self.step_back(n, bars)
            bars = [grad[n] if y_bar is None else grad[n] + y_bar, *history_bars]
        sums = iter(self.sums.totals)
        params = [next(sums) if wanted else None for wanted in self.params_wanted]
        cast = [g if g is None else g.to(p.dtype) for g, p in zip(params, self.params, strict=True)]
        return None, bars[0], torch.stack(self.t_bars) if self.t_wanted else None, *cast

    def step_back(self, n: int, bars: list[Tensor | None]) -> list[Tensor | None]:
        """From dL/dz_{n+1} to dL/dz_n; the other gradients are added up on the way."""
        t0, t1 = (t.detach().requires_grad_(self.t_wanted) for t in self.nodes[n : n + 2])
        start = [z.detach().requires_grad_() for z in self.starts[n]]
        self.stepper.history = tuple(start[1:])
        self.field.results.clear()
        with torch.enable_grad(), self.around.autocasting():
            self.around.restore(n, 0)
            y, _ = self.stepper.step(t0, t1, t1 - t0, start[0])
        self.check(n, y, *start, t0, t1)
        reached = [
            (end, bar)
            for end, bar in zip((y, *self.stepper.history), bars, strict=False)
            if bar is not None and end.requires_grad
        ]
        times = [t0, t1] if self.t_wanted else []
        grads = vjp(
            [end for end, _ in reached],
            [*self.leaves, *start, *times],
            [bar for _, bar in reached],
        )
        for m, t in enumerate(times):
            t_bar = grads[m - 2]
            if t_bar is not None:
                self.t_bars[n + m] = self.t_bars[n + m] + t_bar.to(t.dtype)
        count = len(self.leaves)
        self.sums.add(grads[:count])
        return grads[count : count + len(start)]

    def check(self, n: int, y: Tensor, *own: Tensor) -> None:
        """Look for a field that changed."""
        results = self.field.results
        if n == 0:
            self.around.check(results[0], self.around.first)
        if n == len(self.starts) - 1:
            self.around.check(results[-1], self.around.last)
        self.known.refuse_lost(y, *own)


class _WatchedField(NormalisedField):
    """The field of the forward pass: the graph of its first evaluation is looked at."""

    def __init__(self, field: NormalisedField, around: Surroundings, known: KnownTensors):
        super().__init__(field.base, field.shapes, field.dtype, field.direction)
        self.around, self.known = around, known

    def __call__(self, t: Tensor, y: Tensor, perturb: Perturb = Perturb.NONE) -> Tensor:
        if self.evaluations:
            k = super().__call__(t, y, perturb)
            self.around.keep(k)
            return k
        self.around.begin()
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            k = super().__call__(t, leaf, perturb)
        self.around.compare(k)
        self.known.refuse_doubled(self.known.refuse_lost(k, leaf))
        return k.detach()


class _RepeatedField(NormalisedField):
    """The field of the backward pass, whose results are kept for comparison."""

    def __init__(self, field: NormalisedField):
        super().__init__(field.base, field.shapes, field.dtype, field.direction)
        self.results: list[Tensor] = []

    def __call__(self, t: Tensor, y: Tensor, perturb: Perturb = Perturb.NONE) -> Tensor:
        k = super().__call__(t, y, perturb)
        self.results[1:] = [k.detach()]  # the first and the last one
        return k


def solve_stepwise(plan: StepwisePlan, params: Sequence[Tensor]) -> Tensor:
    """The states [N + 1, *state] of a solve whose gradient is the discrete adjoint.

    Raises:
        GradientError: the field depends on a tensor that requires grad and is not in `params`.
    """
    problem = plan.problem
    x0 = problem.y0.clone() if problem.y0.is_inference() else problem.y0
    y = StepwiseSolve.apply(plan, x0, problem.t, *params)
    assert isinstance(y, Tensor)
    t = problem.t.detach()
    grid = Grid(t, step_sizes(t), [])
    warn_non_finite(problem, lambda: plan.make_stepper(problem), grid, y[-1])
    last = abs(grid.h[-1]) if isinstance(grid.h[-1], float) else None
    report(SolveStats(problem.method, problem.field.evaluations, len(grid.h), 0, last))
    return y
