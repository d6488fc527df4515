"""`solve`: one state, one field, the exact gradient of what was computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from .fixed import stage_times
from .grids import make_grid
from .methods import find_method
from .per_sample import solve_per_sample
from .repeated import PLAIN_TENSORS, repeat, solve_kind
from .solution import Gradient, Solution, SolveRequest
from .whole_solve import fusion_mode


def solve(
    field: Callable[..., Tensor],
    x0: Tensor,
    t0: float | Tensor = 0.0,
    t1: float | Tensor = 1.0,
    *,
    method: str = "euler",
    steps: int | Tensor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    gradient: Gradient = "discrete",
    save: Literal["final", "all"] = "final",
    backend: str = "auto",
    cond: Tensor | None = None,
    params: Iterable[Tensor] = (),
    time_table: Tensor | None = None,
    checkpoint_every: int = 0,
    options: dict[str, Any] | None = None,
) -> Solution:
    """Solve dx/dt = field(t, x[, cond]) from x0 at t0 to t1, with fixed or adaptive steps.

    Args:
        field: maps a 0-d tensor t, x [*state] and, if given, cond to [*state]. Usually an
            nn.Module; its parameters get gradients.
        x0: initial state of any shape, real or complex; bf16 and fp16 are integrated in float32.
        t0, t1: initial and final time, numbers or 0-d tensors; t1 < t0 integrates backwards.
        method: a name in `fmft_fast.METHODS`; scipy_solver has gradient="continuous" and "none"
            only.
        steps: number of equal steps, or a strictly monotonic grid [N + 1] of times, which replaces
            t0 and t1. With tolerances a grid gives the times that the steps must meet.
        rtol, atol: tolerances; giving one makes the steps adaptive (default of the other: 1e-5).
        gradient: "discrete": the exact gradient of the computed solution, in memory
            O(steps x state); the backward pass takes the steps once more (with their equations,
            where the method is implicit). Dropout masks are repeated, and so are changes of buffers
            (batch or spectral norm) if the field is the nn.Module itself and not a function around
            it. "continuous": the adjoint ODE, approximate. "backprop": an ordinary graph of
            everything, differentiable twice. "none": no graph.
        save: "final" state, or "all" states: the ends of the steps (with tolerances and a grid: the
            states on the grid).
        backend: kernels of the step ops: "auto", "reference", "cpu", "triton" or "cuda".
        cond: condition, passed to the field as third argument; gets a gradient.
        params: further tensors that the field depends on and that get gradients. Those that a
            module holds, or a function closes over, are found; a field that depends on another
            tensor that requires grad is refused.
        time_table: [N, stages, ...], what the field gets as t in every stage of every step, for
            instance a time embedding computed once (see `stage_time_table`); gets a gradient.
        checkpoint_every: keep every so many states only and compute the rest again in the backward
            pass (one more evaluation per stage), for very long solves; 0 keeps all.
        options: options of the adaptive step control or of an implicit method, as in `odeint`.
            {"per_sample": True} gives every row [state] of x0 [*lead, state] its own adaptive
            steps, in one call (for a field that can be fused, save="final"); `Solution.stats` then
            counts those of the row with the most, and has tensors with the counts of every row.

    Returns:
        A `Solution`.

    Raises:
        UnknownMethodError, InputError, InputTypeError: see the messages.
        GradientError: the gradient would be incomplete.
        NonFiniteError: NaN or infinity, with the step (CPU only: a GPU is not read back; look at
            `Solution.status` there), or an adaptive solve that cannot go on.

    Example:
        >>> import torch
        >>> from fmft_fast import solve
        >>> field = torch.nn.Linear(2, 2)
        >>> y = solve(lambda t, x: field(x), torch.ones(8, 2), steps=4).y
        >>> y.square().mean().backward(); field.weight.grad.shape
        torch.Size([2, 2])
    """
    if (
        rtol is atol is time_table is None
        and backend == "auto"
        and not (options or checkpoint_every or torch.compiler.is_compiling())
        and type(checkpoint_every) is int
        and type(params) is tuple
        and not params
    ):
        again = _solve_again(field, x0, (t0, t1), steps, method, gradient, save, cond)
        if again is not None:
            return again
    tableau = find_method(method).tableau
    explicit = tableau is not None and tableau.explicit
    options = dict(options or {})
    per_sample = options.pop("per_sample", False)
    request = SolveRequest(
        field=field,
        x0=x0,
        t0=t0,
        t1=t1,
        method=method,
        tableau=tableau if explicit else None,
        steps=steps,
        rtol=rtol,
        atol=atol,
        gradient=gradient,
        save=save,
        backend=backend,
        cond=cond,
        params=params,
        table=time_table,
        checkpoint_every=checkpoint_every,
        options=options,
    )
    if per_sample:
        return solve_per_sample(request)
    if gradient == "continuous" or not explicit:
        return request.by_odeint()
    return request.by_steps()


def _solve_again(
    field: Callable[..., Tensor],
    x0: Any,
    times: tuple[Any, Any],
    steps: Any,
    method: Any,
    gradient: Any,
    save: Any,
    cond: Any,
) -> Solution | None:
    """The solution if all of this was asked for before, with defaults for the rest."""
    if not type(method) is type(gradient) is type(save) is str:
        return None
    if type(x0) not in PLAIN_TENSORS or not x0.is_cpu:
        return None
    kind = solve_kind(times, steps, method, gradient, save)
    mode = fusion_mode()
    if kind is None or mode == "off":
        return None
    found = repeat(field, kind, (x0,), cond, mode == "auto")
    return None if found is None else Solution(found[0], make_grid(*times, steps), found[1])


def stage_time_table(
    method: str, steps: int | Tensor, t0: float | Tensor = 0.0, t1: float | Tensor = 1.0
) -> Tensor:
    """The times [N, stages], float64, at which `solve` evaluates the field with fixed steps.

    Embed them once and pass the result as time_table.

    Raises:
        UnknownMethodError, InputError: no such explicit Runge-Kutta method; bad times.

    Example:
        >>> from fmft_fast import stage_time_table
        >>> stage_time_table("midpoint", 2).tolist()
        [[0.0, 0.25], [0.5, 0.75]]
    """
    tableau = find_method(method).tableau
    if tableau is None or not tableau.explicit:
        raise InputError(f"a time table needs an explicit Runge-Kutta method, got {method}")
    return stage_times(tableau.advancing, make_grid(t0, t1, steps), torch.float64)
