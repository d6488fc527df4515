"""Reader of robomimic files: `data/demo_k` with `obs/*`, `actions` and more, and `mask/*`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmft_fast.data import hdf5
from fmft_fast.data.episodes import Episodes
from fmft_fast.data.names import choose
from fmft_fast.errors import InputError

# Copies and by-products, which are read when named.
ASIDE = ("next_obs/", "datagen_info/")


def recognise(path: Path) -> bool:
    """Whether this is a file for `read`."""
    return hdf5.is_hdf5(path) and "data" in hdf5.top_names(path)


def read(
    path: Path, arrays: Sequence[str] | None = None, filter_key: str | None = None
) -> Episodes:
    """Read all demonstrations in the order of their numbers, or those that a filter key lists.

    Source:
        Mandlekar et al. 2021, What Matters in Learning from Offline Human Demonstrations
        (arXiv:2108.03298), and the layout of its data sets.
    """
    with hdf5.open_file(path) as file:
        data = hdf5.group_of(file, "data")
        names = hdf5.by_number(
            list(data) if filter_key is None else _listed(file, filter_key), "demo_"
        )
        if not names:
            raise InputError("data: expected groups demo_0, demo_1, ..., got none; copy it again")
        demos = [_leaves_of(hdf5.group_of(data, name)) for name in names]
        chosen = choose({name: node.shape for name, node in demos[0].items()}, arrays, ASIDE)
        episodes = [
            {name: hdf5.read_array(demo[name]) for name in chosen if name in demo} for demo in demos
        ]
        return Episodes.from_list(episodes, labels=[f"data/{name}" for name in names])


def _leaves_of(demo: Any) -> dict[str, Any]:
    """Give the arrays of one demonstration after a look at its actions and its length."""
    found = hdf5.leaves(demo)
    place = demo.name.lstrip("/")
    if "actions" not in found:
        raise InputError(
            f"{place}/actions: expected an array [steps, action_dim], got none; copy it again"
        )
    hdf5.expect_dims(found["actions"], "steps", "action_dim")
    if "num_samples" in demo.attrs:
        of = f"the attribute num_samples of {place}"
        hdf5.expect_steps(found["actions"], int(demo.attrs["num_samples"]), of)
    return found


def _listed(file: Any, key: str) -> list[str]:
    """Give the demonstrations that a filter key lists."""
    masks = hdf5.leaves(file["mask"]) if "mask" in file else {}
    if key not in masks:
        raise InputError(
            f"mask/{key}: expected a filter key of the file, which has "
            f"{', '.join(masks) or 'none'}; use one of these, or none"
        )
    listed = hdf5.read_array(masks[key]).ravel().tolist()
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in listed]
    for name in names:
        if name not in file["data"]:
            raise InputError(
                f"mask/{key}: expected names of demonstrations, got {name!r}, which data lacks; "
                f"copy the file again or repair the mask"
            )
    return names
