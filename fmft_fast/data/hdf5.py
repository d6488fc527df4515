"""What the readers of HDF5 files share: opening, listing and reading with errors that say where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fmft_fast.errors import InputError, MissingDependencyError

SUFFIXES = (".hdf5", ".h5", ".hdf")
SIGNATURE = b"\x89HDF\r\n\x1a\n"


def is_hdf5(path: Path) -> bool:
    """Whether a file is meant to be HDF5, by its name or by how it begins."""
    if not path.is_file():
        return False
    if path.suffix in SUFFIXES:
        return True
    with path.open("rb") as stream:
        return stream.read(len(SIGNATURE)) == SIGNATURE


def top_names(path: Path) -> list[str]:
    """Give the names at the root of a file."""
    with open_file(path) as file:
        return list(file)


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Open a file for reading, and turn what damage raises inside the block into InputError.

    Raises:
        InputError: it is not a complete and undamaged HDF5 file.
        MissingDependencyError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            "HDF5 files need h5py: pip install 'fmft-fast[data]'"
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"the file: expected a complete HDF5 file, got {error}; copy it again"
        ) from error
    with file:
        try:
            yield file
        except InputError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, MemoryError) as error:
            raise InputError(
                f"the file: expected an undamaged HDF5 file, got {error}; copy it again"
            ) from error


def group_of(parent: Any, name: str) -> Any:
    """Give a group that has to be there."""
    found = _get(parent, name)
    if not hasattr(found, "keys"):
        raise InputError(
            f"{_place(parent, name)}: expected a group, got "
            f"{'nothing' if found is None else 'an array'}; copy the file again or repair it"
        )
    return found


def leaves(group: Any, prefix: str = "") -> dict[str, Any]:
    """Give every array below a group by its path, unread."""
    found = {}
    for name in group:
        node = _get(group, name)
        if node is None:
            raise InputError(
                f"{_place(group, name)}: expected a group or an array, got a link to nothing; put "
                f"the file that it names beside this one"
            )
        if hasattr(node, "keys"):
            found.update(leaves(node, f"{prefix}{name}/"))
        elif getattr(node, "shape", None) is None:
            raise InputError(
                f"{_place(group, name)}: expected a group or an array, got an empty entry; remove "
                f"it or write the array"
            )
        else:
            found[f"{prefix}{name}"] = node
    return found


def read_array(node: Any) -> np.ndarray:
    """Read one array whole."""
    place = node.name.lstrip("/")
    _check_written(node, place)
    try:
        return np.asarray(node[()])
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"{place}: expected an undamaged array, got {error}; copy the file again"
        ) from error


def expect_dims(node: Any, *dims: str) -> None:
    """Refuse an array with another number of dimensions."""
    if len(node.shape) != len(dims):
        raise InputError(
            f"{node.name.lstrip('/')}: expected shape [{', '.join(dims)}], got "
            f"{list(node.shape)}; write it with these dimensions"
        )


def expect_steps(node: Any, steps: int, of: str) -> None:
    """Refuse an array with another number of steps than something else has."""
    if not node.shape or node.shape[0] != steps:
        raise InputError(
            f"{node.name.lstrip('/')}: expected {steps} steps as in {of}, got shape "
            f"{list(node.shape)}; write one entry for every step"
        )


def by_number(names: list[str], prefix: str) -> list[str]:
    """Sort names such as demo_10 by their number.

    Raises:
        InputError: a name is not the prefix and a number.
    """
    for name in names:
        number = name.removeprefix(prefix)
        if not name.startswith(prefix) or not (number.isascii() and number.isdigit()):
            raise InputError(
                f"{name}: expected a name such as {prefix}0, got this one; rename or remove it"
            )
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


def _get(group: Any, name: str) -> Any:
    """Give what is under a name; None where a link leads nowhere."""
    try:
        return group[name]
    except KeyError:
        return None
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{_place(group, name)}: expected an undamaged group or array, got {error}; copy the "
            f"file again"
        ) from error


def _place(group: Any, name: str) -> str:
    return f"{group.name}/{name}".lstrip("/")


def _check_written(node: Any, place: str) -> None:
    """Refuse an array that was laid out but not filled: it would read as zeros."""
    if node.is_virtual or node.external or not node.size:
        return
    due, there = 1, int(node.id.get_storage_size() > 0)
    if node.chunks:
        sizes = zip(node.shape, node.chunks, strict=True)
        due = math.prod(-(-size // chunk) for size, chunk in sizes)
        there = node.id.get_num_chunks()
    if there < due:
        raise InputError(
            f"{place}: expected {due} written chunks, got {there}; the writer was interrupted: "
            f"write the file again"
        )
