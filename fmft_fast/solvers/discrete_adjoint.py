"""The exact gradient of a discretised solve, in memory O(steps x state).

With the stages k_i = f(t_i, Y_i), Y_i = y_n + h sum_j a_ij k_j, y_{n+1} = y_n + h sum_i b_i k_i and
lambda = dL/dy_{n+1}, one step back is, from the last stage to the first,

    kbar_i = h (b_i lambda + sum_{j > i} a_ji ybar_j)      ybar_i = (df/dy)^T kbar_i
    lambda <- lambda + sum_i ybar_i                        pbar <- pbar + (df/dp)^T kbar_i

The forward pass keeps the stage inputs Y_i (or every k-th state, from which they are computed
again); the backward pass evaluates the field once more at each of them, one graph at a time.

Source: Hager, "Runge-Kutta methods in optimal control and the transformed adjoint system",
Numer. Math. 87 (2000); Sanz-Serna, "Symplectic Runge-Kutta schemes for adjoint equations",
SIAM Review 58 (2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import GradientError
from ..ops.backend import StepKernels
from .fixed import Step
from .graphs import find_graphs
from .inputs import expand_result
from .replay import GradientSums, KnownTensors, Surroundings, vjp, without_hooks
from .tableau import Tableau


class StageField:
    """The user's field(t, x) or field(t, x, cond) on the state of the solver, with a count.

    Args:
        base: the user's callable.
        dtype: dtype of the user's state; a half-precision field works on a rounded copy of the
            float32 state of the solver.
    """

    def __init__(self, base: Callable[..., Tensor], dtype: torch.dtype):
        self.base = base
        self.dtype = dtype
        self.evaluations = 0

    def __call__(self, t: Tensor, y: Tensor, cond: Tensor | None = None) -> Tensor:
        """Evaluate at t (0-d, or a row of a time table) and y [*state]."""
        self.evaluations += 1
        x = y if y.dtype == self.dtype else y.to(self.dtype)
        f = self.base(t, x) if cond is None else self.base(t, x, cond)
        return f if f.shape == y.shape else expand_result(f, y)


@dataclass
class DiscretePlan:
    """What a discrete solve does, apart from the tensors that get gradients.

    Attributes:
        field: the field.
        tableau: explicit, without a FSAL stage.
        kernels: the step ops.
        h: [N] signed steps.
        save_all: whether the result is [N + 1, *state] or the final state.
        checkpoint_every: keep every so many states only; 0 keeps all stage inputs.
        known: states [N + 1], stage inputs [N][s] and first slope of a solve that was done already.
        own_times: whether the field gets the times of the grid (or what a user's table holds).
    """

    field: StageField
    tableau: Tableau
    kernels: StepKernels
    h: Sequence[Step]
    save_all: bool
    checkpoint_every: int = 0
    known: tuple[list[Tensor], list[list[Tensor]], Tensor] | None = None
    own_times: bool = True

    def step(
        self, n: int, y: Tensor, evaluate: Callable[[int, int, Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Step n with k_i = evaluate(n, i, Y_i): the next state and the stage inputs."""
        combine, h = self.kernels.rk_combine, self.h[n]
        k: list[Tensor] = []
        inputs: list[Tensor] = []
        for i, row in enumerate(self.tableau.a):
            inputs.append(combine(y, k, h, row) if i else y)
            k.append(evaluate(n, i, inputs[i]))
        return combine(y, k, h, self.tableau.b), inputs

    def step_back(self, h: Step, lam: Tensor, pull: Callable[[int, Tensor], Tensor]) -> Tensor:
        """From dL/dy_{n+1} to dL/dy_n, with ybar_i = pull(i, kbar_i)."""
        a, b, combine = self.tableau.a, self.tableau.b, self.kernels.rk_combine
        bars: list[Tensor] = []  # ybar of the stages after i, the last stage first
        for i in range(self.tableau.stages - 1, -1, -1):
            k_bar = lam * (h * b[i])
            if bars:
                later = range(self.tableau.stages - 1, i, -1)
                k_bar = combine(k_bar, bars, h, tuple(a[j][i] for j in later))
            bars.append(pull(i, k_bar))
        return combine(lam, bars, 1.0, (1.0,) * len(bars))


class DiscreteSolve(torch.autograd.Function):
    """Forward: steps without a graph. Backward: the discrete adjoint.

    Inputs: plan, x0 [*state], grid [N + 1] (for its gradient), table [N, s, ...] of what the field
    gets as t in every stage, cond or None, and the parameters.
    """

    @staticmethod
    def forward(ctx, plan: DiscretePlan, x0, grid, table, cond, *params):
        """Run the steps; the first evaluation also looks for gradients that would be lost."""
        times = [row.unbind() for row in table.detach().unbind()]
        around = Surroundings(plan.field.base, x0.device)
        known = KnownTensors(t for t in (cond, *params) if t is not None)

        def evaluate(n: int, i: int, y: Tensor) -> Tensor:
            if n or i:
                around.note(n, i)
                k = plan.field(times[n][i], y, cond)
                around.keep(k)
                return k
            around.begin()
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                k = plan.field(times[n][i], leaf, cond)
            around.compare(k)
            known.refuse_doubled(known.refuse_lost(k, leaf))
            return k.detach()

        graphs = find_graphs(plan, x0, table, cond, params)
        replayed = graphs.forward(x0) if graphs and plan.known is None else None
        if replayed is not None:
            states, inputs = replayed
            around.settled()
        elif plan.known is not None:
            states, inputs, slope = plan.known
            evaluate(0, 0, states[0])
            around.end_adaptive(slope)
        else:
            states, inputs = [x0.detach()], []
            for n in range(len(plan.h)):
                y, stages = plan.step(n, states[-1], evaluate)
                states.append(y)
                inputs.append([] if plan.checkpoint_every else stages)
            around.end()
        if graphs is not None and replayed is None:
            graphs.settle()
        if any(ctx.needs_input_grad):
            ctx.plan, ctx.times, ctx.around = plan, times, around
            ctx.inputs, ctx.graphs = inputs, graphs
            ctx.checkpoints = states[:: plan.checkpoint_every] if plan.checkpoint_every else []
            ctx.params, ctx.cond = params, cond
            ctx.grid_device = grid.device
            # Only so that torch refuses a backward pass after one of them was changed in place.
            ctx.save_for_backward(x0, cond, *params)
            plan.known = None
        return torch.stack(states) if plan.save_all else states[-1].clone()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the discrete adjoint."""
        if torch.is_grad_enabled():
            raise GradientError(
                "the discrete adjoint is differentiable once, but create_graph=True asks for more: "
                'use gradient="backprop" for second derivatives'
            )
        run = _Backward(ctx)
        with run.around.unchanged(), without_hooks(run.leaves):
            return run.run(grad)


class _Backward:
    """One backward pass through the steps of a `DiscreteSolve`."""

    def __init__(self, ctx: Any):
        self.plan: DiscretePlan = ctx.plan
        self.around: Surroundings = ctx.around
        self.times = ctx.times
        self.inputs: list[list[Tensor]] = list(ctx.inputs)
        self.checkpoints: list[Tensor] = ctx.checkpoints
        _ = ctx.saved_tensors  # raises if one was changed in place
        self.cond = None if ctx.cond is None else ctx.cond.detach()
        self.params = ctx.params
        _, self.x0_grad, self.grid_grad, self.table_grad, cond_grad, *params_grad = (
            ctx.needs_input_grad
        )
        self.leaves = [p for p, wanted in zip(self.params, params_grad, strict=True) if wanted]
        self.params_grad = params_grad
        self.cond_grad = self.cond is not None and cond_grad
        if self.cond_grad:
            assert self.cond is not None
            self.leaves.append(self.cond.requires_grad_())
        self.known = KnownTensors(self.leaves)
        self.sums = GradientSums(len(self.leaves))
        self.grid_device = ctx.grid_device
        self.time_wanted = self.table_grad or (self.grid_grad and self.plan.own_times)
        self.time_bars: list[list[Tensor]] = []
        if self.time_wanted:
            self.time_bars = [[torch.zeros_like(t) for t in row] for row in self.times]
        self.h_bars: list[Tensor] = []
        self.graphs = None if self.time_wanted or self.grid_grad else ctx.graphs

    def run(self, grad: Tensor) -> tuple:
        """Gradients of all inputs of the forward pass."""
        lam = self.replayed(grad)
        if lam is None:
            lam = self.all_steps_back(grad)
        sums = iter(self.sums.totals)
        params = [next(sums) if wanted else None for wanted in self.params_grad]
        cond = next(sums) if self.cond_grad else None
        cast = [g if g is None else g.to(p.dtype) for g, p in zip(params, self.params, strict=True)]
        return (
            None,
            lam if self.x0_grad else None,
            self.grid_gradient() if self.grid_grad else None,
            self.stacked_time_bars() if self.table_grad else None,
            cond if cond is None or self.cond is None else cond.to(self.cond.dtype),
            *cast,
        )

    def replayed(self, grad: Tensor) -> Tensor | None:
        """dL/dx0 by recorded steps; None where there are none."""
        graphs = self.graphs
        found = graphs and graphs.backward(grad, self.inputs, self.leaves, self.cond_grad)
        if found is None:
            return None
        lam, self.sums.totals = found
        return lam

    def all_steps_back(self, grad: Tensor) -> Tensor:
        """From the gradient of the result to dL/dx0."""
        every, steps = self.plan.save_all, len(self.plan.h)
        lam = grad[steps] if every else grad
        for n in range(steps - 1, -1, -1):
            lam = self.step_back(n, lam)
            if every:
                lam = lam + grad[n]
        return lam

    def step_back(self, n: int, lam: Tensor) -> Tensor:
        """From dL/dy_{n+1} to dL/dy_n; the other gradients are added up on the way."""
        h, inputs = self.plan.h[n], self.stage_inputs(n)
        h_bar: Tensor | float = 0.0

        def pull(i: int, k_bar: Tensor) -> Tensor:
            nonlocal h_bar
            wanted = self.x0_grad or n > 0 or i > 0
            y_bar, k = self.stage_back(n, i, inputs[i], k_bar, wanted)
            if self.grid_grad:
                h_bar = h_bar + (k_bar.conj() * k).real.sum(dtype=torch.float64) / h
            return y_bar

        lam = self.plan.step_back(h, lam, pull)
        if isinstance(h_bar, Tensor):
            self.h_bars.append(h_bar)
        self.inputs[n] = []
        return lam

    def stage_inputs(self, n: int) -> list[Tensor]:
        """Y_i of step n, computed again from the last checkpoint where they were not kept."""
        every = self.plan.checkpoint_every
        if not self.inputs[n]:
            start = n - n % every
            y = self.checkpoints[n // every]

            def evaluate(m: int, i: int, y_i: Tensor) -> Tensor:
                self.around.restore(m, i)
                return self.plan.field(self.times[m][i], y_i, self.cond)

            with self.around.autocasting():
                for m in range(start, n + 1):
                    y, self.inputs[m] = self.plan.step(m, y, evaluate)
        return self.inputs[n]

    def stage_back(
        self, n: int, i: int, y: Tensor, k_bar: Tensor, y_wanted: bool
    ) -> tuple[Tensor, Tensor]:
        """Vector-Jacobian products of one evaluation: ybar_i, and k_i for the gradient of h."""
        time_wanted = self.time_wanted
        t = self.times[n][i].detach().requires_grad_(time_wanted)
        with torch.enable_grad(), self.around.autocasting():
            y = y.detach().requires_grad_(y_wanted)
            self.around.restore(n, i)
            k = self.plan.field(t, y, self.cond)
        self.check(n, i, k, t, y)
        inputs = [*self.leaves, *((y,) if y_wanted else ()), *((t,) if time_wanted else ())]
        grads: list[Tensor | None] = [None] * len(inputs)
        if k.requires_grad and inputs:
            grads = vjp([k], inputs, [k_bar])
        if time_wanted and (time_bar := grads.pop()) is not None:
            self.time_bars[n][i] = time_bar
        y_bar = grads.pop() if y_wanted else None
        self.sums.add(grads)
        return torch.zeros_like(k_bar) if y_bar is None else y_bar, k.detach()

    def check(self, n: int, i: int, k: Tensor, t: Tensor, y: Tensor) -> None:
        """Look for a field that changed; once per step, since a walk of the graph takes time."""
        if n == i == 0:
            self.around.check(k, self.around.first)
        if i == self.plan.tableau.stages - 1:
            if n == len(self.plan.h) - 1 and self.around.last is not self.around.first:
                self.around.check(k, self.around.last)
            self.known.refuse_lost(k, t, y)

    def stacked_time_bars(self) -> Tensor:
        """dL/dtable [N, s, ...]."""
        return torch.stack([torch.stack(row) for row in self.time_bars])

    def grid_gradient(self) -> Tensor:
        """dL/dgrid [N + 1] from t_i = t_n + c_i h, h = t_{n+1} - t_n."""
        h_bars = torch.stack(self.h_bars[::-1])
        t_bars = torch.zeros_like(h_bars)
        if self.plan.own_times:
            bars = self.stacked_time_bars().to(torch.float64)
            c = torch.tensor(self.plan.tableau.c, dtype=torch.float64, device=bars.device)
            h_bars = h_bars + bars @ c
            t_bars = bars.sum(1)
        zero = h_bars.new_zeros(1)
        ends = torch.cat((t_bars - h_bars, zero)) + torch.cat((zero, h_bars))
        return ends.to(self.grid_device)
