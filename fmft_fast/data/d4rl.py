"""Reader of D4RL files: observations, actions, terminals and timeouts of all steps in a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmft_fast.data import hdf5
from fmft_fast.data.episodes import Episodes
from fmft_fast.data.names import choose
from fmft_fast.errors import InputError

# Read when named: what describes the data set, and what the simulator logged beside.
ASIDE = ("infos", "metadata", "next_observations")
NEEDED = ("observations", "actions", "terminals")
FLAGS = ("terminals", "timeouts")


def recognise(path: Path) -> bool:
    """Whether this is a file for `read`."""
    return hdf5.is_hdf5(path) and "observations" in hdf5.top_names(path)


def read(path: Path, arrays: Sequence[str] | None = None) -> Episodes:
    """Read all steps; an episode ends where terminals or timeouts says so, and at the last step.

    Source:
        Fu et al. 2020, D4RL (arXiv:2004.07219), and the layout of its data sets.
    """
    with hdf5.open_file(path) as file:
        found = hdf5.leaves(file)
        for name in NEEDED:
            if name not in found:
                raise InputError(
                    f"{name}: expected an array, got none among {', '.join(found) or 'none'}; "
                    f"copy the file again"
                )
        hdf5.expect_dims(found["observations"], "steps", "obs_dim")
        hdf5.expect_dims(found["actions"], "steps", "action_dim")
        chosen = choose({name: node.shape for name, node in found.items()}, arrays, ASIDE)
        ends = _ends(found)
        return Episodes({name: hdf5.read_array(found[name]) for name in chosen}, ends)


def _ends(found: dict[str, Any]) -> np.ndarray:
    """Find the step after the last of every episode."""
    steps = found["actions"].shape[0]
    last = np.zeros(steps, dtype=bool)
    for name in FLAGS:
        if name in found:
            hdf5.expect_dims(found[name], "steps")
            hdf5.expect_steps(found[name], steps, "actions")
            last |= _flags(name, hdf5.read_array(found[name]))
    if not last.any():
        raise InputError(
            f"{' and '.join(FLAGS)}: expected at least one end of an episode, got none; set "
            f"timeouts where episodes end"
        )
    last[-1] = True
    return np.flatnonzero(last) + 1


def _flags(name: str, values: np.ndarray) -> np.ndarray:
    """Read flags, also such as were stored as numbers."""
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise InputError(
            f"{name}: expected flags of value 0 or 1, got dtype {values.dtype} with other values; "
            f"copy the file again"
        )
    return values.astype(bool)
