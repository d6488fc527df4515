"""Readers of HDF5: robomimic, Minari and D4RL."""

from __future__ import annotations

import numpy as np
import pytest
import sample_files as sample
from test_read_arrays import refused

from fmft_fast.data import read_episodes

h5py = pytest.importorskip("h5py", reason="reads HDF5 files")


@pytest.fixture
def robomimic(tmp_path):
    return sample.write_robomimic(tmp_path / "low_dim_v141.hdf5")


@pytest.fixture
def minari(tmp_path):
    return sample.write_minari(tmp_path / "kitchen-complete-v2", nested=True)


@pytest.fixture
def d4rl(tmp_path):
    return sample.write_d4rl(tmp_path / "kitchen_complete-v0.hdf5")


def change(path, **arrays):
    """Put other arrays into a file; None removes one, and "__" stands for "/"."""
    with h5py.File(path, "r+") as file:
        for name, array in arrays.items():
            name = name.replace("__", "/")
            if name in file:
                del file[name]
            if array is not None:
                file[name] = array
    return path


def test_robomimic(robomimic):
    episodes = read_episodes(robomimic)
    sample.assert_same(episodes, "obs/object", "actions")
    expected = {"actions", "dones", "obs/object", "obs/robot0_eef_pos", "rewards", "states"}
    assert set(episodes.arrays) == expected
    assert episodes["actions"].dtype == np.float64
    named = read_episodes(robomimic, "robomimic", ["next_obs/object", "actions"])
    assert list(named.arrays) == ["next_obs/object", "actions"]


def test_robomimic_sorts_by_number_not_by_name(tmp_path):
    path = tmp_path / "many.hdf5"
    with h5py.File(path, "w") as file:
        for k in (10, 9, 2, 100):
            file[f"data/demo_{k}/actions"] = np.full((k, 1), float(k))
    assert read_episodes(path).lengths.tolist() == [2, 9, 10, 100]


def test_robomimic_filter_keys(robomimic):
    assert read_episodes(robomimic, filter_key="train").lengths.tolist() == [4, 6]
    assert read_episodes(robomimic, filter_key="valid").lengths.tolist() == [1]
    refused(robomimic, "mask/test: expected a filter key", "train, valid", filter_key="test")
    change(robomimic, mask__train=np.array([b"demo_0", b"demo_7"]))
    refused(
        robomimic, "mask/train: expected names of demonstrations, got 'demo_7'", filter_key="train"
    )
    change(robomimic, mask=None)
    refused(robomimic, "mask/train: expected a filter key", "has none", filter_key="train")


@pytest.mark.parametrize(
    ("arrays", "pattern"),
    [
        ({"data__demo_1__actions": None}, "data/demo_1/actions: expected an array [steps, action"),
        ({"data__demo_1__actions": np.ones(1)}, "data/demo_1/actions: expected shape [steps, act"),
        ({"data__demo_0__actions": np.ones((3, 2))}, "data/demo_0/actions: expected 4 steps as in"),
        ({"data__demo_2__obs": None}, "obs/object: expected in every episode or in none"),
        ({"data__demo_2__obs__object": np.ones((5, 3))}, "obs/object of data/demo_2: expected 6"),
        ({"data__demo_2__obs__object": np.ones((6, 4))}, "obs/object of data/demo_2: expected"),
        ({"data__demo_2__obs__object": np.full((6, 3), np.inf)}, "finite numbers"),
        ({"data__demo_2__rewards": np.array([b"x"] * 6)}, "rewards of data/demo_2: expected bool"),
        ({"data__demo_2__rewards": h5py.Empty("f4")}, "data/demo_2/rewards: expected a group or"),
        ({"data__demo_2": np.ones(3)}, "data/demo_2: expected a group, got an array"),
        ({"data__demo_x": np.ones(3)}, "demo_x: expected a name such as demo_0"),
        ({"data__demo_2__obs__link": h5py.SoftLink("/nowhere")}, "data/demo_2/obs/link: expected"),
        ({"data__demo_2__obs__link": h5py.ExternalLink("gone.hdf5", "/")}, "demo_2/obs/link"),
        ({"data__demo_0": None, "data__demo_1": None, "data__demo_2": None}, "data: expected grou"),
    ],
)
def test_robomimic_with_wrong_content_is_refused(robomimic, arrays, pattern):
    refused(change(robomimic, **arrays), pattern)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("part", ["", "data", "data/main_data.hdf5"])
