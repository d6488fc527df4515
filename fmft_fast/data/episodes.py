"""Demonstrations in memory: arrays over all steps, and where each episode ends."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmft_fast.errors import InputError

ENDS = "episode_ends"
# Values checked at once for NaN: small enough that a memory-mapped array stays on disk.
BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Episodes:
    """Recorded episodes, one behind the other.

    Attributes:
        arrays: what was recorded, by name, each [steps, ...]; booleans, integers or floats in the
            source's own units.
        episode_ends: [episodes] int64; episode i is the steps episode_ends[i - 1] up to, not
            including, episode_ends[i].

    Raises:
        InputError: an array or `episode_ends` is not as described, is empty, or holds NaN or
            infinite numbers; the message names it.

    Example:
        >>> action = np.arange(5.0)[:, None]
        >>> episodes = Episodes({"action": action}, np.array([3, 5]))
        >>> episodes.count, episodes.steps, episodes.lengths.tolist()
        (2, 5, [3, 2])
        >>> episodes.select([1])["action"].ravel().tolist()
        [3.0, 4.0]
    """

    arrays: Mapping[str, np.ndarray]
    episode_ends: np.ndarray

    def __post_init__(self) -> None:
        """Check everything, and bring arrays into this machine's byte order."""
        if not self.arrays:
            raise InputError("arrays: expected at least one array [steps, ...], got none; add one")
        ends = check_ends(self.episode_ends)
        checked = {}
        for name, array in self.arrays.items():
            if not isinstance(name, str) or not name or name == ENDS:
                raise InputError(
                    f"arrays: expected names of arrays as text other than {ENDS!r}, got {name!r}; "
                    f"rename the array"
                )
            checked[name] = check_array(name, array)
            if len(array) != ends[-1]:
                raise InputError(
                    f"{name}: expected {ends[-1]} steps, where {ENDS} ends, got {len(array)}; "
                    f"every array holds the steps of all episodes: write the file again"
                )
        object.__setattr__(self, "arrays", checked)
        object.__setattr__(self, "episode_ends", ends)

    @classmethod
    def from_list(
        cls, episodes: Sequence[Mapping[str, Any]], *, labels: Sequence[str] | None = None
    ) -> Episodes:
        """Join episodes, each a mapping of arrays [length, ...] with the same names.

        Args:
            episodes: one mapping for each.
            labels: what messages call them; "episode 0" and so on by default.

        Raises:
            InputError: an episode lacks an array, has one more, or differs in shape, in kind of
                numbers or in length from the others; the message names episode and array.

        Example:
            >>> Episodes.from_list([{"x": np.zeros((2, 1))}, {"x": np.ones((1, 1))}]).lengths
            array([2, 1])
        """
        if not episodes:
            raise InputError("episodes: expected at least one, got none; record one")
        parts: dict[str, list[np.ndarray]] = {name: [] for name in episodes[0]}
        labels = labels or [f"episode {index}" for index in range(len(episodes))]
        for label, episode in zip(labels, episodes, strict=True):
            _append(parts, episode, label, labels[0])
        joined = {name: np.concatenate(pieces) for name, pieces in parts.items()}
        first = next(iter(parts.values()), [])
        return cls(joined, np.cumsum([len(piece) for piece in first], dtype=np.int64))

    @property
    def count(self) -> int:
        """Give the number of episodes."""
        return len(self.episode_ends)

    @property
    def steps(self) -> int:
        """Give the number of steps of all episodes together."""
        return int(self.episode_ends[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Give the number of steps of each episode, [episodes]."""
        return np.diff(self.episode_ends, prepend=0)

    def __getitem__(self, name: str) -> np.ndarray:
        """Give one array, [steps, ...]."""
        if name not in self.arrays:
            raise InputError(
                f"arrays: expected one of {', '.join(self.arrays)}, got {name!r}; "
                f"name one of these, or read the file with arrays=[{name!r}]"
            )
        return self.arrays[name]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Give the episodes one by one, each as views {name: [length, ...]}."""
        for end, length in zip(self.episode_ends.tolist(), self.lengths.tolist(), strict=True):
            yield {name: array[end - length : end] for name, array in self.arrays.items()}

    def columns(self, *names: str) -> np.ndarray:
        """Join arrays side by side, each step flattened: [steps, dim] float32.

        Example:
            >>> pose, grip = np.zeros((4, 3, 2)), np.ones(4)
            >>> Episodes({"pose": pose, "grip": grip}, np.array([4])).columns("pose", "grip").shape
            (4, 7)
        """
        if not names:
            raise InputError("names: expected at least one array, got none; name one")
        flat = [self[name].reshape(self.steps, -1).astype(np.float32) for name in names]
        return np.concatenate(flat, axis=1)

    def select(self, indices: Sequence[int] | np.ndarray) -> Episodes:
        """Give these episodes in this order, as copies.

        Raises:
            InputError: there is no index or one of no episode.
        """
        chosen = np.asarray(indices)
        whole = chosen.ndim == 1 and chosen.size > 0 and np.issubdtype(chosen.dtype, np.integer)
        if not whole or chosen.min() < 0 or chosen.max() >= self.count:
            raise InputError(
                f"indices: expected whole numbers from 0 to {self.count - 1}, at least one, got "
                f"{indices!r}; name episodes that exist"
            )
        lengths = self.lengths[chosen]
        ends = np.cumsum(lengths, dtype=np.int64)
        # Step k of the result is k - (its episode's start there) + (its episode's start here).
        shift = (self.episode_ends[chosen] - lengths) - (ends - lengths)
        steps = np.arange(ends[-1]) + np.repeat(shift, lengths)
        return Episodes({name: array[steps] for name, array in self.arrays.items()}, ends)

    def split(self, share: float, seed: int = 0) -> tuple[Episodes, Episodes]:
        """Split whole episodes at random into (training, held out); both keep the order.

        Args:
            share: of the episodes to hold out, in (0, 1); at least one episode stays on each side.
            seed: the same seed gives the same split.

        Raises:
            InputError: the share is not inside (0, 1) or there is only one episode.

        Example:
            >>> episodes = Episodes({"x": np.arange(10)}, np.arange(1, 11))
            >>> train, heldout = episodes.split(0.2, seed=0)
            >>> train.count, heldout.count
            (8, 2)
        """
        if not 0 < share < 1:
            raise InputError(f"share: expected a number inside (0, 1), got {share!r}; try 0.1")
        if self.count < 2:
            raise InputError("episodes: expected at least 2 to split, got 1; record more")
        held = min(max(round(share * self.count), 1), self.count - 1)
        # RandomState's numbers are frozen: a split is the same under every version of numpy.
        order = np.random.RandomState(seed).permutation(self.count)
        return self.select(np.sort(order[held:])), self.select(np.sort(order[:held]))

    def save(self, path: str | Path) -> Path:
        """Write everything to an .npz file, which is complete or absent at every moment.

        Raises:
            InputError: the name does not end in .npz.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise InputError(f"path: expected a name ending in .npz, got {path.name!r}; add it")
        draft = path.with_name(f".draft-{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # np.savez takes names as keywords, and some names ("file") are its own.
            with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, array in {**self.arrays, ENDS: self.episode_ends}.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        return path


def check_array(name: str, array: Any) -> np.ndarray:
    """Give an array [steps, ...] of finite numbers in this machine's byte order, or refuse it."""
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"{name}: expected a numpy array, got {type(array).__name__}; use np.asarray"
        )
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{name}: expected booleans, integers or floats, got dtype {array.dtype}; "
            f"convert the array, or leave it out"
        )
    if array.ndim == 0 or array.size == 0:
        raise InputError(
            f"{name}: expected a non-empty array [steps, ...], got shape {array.shape}; "
            f"write one entry for every step, or leave the array out"
        )
    if array.dtype.kind == "f":
        _check_finite(name, array)
    return np.asarray(array, dtype=array.dtype.newbyteorder("="))


