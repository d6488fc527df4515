"""Reading recorded episodes of any known format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fmft_fast.data import d4rl, lerobot, minari, npz, relay, robomimic, zarr_buffer
from fmft_fast.data.episodes import Episodes
from fmft_fast.errors import InputError


class Format(NamedTuple):
    """One format: whether a path holds it, how to read it, and what it looks like."""

    recognise: Callable[[Path], bool]
    read: Callable[[Path, Sequence[str] | None], Episodes]
    layout: str


FORMATS = {
    "npz": Format(npz.recognise, npz.read, "a file .npz with episode_ends"),
    "zarr": Format(
        zarr_buffer.recognise,
        zarr_buffer.read,
        "a folder or .zip with data/* and meta/episode_ends",
    ),
    "robomimic": Format(robomimic.recognise, robomimic.read, "HDF5 with data/demo_0/actions"),
    "minari": Format(minari.recognise, minari.read, "HDF5 with episode_0/observations"),
    "d4rl": Format(d4rl.recognise, d4rl.read, "HDF5 with observations and terminals"),
    "relay": Format(relay.recognise, relay.read, "a folder with existence_mask.npy"),
    "lerobot": Format(lerobot.recognise, lerobot.read, "a folder with meta/info.json"),
}


def read_episodes(
    path: str | Path,
    format: str = "auto",
    arrays: Sequence[str] | None = None,
    *,
    filter_key: str | None = None,
) -> Episodes:
    """Read episodes into memory and check them.

    Args:
        path: a file or a folder.
        format: a key of `FORMATS`, or "auto" to recognise it by its content.
        arrays: names to read. By default everything is read but images (arrays of four and more
            dimensions), which are read where they are named or where there is nothing else.
        filter_key: the list of demonstrations to read, as `mask/*` of a robomimic file has them.

    Returns:
        The episodes; arrays keep the names of the source, with "/" between the parts of a name.

    Raises:
        InputError: there is no such path, its format is unknown, an array is not there, or the
            content is damaged or contradicts itself; the message names the file, the field that is
            wrong and what to do.
        MissingDependencyError: a package that reads this format is not installed.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> episodes = Episodes({"action": np.zeros((5, 2), np.float32)}, np.array([3, 5]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_episodes(episodes.save(f"{folder}/demonstrations.npz")).lengths
        array([3, 2])
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: expected a file or folder, got none; check the path")
    try:
        if format == "auto":
            format = recognise(path)
        if format not in FORMATS:
            raise InputError(
                f"format: expected auto or one of {', '.join(FORMATS)}, got {format!r}; use one"
            )
        if filter_key is None:
            return FORMATS[format].read(path, arrays)
        if format != "robomimic":
            raise InputError(
                f"filter_key: expected with the format robomimic alone, got format {format}; "
                f"leave it out"
            )
        return robomimic.read(path, arrays, filter_key)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def recognise(path: Path) -> str:
    """Name the format of a file or folder.

    Raises:
        InputError: it is none of the known ones.
    """
    for name, format in FORMATS.items():
        if format.recognise(path):
            return name
    layouts = "; ".join(f"{name}: {format.layout}" for name, format in FORMATS.items())
    raise InputError(
        f"format: expected one of the known layouts ({layouts}), got none of them; check that the "
        f"copy is complete, or name the format"
    )