def test_minari(tmp_path, nested, part):
    folder = sample.write_minari(tmp_path / "set", nested)
    episodes = read_episodes(folder / part)
    obs = "observations/observation" if nested else "observations"
    sample.assert_same(episodes, obs, "actions")
    names = {obs, "actions", "rewards", "terminations", "truncations"}
    if nested:
        names.add("observations/desired_goal/microwave")
    assert set(episodes.arrays) == names
    assert episodes["truncations"].dtype == bool


def test_minari_reads_numeric_infos_when_named(minari):
    file = minari / "data" / "main_data.hdf5"
    for k, steps in enumerate(sample.LENGTHS):
        info = np.arange(steps + 1.0)
        change(file, **{f"episode_{k}__infos": None, f"episode_{k}__infos__qpos": info})
    assert "infos/qpos" not in read_episodes(minari).arrays
    named = read_episodes(minari, arrays=["infos/qpos", "actions"])
    assert named["infos/qpos"].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]


def test_minari_sorts_by_number(tmp_path):
    path = tmp_path / "main_data.hdf5"
    with h5py.File(path, "w") as file:
        for k in range(12):
            file[f"episode_{k}/actions"] = np.zeros((k + 1, 1))
            file[f"episode_{k}/observations"] = np.zeros((k + 2, 1))
    assert read_episodes(path).lengths.tolist() == list(range(1, 13))


@pytest.mark.parametrize(
    ("arrays", "pattern"),
    [
        ({"episode_1": None}, "episode_1: expected a group, got none, but episode_2"),
        ({"episode_1__actions": None}, "episode_1/actions: expected an array or a group"),
        ({"episode_1__observations": None}, "episode_1/observations: expected an array or a gro"),
        ({"episode_1__actions": np.ones((2, 2))}, "episode_1/actions: expected 1 steps as in the"),
        ({"episode_1__actions": 1.0}, "episode_1/actions: expected shape [steps, action_dim]"),
        (
            {"episode_2__observations__observation": np.ones((6, 3))},
            "episode_2/observations/observation: expected 7 steps as in episode_2/actions and one",
        ),
        ({"episode_2__observations__observation": np.ones((7, 4))}, "observation of episode_2"),
        ({"episode_2__observations__observation": np.full((7, 3), np.nan)}, "finite numbers"),
        ({"episode_2__rewards": np.ones(5)}, "rewards of episode_2: expected"),
        ({"episode_2__rewards": None}, "rewards: expected in every episode or in none"),
        ({"episode_last": np.ones(5)}, "episode_last: expected a name such as episode_0"),
        ({"notes": np.ones(5)}, "notes: expected a name such as episode_0"),
    ],
)
def test_minari_with_wrong_content_is_refused(minari, arrays, pattern):
    change(minari / "data" / "main_data.hdf5", **arrays)
    refused(minari, pattern)


@pytest.mark.parametrize("timeouts", [True, False])
def test_d4rl(tmp_path, timeouts):
    episodes = read_episodes(sample.write_d4rl(tmp_path / "a.hdf5", timeouts))
    sample.assert_same(episodes, "observations", "actions")
    assert set(episodes.arrays) == {"observations", "actions", "rewards", "terminals"} | (
        {"timeouts"} if timeouts else set()
    )


