"""Copies of tensors, to see for certain whether these have changed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import Tensor

try:
    _cpu = importlib.import_module("fmft_fast._cpu")
except ImportError:
    _cpu = None


class Copies:
    """What tensors on the host held, to the byte.

    Their version counters would be quicker to read, but do not count what is written through
    `data`, numpy or another view of the memory.

    Args:
        tensors: those that `can_copy` takes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._copies = [x.detach().clone() for x in tensors]
        self._sizes = [x.nbytes for x in tensors]
        self._addresses = [x.data_ptr() for x in self._copies]

    def hold(self) -> bool:
        """Whether the tensors, whose sizes must be what they were, hold the same."""
        if _cpu is None or not all(x.is_contiguous() for x in self._tensors):
            return False
        now = [x.data_ptr() for x in self._tensors]
        return _cpu.same_bytes(now, self._addresses, self._sizes)


def can_copy(tensors: Sequence[Tensor], most: int) -> bool:
    """Whether tensors lie together in the host's memory, and take at most so many bytes."""
    plain = all(x.device.type == "cpu" and x.is_contiguous() for x in tensors)
    return _cpu is not None and plain and sum(x.nbytes for x in tensors) <= most
