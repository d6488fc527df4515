"""Reader of Minari data sets in HDF5: `episode_k` with observations, actions and more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmft_fast.data import hdf5
from fmft_fast.data.episodes import Episodes
from fmft_fast.data.names import choose
from fmft_fast.errors import InputError

FILE = "main_data.hdf5"
# Read when named: their layout is the environment's own.
ASIDE = ("infos",)
# These have one entry more than there are actions: that of the state after the last.
LONGER = ("observations", "infos")


def recognise(path: Path) -> bool:
    """Whether this is a data set, its folder `data` or its file."""
    file = _file(path)
    return hdf5.is_hdf5(file) and any(n.startswith("episode_") for n in hdf5.top_names(file))


def read(path: Path, arrays: Sequence[str] | None = None) -> Episodes:
    """Read all episodes in the order of their numbers, each without its last observation.

    The observation after the last action belongs to no step and is dropped. Nested observations
    keep their place as name: `observations/achieved_goal/microwave`.

    Source:
        The data set standard of Minari (Farama Foundation), minari.farama.org.
    """
    with hdf5.open_file(_file(path)) as file:
        names = hdf5.by_number(list(file), "episode_")
        for number, name in enumerate(names):
            if name != f"episode_{number}":
                raise InputError(
                    f"episode_{number}: expected a group, got none, but {name}; copy the file again"
                )
        if not names:
            raise InputError("episode_0: expected a group, got none; copy the file again")
        found = [_leaves_of(hdf5.group_of(file, name)) for name in names]
        chosen = choose({name: node.shape for name, node in found[0].items()}, arrays, ASIDE)
        episodes = [_read_episode(leaves, chosen) for leaves in found]
        return Episodes.from_list(episodes, labels=names)


def _file(path: Path) -> Path:
    """Give the HDF5 file of a data set that is named by its folder."""
    inside = (path / FILE, path / "data" / FILE)
    return next((file for file in inside if file.is_file()), path)


def _leaves_of(episode: Any) -> dict[str, Any]:
    """Give the arrays of one episode after a look at their lengths."""
    found = hdf5.leaves(episode)
    place = episode.name.lstrip("/")
    for part in ("actions", "observations"):
        if not any(name.split("/")[0] == part for name in found):
            raise InputError(
                f"{place}/{part}: expected an array or a group of arrays, got none; copy it again"
            )
    steps = _steps(found)
    if "total_steps" in episode.attrs and int(episode.attrs["total_steps"]) != steps:
        raise InputError(
            f"{place}/actions: expected {int(episode.attrs['total_steps'])} steps as in the "
            f"attribute total_steps, got {steps}; copy the file again"
        )
    for name, node in found.items():
        if name.split("/")[0] == "observations":
            hdf5.expect_steps(node, steps + 1, f"{place}/actions and one more")
    return found


def _steps(found: dict[str, Any]) -> int:
    """Give the number of actions."""
    node = next(node for name, node in found.items() if name.split("/")[0] == "actions")
    if not node.shape:
        hdf5.expect_dims(node, "steps", "action_dim")
    return node.shape[0]


def _read_episode(found: dict[str, Any], chosen: list[str]) -> dict[str, np.ndarray]:
    """Read the chosen arrays, cut to the number of actions."""
    steps = _steps(found)
    episode = {}
    for name in chosen:
        if name in found:
            array = hdf5.read_array(found[name])
            longer = name.split("/")[0] in LONGER and len(array) == steps + 1
            episode[name] = array[:steps] if longer else array
    return episode
