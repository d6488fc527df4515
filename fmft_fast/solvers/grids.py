"""The times of `solve`: a grid of the user's, or equal steps."""

from __future__ import annotations

import math
import operator
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.contract import is_traced
from .inputs import direction_of


def make_grid(t0: float | Tensor, t1: float | Tensor, steps: int | Tensor | None) -> Tensor:
    """[N + 1] float64 times: the user's grid, or equal steps (one without a number of steps)."""
    if isinstance(steps, Tensor):
        if steps.ndim != 1 or len(steps) < 2 or not steps.is_floating_point():
            raise InputError(
                "a grid of steps must be a floating point tensor of shape [N + 1], N >= 1, got "
                f"{steps.dtype} of shape {tuple(steps.shape)}"
            )
        grid = steps.to(torch.float64)
    else:
        try:
            count = 1 if steps is None else operator.index(steps)
        except TypeError:
            count = 0
        if count < 1 or isinstance(steps, bool):
            raise InputError(
                f"steps must be a positive int or a tensor of times [N + 1], got {steps!r}"
            )
        if isinstance(t0, (int, float)) and isinstance(t1, (int, float)) and not is_traced():
            return torch.tensor(equal_times(t0, t1, count), dtype=torch.float64)
        grid = _equal_steps(t0, t1, count)
    direction_of(grid)
    return grid


def _equal_steps(t0: float | Tensor, t1: float | Tensor, count: int) -> Tensor:
    ends = [torch.as_tensor(t, dtype=torch.float64).reshape(()) for t in (t0, t1)]
    device = next((t.device for t in ends if t.device.type != "cpu"), ends[0].device)
    share = torch.arange(count + 1, dtype=torch.float64, device=device) / count
    return torch.lerp(ends[0].to(device), ends[1].to(device), share)


@lru_cache(maxsize=64)
def equal_times(t0: float, t1: float, count: int) -> list[float]:
    """The times of equal steps, remembered: they take longer than a small network's step."""
    if not (math.isfinite(t0) and math.isfinite(t1)):
        raise InputError(f"t0 and t1 must be finite, got {t0} and {t1}: end where y is wanted")
    grid = _equal_steps(t0, t1, count)
    direction_of(grid)
    return grid.tolist()
