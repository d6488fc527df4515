"""The torchdiffeq-compatible face: `odeint`, `odeint_dense`, `odeint_event`.

Gradients are those of the computation itself (backpropagation through the solver); see
`continuous_adjoint` for `odeint_adjoint` and `solution` for the exact discrete adjoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from ..fusion import NotFusable
from ..ops.backend import choose_kernels
from .adaptive import (
    AdaptiveSolver,
    integrate_adaptive,
    integrate_adaptive_dense,
    integrate_adaptive_until_event,
)
from .bdf import BDF2Stepper
from .dense import DenseSolution, hermite_coefficients
from .events import attach_event_gradient, combine_events
from .fixed import (
    RKStepper,
    Stepper,
    integrate_fixed,
    integrate_fixed_until_event,
    make_grid,
)
from .implicit import BroydenStepper
from .inputs import NormalisedField, Problem, State, normalise
from .multistep import AdamsStepper
from .scipy_bridge import integrate_with_scipy
from .stats import SolveStats, report
from .whole_solve import integrate_fused, odeint_again, route_or_none


def odeint(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable | None = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, and return the solution at every t.

    Same signature, semantics and options as torchdiffeq's `odeint`.

    Args:
        func: maps a 0-d tensor t and the state to the derivative of the state.
        y0: tensor of any shape (float32, float64, complex; bf16 and fp16 are integrated in
            float32), or a tuple of tensors; then func takes and returns tuples.
        t: [T] floating point times, strictly increasing or decreasing; t[0] belongs to y0.
        rtol, atol: tolerances of the adaptive and implicit methods; floats, or one per tuple part.
        method: a name in `fmft_fast.METHODS`; None is "dopri5".
        options: adaptive methods: first_step, safety, ifactor, dfactor, min_step, max_step,
            max_num_steps, dtype (of time), step_t, jump_t, norm. Fixed grids: step_size or
            grid_constructor (default: the steps lie between the given t), interp ("linear" or
            "cubic"), perturb. Adams: also max_order, max_iters; implicit and bdf2: max_iters.
            scipy_solver: solver, min_step, max_step.
        event_fn: maps (t, y) to a tensor; the solve ends at its first change of sign. t then holds
            the initial time and any second time that gives the direction.

    Returns:
        The solution [T, *y0.shape] (or a tuple of such), beginning with y0; with event_fn the pair
        (event time, solution at the initial and event times).

    Raises:
        UnknownMethodError: no such method.
        InputError, InputTypeError: an argument is wrong; the message says which and how.
        StepUnderflowError, NonFiniteError, MaxStepsError: an adaptive solve cannot go on.

    Example:
        >>> import torch
        >>> from fmft_fast import odeint
        >>> y = odeint(lambda t, y: -y, torch.ones(2, dtype=torch.float64),
        ...            torch.tensor([0.0, 1.0], dtype=torch.float64))
        >>> bool((y[-1] - torch.tensor(-1.0).exp()).abs().max() < 1e-6)
        True
    """
    if event_fn is not None:
        event_fn = _combine(event_fn, y0, t)
    elif not (options or torch.compiler.is_compiling()) and type(rtol) is type(atol) is float:
        again = odeint_again(func, y0, t, method)
        if again is not None:
            return again
    problem = normalise(
        func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
    )
    if event_fn is None:
        return problem.restore(integrate(problem), (len(t),))
    event_t, solution = integrate_until_event(problem)
    return event_t.to(t), problem.restore(solution, (2,))


def _combine(event_fn: Callable, y0: State, t: Any) -> Callable:
    if not isinstance(t, Tensor) or t.ndim != 1 or len(t) != 2:
        got = f"len(t)={len(t)}" if isinstance(t, Tensor) and t.ndim else f"{t!r}"
        raise InputError(f"We require len(t) == 2 when in event handling mode, but got {got}.")
    return combine_events(event_fn, t[0], y0)


def integrate(problem: Problem) -> Tensor:
    """The flat solution [T, *state] of a normalised problem."""
    y0, count = problem.y0, len(problem.t)
    if count == 1 or y0.numel() == 0:
        _report(problem, 0)
        if count > 1 and torch.is_grad_enabled():  # no numbers, but a place in the graph
            y0 = y0 + problem.field(problem.t[0], y0)
        return y0.expand(count, *y0.shape)
    solution = integrate_fused(problem)
    return _integrate_by_steps(problem) if solution is None else solution


def _integrate_by_steps(problem: Problem) -> Tensor:
    if problem.spec.family == "adaptive":
        solver = _adaptive_solver(problem)
        solution = integrate_adaptive(problem, solver)
        report(solver.stats())
    elif problem.spec.family == "scipy":
        solution = integrate_with_scipy(
            problem.field,
            problem.y0,
            problem.t,
            rtol=problem.rtol,
            atol=problem.atol,
            solver=problem.options.solver,
            min_step=problem.options.min_step,
            max_step=problem.options.max_step,
        )
        _report(problem, 0)
    else:
        solution, grid = integrate_fixed(problem, lambda: make_stepper(problem), problem.options)
        _report(problem, len(grid.h), grid.h[-1])
    return solution


def integrate_until_event(problem: Problem) -> tuple[Tensor, Tensor]:
    """Event time and the flat states [2, *state] at the initial and the event time."""
    route_or_none(NotFusable("the solve ends at an event"))
    if problem.spec.family == "adaptive":
        solver = _adaptive_solver(problem)
        result = integrate_adaptive_until_event(problem, solver)
        report(solver.stats())
        return result
    return integrate_fixed_until_event(problem, make_stepper(problem), problem.options)


