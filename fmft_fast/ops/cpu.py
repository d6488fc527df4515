"""The fused step ops of the compiled module `fmft_fast._cpu`, on torch tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmft_fast import _cpu
from fmft_fast.ops.contract import Step, StepKernels, Weights
from fmft_fast.ops.layout import TYPE_CODES, addresses, laid_out


def rk_combine(y: Tensor, k: Sequence[Tensor], h: Step, w: Weights) -> Tensor:
    """Return y + h sum_i w[i] k[i]."""
    out, y, k = laid_out(y, k)
    _cpu.rk_combine(
        out.data_ptr(),
        y.data_ptr(),
        addresses(k),
        float(h),
        w,
        *_shape(y, k),
        torch.get_num_threads(),
    )
    return out


def rk_finish(
    y: Tensor, k: Sequence[Tensor], h: Step, b: Weights, b_err: Weights, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Return the solution and its error ratio, in one pass."""
    out, y, k = laid_out(y, k)
    ratio = y.new_empty(())
    _cpu.rk_finish(
        out.data_ptr(),
        ratio.data_ptr(),
        y.data_ptr(),
        addresses(k),
        float(h),
        b,
        b_err,
        rtol,
        atol,
        *_shape(y, k),
        torch.get_num_threads(),
    )
    return out, ratio


def dense_eval(
    y: Tensor, k: Sequence[Tensor], h: Step, p: Sequence[Weights], theta: Tensor
) -> Tensor:
    """Return the dense output [len(theta), *state]."""
    y, k = y.contiguous(), [ki.contiguous() for ki in k]
    theta = theta.to(torch.float64).contiguous()
    out = y.new_empty((theta.shape[0], *y.shape))
    _cpu.dense_eval(
        out.data_ptr(),
        y.data_ptr(),
        addresses(k),
        float(h),
        p,
        theta.data_ptr(),
        theta.shape[0],
        *_shape(y, k),
        torch.get_num_threads(),
    )
    return out


def _shape(y: Tensor, k: Sequence[Tensor]) -> tuple[int, int, int]:
    return y.numel(), TYPE_CODES[y.dtype], TYPE_CODES[k[0].dtype]


KERNELS = StepKernels("cpu", rk_combine, rk_finish, dense_eval)