def check_ends(ends: Any) -> np.ndarray:
    """Give episode ends as int64, or refuse them."""
    ends = np.asarray(ends)
    if ends.ndim != 1 or ends.size == 0 or ends.dtype.kind not in "iu":
        raise InputError(
            f"{ENDS}: expected whole numbers [episodes], at least one, got dtype {ends.dtype} "
            f"and shape {ends.shape}; write the step after the last of every episode"
        )
    ends = ends.astype(np.int64)
    wrong = np.flatnonzero(np.diff(ends, prepend=0) <= 0)
    if wrong.size:
        i = int(wrong[0])
        raise InputError(
            f"{ENDS}: expected numbers that increase from above 0, got {int(ends[i])} for "
            f"episode {i} after {int(ends[i - 1]) if i else 0}; drop empty episodes and keep order"
        )
    return ends


def _check_finite(name: str, array: np.ndarray) -> None:
    """Refuse NaN and infinite numbers, naming the first step that has one."""
    rows = max(1, BLOCK // max(1, array[0].size))
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        good = np.isfinite(block.reshape(len(block), -1)).all(axis=1)
        if not good.all():
            step = start + int(good.argmin())
            raise InputError(
                f"{name}: expected finite numbers, got NaN or infinity at step {step}; "
                f"repair or drop that episode, or leave the array out"
            )


def _append(
    parts: dict[str, list[np.ndarray]], episode: Mapping[str, Any], label: str, first_label: str
) -> None:
    """Check an episode against those before it and append its arrays to `parts`."""
    if set(episode) != set(parts):
        odd = sorted(set(episode) ^ set(parts))[0]
        where = "only in" if odd in episode else "missing from"
        raise InputError(
            f"{odd}: expected in every episode or in none, got an array {where} {label}; "
            f"write the same arrays for every episode, or leave it out"
        )
    length: tuple[str, int] | None = None
    for name, pieces in parts.items():
        array = check_array(f"{name} of {label}", episode[name])
        first = pieces[0] if pieces else array
        if array.shape[1:] != first.shape[1:] or array.dtype.kind != first.dtype.kind:
            raise InputError(
                f"{name} of {label}: expected {first.dtype} of shape {list(first.shape[1:])} a "
                f"step as in {first_label}, got {array.dtype} of {list(array.shape[1:])}; "
                f"make them alike"
            )
        length = length or (name, len(array))
        if len(array) != length[1]:
            raise InputError(
                f"{name} of {label}: expected {length[1]} steps as in {length[0]}, got "
                f"{len(array)}; write one entry for every step"
            )
        pieces.append(array)
