"""The same three episodes written in every layout that is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fmft_fast.data import Episodes

LENGTHS = (4, 1, 6)


def make_episodes(lengths=LENGTHS, seed=0) -> list[dict[str, np.ndarray]]:
    """Give episodes of random observations [length, 3] and actions [length, 2]."""
    rng = np.random.default_rng(seed)
    return [
        {
            "obs": rng.normal(size=(length, 3)).astype(np.float32),
            "action": rng.normal(size=(length, 2)).astype(np.float32),
        }
        for length in lengths
    ]


def write_npz(folder: Path) -> Path:
    return Episodes.from_list(make_episodes()).save(folder / "demonstrations.npz")


def write_zarr(path: Path, version: int, episodes=None, images=None) -> Path:
    """Write a replay buffer; a path that ends in .zip becomes an archive."""
    import zarr
    from zarr.storage import ZipStore

    together = Episodes.from_list(episodes or make_episodes())
    store = ZipStore(str(path), mode="w") if path.suffix == ".zip" else str(path)
    with zarr.config.set({"array.write_empty_chunks": True}):
        root = zarr.open_group(store, mode="w", zarr_format=version)
        data, meta = root.create_group("data"), root.create_group("meta")
        arrays = {"obs": together["obs"], "action": together["action"]}
        if images is not None:
            arrays["img"] = images
        for name, array in arrays.items():
            chunks = (3, *array.shape[1:])
            data.create_array(name, shape=array.shape, chunks=chunks, dtype=array.dtype)[:] = array
        ends = together.episode_ends
        meta.create_array("episode_ends", shape=ends.shape, dtype=ends.dtype)[:] = ends
    if not isinstance(store, str):
        store.close()
    return path


def write_robomimic(path: Path, order=(0, 1, 2)) -> Path:
    """Write `data/demo_k`; `order` is that of writing, so that names need not be sorted."""
    import h5py

    episodes = make_episodes()
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(LENGTHS)
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
        for k in order:
            obs, action = episodes[k]["obs"], episodes[k]["action"]
            demo = data.create_group(f"demo_{k}")
            demo.attrs["num_samples"] = len(action)
            demo.attrs["model_file"] = "<mujoco/>"
            demo["actions"], demo["states"] = action.astype(np.float64), obs.astype(np.float64)
            demo["rewards"], demo["dones"] = np.zeros(len(obs)), np.zeros(len(obs), np.int64)
            for part in ("obs", "next_obs"):
                demo[f"{part}/object"], demo[f"{part}/robot0_eef_pos"] = obs, obs[:, :2] * 2
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
        file["mask/valid"] = np.array([b"demo_1"])
    return path


def write_minari(folder: Path, nested: bool) -> Path:
    """Write a data set's folder; observations have one entry more than actions."""
    import h5py

    (folder / "data").mkdir(parents=True)
    text = h5py.string_dtype(encoding="utf-8")
    with h5py.File(folder / "data" / "main_data.hdf5", "w", track_order=True) as file:
        for k, episode in enumerate(make_episodes()):
            group, steps = file.create_group(f"episode_{k}"), len(episode["action"])
            group.attrs.update(id=k, seed=123, total_steps=steps)
            obs = np.concatenate([episode["obs"], np.full((1, 3), 9.0, np.float32)])
            growing = {"chunks": True, "maxshape": (None, 3)}
            if nested:
                group.create_dataset("observations/observation", data=obs, **growing)
                goal = "observations/desired_goal/microwave"
                group.create_dataset(goal, data=np.full((steps + 1, 1), -0.75))
            else:
                group.create_dataset("observations", data=obs, **growing)
            group["actions"], group["rewards"] = episode["action"], np.ones(steps)
            group["terminations"] = np.zeros(steps, bool)
            group["truncations"] = np.arange(steps) == steps - 1
            group.create_dataset("infos", data=["{}"] * (steps + 1), dtype=text)
    return folder


