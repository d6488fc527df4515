"""Reader of LeRobot data sets, versions 2 and 3: parquet files beside `meta/info.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmft_fast.data.episodes import Episodes
from fmft_fast.data.names import choose
from fmft_fast.errors import InputError, MissingDependencyError

INFO = "meta/info.json"
# Kinds of features that are no numbers in the parquet files.
NO_NUMBERS = ("video", "image", "string", "language")


def recognise(path: Path) -> bool:
    """Whether this is a folder for `read`."""
    return (path / INFO).is_file()


def read(path: Path, arrays: Sequence[str] | None = None) -> Episodes:
    """Read the numbers of all frames; pictures and videos are left alone.

    Version 2 has a file for every episode, version 3 several episodes in a file; both are read in
    the order of their names, and the columns episode_index and frame_index tell what is missing.

    Source:
        LeRobotDataset v2.1 and v3.0 (Hugging Face), huggingface.co/docs/lerobot.
    """
    info = _read_info(path)
    features = info["features"]
    shapes = {
        name: (0, *feature["shape"])
        for name, feature in features.items()
        if feature["dtype"] not in NO_NUMBERS
    }
    chosen = choose(shapes, arrays)
    needed = list(dict.fromkeys([*chosen, "episode_index", "frame_index"]))
    files = sorted((path / "data").glob("chunk-*/*.parquet"))
    if not files:
        raise InputError("data: expected files chunk-*/*.parquet, got none; copy the folder again")
    pieces = [_read_file(file, path, {n: shapes.get(n, (0, 1)) for n in needed}) for file in files]
    joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in needed}
    ends = _ends(joined["episode_index"].ravel(), joined["frame_index"].ravel(), info)
    return Episodes({name: joined[name] for name in chosen}, ends)


def _read_info(path: Path) -> dict[str, Any]:
    """Read and check the description of the data set."""
    try:
        info = json.loads((path / INFO).read_text(encoding="utf-8"))
        version, features = str(info["codebase_version"]), info["features"]
        for name, feature in features.items():
            if not all(isinstance(size, int) for size in feature["shape"]):
                raise ValueError(f"shape {feature['shape']} of {name}")
            str(feature["dtype"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{INFO}: expected JSON with codebase_version and features, each with dtype and shape, "
            f"got {type(error).__name__} ({error}); copy it again"
        ) from error
    if not version.startswith(("v2.", "v3.")):
        raise InputError(
            f"{INFO}, codebase_version: expected v2.x or v3.x, got {version!r}; convert the data "
            f"set with LeRobot's scripts"
        )
    return info


def _read_file(
    file: Path, root: Path, shapes: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Read columns of one file as arrays [frames, *shape]."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            "LeRobot data sets need pyarrow: pip install 'fmft-fast[data]'"
        ) from error
    place = file.relative_to(root).as_posix()
    try:
        # ParquetFile takes nothing from the names of folders, as read_table would.
        with parquet.ParquetFile(file) as source:
            there = source.schema_arrow.names
            for name in shapes:
                if name not in there:
                    raise InputError(
                        f"{place}, column {name}: expected numbers, got no such column among "
                        f"{', '.join(there)}; copy the file again or name other arrays"
                    )
            table = source.read(columns=list(shapes))
            return {
                name: _to_numpy(table.column(name), tuple(shape[1:]), f"{place}, column {name}")
                for name, shape in shapes.items()
            }
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{place}: expected a complete parquet file, got {error}; copy it again"
        ) from error


def _to_numpy(column: Any, shape: tuple[int, ...], place: str) -> np.ndarray:
    """Turn a column of numbers or of nested lists into an array [frames, *shape]."""
    import pyarrow.compute
    import pyarrow.types as kinds

    if not len(column):
        return np.empty((0, *shape))
    values, sizes = column.combine_chunks(), []
    while not values.null_count:
        if hasattr(values, "storage"):
            values = values.storage
        elif isinstance(
            values, pyarrow.ListArray | pyarrow.LargeListArray | pyarrow.FixedSizeListArray
        ):
            lengths = pyarrow.compute.call_function("list_value_length", [values])
            sizes.append(lengths.unique().to_pylist())
            values = values.flatten()
        else:
            break
    if values.null_count:
        raise InputError(
            f"{place}: expected a number in every frame, got {values.null_count} empty entries; "
            f"repair or drop that episode"
        )
    # One number in a frame is stored without a list around it.
    if sizes != [[size] for size in shape] and not (shape == (1,) and not sizes):
        raise InputError(
            f"{place}: expected shape {list(shape)} in every frame, as in {INFO}, got lists of "
            f"length {sizes}; copy both files again"
        )
    number = (kinds.is_integer, kinds.is_floating, kinds.is_boolean)
    if not any(test(values.type) for test in number):
        raise InputError(f"{place}: expected numbers, got {values.type}; name other arrays")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), *shape)


def _ends(episode: np.ndarray, frame: np.ndarray, info: Mapping[str, Any]) -> np.ndarray:
    """Check that no frame and no episode is missing; give the step after the last of each."""
    starts = np.flatnonzero(np.diff(episode, prepend=-1))
    ends = np.append(starts[1:], len(episode))
    order = episode[starts]
    wrong = np.flatnonzero(order != np.arange(len(starts)))
    if wrong.size:
        raise InputError(
            f"episode_index: expected episode {wrong[0]}, got {order[wrong[0]]}; copy the missing "
            f"file, or put the files in order"
        )
    within = np.arange(len(frame)) - np.repeat(starts, ends - starts)
    if (frame != within).any():
        step = int((frame != within).argmax())
        raise InputError(
            f"frame_index: expected {within[step]} at step {step}, in episode {episode[step]}, got "
            f"{frame[step]}; frames are missing or out of order: copy that file again"
        )
    for key, got in (("total_episodes", len(ends)), ("total_frames", len(frame))):
        if key in info and info[key] != got:
            raise InputError(
                f"{INFO}, {key}: expected {info[key]} in the parquet files, got {got}; copy the "
                f"missing files of data/"
            )
    return ends
