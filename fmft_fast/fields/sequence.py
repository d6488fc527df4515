"""What fields of sequences share: checks of sizes and calls, and the embedding of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmft_fast.errors import InputError

FASTEST = 100.0  # radians per unit of flow time


def check_state(state: Sequence[int]) -> tuple[int, int]:
    """Return (horizon, action_dim).

    Raises:
        InputError: it is not two whole numbers from 1 on.
    """
    sizes = tuple(state)
    if len(sizes) != 2 or any(not _is_whole(size) or size < 1 for size in sizes):
        raise InputError(
            f"expected state = (horizon, action_dim), two whole numbers from 1 on, got {state}"
        )
    return sizes[0], sizes[1]


def check_sizes(least: Mapping[str, int], **sizes: Any) -> None:
    """Refuse sizes that are no whole numbers or lie below the least ones.

    Raises:
        InputError: names the size.
    """
    for name, size in sizes.items():
        if not _is_whole(size) or size < least[name]:
            raise InputError(f"{name}: expected a whole number from {least[name]} on, got {size!r}")


def check_dropout(dropout: float) -> None:
    """Refuse a probability outside of [0, 1).

    Raises:
        InputError: it lies outside.
    """
    if not 0 <= dropout < 1:
        raise InputError(f"dropout: expected a probability from 0 to below 1, got {dropout!r}")


def _is_whole(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool)


def check_call(
    t: Tensor, x: Tensor, cond: Tensor | None, state: tuple[int, int], cond_dim: int
) -> None:
    """Refuse arguments of a field that do not fit it.

    Raises:
        InputError: t is neither 0-d nor [batch], or x is not [batch, *state], or the condition is
            not [batch, cond_dim] (none if cond_dim = 0).
    """
    if x.ndim != 3 or tuple(x.shape[1:]) != state:
        raise InputError(f"x must be [batch, {state[0]}, {state[1]}], got {list(x.shape)}")
    if t.ndim and tuple(t.shape) != (len(x),):
        raise InputError(f"t must be 0-d or [{len(x)}], one time for each x, got {list(t.shape)}")
    wanted = [len(x), cond_dim] if cond_dim else "none"
    got = "none" if cond is None else list(cond.shape)
    if got != wanted:
        raise InputError(f"cond must be {wanted} (cond_dim = {cond_dim}), got {got}")


class TimeEmbedding(nn.Module):
    """A flow time as sines and cosines through a perceptron with one hidden layer.

    The angular frequencies go from 1 to 100 in equal ratios: a flow time stays within [0, 1], where
    slower waves would all look alike.

    Args:
        width: size of the embedding, an even number.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise InputError(
                f"expected an even width of the time's embedding, half sines and half cosines, "
                f"got {width}; take {width + 1}"
            )
        frequencies = FASTEST ** torch.linspace(0, 1, width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.enter = nn.Linear(width, 4 * width)
        self.leave = nn.Linear(4 * width, width)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return [1, width] for a 0-d t and [batch, width] for t [batch], in the dtype of x."""
        angles = t.to(x).reshape(-1, 1) * self.frequencies
        waves = torch.cat([torch.sin(angles), torch.cos(angles)], 1)
        return self.leave(F.mish(self.enter(waves)))
