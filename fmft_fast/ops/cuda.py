"""The fused step ops of the compiled module `fmft_fast._cuda`, on torch tensors of a GPU.

Every call only queues work on torch's current stream: a step on the device is read there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmft_fast import _cuda
from fmft_fast.ops.contract import Step, StepKernels, Weights
from fmft_fast.ops.layout import TYPE_CODES, addresses, laid_out

FLOAT64 = TYPE_CODES[torch.float64]


def rk_combine(y: Tensor, k: Sequence[Tensor], h: Step, w: Weights) -> Tensor:
    """Return y + h sum_i w[i] k[i]."""
    out, y, k = laid_out(y, k)
    h = _readable(h)
    _cuda.rk_combine(
        out.data_ptr(), y.data_ptr(), addresses(k), *_step(h), w, *_shape(y, k), *_queue(y)
    )
    return out


def rk_finish(
    y: Tensor, k: Sequence[Tensor], h: Step, b: Weights, b_err: Weights, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Return the solution and its error ratio, in one pass over the state."""
    out, y, k = laid_out(y, k)
    h = _readable(h)
    ratio = y.new_empty(())
    partials = y.new_empty(_cuda.PARTIALS, dtype=torch.float64)
    _cuda.rk_finish(
        out.data_ptr(),
        ratio.data_ptr(),
        partials.data_ptr(),
        y.data_ptr(),
        addresses(k),
        *_step(h),
        b,
        b_err,
        rtol,
        atol,
        *_shape(y, k),
        *_queue(y),
    )
    return out, ratio


def dense_eval(
    y: Tensor, k: Sequence[Tensor], h: Step, p: Sequence[Weights], theta: Tensor
) -> Tensor:
    """Return the dense output [len(theta), *state]."""
    y, k = y.contiguous(), [ki.contiguous() for ki in k]
    h = _readable(h)
    theta = theta.to(torch.float64).contiguous()
    out = y.new_empty((theta.shape[0], *y.shape))
    _cuda.dense_eval(
        out.data_ptr(),
        y.data_ptr(),
        addresses(k),
        *_step(h),
        p,
        theta.data_ptr(),
        theta.shape[0],
        *_shape(y, k),
        *_queue(y),
    )
    return out


def _readable(h: Step) -> Step:
    """Return a step on the device in a type that the kernels read."""
    if isinstance(h, Tensor) and h.dtype not in (torch.float32, torch.float64):
        return h.to(torch.float64)
    return h


def _step(h: Step) -> tuple[float, int, int]:
    """Return the step as the binding takes it: value, address on the device or 0, type there."""
    if isinstance(h, Tensor):
        return 0.0, h.data_ptr(), TYPE_CODES[h.dtype]
    return h, 0, FLOAT64


def _shape(y: Tensor, k: Sequence[Tensor]) -> tuple[int, int, int]:
    return y.numel(), TYPE_CODES[y.dtype], TYPE_CODES[k[0].dtype]


def _queue(y: Tensor) -> tuple[int, int]:
    return y.device.index, torch.cuda.current_stream(y.device).cuda_stream


KERNELS = StepKernels("cuda", rk_combine, rk_finish, dense_eval)
