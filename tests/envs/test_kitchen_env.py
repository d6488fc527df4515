"""Franka Kitchen behind Environment: gymnasium-robotics' own numbers, starts, scores, pictures."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fmft_fast.envs import kitchen, make_environment
from fmft_fast.envs.drawing import Canvas
from fmft_fast.envs.kitchen import TASKS, Kitchen, check_mujoco
from fmft_fast.errors import InputError, MissingDependencyError

robotics = pytest.importorskip(
    "gymnasium_robotics", reason="needs the simulator gymnasium-robotics"
)


@pytest.fixture(scope="module")
def env():
    kitchen = make_environment("kitchen")
    yield kitchen
    kitchen.close()


def test_steps_are_those_of_the_registered_simulator(env):
    gym = pytest.importorskip("gymnasium", reason="comes with gymnasium-robotics")
    gym.register_envs(robotics)
    theirs = gym.make("FrankaKitchen-v1", disable_env_checker=True)
    actions = np.random.default_rng(0).uniform(-1, 1, size=(25, 9))
    obs, _ = theirs.reset(seed=100_007)
    assert np.array_equal(env.reset(7), obs["observation"].astype(np.float32))
    for action in actions:
        obs, _, done, _, _ = theirs.step(action)
        ours, ended = env.step(action)
        assert np.array_equal(ours, obs["observation"].astype(np.float32)) and ended == done
    assert theirs.spec is not None and theirs.spec.max_episode_steps == env.max_steps
    assert theirs.unwrapped.metadata["render_fps"] == int(env.frame_rate)
    theirs.close()


def test_a_start_is_the_same_state_and_the_same_noise_each_time(env):
    def roll(start):
        first = env.reset(start)
        return np.stack([first, *(env.step(np.full(9, 0.3))[0] for _ in range(5))])

    once, other, again = roll(3), roll(4), roll(3)
    assert np.array_equal(once, again)
    assert once.dtype == np.float32 and once.shape == (6, env.obs_dim)
    assert 0 < np.abs(once[0] - other[0]).max() < 0.002  # the sensors' noise alone


def test_scores_count_tasks_that_stay_done(env):
    env.reset(0)
    assert env.scores() == {"p1": 0, "p2": 0, "p3": 0, "p4": 0, "tasks": 0}
    data = env.sim.data
    data.joint("microwave").qpos[0] = -0.7
    data.joint("slide_cabinet").qpos[0] = 0.4
    env.step(np.zeros(9))
    data.joint("microwave").qpos[0] = 0.0
    _, done = env.step(np.zeros(9))
    assert sorted(env.completed) == ["microwave", "slide cabinet"] and not done
    assert env.scores() == {"p1": 1, "p2": 1, "p3": 0, "p4": 0, "tasks": 2}
    assert tuple(env.scores()) == env.measures
    env.reset(0)
    assert env.completed == ()


def test_done_is_when_all_chosen_tasks_are():
    env = make_environment("kitchen:light switch,kettle")
    assert isinstance(env, Kitchen)
    env.close()
    env = Kitchen(["light switch"])
    env.reset(0)
    assert not env.step(np.zeros(9))[1]
    env.sim.data.joint("light_switch").qpos[0] = -0.69
    env.sim.data.joint("light_joint").qpos[0] = -0.05
    assert env.step(np.zeros(9))[1]
    assert env.scores()["tasks"] == 1
    env.close()


@pytest.mark.parametrize("tasks", [["sink"], ["kettle", "kettle"], []])
def test_tasks_that_mean_nothing_are_refused(tasks):
    with pytest.raises(InputError, match=TASKS[0]):
        Kitchen(tasks)


@pytest.mark.parametrize("version", ["3.1.6", "3.2.0", "3.11.0", "3.11.0.dev1"])
def test_fitting_versions_of_mujoco_are_taken(version):
    check_mujoco(version)


@pytest.mark.parametrize("version", ["2.3.7", "3.1.5", "3.12.0", "3.12", "4.0"])
def test_other_versions_of_mujoco_are_refused_with_a_remedy(version):
    with pytest.raises(MissingDependencyError, match=f"got {version}; pip install"):
        check_mujoco(version)


def test_a_missing_simulator_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics.envs.franka_kitchen", None)
    kitchen._simulator.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"'fmft-fast\[kitchen\]'"):
        make_environment("kitchen")


def test_several_simulators_draw_in_turn_and_apart(env):
    other = Kitchen()
    env.reset(0)
    other.reset(0)
    for _ in range(8):
        other.step(np.array([1.0, *[0.0] * 8]))
    try:
        here, there = env.render(), other.render()
    except MissingDependencyError as error:
        pytest.skip(f"nothing draws here: {error}")
    assert here.shape == (240, 240, 3) and here.dtype == np.uint8
    assert here.std() > 20 and np.abs(here.astype(int) - there).max() > 50
    assert np.array_equal(env.render(), here)
    other.close()
    assert np.array_equal(env.render(), here)  # a closed one takes no other's picture along


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_backend_that_fails_is_named_with_a_remedy(env, monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco.osmesa", None)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(MissingDependencyError, match="MUJOCO_GL=osmesa failed.*libosmesa6"):
        Canvas(env.sim.model, env.sim.data, 64, {})
