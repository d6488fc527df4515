"""Reader of the relay-policy-learning arrays: padded sequences and a mask, one .npy file each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmft_fast.data.episodes import Episodes
from fmft_fast.data.names import choose
from fmft_fast.data.npz import DAMAGE
from fmft_fast.errors import InputError

SEQUENCES = ("observations_seq", "actions_seq")
MASK = "existence_mask"


def recognise(path: Path) -> bool:
    """Whether this is a folder for `read`."""
    return any((path / f"{name}.npy").is_file() for name in (*SEQUENCES, MASK))


def read(path: Path, arrays: Sequence[str] | None = None) -> Episodes:
    """Read the sequences of a folder and drop their padding.

    The files hold [time, episodes, ...]; copies that hold [episodes, time, ...] are told apart by
    the mask, whose ones come first along time.

    Source:
        Gupta et al. 2019, Relay Policy Learning (arXiv:1910.11956), as arrays of Diffusion Policy's
        and Behavior Transformers' kitchen data.
    """
    mask = _read_mask(path)
    sequences = {name: _load(path, name) for name in SEQUENCES}
    for name, sequence in sequences.items():
        if sequence.ndim != 3 or sequence.shape[:2] != mask.shape:
            raise InputError(
                f"{name}: expected shape [{mask.shape[0]}, {mask.shape[1]}, dim], the first two as "
                f"in {MASK}, got {list(sequence.shape)}; copy both files again"
            )
    chosen = choose({name: (0, *item.shape[2:]) for name, item in sequences.items()}, arrays)
    if not _ones_first(mask):
        mask = mask.T
        sequences = {name: item.swapaxes(0, 1) for name, item in sequences.items()}
    # Indexing by the mask goes through it row by row, so one row must be one episode.
    cut = {name: sequences[name].swapaxes(0, 1)[mask.T] for name in chosen}
    return Episodes(cut, np.cumsum(mask.sum(axis=0), dtype=np.int64))


def _load(path: Path, name: str) -> np.ndarray:
    """Open one array without reading all of it."""
    file = path / f"{name}.npy"
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{name}: expected a file {file.name}, got none; copy it") from error
    except DAMAGE as error:
        raise InputError(
            f"{name}: expected an undamaged array of numbers, got {error}; copy {file.name} again"
        ) from error


def _read_mask(path: Path) -> np.ndarray:
    """Read the mask [time, episodes] or [episodes, time] as booleans."""
    mask = _load(path, MASK)
    if mask.ndim != 2 or not mask.size or mask.dtype.kind not in "biuf":
        raise InputError(
            f"{MASK}: expected numbers of shape [time, episodes], got dtype {mask.dtype} and shape "
            f"{list(mask.shape)}; copy {MASK}.npy again"
        )
    if not np.isin(mask, (0, 1)).all():
        raise InputError(f"{MASK}: expected 0 or 1, got other values; copy {MASK}.npy again")
    mask = np.asarray(mask, dtype=bool)
    if not (_ones_first(mask) or _ones_first(mask.T)):
        raise InputError(
            f"{MASK}: expected ones, then zeros for every episode, got a gap or an empty episode; "
            f"drop empty episodes and pad at the end only"
        )
    return mask


def _ones_first(mask: np.ndarray) -> bool:
    """Whether every column is ones, at least one, and then zeros."""
    return bool(mask[0].all() and (mask[:-1] >= mask[1:]).all())
