"""Events: where a solution crosses a surface, and the gradient of when and where it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EventFn = Callable[[Any, Any], Tensor]


def combine_events(event_fn: EventFn, t0: Tensor, y0: Any) -> EventFn:
    """One scalar event function that is positive at the start and changes sign with the first part.

    Args:
        event_fn: maps (t, y) to a tensor of any shape; each entry is an event of its own.
        t0, y0: initial time and state, as event_fn takes them.
    """
    with torch.no_grad():
        signs = torch.sign(event_fn(t0, y0))
    return lambda t, y: torch.min(event_fn(t, y) * signs)


def bisect_event(
    interpolate: Callable[[Tensor], Tensor],
    sign: Tensor,
    t0: Tensor,
    t1: Tensor,
    event_fn: EventFn,
    tol: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Bisect [t0, t1] for the change of sign of event_fn along a dense output.

    Returns:
        The event time, detached, and the state there, differentiable through `interpolate`.
    """
    width = abs((t1 - t0).item())  # sync: bisection is host control flow
    smallest = float(tol.min()) if isinstance(tol, Tensor) else tol
    halvings = max(0, math.ceil(math.log2(width / smallest))) if smallest > 0 else 53
    with torch.no_grad():
        for _ in range(halvings):
            middle = (t0 + t1) / 2
            before = torch.sign(event_fn(middle, interpolate(middle))) == sign
            t0 = torch.where(before, middle, t0)
            t1 = torch.where(before, t1, middle)
        event_t = (t0 + t1) / 2
    return event_t, interpolate(event_t)


def attach_event_gradient(
    field: Callable[[Tensor, Tensor], Tensor], event_fn: EventFn, event_t: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Give an event time and state their derivatives by the implicit function theorem.

    With g(t, y) = 0 along y(t), dt = -dg / (g_t + g_y f) and dy moves along f by dt. The
    values stay as they are. Gradients reach y (and through it the solve) and whatever event_fn
    closes over.

    Source: Chen, Amos, Nickel, "Learning Neural Event Functions for ODEs", ICLR 2021, section 3.
    """
    event_t = event_t.detach()
    with torch.enable_grad():
        t_leaf = event_t.clone().requires_grad_()
        y_leaf = y.detach().requires_grad_()
        g_t, g_y = torch.autograd.grad(
            event_fn(t_leaf, y_leaf), (t_leaf, y_leaf), allow_unused=True
        )
    f = field(event_t, y.detach()).detach()
    rate = torch.zeros_like(event_t)
    if g_t is not None:
        rate = rate + g_t
    if g_y is not None:
        rate = rate + (g_y.conj() * f).real.sum() if f.is_complex() else rate + (g_y * f).sum()
    g = event_fn(event_t, y)
    shift = (g.detach() - g) / (rate + torch.copysign(torch.full_like(rate, 1e-12), rate))
    event_t = event_t + shift.to(event_t)
    return event_t, y + f * shift.to(f.abs().dtype)
