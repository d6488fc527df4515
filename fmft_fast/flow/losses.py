"""The two losses: flow matching, without a solve, and the likelihood of reconstructions."""

from __future__ import annotations

import torch
from torch import Tensor

from fmft_fast.errors import InputError
from fmft_fast.flow.paths import LinearPath, Path


def flow_matching_loss(
    field,
    x0: Tensor,
    x1: Tensor,
    *,
    cond: Tensor | None = None,
    path: Path | None = None,
    t: Tensor | None = None,
    time_power: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Give the mean squared error of the field against the path's velocity.

    With pairs (x0, x1) from an OT coupling this is the OT-CFM loss.

    Args:
        field: `field(t, x)` or, with cond, `field(t, x, cond)`; t is [batch].
        x0: noise, [batch, *state].
        x1: data paired with it, [batch, *state].
        cond: conditions, [batch, ...].
        path: `LinearPath()` unless given.
        t: flow times in [0, 1], [batch]; drawn unless given.
        time_power: of the density p (1 - t)^(p - 1) that t is drawn from; 1 is uniform. Above 1 it
            favours early times, where what the condition says decides, over late ones, where the
            loss has its largest part that nothing can learn.
        generator: source of t and of the path's own noise.

    Returns:
        A 0-d tensor.

    Source: Lipman et al. 2022 (arXiv 2210.02747), equation 9.

    Example:
        >>> straight = lambda t, x: torch.ones_like(x)
        >>> flow_matching_loss(straight, torch.zeros(4, 2), torch.ones(4, 2))
        tensor(0.)
    """
    if t is None:
        device = x1.device if generator is None else generator.device
        t = torch.rand(len(x1), generator=generator, dtype=x1.dtype, device=device).to(x1.device)
        t = t if time_power == 1.0 else 1 - t ** (1 / time_power)
    point = (path or LinearPath()).sample(t, x0, x1, generator=generator)
    velocity = field(point.t, point.x_t) if cond is None else field(point.t, point.x_t, cond)
    if velocity.shape != point.u_t.shape:
        raise InputError(
            f"the field must return the state's shape {list(point.u_t.shape)}, "
            f"got {list(velocity.shape)}"
        )
    return (velocity - point.u_t).square().mean()


def reconstruction_loss(phi: Tensor, x1: Tensor, *, sigma: float | Tensor | None = 1.0) -> Tensor:
    """Give -log N(x1 | phi, sigma^2) per dimension, averaged, without its constant log(2 pi) / 2.

    This is the fine-tuning loss when phi is the solve's end point; at sigma = 1 it is half the
    mean squared error. Keeping log(sigma) lets a trainable sigma find its optimum, the error's rms.
    With sigma = None that optimum is taken for each batch, and the loss is this rms itself: the
    exponential of the best likelihood. Solves of few and of many steps, whose errors differ by
    much, then weigh alike.

    Args:
        phi: end points of the solve, [batch, *state].
        x1: data, [batch, *state].
        sigma: standard deviation, > 0: a scalar, or a tensor that broadcasts to [*state]
            (a diagonal covariance; keep it positive by training its logarithm), or None.

    Returns:
        A 0-d tensor.

    Raises:
        InputError: the shapes differ, or sigma does not fit a state, or a float is not positive.

    Source: "Fine-Tuning Flow Matching via Maximum Likelihood Estimation of Reconstructions"
    (arXiv 2510.02081), section 4.1.

    Example:
        >>> reconstruction_loss(torch.zeros(4, 2), torch.ones(4, 2))
        tensor(0.5000)
    """
    if phi.shape != x1.shape:
        raise InputError(
            f"end points and data must share one shape, got {list(phi.shape)} and {list(x1.shape)}"
        )
    if sigma is None:
        # The root's slope is infinite at 0; the smallest normal number keeps it finite.
        return (phi - x1).square().mean().clamp_min(torch.finfo(x1.dtype).tiny).sqrt()
    if not isinstance(sigma, Tensor) and not sigma > 0:
        raise InputError(f"sigma must be positive, got {sigma}")
    # A float goes to its kernel as an argument: a copy from the host would wait for the device.
    width = sigma.to(x1) if isinstance(sigma, Tensor) else x1.new_full((), sigma)
    state = x1.shape[1:]
    tail = state[len(state) - width.ndim :]
    fits = all(w in (1, s) for w, s in zip(width.shape, tail, strict=False))
    if width.ndim > len(state) or not fits:
        raise InputError(f"sigma must broadcast to a state {list(state)}, got {list(width.shape)}")
    return (0.5 * ((x1 - phi) / width).square() + width.log()).mean()
