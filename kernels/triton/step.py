"""The fused step ops in Triton, for GPUs where no compiled module exists.

Numbers reach a kernel as tuples of float32, Triton's type for a Python float: for a float64 state
each is the exact sum of three. Without a step on the device, h is folded into the weights.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmft_fast.ops.contract import Step, StepKernels, Weights
from fmft_fast.ops.layout import laid_out

BLOCK = 1024
# The grid of rk_finish depends on the size of the state alone, and so does the order of its sum.
MAX_BLOCKS = 1024
FLOAT32 = struct.Struct("f")


@triton.jit
def _number(parts, i: tl.constexpr, like: tl.constexpr):
    """Return the i-th of the numbers in `parts`, in the dtype `like`."""
    if like == tl.float64:
        first = tl.cast(parts[3 * i], tl.float64)
        second = tl.cast(parts[3 * i + 1], tl.float64)
        return first + second + tl.cast(parts[3 * i + 2], tl.float64)
    else:
        return tl.cast(parts[3 * i], tl.float32)


@triton.jit
def _combine_kernel(
    out,  # [size]
    y,  # [size]
    k,  # a tuple of [size]
    w,  # three parts per stage
    h,  # 0-d, read if ON_DEVICE
    size,
    STAGES: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size  # the last block hangs over
    start = tl.load(y + at, mask=inside)
    total = tl.zeros_like(start)
    for s in tl.static_range(STAGES):
        total += _number(w, s, start.dtype) * tl.load(k[s] + at, mask=inside).to(start.dtype)
    if ON_DEVICE:
        total *= tl.load(h).to(start.dtype)
    tl.store(out + at, start + total, mask=inside)


@triton.jit
def _finish_kernel(
    out,  # [size]
    partials,  # [blocks], the sum of squares of each
    y,  # [size]
    k,  # a tuple of [size]
    b,  # three parts per stage
    b_err,  # three parts per stage
    tolerances,  # three parts of rtol and atol each
    h,  # 0-d, read if ON_DEVICE
    size,
    STAGES: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    offset = tl.program_id(0).to(tl.int64) * BLOCK
    while offset < size:
        at = offset + tl.arange(0, BLOCK)
        inside = at < size  # the last block hangs over
        start = tl.load(y + at, mask=inside, other=0.0)
        total = tl.zeros_like(start)
        error = tl.zeros_like(start)
        for s in tl.static_range(STAGES):
            value = tl.load(k[s] + at, mask=inside, other=0.0).to(start.dtype)
            total += _number(b, s, start.dtype) * value
            error += _number(b_err, s, start.dtype) * value
        if ON_DEVICE:
            total *= tl.load(h).to(start.dtype)
            error *= tl.load(h).to(start.dtype)
        end = start + total
        # A NaN in `end` makes the comparison false and so reaches the scale.
        larger = tl.where(tl.abs(start) > tl.abs(end), tl.abs(start), tl.abs(end))
        scale = _number(tolerances, 1, start.dtype) + _number(tolerances, 0, start.dtype) * larger
        ratio = tl.where(inside, error / scale, 0.0).to(tl.float64)
        squares += ratio * ratio
        tl.store(out + at, end, mask=inside)
        offset += tl.num_programs(0) * BLOCK
    tl.store(partials + tl.program_id(0), tl.sum(squares))


@triton.jit
def _ratio_kernel(ratio, partials, blocks, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(partials + at, mask=at < blocks, other=0.0))
    tl.store(ratio, tl.sqrt(total / size).to(ratio.dtype.element_ty))


@triton.jit
def _dense_kernel(
    out,  # [thetas, size]
    y,  # [size]
    k,  # a tuple of [size]
    p,  # three parts per stage and power, the powers of a stage together
    h,  # 0-d, read if ON_DEVICE
    theta,  # [thetas], float64
    size,
    STAGES: tl.constexpr,
    DEGREE: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size  # the last block hangs over
    place = tl.load(theta + row)
    start = tl.load(y + at, mask=inside)
    total = tl.zeros_like(start)
    for s in tl.static_range(STAGES):
        weight = place * 0.0
        for j in tl.static_range(DEGREE):
            weight = (weight + _number(p, s * DEGREE + DEGREE - 1 - j, tl.float64)) * place
        total += weight.to(start.dtype) * tl.load(k[s] + at, mask=inside).to(start.dtype)
    if ON_DEVICE:
        total *= tl.load(h).to(start.dtype)
    tl.store(out + row * size + at, start + total, mask=inside)


def rk_combine(y: Tensor, k: Sequence[Tensor], h: Step, w: Weights) -> Tensor:
    """Return y + h sum_i w[i] k[i]."""
    out, y, k = laid_out(y, k)
    pairs = [(wi, ki) for wi, ki in zip(w, k, strict=True) if wi != 0] or [(0.0, k[0])]
    scale, on_device = _scale(h)
    grid = (triton.cdiv(y.numel(), BLOCK),)
    with torch.cuda.device_of(y):
        _combine_kernel[grid](
            out,
            y,
            tuple(ki for _, ki in pairs),
            parts(scale * wi for wi, _ in pairs),
            h if on_device else y,
            y.numel(),
            STAGES=len(pairs),
            ON_DEVICE=on_device,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return out


def rk_finish(
    y: Tensor, k: Sequence[Tensor], h: Step, b: Weights, b_err: Weights, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Return the solution and its error ratio, in one pass over the state."""
    out, y, k = laid_out(y, k)
    stages = [t for t in zip(b, b_err, k, strict=True) if t[0] != 0 or t[1] != 0]
    stages = stages or [(0.0, 0.0, k[0])]
    scale, on_device = _scale(h)
    blocks = min(triton.cdiv(y.numel(), BLOCK), MAX_BLOCKS)
    partials = y.new_empty(blocks, dtype=torch.float64)
    ratio = y.new_empty(())
    with torch.cuda.device_of(y):
        _finish_kernel[(blocks,)](
            out,
            partials,
            y,
            tuple(ki for _, _, ki in stages),
            parts(scale * bi for bi, _, _ in stages),
            parts(scale * ei for _, ei, _ in stages),
            parts((rtol, atol)),
            h if on_device else y,
            y.numel(),
            STAGES=len(stages),
            ON_DEVICE=on_device,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
        _ratio_kernel[(1,)](
            ratio, partials, blocks, y.numel(), BLOCK=MAX_BLOCKS, enable_fp_fusion=True
        )
    return out, ratio


def dense_eval(
    y: Tensor, k: Sequence[Tensor], h: Step, p: Sequence[Weights], theta: Tensor
) -> Tensor:
    """Return the dense output [len(theta), *state]."""
    y, k = y.contiguous(), tuple(ki.contiguous() for ki in k)
    theta = theta.to(torch.float64).contiguous()
    out = y.new_empty((theta.shape[0], *y.shape))
    scale, on_device = _scale(h)
    with torch.cuda.device_of(y):
        _dense_kernel[(triton.cdiv(y.numel(), BLOCK), theta.shape[0])](
            out,
            y,
            k,
            parts(scale * c for row in p for c in row),
            h if on_device else y,
            theta,
            y.numel(),
            STAGES=len(k),
            DEGREE=len(p[0]),
            ON_DEVICE=on_device,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return out


def parts(numbers: Iterable[float]) -> tuple[float, ...]:
    """Return every number as three that float32 holds exactly and whose sum is the number."""
    found = []
    for number in numbers:
        for _ in range(3):
            (part,) = FLOAT32.unpack(FLOAT32.pack(number))
            found.append(part)
            number -= part
    return tuple(found)


def _scale(h: Step) -> tuple[float, bool]:
    """Return the factor of the weights, and whether the kernel has to read `h` on the device."""
    return (1.0, True) if isinstance(h, Tensor) else (h, False)


KERNELS = StepKernels("triton", rk_combine, rk_finish, dense_eval)