def test_d4rl_keeps_a_last_episode_without_an_end(d4rl):
    flags = np.zeros(11)
    flags[[3, 4]] = 1
    change(d4rl, timeouts=flags)
    assert read_episodes(d4rl).lengths.tolist() == [4, 1, 6]


def test_d4rl_reads_infos_when_named(d4rl):
    assert list(read_episodes(d4rl, "d4rl", ["infos/goal"]).arrays) == ["infos/goal"]


@pytest.mark.parametrize(
    ("arrays", "pattern"),
    [
        ({"actions": None}, "actions: expected an array, got none among"),
        ({"terminals": None}, "terminals: expected an array, got none among"),
        ({"observations": np.ones(11)}, "observations: expected shape [steps, obs_dim], got [11]"),
        ({"observations": np.ones((10, 3))}, "observations: expected 11 steps"),
        ({"actions": np.ones((11, 2, 2))}, "actions: expected shape [steps, action_dim]"),
        ({"actions": np.full((11, 2), np.nan)}, "actions: expected finite numbers"),
        ({"actions": np.zeros((0, 2))}, "terminals: expected 0 steps as in actions"),
        ({"terminals": np.ones((11, 1))}, "terminals: expected shape [steps], got [11, 1]"),
        ({"terminals": np.ones(10)}, "terminals: expected 11 steps as in actions"),
        ({"terminals": np.full(11, 2.0)}, "terminals: expected flags of value 0 or 1"),
        ({"timeouts": np.full(11, np.nan)}, "timeouts: expected flags of value 0 or 1"),
        ({"timeouts": np.array([b"x"] * 11)}, "timeouts: expected flags"),
        ({"terminals": np.zeros(11), "timeouts": None}, "terminals and timeouts: expected at lea"),
        ({"rewards": np.zeros(12)}, "rewards: expected 11 steps"),
    ],
)
def test_d4rl_with_wrong_content_is_refused(d4rl, arrays, pattern):
    refused(change(d4rl, **arrays), pattern)


def test_an_array_that_was_never_written_is_refused(d4rl):
    for options in ({}, {"chunks": (4, 2)}):
        with h5py.File(d4rl, "r+") as file:
            del file["actions"]
            file.create_dataset("actions", (11, 2), "f4", **options)
        refused(d4rl, "actions: expected", "the writer was interrupted")
    with h5py.File(d4rl, "r+") as file:
        file["actions"][:4] = 1
    refused(d4rl, "actions: expected 3 written chunks, got 1")


@pytest.mark.parametrize("kind", ["robomimic", "minari", "d4rl"])
def test_damaged_files_are_refused(kind, request):
    path = request.getfixturevalue(kind)
    path = path / "data" / "main_data.hdf5" if path.is_dir() else path
    whole = path.read_bytes()
    for content in (b"", b"garbage", whole[: len(whole) // 2], whole[:-100], whole[:8]):
        path.write_bytes(content)
        refused(path, "the file: expected a complete HDF5 file")
        refused(path, "the file: expected a complete HDF5 file", format=kind)


@pytest.mark.parametrize("kind", ["robomimic", "minari", "d4rl"])
def test_a_file_of_another_layout_is_refused(kind, tmp_path):
    path = tmp_path / "a.hdf5"
    for name in ("other", None):
        with h5py.File(path, "w") as file:
            if name:
                file[name] = np.zeros(3)
        refused(path, "format: expected one of the known layouts")
        refused(path, format=kind)


def test_a_damaged_compressed_array_is_refused(tmp_path):
    path = tmp_path / "a.hdf5"
    noise = np.random.default_rng(0).normal(size=(200, 4))
    with h5py.File(path, "w") as file:
        file.create_dataset("observations", data=noise, compression="gzip", fletcher32=True)
        file["actions"], file["terminals"] = np.ones((200, 1)), np.ones(200, bool)
        place = file["observations"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[place.byte_offset + place.size // 2] ^= 255
    path.write_bytes(bytes(content))
    refused(path, "observations: expected an undamaged array")
