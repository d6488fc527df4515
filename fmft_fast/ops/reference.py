"""The meaning of every step op in plain torch: any device, dtype and transform, differentiable.

Shapes: `y` and every `k[i]` are [*state]; `k` may be of lower precision than `y`, the result has
the dtype of `y`. `h` is the signed step, a float or a 0-d real tensor. Weights are floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rk_combine(y: Tensor, k: Sequence[Tensor], h: float | Tensor, w: Sequence[float]) -> Tensor:
    """Return y + h sum_i w[i] k[i]; a stage of weight zero is not read.

    Written as y + (h w0) (k0 + sum_i (w[i] / w0) k[i]): one torch op per stage, and only the last
    one rounds at the magnitude of `y`.
    """
    terms = [(wi, ki) for wi, ki in zip(w, k, strict=True) if wi != 0]
    if not terms:
        return y.clone()
    w0, total = terms[0]
    if total.dtype != y.dtype:
        total = total.to(y.dtype)
    for wi, ki in terms[1:]:
        total = torch.add(total, ki, alpha=wi / w0)
    h = _as_factor(h, y)
    if not isinstance(h, Tensor):
        return torch.add(y, total, alpha=h * w0)
    if h.device != y.device:
        return y + total * (h * w0)
    return torch.addcmul(y, total, h, value=w0)


def rk_finish(
    y: Tensor,
    k: Sequence[Tensor],
    h: float | Tensor,
    b: Sequence[float],
    b_err: Sequence[float],
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    """Return y1 = y + h sum_i b[i] k[i] and its scaled error ratio, 0-d and detached.

    The ratio is the root mean square of h sum_i b_err[i] k[i] / (atol + rtol max(|y|, |y1|)): the
    step is good if it is at most 1. That of an empty state is 0.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, eq. II.4.10-4.11.
    """
    y1 = rk_combine(y, k, h, b)
    with torch.no_grad():
        scale = torch.maximum(y.abs(), y1.abs()).mul_(rtol).add_(atol)
        if y.numel() == 0:
            return y1, scale.new_zeros(())
        error = rk_combine(torch.zeros_like(y), k, h, b_err)
        return y1, (error / scale).abs().square().mean().sqrt()


def dense_eval(
    y: Tensor,
    k: Sequence[Tensor],
    h: float | Tensor,
    p: Sequence[Sequence[float]],
    theta: Tensor,
) -> Tensor:
    """Return y + h sum_i k[i] sum_j p[i][j] theta^(j+1), shape [len(theta), *state].

    `theta` [m] is the position in the step, 0 at `y` and 1 at its end; `p` is [stages][degree].
    """
    total = torch.zeros_like(y).expand(theta.shape[0], *y.shape)
    for ki, weight in zip(k, stage_weights(p, theta), strict=True):
        total = total + along_state(weight, y) * ki
    return y + _as_factor(h, y) * total


def _as_factor(h: float | Tensor, y: Tensor) -> float | Tensor:
    """Return `h` in the dtype of `y`, or a 0-d `y` would take the dtype of `h`."""
    return h.to(y.dtype) if isinstance(h, Tensor) and h.dtype != y.dtype else h


def stage_weights(p: Sequence[Sequence[float]], theta: Tensor) -> list[Tensor]:
    """Return the weights [m] of the stages at `theta` [m]: sum_j p[i][j] theta^(j+1)."""
    weights = []
    for row in p:
        weight = torch.zeros_like(theta)
        for coefficient in reversed(row):
            weight = (weight + coefficient) * theta
        weights.append(weight)
    return weights


def along_state(values: Tensor, y: Tensor) -> Tensor:
    """Return `values` [m] as [m, 1, ...] in the real dtype of `y`, to multiply [m, *state]."""
    dtype = y.dtype.to_real() if y.dtype.is_complex else y.dtype
    return values.to(device=y.device, dtype=dtype).reshape(-1, *(1 for _ in y.shape))
