"""Whether numbers on the host are finite, in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmft_fast.ops.compiled import CPU, TYPE_CODES
from fmft_fast.ops.layout import is_plain

LARGE = 1 << 16  # numbers, of which torch's sum takes less time


def all_finite(x: Tensor) -> bool:
    """Whether all numbers are finite, on any device (on a GPU this waits)."""
    x = x.detach()
    plain = type(x) is Tensor and x.is_floating_point()
    return plain and seems_finite(x) or bool(torch.isfinite(x).all())


def seems_finite(x: Tensor) -> bool:
    """Whether all numbers are finite; may be false for numbers so large that their sum is not."""
    size = x.numel()
    known = x.dtype in TYPE_CODES and x.is_contiguous() and is_plain(x)
    if CPU is not None and known and size < LARGE:
        return CPU.all_finite(x.data_ptr(), size, TYPE_CODES[x.dtype])
    return math.isfinite(x.sum().item())