def write_d4rl(path: Path, timeouts: bool = True) -> Path:
    import h5py

    together = Episodes.from_list(make_episodes())
    last = np.zeros(together.steps, bool)
    last[together.episode_ends - 1] = True
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = together["obs"], together["action"]
        file["rewards"] = np.zeros(together.steps, np.float32)
        # Half of the ends are the task's, half the clock's.
        file["terminals"] = last & (np.arange(together.steps) < 4 if timeouts else True)
        if timeouts:
            file["timeouts"] = last & (np.arange(together.steps) >= 4)
        file["infos/goal"] = np.zeros((together.steps, 2))
        file["metadata/algorithm"] = "human"
    return path


def write_relay(folder: Path, time_first: bool = True) -> Path:
    """Write sequences padded with numbers that must not come back."""
    folder.mkdir()
    episodes = make_episodes()
    longest = max(LENGTHS)
    mask = np.array([[step < n for n in LENGTHS] for step in range(longest)], dtype=np.float32)
    for name, key, dim in (("observations_seq", "obs", 3), ("actions_seq", "action", 2)):
        sequence = np.full((longest, len(LENGTHS), dim), 777.0, np.float32)
        for k, episode in enumerate(episodes):
            sequence[: LENGTHS[k], k] = episode[key]
        np.save(folder / f"{name}.npy", sequence if time_first else sequence.swapaxes(0, 1))
    np.save(folder / "existence_mask.npy", mask if time_first else mask.T)
    return folder


def write_lerobot(folder: Path, version: str) -> Path:
    """Write v2 with one file for each episode, or v3 with two episodes in its first file."""
    import pyarrow as pa
    from pyarrow import parquet

    tables, index = [], 0
    for k, episode in enumerate(make_episodes()):
        steps = len(episode["action"])
        columns = {
            "observation.state": pa.FixedSizeListArray.from_arrays(episode["obs"].ravel(), 3)
            if version.startswith("v2")
            else pa.array(episode["obs"].tolist(), pa.list_(pa.float32())),
            "observation.image": pa.array([{"bytes": b"png", "path": None}] * steps),
            "observation.grid": pa.array(np.zeros((steps, 2, 4)).tolist()),
            "action": pa.array(episode["action"].tolist(), pa.list_(pa.float32())),
            "timestamp": pa.array(np.arange(steps, dtype=np.float32) / 10),
            "frame_index": pa.array(np.arange(steps)),
            "episode_index": pa.array(np.full(steps, k)),
            "index": pa.array(np.arange(index, index + steps)),
            "task_index": pa.array(np.zeros(steps, np.int64)),
        }
        index += steps
        tables.append(pa.table(columns))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta").mkdir()
    if version.startswith("v2"):
        names = [f"episode_{k:06d}" for k in range(len(tables))]
    else:
        tables, names = [pa.concat_tables(tables[:2]), tables[2]], ["file-000", "file-001"]
    for table, name in zip(tables, names, strict=True):
        parquet.write_table(table, folder / "data" / "chunk-000" / f"{name}.parquet")
    shapes = {
        "observation.state": ("float32", [3]),
        "observation.image": ("image", [96, 96, 3]),
        "observation.grid": ("float64", [2, 4]),
        "observation.video": ("video", [96, 96, 3]),
        "action": ("float32", [2]),
        "timestamp": ("float32", [1]),
        "frame_index": ("int64", [1]),
        "episode_index": ("int64", [1]),
        "index": ("int64", [1]),
        "task_index": ("int64", [1]),
    }
    info = {
        "codebase_version": version,
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "fps": 10,
        "features": {k: {"dtype": d, "shape": s, "names": None} for k, (d, s) in shapes.items()},
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return folder


def assert_same(episodes: Episodes, obs: str, action: str) -> None:
    """Assert that what was read is what `make_episodes` gives."""
    expected = Episodes.from_list(make_episodes())
    np.testing.assert_array_equal(episodes.episode_ends, expected.episode_ends)
    np.testing.assert_array_equal(episodes[obs], expected["obs"])
    np.testing.assert_array_equal(episodes[action], expected["action"])
