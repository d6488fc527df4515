"""What may be done while a stream is recorded as a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing() -> bool:
    """Whether somebody is recording the present stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def place(numbers: Tensor, device: torch.device) -> Tensor:
    """Bring a few numbers from the host to a device, also while its stream is recorded.

    A replay would copy from memory of the host that is gone by then; numbers that kernels are given
    as arguments stay.
    """
    if numbers.device == device or not is_capturing():
        return numbers.to(device, non_blocking=True)
    flat = [
        torch.full((), x, dtype=numbers.dtype, device=device) for x in numbers.flatten().tolist()
    ]
    return torch.stack(flat).reshape(numbers.shape)
