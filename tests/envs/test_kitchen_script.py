"""Scripted demonstrations: they do their tasks in the simulator itself, and resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fmft_fast.data import read_episodes
from fmft_fast.envs import kitchen_script
from fmft_fast.envs.kitchen import FIRST_SEED, TASKS, Kitchen
from fmft_fast.envs.kitchen_arm import Pose
from fmft_fast.envs.kitchen_script import make_demonstrations, record_attempt
from fmft_fast.errors import FmftError, InputError

robotics = pytest.importorskip(
    "gymnasium_robotics", reason="needs the simulator gymnasium-robotics"
)
QUICK = {"tasks": ["light switch", "kettle"], "tasks_each": 1, "progress": False, "workers": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give the file of six short demonstrations and its report."""
    path = tmp_path_factory.mktemp("kitchen") / "six.npz"
    return path, make_demonstrations(path, 6, seed=1, **QUICK)


def test_actions_repeat_the_episode_in_the_registered_simulator(made):
    gym = pytest.importorskip("gymnasium", reason="comes with gymnasium-robotics")
    gym.register_envs(robotics)
    env = gym.make("FrankaKitchen-v1", disable_env_checker=True)
    for episode in list(read_episodes(made[0]))[:3]:
        obs, _ = env.reset(seed=FIRST_SEED + int(episode["start"][0]))
        for seen, action in zip(episode["obs"], episode["executed"], strict=True):
            assert np.array_equal(seen, obs["observation"].astype(np.float32))
            obs, _, _, _, info = env.step(action)
        assert TASKS[episode["task"][-1]] in info["episode_task_completions"]
    env.close()


def test_the_file_is_labelled_and_holds_what_it_says(made):
    path, report = made
    episodes = read_episodes(path)
    assert set(episodes.arrays) == {"obs", "action", "executed", "task", "start", "scripted"}
    assert episodes["scripted"].all() and episodes["scripted"].dtype == bool
    assert episodes["obs"].shape == (episodes.steps, 59)
    assert episodes["obs"].dtype == episodes["action"].dtype == np.float32
    assert np.abs(episodes["action"]).max() <= 1
    assert len({int(episode["start"][0]) for episode in episodes}) == 6
    assert episodes["start"].min() >= kitchen_script.FIRST_START
    assert {TASKS[i] for i in np.unique(episodes["task"])} == {"light switch", "kettle"}
    assert json.loads(path.with_suffix(".json").read_text()) == report
    assert report["kind"].startswith("scripted") and report["episodes"] == 6
    assert report["steps"] == episodes.steps
    assert sum(row["tried"] for row in report["tasks"].values()) == report["attempts"]
    assert sum(row["done"] for row in report["tasks"].values()) >= 6
    assert not path.with_name("six.parts").exists()


def test_work_goes_on_after_an_interruption_with_the_same_result(made, tmp_path, monkeypatch):
    path, make, calls = tmp_path / "again.npz", kitchen_script._make_part, []

    def make_one(parts, chunk, settings):
        calls.append(chunk)
        if len(calls) == 2:
            raise KeyboardInterrupt
        make(parts, chunk, settings)

    monkeypatch.setattr(kitchen_script, "_make_part", make_one)
    with pytest.raises(KeyboardInterrupt):
        make_demonstrations(path, 6, seed=1, **QUICK)
    assert not path.exists() and len(list(tmp_path.glob("again.parts/*.npz"))) == 1
    with pytest.raises(InputError, match="other settings"):
        make_demonstrations(path, 6, seed=2, **QUICK)
    report = make_demonstrations(path, 6, seed=1, **QUICK)
    assert calls == [range(0, 5), range(5, 6), range(5, 6)]
    assert report == made[1]
    ours, theirs = read_episodes(path), read_episodes(made[0])
    for name in theirs.arrays:
        assert np.array_equal(ours[name], theirs[name])


def test_failed_attempts_are_counted_and_not_kept(tmp_path, monkeypatch):
    attempt = record_attempt

    def fail_first(env, start, tasks, rng, noise):
        arrays, outcome = attempt(env, start, tasks, rng, noise)
        seen.append(arrays)
        return arrays, {**outcome, "done": [] if len(seen) == 1 else outcome["done"]}

    seen: list = []
    monkeypatch.setattr(kitchen_script, "record_attempt", fail_first)
    path = tmp_path / "one.npz"
    report = make_demonstrations(path, 1, seed=1, noise=0.0, **QUICK)
    assert report["attempts"] == len(seen) == 2
    assert np.array_equal(read_episodes(path)["obs"], seen[1]["obs"])
    monkeypatch.setattr(kitchen_script, "ATTEMPTS", 1)
    seen.clear()
    with pytest.raises(FmftError, match="episode 0 failed 1 times"):
        make_demonstrations(tmp_path / "none.npz", 1, seed=1, **QUICK)


@pytest.mark.parametrize(
    "change",
    [{"path": "no.zip"}, {"episodes": 0}, {"tasks_each": 3}, {"tasks_each": 0}, {"noise": 1.5}],
)
def test_settings_without_meaning_are_refused(tmp_path, change):
    options = {"path": "a.npz", "episodes": 1, **QUICK, **change}
    path, episodes = options.pop("path"), options.pop("episodes")
    with pytest.raises(InputError, match=r"^\w+: expected .* got"):
        make_demonstrations(tmp_path / path, episodes, **options)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_not_overwritten(made):
    with pytest.raises(InputError, match="exists already"):
        make_demonstrations(made[0], 6, seed=1, **QUICK)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_is_done_from_the_start(task):
    env = Kitchen()
    done = 0
    for seed in range(4):
        _, outcome = record_attempt(env, seed, [task], np.random.default_rng(seed))
        done += outcome["done"] == [task]
    env.close()
    assert done >= 3


def test_axes_of_a_pose_are_a_rotation_that_points_along_the_fingers():
    axes = Pose(np.zeros(3), yaw=0.4, pitch=-0.5).axes
    assert np.allclose(axes.T @ axes, np.eye(3)) and np.isclose(np.linalg.det(axes), 1)
    assert axes[2, 2] == np.sin(-0.5) and axes[0, 2] < 0 < axes[1, 2]
    assert axes[2, 1] == 0 and axes[2, 0] > 0  # its right stays level, its upper side up
