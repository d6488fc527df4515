"""The contract of the step ops: when a fused kernel may run, and its gradient.

A fused kernel is a plain function on real tensors that knows nothing of autograd. `fuse` gives it
the behaviour of the reference: in a trace or a transform, and for arguments that it does not take,
the reference runs; where something requires a gradient, a thin `autograd.Function` wraps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fmft_fast.ops import reference

FUSED_DTYPES = (torch.float32, torch.float64)
LOW_PRECISION = (torch.float16, torch.bfloat16)
MAX_STAGES = 16
MAX_DEGREE = 8
# Below this many numbers torch differentiates its own chain of additions faster than a Function:
# 3 stages of [1024, 2], forward and backward, take 31 against 36 us, of [1024, 64] 89 against 86.
SMALL = 1 << 14

Step = float | Tensor
Weights = Sequence[float]


@dataclass(frozen=True)
class StepKernels:
    """The step ops of one backend; chosen once per solve and handed to the numerics.

    Attributes:
        name: "reference", "cpu", "triton" or "cuda".
        rk_combine: (y, k, h, w) -> y + h sum_i w[i] k[i].
        rk_finish: (y, k, h, b, b_err, rtol, atol) -> (y1, error_ratio), the ratio 0-d and detached.
        dense_eval: (y, k, h, p, theta) -> [len(theta), *state].
    """

    name: str
    rk_combine: Callable[..., Tensor]
    rk_finish: Callable[..., tuple[Tensor, Tensor]]
    dense_eval: Callable[..., Tensor]


REFERENCE = StepKernels(
    "reference", reference.rk_combine, reference.rk_finish, reference.dense_eval
)


def is_traced() -> bool:
    """Tell whether a kernel on raw pointers would escape what torch is doing around the call.

    That is torch.compile, torch.jit.trace, functorch (vmap, grad, jvp), a dispatch mode such as
    fake tensors, or a level of forward-mode AD. torch has no public question for the last four.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_transformed()
    )


def is_transformed() -> bool:
    """Tell whether functorch (vmap, grad, jvp) or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def fuse(name: str, raw: StepKernels) -> StepKernels:
    """Return differentiable ops over the fused kernels `raw`: the reference in all but speed."""

    def rk_combine(y: Tensor, k: Sequence[Tensor], h: Step, w: Weights) -> Tensor:
        if is_traced():
            return reference.rk_combine(y, k, h, w)
        h = _host_step(h)
        # A single stage is one torch op already, and that one is faster to dispatch.
        if len(k) == 1 or not _fits(y, k, w):
            return reference.rk_combine(y, k, h, w)
        if not _needs_grad(y, h, *k):
            return raw.rk_combine(y, k, h, w)
        if y.numel() < SMALL:
            return reference.rk_combine(y, k, h, w)
        return _Combine.apply(raw.rk_combine, w, h, y, *k)

    def rk_finish(
        y: Tensor,
        k: Sequence[Tensor],
        h: Step,
        b: Weights,
        b_err: Weights,
        rtol: float,
        atol: float,
    ) -> tuple[Tensor, Tensor]:
        if is_traced() or not _fits(y, k, b, b_err):
            return reference.rk_finish(y, k, h, b, b_err, rtol, atol)
        h = _host_step(h)
        if not _needs_grad(y, h, *k):
            return raw.rk_finish(y, k, h, b, b_err, rtol, atol)
        ratios = []

        def solution(y: Tensor, k: Sequence[Tensor], h: Step, b: Weights) -> Tensor:
            y1, ratio = raw.rk_finish(y, k, h, b, b_err, rtol, atol)
            ratios.append(ratio)
            return y1

        y1 = _Combine.apply(solution, b, h, y, *k)
        return y1, ratios[0]

    def dense_eval(
        y: Tensor, k: Sequence[Tensor], h: Step, p: Sequence[Weights], theta: Tensor
    ) -> Tensor:
        if (
            is_traced()
            or not _fits(y, k, p)
            or not _fits_theta(y, p, theta)
            or _needs_grad(y, h, theta, *k)
        ):
            return reference.dense_eval(y, k, h, p, theta)
        return raw.dense_eval(y, k, _host_step(h), p, theta)

    return StepKernels(name, rk_combine, rk_finish, dense_eval)


def _fits(y: Tensor, k: Sequence[Tensor], *weights: Sequence[Any]) -> bool:
    """Tell whether the kernels may read these tensors through their pointers."""
    dtype, stages = y.dtype, len(k)
    if type(y) is not Tensor or dtype not in FUSED_DTYPES or y.numel() == 0:
        return False
    if not 0 < stages <= MAX_STAGES or any(len(w) != stages for w in weights):
        return False
    k_dtype, shape, device = k[0].dtype, y.shape, y.device
    if k_dtype is not dtype and (dtype is not torch.float32 or k_dtype not in LOW_PRECISION):
        return False
    return all(
        type(ki) is Tensor and ki.dtype is k_dtype and ki.shape == shape and ki.device == device
        for ki in k
    )


def _fits_theta(y: Tensor, p: Sequence[Weights], theta: Tensor) -> bool:
    degree = len(p[0])
    return (
        0 < degree <= MAX_DEGREE
        and all(len(row) == degree for row in p)
        and theta.dim() == 1
        and theta.numel() > 0
        and theta.device == y.device
    )


def _host_step(h: Step) -> Step:
    """Return a constant step that lives on the host as a float; others stay tensors."""
    if isinstance(h, Tensor) and not h.requires_grad and h.device.type == "cpu":
        return h.item()
    return h


def _needs_grad(*values: Step) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in values
    )


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the real inner product Re <a, b>, 0-d."""
    return (a.conj() * b).real.sum() if a.is_complex() else (a * b).sum()


def step_gradient(grad: Tensor, k: Sequence[Tensor], h: Tensor, w: Weights) -> Tensor:
    """Return the gradient of rk_combine for `h`; differentiable once more."""
    total = reference.rk_combine(torch.zeros_like(grad), k, 1.0, w)
    return inner(grad, total).to(h)


def stage_gradients(grad: Tensor, h: Step, w: Weights) -> list[Tensor | None]:
    """Return the gradient of rk_combine for every stage, None where the weight is zero."""
    if isinstance(h, Tensor):
        h = h.to(grad.dtype)
    return [grad * (h * wi) if wi != 0 else None for wi in w]


class _Combine(torch.autograd.Function):
    """A fused rk_combine; it keeps the stages only where `h` needs a gradient."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable, w: Weights, h: Step, y: Tensor, *k: Tensor) -> Tensor:
        ctx.w = w
        if isinstance(h, Tensor):
            ctx.save_for_backward(h, *(k if ctx.needs_input_grad[2] else ()))
            return kernel(y, k, _host_step(h.detach()), w)
        ctx.h = h
        return kernel(y, k, h, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h, *k = ctx.saved_tensors or (ctx.h,)
        grad_h = step_gradient(grads[0], k, h, ctx.w) if k else None
        return None, None, grad_h, grads[0], *stage_gradients(grads[0], h, ctx.w)
