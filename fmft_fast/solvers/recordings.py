"""What is recorded of solves: which are of one kind, how many are kept, what has failed."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureWarning
from ..ops.precision import convolution_precision, matmul_precision

SEEN_LIMIT = 256


class Recordings:
    """Recordings, the one used last at the end, and the kinds of solves that ran once.

    The first entry of every key and kind is the number of its owner, see `know`.

    Args:
        limit: most recordings that are kept; the one not used for longest makes room.
        budget: most bytes that they may hold together, as far as `get` is told.
        patience: one that was used within so many calls of `get` makes no room, so that kinds that
            take turns and are too many are not recorded again and again.
    """

    def __init__(self, limit: int, budget: int | None = None, patience: int = 0) -> None:
        self.limit, self.budget, self.patience = limit, budget, patience
        self.lock = threading.RLock()
        self.recorded: OrderedDict[Any, Any] = OrderedDict()
        self.sizes: dict[Any, int] = {}
        self.used: dict[Any, int] = {}
        self.calls = 0
        self.seen: OrderedDict[Any, Any] = OrderedDict()
        self.owners: dict[int, weakref.ref] = {}
        self.failed: weakref.WeakSet[Any] = weakref.WeakSet()

    def know(self, owner: Any) -> int:
        """The number of an owner; what is recorded of it goes when it goes."""
        number = id(owner)
        known = self.owners.get(number)
        if known is None or known() is not owner:
            with self.lock:
                self.forget(number)
                self.owners[number] = weakref.ref(owner, lambda _: self.forget(number))
        return number

    def forget(self, number: int) -> None:
        """Drop all that belongs to an owner."""
        with self.lock:
            self.owners.pop(number, None)
            for table in (self.recorded, self.sizes, self.used, self.seen):
                for key in list(table):
                    if key[0] == number:
                        table.pop(key, None)  # a collection inside this loop may come first

    def get(self, key: Any, make: Callable[[], Any], size: int = 0) -> Any:
        """What was recorded under a key, or is now; None where there is no room for its bytes."""
        with self.lock:
            self.calls += 1
            if key not in self.recorded:
                if not self._make_room(size):
                    return None
                made = make()
                self.recorded[key], self.sizes[key] = made, size
            self.recorded.move_to_end(key)
            self.used[key] = self.calls
            return self.recorded[key]

    def _make_room(self, size: int) -> bool:
        """Drop what was not used for longest, as far as one more needs it and it may go."""
        if self.budget is not None and size > self.budget:
            return False
        while len(self.recorded) >= self.limit or (
            self.budget is not None and sum(self.sizes.values()) + size > self.budget
        ):
            oldest = next(iter(self.recorded))
            if self.calls - self.used.get(oldest, 0) < self.patience:
                return False
            for table in (self.recorded, self.sizes, self.used):
                table.pop(oldest, None)
        return True

    def note(self, kind: Any, found: Any) -> None:
        """Remember what the first solve of a kind has shown."""
        with self.lock:
            self.seen[kind] = found
            while len(self.seen) > SEEN_LIMIT:
                self.seen.popitem(last=False)

    def give_up(self, owner: Any, who: str, error: Exception, advice: str = "") -> None:
        """Record nothing more of an owner, and say why."""
        self.failed.add(owner)
        warnings.warn(
            f"{who} runs without CUDA graphs from now on: {error}. {advice}To silence this, use "
            "fmft_fast.cuda_graphs(False)",
            CaptureWarning,
            stacklevel=3,
        )

    def clear(self) -> None:
        """Drop everything, with the memory that it holds."""
        with self.lock:
            for table in (self.recorded, self.sizes, self.used, self.seen, self.owners):
                table.clear()
            self.failed.clear()


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; torch does not count it for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def layout(tensor: Tensor | None) -> Any:
    """What a recording holds fixed of a tensor whose numbers change."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_inference()


def stream_of(device: torch.device) -> int:
    """The present stream of a device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def settings(device: torch.device) -> tuple:
    """What besides its arguments decides how an operation is done."""
    return (
        threading.get_ident(),
        stream_of(device),
        torch.is_inference_mode_enabled(),
        matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        convolution_precision(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.get_default_dtype(),
    )


def autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether torch casts by itself on a device, and to what."""
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
