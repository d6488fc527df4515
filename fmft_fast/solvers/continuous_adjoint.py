"""The continuous adjoint of torchdiffeq: the adjoint ODE, solved backwards in time.

Its gradient is that of the exact solution, approximated by a second solve, not that of the computed
one: with few steps the two differ. `fmft_fast.solve` gives the exact gradient of the computed one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GradientError, InputError
from .drop_in import _combine, integrate, integrate_until_event, odeint
from .events import attach_event_gradient
from .inputs import (
    CALLBACKS,
    Norm,
    Problem,
    State,
    max_rms_norm,
    normalise,
    real_dtype,
    rms_norm,
    unflatten,
)
from .replay import without_hooks


class _AdjointSolve(torch.autograd.Function):
    """Forward: any solve without a graph. Backward: the augmented adjoint ODE."""

    @staticmethod
    def forward(ctx, problem: Problem, adjoint: dict[str, Any], y0, t, *params):
        ctx.problem = problem
        ctx.adjoint_options = adjoint.pop("options")
        ctx.adjoint = adjoint
        ctx.time_grad, ctx.params = t.requires_grad, params
        problem.y0, problem.t = y0.detach(), t.detach()
        if problem.event_fn is None:
            solution = integrate(problem)
            ctx.save_for_backward(problem.t, solution, *params)
            return solution
        event_t, solution = integrate_until_event(problem)
        ends = torch.stack((problem.t[0], event_t.to(problem.t)))
        ctx.save_for_backward(ends, solution, *params)
        ctx.mark_non_differentiable(event_t)
        return event_t, solution

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the adjoint ODE."""
        if torch.is_grad_enabled():
            raise GradientError(
                "the continuous adjoint is differentiable once, but create_graph=True asks for "
                "more: use odeint for second derivatives"
            )
        with without_hooks(ctx.params):
            return _AdjointSolve.integrate_back(ctx, grads)

    @staticmethod
    def integrate_back(ctx, grads: tuple[Tensor, ...]) -> tuple:
        """Gradients of all inputs of the forward pass."""
        t, y, *_ = ctx.saved_tensors  # raises if a parameter was changed in place
        params = ctx.params
        problem: Problem = ctx.problem
        grad_y = grads[-1]
        dynamics = _augment(problem, params, ctx.time_grad)
        adj_t = torch.zeros((), dtype=real_dtype(y.dtype), device=y.device)
        adj_y = grad_y[-1]
        adj_params = [torch.zeros_like(p) for p in params]
        grad_t = torch.zeros_like(t) if ctx.time_grad else None

        for i in range(len(t) - 1, 0, -1):
            if grad_t is not None:
                # Moving this observation time moves the state along the field.
                moved = (grad_y[i].conj() * problem.field(t[i], y[i])).real.sum()
                adj_t = adj_t - moved
                grad_t[i] = moved
            aug = odeint(
                dynamics,
                (adj_t, y[i], adj_y, *adj_params),
                t[i - 1 : i + 1].flip(0),
                options=ctx.adjoint_options,
                **ctx.adjoint,
            )
            adj_t, _, adj_y, *adj_params = (part[1] for part in aug)
            adj_t, adj_y = adj_t.real, adj_y + grad_y[i - 1]
        if grad_t is not None:
            grad_t[0] = adj_t
            if problem.event_fn is not None:
                grad_t[1:] = 0
        return (None, None, adj_y, grad_t, *adj_params)


def _augment(problem: Problem, params: tuple[Tensor, ...], time_grad: bool) -> Callable:
    """The adjoint dynamics on (adj_t, y, adj_y, *adj_params), with the user's adjoint callbacks."""

    def dynamics(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, adj_y = state[1], state[2]
        with torch.enable_grad():
            t = t.detach().requires_grad_(time_grad)
            y = y.detach().requires_grad_()
            f = problem.field(t, y)
            wanted = (*((t,) if time_grad else ()), y, *params)
            grads: tuple[Tensor | None, ...] = (None,) * len(wanted)
            if f.requires_grad:
                grads = torch.autograd.grad(f, wanted, -adj_y.to(f.dtype), allow_unused=True)
        filled = [
            torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)
        ]
        vjp_t = filled.pop(0) if time_grad else torch.zeros_like(t)
        return (vjp_t, f.detach(), *filled)

    for name in CALLBACKS:
        callback = getattr(problem.field.base, f"{name}_adjoint", None)
        if callback is not None:
            setattr(dynamics, name, callback)
    return dynamics


