"""Small demonstrations in the layouts of the robot tasks, made up from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmft_fast.data import Episodes


def pusht_file(path: Path, *, episodes: int = 6, seed: int = 0, shift: float = 0.0) -> Path:
    """Write wandering fingers as Push-T has them; `shift` moves all actions, pixels.

    The second number of an action is 10 times the number of its episode, so that a test can tell
    from where a window comes.
    """
    rng = np.random.default_rng(seed)
    made = []
    for number in range(episodes):
        n = 14 + number
        state = 250 + np.cumsum(rng.normal(0, 5, (n, 5)), axis=0)
        action = np.stack([state[:, 0] + rng.normal(0, 3, n), np.full(n, 10.0 * number)], axis=1)
        made.append(
            {
                "state": state.astype(np.float32),
                "keypoint": rng.uniform(150, 350, (n, 18)).astype(np.float32),
                "action": (action + shift).astype(np.float32),
            }
        )
    return Episodes.from_list(made).save(path)


def robomimic_file(path: Path, *, demos: int = 3, seed: int = 0) -> Path:
    """Write a low_dim file of robomimic: a group per demonstration, observations apart."""
    import h5py

    rng = np.random.default_rng(seed)
    sizes = {
        "object": 10,
        "robot0_eef_pos": 3,
        "robot0_eef_quat": 4,
        "robot0_gripper_qpos": 2,
        "robot0_joint_pos": 7,
    }
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = '{"env_name": "Lift"}'
        for number in range(demos):
            n = 15 + number
            group = data.create_group(f"demo_{number}")
            group.attrs["num_samples"] = n
            group["actions"] = rng.uniform(-1, 1, (n, 7))
            group["dones"] = np.arange(n) == n - 1
            for name, size in sizes.items():
                group[f"obs/{name}"] = rng.normal(size=(n, size))
    return path
