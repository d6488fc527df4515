"""What `solve` does with its arguments: check them, lay out the steps, run, and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import GradientError, InputError, InputTypeError
from ..fusion import NotFusable
from ..ops.backend import choose_kernels
from ..ops.capture import place
from ..ops.contract import is_traced, is_transformed
from ..ops.finite import all_finite
from .accepted_steps import find_accepted_steps
from .adaptive import AdaptiveSolver
from .closure import leaves_of
from .continuous_adjoint import odeint_adjoint
from .discrete_adjoint import DiscretePlan, DiscreteSolve, StageField
from .drop_in import make_stepper, odeint
from .fixed import Layout, equal_steps, stage_times, step_sizes
from .graphs import find_graphs
from .grids import make_grid
from .inputs import Problem, normalise, real_dtype
from .methods import find_method
from .repeated import PLAIN_TENSORS, remember, solve_kind
from .replay import KnownTensors
from .single_steps import find_not_finite, refuse_changes, remember_steps, unroll, versions_of
from .stats import SolveStats, record_stats, report
from .stepwise_adjoint import StepwisePlan, solve_stepwise
from .tableau import Tableau
from .whole_solve import (
    find_route,
    make_program,
    obstacle,
    route_or_none,
    stats_of,
)

Gradient = Literal["discrete", "continuous", "backprop", "none"]
GRADIENTS = ("discrete", "continuous", "backprop", "none")


@dataclass(frozen=True)
class Solution:
    """Result of `solve`.

    Attributes:
        y: final state [*state], or [len(t), *state] with save="all".
        t: [N + 1] float64 times of the states of the solve.
        stats: evaluations, accepted and rejected steps, last step size.
    """

    y: Tensor
    t: Tensor
    stats: SolveStats

    @property
    def status(self) -> str:
        """Either "success" or, with NaN or infinity in y, "non-finite" (reads the device)."""
        return "success" if bool(torch.isfinite(self.y.detach()).all()) else "non-finite"


@dataclass
class SolveRequest:
    """The arguments of one call of `solve`, checked."""

    field: Callable[..., Tensor]
    x0: Tensor
    t0: float | Tensor
    t1: float | Tensor
    method: str
    tableau: Tableau | None
    steps: int | Tensor | None
    rtol: float | None
    atol: float | None
    gradient: Gradient
    save: str
    backend: str
    cond: Tensor | None
    params: Iterable[Tensor]
    table: Tensor | None
    checkpoint_every: int
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.x0, Tensor):
            raise InputTypeError(
                f"x0 must be a torch.Tensor, got {type(self.x0).__name__}; tuples go to odeint"
            )
        if not (self.x0.is_floating_point() or self.x0.is_complex()):
            raise InputTypeError(f"x0 must be floating point or complex, got {self.x0.dtype}")
        if self.gradient not in GRADIENTS:
            raise InputError(f"gradient must be one of {GRADIENTS}, got {self.gradient!r}")
        if self.save not in ("final", "all"):
            raise InputError(f'save must be "final" or "all", got {self.save!r}')
        if not isinstance(self.checkpoint_every, int) or self.checkpoint_every < 0:
            raise InputError(f"checkpoint_every must be an int >= 0, got {self.checkpoint_every!r}")
        if self.cond is not None and not isinstance(self.cond, Tensor):
            raise InputTypeError(
                f"cond must be one torch.Tensor, got {type(self.cond).__name__}: concatenate "
                "several, or close over them and pass them in params"
            )
        self._check_method()
        single = isinstance(self.params, (Tensor, nn.Module))
        given: tuple[Any, ...] = (self.params,) if single else tuple(self.params)
        if wrong := [p for p in given if not isinstance(p, Tensor)]:
            raise InputTypeError(
                f"params must be tensors, got {type(wrong[0]).__name__}; for a module pass "
                "module.parameters()"
            )
        self.params = given
        self.keeps_graph = torch.is_grad_enabled() and self.gradient != "none"

    @cached_property
    def leaves(self) -> tuple[Tensor, ...]:
        """What requires grad of what the field holds and of `params`, each once."""
        held = leaves_of(self.field)
        unique = {id(p): p for p in (*held, *self.params) if p.requires_grad}
        return tuple(unique.values())

    def _check_method(self) -> None:
        family = find_method(self.method).family
        if not self.adaptive and self.steps is None:
            raise InputError("give steps=N (or a grid of times), or rtol and atol")
        if self.adaptive and family not in ("adaptive", "scipy"):
            raise InputError(
                f"{self.method} has no step control: give steps instead of rtol and atol, or use "
                "dopri5, tsit5, bosh3, dopri8, fehlberg2 or adaptive_heun"
            )
        if self.adaptive and not (self.steps is None or isinstance(self.steps, Tensor)):
            raise InputError("give steps=N or tolerances, not both; a grid goes with tolerances")
        if self.adaptive and self.table is not None:
            raise InputError("a time table needs fixed steps: adaptive ones are not known before")
        if "jump_t" in self.options or "grid_constructor" in self.options:
            raise InputError("put the times of jumps and grids into steps (a grid of times)")
        own_steps = self.tableau is not None and self.gradient != "continuous"
        if self.table is not None and not own_steps:
            raise InputError(
                "a time table needs an explicit Runge-Kutta method and a gradient other than "
                f'"continuous", got {self.method} and {self.gradient!r}'
            )
        if self.options and own_steps and not self.adaptive:
            raise InputError(
                f"explicit methods with fixed steps have no options, got {sorted(self.options)}: "
                "lay out the steps by steps=N or a grid of times"
            )
        if self.gradient == "discrete" and self.tableau is None:
            self._check_stepwise()
        if self.gradient in ("discrete", "backprop") and family == "scipy":
            raise GradientError(
                f"{self.method} works outside of torch and has no graph: use "
                'gradient="continuous" or "none"'
            )
        if self.gradient == "continuous" and family == "adaptive" and not self.adaptive:
            raise InputError(f'gradient="continuous" with {self.method} needs rtol and atol')

    def _check_stepwise(self) -> None:
        """Look for what the discrete adjoint of methods without explicit stages does not take."""
        if "step_size" in self.options:
            raise InputError(
                f"the discrete adjoint of {self.method} steps from time to time: lay out the steps "
                "by steps=N or a grid of times instead of option step_size"
            )
        if self.checkpoint_every:
            raise InputError(
                f"checkpoint_every is for explicit Runge-Kutta methods, got {self.method}"
            )

    @property
    def adaptive(self) -> bool:
        """Whether tolerances were given."""
        return self.rtol is not None or self.atol is not None

    @property
    def tolerances(self) -> dict[str, float]:
        """The tolerances with their defaults."""
        return {
            "rtol": 1e-5 if self.rtol is None else self.rtol,
            "atol": 1e-5 if self.atol is None else self.atol,
        }

    def call(self, t: Tensor, x: Tensor) -> Tensor:
        """The field with its condition."""
        return self.field(t, x) if self.cond is None else self.field(t, x, self.cond)

    def by_odeint(self) -> Solution:
        """Solve by the torchdiffeq-compatible functions, over the grid or the given times."""
        t = make_grid(self.t0, self.t1, self.steps).to(self.x0.device)
        tolerances = self.tolerances if self.adaptive else {"rtol": 1e-7, "atol": 1e-9}
        common: dict[str, Any] = {"method": self.method, "options": self.options, **tolerances}
        params = (*self.leaves, *(() if self.cond is None else (self.cond,)))
        with record_stats() as log:
            if self.gradient == "continuous":
                self._refuse_lost_gradients(t[0])
                y = odeint_adjoint(self.call, self.x0, t, **common, adjoint_params=params)
            elif self.gradient == "discrete" and self.keeps_graph and not is_transformed():
                problem = normalise(self.call, self.x0, t, **common)
                y = solve_stepwise(StepwisePlan(problem, make_stepper), params)
                y = problem.restore(y, (len(t),))
            else:
                with torch.set_grad_enabled(self.keeps_graph):
                    y = odeint(self.call, self.x0, t, **common)
        return Solution(y if self.save == "all" else y[-1], t.detach(), log[-1])

    def _refuse_lost_gradients(self, t: Tensor) -> None:
        """Raise if the field depends on an unknown tensor that requires grad."""
        if self.keeps_graph:
            with torch.enable_grad():
                leaf = self.x0.detach().requires_grad_()
                k = self.call(t.detach().to(real_dtype(leaf.dtype)), leaf)
            known = (*self.leaves, *(() if self.cond is None else (self.cond,)))
            KnownTensors(known).refuse_lost(k, leaf)

    def by_steps(self) -> Solution:
        """Solve by explicit Runge-Kutta steps."""
        assert self.tableau is not None
        compiling = torch.compiler.is_compiling()
        discrete = self.keeps_graph and self.gradient == "discrete"
        if compiling or is_transformed():
            discrete = False  # they derive the same gradient from the unrolled steps
        dtype = self.x0.dtype
        x = self.x0.float() if dtype in (torch.float16, torch.bfloat16) else self.x0
        if discrete and x.is_inference():
            x = x.clone()  # an inference tensor cannot be kept for the backward pass
        tableau, layout = self.tableau.advancing, self._equal_steps()
        grid = make_grid(self.t0, self.t1, self.steps) if layout is None else layout.grid
        problem = self._problem(grid, x) if self.adaptive else None
        if not compiling:
            fused = self._in_one_call(grid, problem)
            if fused is not None:
                return fused
        kernels = choose_kernels(x, self.backend)
        known, control = None, None
        if problem is not None:
            keep_inputs = self.keeps_graph and not self.checkpoint_every
            grid, known, control = find_accepted_steps(problem, grid, kernels, keep_inputs)
        plan = DiscretePlan(
            field=StageField(self.field, dtype),
            tableau=tableau,
            kernels=kernels,
            h=step_sizes(grid.detach() if discrete else grid) if layout is None else layout.h,
            save_all=self.save == "all",
            checkpoint_every=self.checkpoint_every,
            known=known,
            own_times=self.table is None,
        )
        table = layout and layout.table
        if table is None:
            table = self._time_rows(tableau, grid.detach() if discrete else grid)
        versions = [] if compiling or is_traced() else versions_of(x, table)
        if discrete:
            y = DiscreteSolve.apply(plan, x, grid, table, self.cond, *self.leaves)
        elif known is not None and not self.keeps_graph:
            y = torch.stack(known[0]) if plan.save_all else known[0][-1]
        else:
            with torch.set_grad_enabled(self.keeps_graph):
                one_use = compiling or self.keeps_graph
                y = (unroll if one_use else _replay)(plan, x, table, self.cond)
        assert isinstance(y, Tensor)
        if versions:
            refuse_changes(versions, x, table)
        t = grid.detach()
        if self.adaptive and plan.save_all and isinstance(self.steps, Tensor):
            t = self.steps.detach().to(torch.float64)
            y = y[torch.isin(grid.detach(), t)]
        if not compiling:
            end = y[-1] if plan.save_all else y
            if y.device.type == "cpu" and not is_traced() and not all_finite(end.detach()):
                find_not_finite(plan, x, table, self.cond, grid)
            return Solution(y.to(dtype), t, self._report(plan, control, grid))
        return Solution(y.to(dtype), t, SolveStats(self.method, 0, len(plan.h)))

    def _equal_steps(self) -> Layout | None:
        """The steps, where they are equal ones on the host and nothing is at work around them."""
        if not (isinstance(self.t0, float) and isinstance(self.t1, float)):
            return None
        if type(self.steps) is not int or self.steps < 1 or self.adaptive:
            return None
        if self.table is not None or self.tableau is None:
            return None
        if type(self.x0) not in PLAIN_TENSORS or not self.x0.is_cpu:
            return None
        if torch._C._len_torch_function_stack() or is_traced():
            return None
        dtype = real_dtype(self.x0.dtype)
        return equal_steps(self.tableau.advancing, self.t0, self.t1, self.steps, dtype)

    def _problem(self, grid: Tensor, x: Tensor) -> Problem:
        """What the step control is given."""
        return normalise(
            self.call,
            self.x0,
            grid.detach().to(x.device),
            rtol=self.tolerances["rtol"],
            atol=self.tolerances["atol"],
            method=self.method,
            options=self.options,
        )

    def _obstacle(self, grid: Tensor, problem: Problem | None) -> str | None:
        """What of the call, apart from the field, stands in the way of one kernel call."""
        if self.table is not None:
            return "a time table is given"
        if self.checkpoint_every:
            return "checkpoint_every is given"
        if torch.is_grad_enabled() and grid.requires_grad:
            return "the times require grad"
        if problem is not None and self.save == "all" and not isinstance(self.steps, Tensor):
            return "all states of adaptive steps are wanted"
        return None if problem is None else obstacle(problem)

    def _in_one_call(self, grid: Tensor, problem: Problem | None) -> Solution | None:
        """The solution by whole-trajectory kernels; None if they do not take it.

        Also None if it is not finite or the step control gives up: the single steps find out where.
        """
        assert self.tableau is not None
        adaptive = problem is not None
        tableau = self.tableau if adaptive else self.tableau.advancing
        reason = self._obstacle(grid, problem)
        found = (
            find_route(self.field, self.x0, tableau.stages, self.backend, self.cond, adaptive)
            if reason is None
            else NotFusable(reason)
        )
        route, kind = route_or_none(found), self._kind()
        if route is None:
            if kind is not None and not self.keeps_graph:
                remember_steps(kind, self.field, found, self.x0, self.cond, self.save == "all")
            return None
        low_memory, t = self.gradient == "discrete", grid
        with torch.set_grad_enabled(self.keeps_graph):
            if problem is not None:
                solved = route.solve_adaptively(problem, low_memory, meet=True)
                if solved is None:
                    return None
                y, stats = solved[0], stats_of(self.method, solved[1])
                if self.save == "final":
                    y, t = y[-1], torch.cat((solved[1].program.times[:, 0], grid[-1:].cpu()))
            else:
                steps = len(grid) - 1
                wanted = tuple(range(steps + 1)) if self.save == "all" else (steps,)
                program = make_program(
                    route.plan.network, tableau, grid.tolist(), grid.dtype, self.x0.dtype, wanted
                )
                states = route.solve(program, self.x0, low_memory)
                if states is None:
                    return None
                y = states if self.save == "all" else states[0]
                count = steps * program.stages
                stats = SolveStats(self.method, count, steps, 0, program.last_step)
                if kind is not None:
                    final = self.save == "final"
                    remember(kind, (self.x0,), route, program, low_memory, stats, final)
        report(stats)
        return Solution(y, t, stats)

    def _kind(self) -> tuple | None:
        """The kind of this call for `solve_again`."""
        if self.adaptive or self.params or self.backend != "auto":
            return None
        times = self.t0, self.t1
        return solve_kind(times, self.steps, self.method, self.gradient, self.save)

    def _time_rows(self, tableau: Tableau, grid: Tensor) -> Tensor:
        """[N, s, ...]: what the field gets as t."""
        if self.table is None:
            real = real_dtype(self.x0.dtype)
            return place(stage_times(tableau, grid, real), self.x0.device)
        expected = (len(grid) - 1, tableau.stages)
        if tuple(self.table.shape[:2]) != expected:
            raise InputError(
                f"time_table must begin with [steps, stages] = {list(expected)}, got shape "
                f"{tuple(self.table.shape)}; see stage_time_table"
            )
        return self.table

    def _report(
        self, plan: DiscretePlan, control: AdaptiveSolver | None, grid: Tensor
    ) -> SolveStats:
        last = plan.h[-1]
        stats = SolveStats(
            self.method,
            plan.field.evaluations + (control.field.evaluations if control else 0),
            len(grid) - 1,
            control.rejected if control else 0,
            abs(last) if isinstance(last, float) else None,
        )
        report(stats)
        return stats


def _replay(plan: DiscretePlan, x: Tensor, table: Tensor, cond: Tensor | None) -> Tensor:
    """All steps without a graph, from their recording where there is one."""
    graphs = find_graphs(plan, x, table, cond)
    replayed = graphs.forward(x, keep=plan.save_all) if graphs is not None else None
    if replayed is not None:
        return torch.stack(replayed[0]) if plan.save_all else replayed[0][-1]
    y = unroll(plan, x, table, cond)
    if graphs is not None:
        graphs.settle()
    return y
