"""Reader of .npz files: arrays [steps, ...] beside `episode_ends`, as `Episodes.save` writes."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmft_fast.data.episodes import ENDS, Episodes
from fmft_fast.data.names import choose
from fmft_fast.errors import InputError

# What reading .npy and .npz raises on damage, which may as well have hit a header or its sizes.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    SyntaxError,
    tokenize.TokenError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


def recognise(path: Path) -> bool:
    """Whether this is a file for `read`."""
    return path.is_file() and path.suffix == ".npz"


def read(path: Path, arrays: Sequence[str] | None = None) -> Episodes:
    """Read the arrays that are named, or all but images; see `fmft_fast.data.read_episodes`."""
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        raise InputError(
            f"the file: expected a complete .npz archive, got {error}; copy or make it again"
        ) from error
    with archive:
        shapes = {}
        for member in archive.namelist():
            if member.endswith(".npy"):
                shapes[member.removesuffix(".npy")] = _read_shape(archive, member)
        if ENDS not in shapes:
            raise InputError(
                f"{ENDS}: expected whole numbers [episodes], got no such array among "
                f"{', '.join(shapes) or 'none'}; add the step after the last of every episode"
            )
        ends = _read_array(archive, ENDS)
        del shapes[ENDS]
        return Episodes({name: _read_array(archive, name) for name in choose(shapes, arrays)}, ends)


def _read_shape(archive: zipfile.ZipFile, member: str) -> tuple[int, ...]:
    """Read the shape of an array, and leave its numbers on the disk."""
    try:
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                return np.lib.format.read_array_header_1_0(stream)[0]
            return np.lib.format.read_array_header_2_0(stream)[0]
    except DAMAGE as error:
        raise _damaged(member.removesuffix(".npy"), error) from error


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        with archive.open(f"{name}.npy") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except DAMAGE as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(
        f"{name}: expected an undamaged array of numbers, got {error}; write the file again with "
        f"plain numbers, or copy it again"
    )
