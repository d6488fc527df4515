"""Random damage never comes through as another kind of error, and never as half an episode."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sample_files as sample

from fmft_fast.data import Episodes, read_episodes
from fmft_fast.errors import InputError

TRIALS = 40
WRITERS = {
    "npz": lambda folder: sample.write_npz(folder),
    "zarr2": lambda folder: sample.write_zarr(folder / "a.zarr", 2),
    "zarr3": lambda folder: sample.write_zarr(folder / "a.zarr", 3),
    "zip": lambda folder: sample.write_zarr(folder / "a.zip", 2),
    "robomimic": lambda folder: sample.write_robomimic(folder / "a.hdf5"),
    "minari": lambda folder: sample.write_minari(folder / "a", nested=True),
    "d4rl": lambda folder: sample.write_d4rl(folder / "a.hdf5"),
    "relay": lambda folder: sample.write_relay(folder / "a"),
    "lerobot": lambda folder: sample.write_lerobot(folder / "a", "v3.0"),
}
NEEDS = {"zarr2": "zarr", "zarr3": "zarr", "zip": "zarr", "lerobot": "pyarrow"}
NEEDS.update(robomimic="h5py", minari="h5py", d4rl="h5py")


@pytest.mark.parametrize("kind", WRITERS)
def test_random_damage_is_refused_or_gives_whole_episodes(kind, tmp_path):
    if kind in NEEDS:
        least = "3" if NEEDS[kind] == "zarr" else None
        pytest.importorskip(NEEDS[kind], least, reason="writes and reads this format")
    path = WRITERS[kind](tmp_path)
    files = sorted(f for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
    chance, refusals = random.Random(kind), 0
    for _ in range(TRIALS):
        file = chance.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 4, 64)) if whole else 0):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if chance.random() < 0.3:
            damaged = damaged[: chance.randrange(len(damaged) + 1)]
        file.write_bytes(bytes(damaged))
        try:
            episodes = read_episodes(path)
        except InputError as error:
            refusals += 1
            assert str(error).startswith(f"{path}: ")
        else:
            assert isinstance(episodes, Episodes)
            assert all(len(a) == episodes.steps for a in episodes.arrays.values())
            assert all(np.isfinite(a).all() for a in episodes.arrays.values())
        file.write_bytes(whole)
    assert refusals > 0
    assert read_episodes(path).steps == sum(sample.LENGTHS)
