"""Registration of the step ops with torch, as `torch.ops.fmft_fast.*`: schema, fake and gradient.

They are for graphs: a call inside `torch.compile(fullgraph=True)` or an exported program stays one
node and runs the fused kernel. Eager code calls the ops of `choose_kernels`, whose dispatch costs
far less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmft_fast.ops import reference
from fmft_fast.ops.contract import StepKernels, inner, stage_gradients, step_gradient

SCHEMAS = {
    "rk_combine": "(Tensor y, Tensor[] k, Tensor h, float[] w) -> Tensor",
    "rk_finish": (
        "(Tensor y, Tensor[] k, Tensor h, float[] b, float[] b_err, float rtol, float atol)"
        " -> (Tensor, Tensor)"
    ),
    "dense_eval": "(Tensor y, Tensor[] k, Tensor h, float[] p, int degree, Tensor theta) -> Tensor",
}


def register(choose_kernels: Callable[[Tensor], StepKernels]) -> None:
    """Define the three ops; every call of one asks `choose_kernels` for its backend."""

    def rk_combine(y: Tensor, k: list[Tensor], h: Tensor, w: list[float]) -> Tensor:
        return choose_kernels(y).rk_combine(y, k, h, w)

    def rk_finish(
        y: Tensor,
        k: list[Tensor],
        h: Tensor,
        b: list[float],
        b_err: list[float],
        rtol: float,
        atol: float,
    ) -> tuple[Tensor, Tensor]:
        return choose_kernels(y).rk_finish(y, k, h, b, b_err, rtol, atol)

    def dense_eval(
        y: Tensor, k: list[Tensor], h: Tensor, p: list[float], degree: int, theta: Tensor
    ) -> Tensor:
        return choose_kernels(y).dense_eval(y, k, h, rows(p, degree), theta)

    for kernel, fake, backward, keep in (
        (rk_combine, _fake_combine, _combine_backward, _keep_combine),
        (rk_finish, _fake_finish, _finish_backward, _keep_finish),
        (dense_eval, _fake_dense, _dense_backward, _keep_dense),
    ):
        name = kernel.__name__
        op = torch.library.custom_op(
            f"fmft_fast::{name}", kernel, mutates_args=(), schema=SCHEMAS[name]
        )
        op.register_fake(fake)
        op.register_autograd(backward, setup_context=keep)


def rows(p: Sequence[float], degree: int) -> list[Sequence[float]]:
    """Return the flat `p` as [stages][degree]."""
    return [p[i : i + degree] for i in range(0, len(p), degree)]


def _fake_combine(y: Tensor, k: list[Tensor], h: Tensor, w: list[float]) -> Tensor:
    return torch.empty_like(y)


def _fake_finish(
    y: Tensor,
    k: list[Tensor],
    h: Tensor,
    b: list[float],
    b_err: list[float],
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    real = y.dtype.to_real() if y.dtype.is_complex else y.dtype
    return torch.empty_like(y), y.new_empty((), dtype=real)


def _fake_dense(
    y: Tensor, k: list[Tensor], h: Tensor, p: list[float], degree: int, theta: Tensor
) -> Tensor:
    return y.new_empty((theta.shape[0], *y.shape))


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, k, h, ctx.w = inputs
    ctx.save_for_backward(h, *(k if ctx.needs_input_grad[2] else ()))


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    h, *k = ctx.saved_tensors
    grad_h = step_gradient(grad, k, h, ctx.w) if k else None
    return grad, stage_gradients(grad, h, ctx.w), grad_h, None


def _keep_finish(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep_combine(ctx, inputs[:4], output)
    ctx.mark_non_differentiable(output[1])


def _finish_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return *_combine_backward(ctx, grad), None, None, None


def _keep_dense(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, k, h, p, degree, theta = inputs
    ctx.p = rows(p, degree)
    ctx.save_for_backward(h, theta, *k)


def _dense_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    h, theta, *k = ctx.saved_tensors
    along_state = [reference.along_state(w, grad[0]) for w in reference.stage_weights(ctx.p, theta)]
    grad_k = [(w * grad).sum(0) * h.to(grad.dtype) for w in along_state]
    grad_h = grad_theta = None
    if ctx.needs_input_grad[2]:
        along_k = [inner(grad, w * ki) for w, ki in zip(along_state, k, strict=True)]
        grad_h = torch.stack(along_k).sum().to(h)
    if ctx.needs_input_grad[5]:
        grad_theta = torch.zeros_like(theta)
        for slope, ki in zip(slopes(ctx.p, theta), k, strict=True):
            along_k = torch.stack([inner(g, ki) for g in grad])
            grad_theta = grad_theta + slope * (along_k * h).to(theta)
    return grad.sum(0), grad_k, grad_h, None, None, grad_theta


def slopes(p: Sequence[Sequence[float]], theta: Tensor) -> list[Tensor]:
    """Return the derivative [m] of every stage's weight at `theta` [m]."""
    derivatives = [[(j + 1) * c for j, c in enumerate(row)] for row in p]
    return [
        weight + row[0]
        for row, weight in zip(
            derivatives,
            reference.stage_weights([row[1:] for row in derivatives], theta),
            strict=True,
        )
    ]
