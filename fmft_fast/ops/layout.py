"""One memory layout for all tensors of a kernel call, and the numbers that the bindings take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def is_plain(x: Tensor) -> bool:
    """Whether a tensor's memory holds its numbers.

    Not so where a bit of the tensor turns their sign (`z.conj().imag`), and in the zeros that torch
    makes as tangents, which have no memory. A clone is plain.
    """
    return not (x.is_neg() or x._is_zerotensor())


def laid_out(y: Tensor, k: Sequence[Tensor]) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Return an empty result like `y`, and `y` and `k` in its layout.

    A dense layout of `y`, such as channels-last, is kept; only tensors of another one are copied,
    and those that are not `is_plain`.
    """
    out = torch.empty_like(y)
    stride = out.stride()

    def fits(x: Tensor) -> bool:
        return x.stride() == stride and is_plain(x)

    if not fits(y):
        y = torch.empty_like(out).copy_(y)
    if not all(map(fits, k)):
        k = [ki if fits(ki) else torch.empty_like(out, dtype=ki.dtype).copy_(ki) for ki in k]
    return out, y, k


def addresses(k: Sequence[Tensor]) -> list[int]:
    """Return the address of every tensor."""
    return [ki.data_ptr() for ki in k]
