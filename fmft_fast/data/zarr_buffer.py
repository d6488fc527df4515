"""Reader of zarr replay buffers, versions 2 and 3: `data/*` beside `meta/episode_ends`."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fmft_fast.data.episodes import ENDS, Episodes
from fmft_fast.data.names import choose
from fmft_fast.errors import InputError, MissingDependencyError

# What describes an array in version 2 and 3, and a group in version 2.
ARRAY_FILES = (".zarray", "zarr.json")
GROUP_FILE = ".zgroup"
ENDS_PATH = f"meta/{ENDS}"
# Bytes before the data of a chunk, the last four of which give the size of all.
BLOSC_HEADER = 16


def recognise(path: Path) -> bool:
    """Whether this is a folder or an archive for `read`."""
    if path.is_dir():
        marks = (GROUP_FILE, "zarr.json", *(f"{ENDS_PATH}/{name}" for name in ARRAY_FILES))
        return any((path / mark).is_file() for mark in marks)
    return path.is_file() and path.suffix == ".zip"


def read(path: Path, arrays: Sequence[str] | None = None) -> Episodes:
    """Read the arrays of `data` that are named, or all but images.

    A chunk without a file would read as the fill value, and is refused as lost.

    Source:
        The replay buffers of Diffusion Policy (Chi et al. 2023, arXiv:2303.04137).
    """
    with _open(path) as (root, described):
        shapes = {name: _shape(name, text) for name, text in described.items()}
        if shapes.get(ENDS_PATH) is None:
            raise InputError(
                f"{ENDS_PATH}: expected whole numbers [episodes], got no such array; copy the "
                f"buffer again with its folder meta, or add the step after the last of each episode"
            )
        data = {
            name.removeprefix("data/"): shape
            for name, shape in sorted(shapes.items())
            if name.startswith("data/") and shape is not None
        }
        chosen = [f"data/{name}" for name in choose(data, arrays)]
        for name in (ENDS_PATH, *chosen):
            _check_chunk_sizes(path / name, name, described[name])
        ends = _read_array(root, ENDS_PATH)
        return Episodes({n.removeprefix("data/"): _read_array(root, n) for n in chosen}, ends)


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a buffer: its root group, and what describes each of its nodes, by path."""
    try:
        import zarr
        from zarr.storage import ZipStore
    except ImportError as error:
        raise MissingDependencyError(
            "zarr replay buffers need zarr: pip install 'fmft-fast[data]'"
        ) from error
    if path.is_dir():
        described = dict(_walk(path))
        with _refusing("the root group", "copy it again; version 3 needs zarr>=3"):
            root = zarr.open_group(str(path), mode="r")
        yield root, described
        return
    with _refusing("the archive", "copy it again"):
        prefix, described = _look_into(path)
        store = ZipStore(str(path), mode="r")
    try:
        with _refusing("the root group", "copy it again; version 3 needs zarr>=3"):
            root = zarr.open_group(store, path=prefix.rstrip("/"), mode="r")
        yield root, described
    finally:
        store.close()


@contextmanager
def _refusing(what: str, remedy: str) -> Iterator[None]:
    """Turn any failure of zarr or one of its codecs, whatever its type, into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{what}: expected it complete and undamaged, got {type(error).__name__} ({error}); "
            f"{remedy}"
        ) from error


def _walk(path: Path) -> Iterator[tuple[str, str]]:
    """Find the descriptions below a folder, without a look at the chunks of an array."""
    for folder, below, files in os.walk(path):
        for name in ARRAY_FILES:
            if name in files:
                text = (Path(folder) / name).read_text(encoding="utf-8", errors="replace")
                yield Path(folder).relative_to(path).as_posix(), text
                if name == ".zarray" or '"array"' in text:
                    below.clear()


def _look_into(path: Path) -> tuple[str, dict[str, str]]:
    """Find the root inside an archive, which may hold a folder, and the descriptions below it."""
    with zipfile.ZipFile(path) as archive:
        files = [name for name in archive.namelist() if name.endswith(ARRAY_FILES)]
        marks = [f"{ENDS_PATH}/{name}" for name in ARRAY_FILES]
        roots = [
            file.removesuffix(mark)
            for file in files
            for mark in marks
            if file == mark or file.endswith(f"/{mark}")
        ]
        prefix = min(roots, key=len, default="")
        return prefix, {
            file[len(prefix) :].rpartition("/")[0]: archive.read(file).decode(errors="replace")
            for file in files
            if file.startswith(prefix)
        }


def _shape(name: str, text: str) -> tuple[int, ...] | None:
    """Read the shape of an array from its description; None for a group."""
    try:
        description = json.loads(text)
        if description.get("node_type") == "group":
            return None
        return tuple(int(size) for size in description["shape"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{name or 'the root group'}: expected JSON that gives a shape, got {error}; copy its "
            f"{' or '.join(ARRAY_FILES)} again"
        ) from error


def _check_chunk_sizes(folder: Path, name: str, text: str) -> None:
    """Refuse chunks shorter than they say: blosc may read on behind the end of what it is given.

    Archives (there is no such folder) have a checksum for every chunk.
    """
    if '"blosc"' not in text or '"sharding_indexed"' in text:
        return
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in (*ARRAY_FILES, ".zattrs"):
            with file.open("rb") as stream:
                header = stream.read(BLOSC_HEADER)
            said, size = int.from_bytes(header[12:16], "little"), file.stat().st_size
            if len(header) < BLOSC_HEADER or said != size:
                raise InputError(
                    f"{name}: expected {said} bytes in the chunk {file.relative_to(folder)}, as "
                    f"its header says, got {size}; copy that file again"
                )


def _read_array(root: Any, name: str) -> np.ndarray:
    """Read one array, a chunk of steps at a time, so that an error says where the damage is."""
    with _refusing(name, "copy it again, or install the codec it names"):
        array = root[name]
        there, due = array.nchunks_initialized, array.nchunks
        if there != due:
            raise InputError(
                f"{name}: expected {due} chunks, got {there}; copy the missing files, or, if they "
                f"held nothing but the fill value, write them: with zarr.config.set("
                f"{{'array.write_empty_chunks': True}}): a[:] = a[:]"
            )
        if not array.shape:
            return np.asarray(array[...])
        whole = np.empty(array.shape, array.dtype)
        rows = (getattr(array, "shards", None) or array.chunks)[0]
    for start in range(0, len(whole), rows):
        stop = min(start + rows, len(whole))
        with _refusing(f"{name}, steps {start} to {stop - 1}", "copy that chunk again"):
            whole[start:stop] = array[start:stop]
    return whole
