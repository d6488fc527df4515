"""One memory layout for all tensors of a kernel call, and the numbers that the bindings take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def laid_out(y: Tensor, k: Sequence[Tensor]) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Return an empty result like `y`, and `y` and `k` in its layout.

    A dense layout of `y`, such as channels-last, is kept; only tensors of another one are copied.
    """
    out = torch.empty_like(y)
    stride = out.stride()
    if y.stride() != stride:
        y = torch.empty_like(out).copy_(y)
    if any(ki.stride() != stride for ki in k):
        k = [
            ki if ki.stride() == stride else torch.empty_like(out, dtype=ki.dtype).copy_(ki)
            for ki in k
        ]
    return out, y, k


def addresses(k: Sequence[Tensor]) -> list[int]:
    """Return the address of every tensor."""
    return [ki.data_ptr() for ki in k]