def _adaptive_solver(problem: Problem) -> AdaptiveSolver:
    return AdaptiveSolver(problem, choose_kernels(problem.y0), problem.options)


def make_stepper(problem: Problem) -> Stepper:
    """The stepper of a fixed-grid method."""
    spec, options, field = problem.spec, problem.options, problem.field
    if spec.family == "adams":
        return AdamsStepper(
            field,
            problem.y0,
            implicit=spec.implicit,
            rtol=problem.rtol,
            atol=problem.atol,
            max_order=options.max_order,
            max_iters=options.max_iters,
            perturb=options.perturb,
        )
    if spec.family == "bdf":
        return BDF2Stepper(field, problem.y0, perturb=options.perturb, max_iters=options.max_iters)
    assert spec.tableau is not None
    if spec.family == "implicit":
        return BroydenStepper(
            field,
            problem.y0,
            spec.tableau,
            perturb=options.perturb,
            max_iters=options.max_iters,
            diagonal=spec.diagonal,
        )
    return RKStepper(field, spec.tableau, choose_kernels(problem.y0), options.perturb)


def _report(problem: Problem, accepted: int, h: Any = None) -> None:
    if not torch.compiler.is_compiling():
        last = abs(h) if isinstance(h, float) else None
        report(SolveStats(problem.method, problem.field.evaluations, accepted, 0, last))


def odeint_dense(
    func: Callable,
    y0: Tensor,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> DenseSolution:
    """Solve from t0 to t1 and return the solution as a function of time.

    Every method has dense output here: the quartic of the adaptive methods, the cubic Hermite
    polynomial through states and slopes on a fixed grid (give `step_size` or `grid_constructor`).

    Returns:
        A callable: t (number, 0-d or [T] tensor within [t0, t1]) to the state [*t.shape, *state].

    Raises:
        InputError, InputTypeError: see `odeint`; scipy_solver has no dense output here.

    Example:
        >>> import torch
        >>> from fmft_fast import odeint_dense
        >>> y = odeint_dense(lambda t, y: -y, torch.ones(2), torch.tensor(0.0), torch.tensor(1.0))
        >>> y(0.5).shape
        torch.Size([2])
    """
    if not isinstance(y0, Tensor):
        raise InputTypeError(f"odeint_dense takes a tensor y0, got {type(y0).__name__}")
    ends = [torch.as_tensor(x, device=y0.device) for x in (t0, t1)]
    if not all(x.is_floating_point() for x in ends):
        ends = [x.to(torch.float64) for x in ends]
    problem = normalise(
        func,
        y0,
        torch.stack([x.to(ends[0].dtype) for x in ends]),
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
    )
    route_or_none(NotFusable("dense output is a function of time"))
    if problem.spec.family == "scipy":
        raise InputError("scipy_solver has no dense output; use dopri5 or another method")
    if problem.spec.family == "adaptive":
        solver = _adaptive_solver(problem)
        dense = integrate_adaptive_dense(problem, solver)
        report(solver.stats())
        return dense
    return _fixed_dense(problem)


def _fixed_dense(problem: Problem) -> DenseSolution:
    grid = make_grid(problem, problem.options)
    states, slopes = [problem.y0], []
    for take_step in grid.steps_of(make_stepper(problem)):
        y, f = take_step(states[-1])
        states.append(y)
        slopes.append(f)
    slopes.append(problem.field(grid.t[-1], states[-1]))
    steps = (grid.t[1:] - grid.t[:-1]).to(problem.y0.abs().dtype)
    pieces = [
        hermite_coefficients(h, states[n], slopes[n], states[n + 1], slopes[n + 1])
        for n, h in enumerate(steps)
    ]
    _report(problem, len(pieces), grid.h[-1])
    return DenseSolution(grid.t, torch.stack(pieces), grid.t[-1].item())


def odeint_event(
    func: Callable,
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable,
    reverse_time: bool = False,
    odeint_interface: Callable = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve until event_fn(t, y) changes sign, with the gradient of the event time and state.

    Args:
        func, y0: as in `odeint`.
        t0: initial time, a tensor of one element.
        event_fn: maps (t, y) to a tensor; gradients also reach what it closes over.
        reverse_time: integrate towards smaller times.
        odeint_interface: `odeint` or `odeint_adjoint`.
        **kwargs: passed on to odeint_interface.

    Returns:
        Event time (0-d) and the solution at the initial and the event time.
    """
    start = t0.reshape(-1)
    step = -1.0 if reverse_time else 1.0
    t = torch.cat([start, start.detach() + step])
    event_t, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)

    parts = (solution,) if isinstance(solution, Tensor) else solution
    flat, shapes = parts[0][-1], None
    if isinstance(y0, tuple):
        shapes = [part.shape[1:] for part in parts]
        flat = torch.cat([part[-1].reshape(-1) for part in parts])
    field = NormalisedField(func, shapes, flat.dtype, 1)
    combined = combine_events(event_fn, t[0], y0)
    event_t, flat = attach_event_gradient(
        field, lambda t, y: combined(t, field.split(y)), event_t, flat
    )
    ends = field.split(flat)
    ends = (ends,) if isinstance(ends, Tensor) else ends
    linked = tuple(torch.cat([p[:-1], e[None]]) for p, e in zip(parts, ends, strict=True))
    return event_t, linked if isinstance(y0, tuple) else linked[0]