def odeint_adjoint(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """`odeint` whose gradient comes from the continuous adjoint, in memory O(len(t)).

    Same signature and semantics as torchdiffeq's `odeint_adjoint`.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn: as in `odeint`.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: for the backward solve; they
            default to those of the forward one (without its norm). adjoint_options["norm"] takes
            the tuple (adj_t, y, adj_y, *adj_params); "seminorm" leaves the parameters out.
        adjoint_params: tensors that get gradients; default func.parameters().

    Returns:
        As `odeint`. With event_fn the event time has its gradient, and the state at the event that
        of a fixed time (see `odeint_event` for the rest).

    Raises:
        InputError: func is no nn.Module and adjoint_params is missing; or options cannot be
            carried over to another adjoint_method. Else as `odeint`.

    Source: Chen et al., "Neural Ordinary Differential Equations", NeurIPS 2018, appendix B;
        Kidger et al., "Hey, that's not an ODE", ICML 2021 (seminorm).

    Example:
        >>> import torch
        >>> from fmft_fast import odeint_adjoint
        >>> f = torch.nn.Linear(2, 2)
        >>> y = odeint_adjoint(lambda t, y: f(y), torch.ones(2), torch.tensor([0.0, 1.0]),
        ...                    adjoint_params=f.parameters())
        >>> y.sum().backward(); f.weight.grad.shape
        torch.Size([2, 2])
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise InputError(
            "func must be an instance of nn.Module to specify the adjoint parameters; "
            "alternatively they can be specified explicitly via the `adjoint_params` argument. If "
            "there are no parameters then it is allowable to set `adjoint_params=()`."
        )
    if adjoint_method not in (None, method) and options is not None and adjoint_options is None:
        raise InputError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. "
            "So as `options` has been passed then `adjoint_options` must be passed as well."
        )
    if adjoint_options is None:
        adjoint_options = {k: v for k, v in (options or {}).items() if k != "norm"}
    params = _adjoint_params(func, adjoint_params, adjoint_options)
    if event_fn is not None:
        event_fn = _combine(event_fn, y0, t)
    problem = normalise(
        func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
    )
    adjoint = {
        "rtol": _adjoint_tolerance(adjoint_rtol, rtol, problem.rtol, problem, len(params)),
        "atol": _adjoint_tolerance(adjoint_atol, atol, problem.atol, problem, len(params)),
        "method": method if adjoint_method is None else adjoint_method,
        "options": {
            **adjoint_options,
            "norm": _adjoint_norm(problem, adjoint_options.get("norm")),
        },
    }
    result = _AdjointSolve.apply(problem, adjoint, problem.y0, problem.t, *params)
    if event_fn is None:
        return problem.restore(result, (len(t),))
    event_t, solution = result
    if solution.requires_grad:
        assert problem.event_fn is not None
        event_t, _ = attach_event_gradient(problem.field, problem.event_fn, event_t, solution[-1])
    return event_t.to(t), problem.restore(solution, (2,))


def _adjoint_params(func: Any, given: Iterable[Tensor] | None, options: dict) -> tuple:
    params = tuple(find_parameters(func) if given is None else given)
    wanted = tuple(p for p in params if p.requires_grad)
    if len(wanted) < len(params) and callable(options.get("norm")):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will "
            "be excluded from the adjoint pass, and will not appear as a tensor in the adjoint "
            "norm.",
            stacklevel=3,
        )
    return wanted


def find_parameters(module: nn.Module) -> list[Tensor]:
    """Parameters of a module; those of a DataParallel replica are plain attributes."""
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())

    def tensors(part: nn.Module) -> list[tuple[str, Tensor]]:
        return [(k, v) for k, v in part.__dict__.items() if torch.is_tensor(v) and v.requires_grad]

    return [p for _, p in module._named_members(get_members_fn=tensors)]


def _adjoint_tolerance(
    given: Any, forward: Any, tol: float | Tensor, problem: Problem, params: int
) -> Any:
    """The tolerance of the backward solve; one per entry of the state serves y and adj_y alike."""
    if given is not None or not isinstance(tol, Tensor):
        return forward if given is None else given
    entries, smallest = tol.expand_as(problem.y0).reshape(-1), tol.min()
    return (smallest, entries, entries, *[smallest] * params)


def _adjoint_norm(problem: Problem, given: Norm | str | None) -> Norm:
    """The norm on (adj_t, y, adj_y, *adj_params) that the backward solve uses."""
    state_norm = problem.norm or rms_norm

    def seminorm(parts: tuple) -> Tensor:
        adj_t, y, adj_y, *_ = parts
        return max(adj_t.abs(), state_norm(y), state_norm(adj_y))

    def full_norm(parts: tuple) -> Tensor | float:
        return max(seminorm(parts), max_rms_norm(parts[3:]))

    def on_user_state(parts: tuple) -> Tensor:
        assert callable(given) and problem.shapes is not None
        adj_t, y, adj_y, *adj_params = parts
        shapes = problem.shapes
        return given((adj_t, *unflatten(y, (), shapes), *unflatten(adj_y, (), shapes), *adj_params))

    if given is None:
        return full_norm
    if given == "seminorm":
        return seminorm
    if not callable(given):
        raise InputError(f'adjoint norm must be callable or "seminorm", got {given!r}')
    return given if problem.shapes is None else on_user_state
