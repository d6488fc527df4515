"""Which arrays of a file to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fmft_fast.errors import InputError

# [steps, height, width, channels] at least: such arrays are large, and are read when named.
IMAGE_DIMS = 4


def choose(
    shapes: Mapping[str, Sequence[int]], wanted: Sequence[str] | None, aside: Sequence[str] = ()
) -> list[str]:
    """Give the names to read out of those that a file has.

    Args:
        shapes: the shape of every array, the steps first.
        wanted: names to read; None means all but images, or images if there is nothing else.
        aside: beginnings of names that are read only when named.

    Raises:
        InputError: a wanted name is not there, or there is nothing to read.
    """
    if isinstance(wanted, str):
        raise InputError(f"arrays: expected a list of names, got {wanted!r}; write [{wanted!r}]")
    if wanted is not None:
        for name in wanted:
            if name not in shapes:
                raise InputError(
                    f"{name}: expected an array of the file, which has "
                    f"{', '.join(shapes) or 'none'}; name one of these"
                )
        names = list(dict.fromkeys(wanted))
    else:
        plain = [name for name in shapes if not name.startswith(tuple(aside))]
        names = [name for name in plain if len(shapes[name]) < IMAGE_DIMS] or plain
    if not names:
        raise InputError("arrays: expected at least one to read, got none; name one that is there")
    return names
