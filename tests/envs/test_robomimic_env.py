"""robomimic's tasks: what files say about their simulator, and robosuite where it is installed."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

import numpy as np
import pytest

from fmft_fast.envs import make_environment, robomimic
from fmft_fast.envs.robomimic import OBSERVATIONS, SETTINGS, Robomimic, read_env_args
from fmft_fast.errors import ConfigWarning, InputError, MissingDependencyError


def write(path, env_args):
    h5py = pytest.importorskip("h5py", reason="robomimic's files need h5py")
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if env_args is not None:
            data.attrs["env_args"] = env_args
    return path


def describe(**changes):
    """Write env_args as robomimic's own files have them."""
    kwargs = {
        **SETTINGS,
        "robots": "Panda",
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "ignore_done": True,
        "use_object_obs": True,
        "use_camera_obs": False,
        "camera_depths": False,
        "camera_heights": 84,
        "camera_widths": 84,
    }
    args = {"env_name": "Lift", "env_version": "1.4.1", "type": 1, "env_kwargs": kwargs}
    return json.dumps({**args, **changes})


def test_a_file_says_which_simulator_it_was_recorded_with(tmp_path):
    found = read_env_args(write(tmp_path / "low_dim.hdf5", describe()))
    assert found["env_name"] == "Lift" and found["env_version"] == "1.4.1"
    assert found["env_kwargs"]["robots"] == ["Panda"]
    assert found["env_kwargs"]["controller_configs"] == SETTINGS["controller_configs"]


@pytest.mark.parametrize(
    "env_args", [None, "", "Lift", "{}", describe(type=2), describe(env_kwargs={})]
)
def test_files_that_describe_no_simulator_are_refused(tmp_path, env_args):
    with pytest.raises(InputError, match=r"env_args of data.*robomimic:Lift"):
        read_env_args(write(tmp_path / "other.hdf5", env_args))


def test_without_robosuite_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    robomimic._robosuite.cache_clear()
    with pytest.raises(MissingDependencyError, match="pip install robosuite"):
        make_environment("robomimic")


@pytest.fixture(scope="module")
def lift():
    pytest.importorskip("robosuite", reason="roll-outs of robomimic's tasks need robosuite")
    env = make_environment("robomimic:Lift")
    assert isinstance(env, Robomimic)
    yield env
    env.close()


def pick_up(env, start):
    """Lift the cube by proportional control on what a policy sees; gives success and steps."""
    obs = env.reset(start)
    for step in range(150):
        cube, hand = obs[:3], obs[10:13]
        way = cube - hand
        over = np.linalg.norm(way[:2]) > 0.01 and hand[2] > cube[2] + 0.03
        held = step > 100
        target = np.array([*way[:2], 0.1 if held else (0.05 - hand[2] + cube[2]) * over])
        target[2] += 0 if over or held else way[2]
        action = np.zeros(7)
        action[:3], action[6] = np.clip(target * 10, -1, 1), 1.0 if step > 85 else -1.0
        obs, done = env.step(action)
        if done:
            return env.scores()["success"], step
    return env.scores()["success"], 150


def global_numbers():
    """Give the state of numpy's global stream."""
    return np.random.get_state(legacy=False)["state"]["key"].copy()  # type: ignore[call-overload]


def test_observations_are_those_of_the_data_sets_in_their_order(lift):
    obs = lift.reset(2)
    theirs = lift.sim._get_observations()
    names = ("object-state", *OBSERVATIONS[1:])
    assert np.array_equal(obs, np.concatenate([theirs[n] for n in names]).astype(np.float32))
    assert (lift.obs_dim, lift.action_dim, lift.max_steps) == (19, 7, 400)
    assert lift.frame_rate == 20


def test_a_start_is_one_state_whatever_was_drawn_before(lift):
    before = global_numbers()
    once, other = lift.reset(5), lift.reset(6)
    assert np.array_equal(global_numbers(), before)  # the process's own stream is kept
    lift.sim.rng.normal(size=7) if hasattr(lift.sim, "rng") else None
    fresh = Robomimic("Lift")
    assert np.array_equal(fresh.reset(5), once) and np.abs(once - other).max() > 1e-3
    fresh.close()


def test_lifting_the_cube_is_success_and_doing_nothing_is_not(lift):
    lift.reset(0)
    assert not any(lift.step(np.zeros(7))[1] for _ in range(5))
    assert lift.scores() == {"success": 0.0}
    success, steps = pick_up(lift, 0)
    assert success == 1.0 and 85 < steps < 150


def test_a_file_is_simulated_as_it_says(lift, tmp_path):
    path = write(tmp_path / "low_dim.hdf5", describe(env_version="1.2.0"))
    robosuite = pytest.importorskip("robosuite")
    newer = tuple(map(int, robosuite.__version__.split(".")[:2])) >= (1, 5)
    expected = pytest.warns(ConfigWarning, match="recorded with robosuite 1.2.0")
    with expected if newer else nullcontext():
        env = make_environment(f"robomimic:{path}")
    assert np.array_equal(env.reset(3), lift.reset(3))
    env.close()


def test_unknown_tasks_and_those_for_two_arms_are_refused(lift):
    with pytest.raises(InputError, match="'Juggle'; there are .*Lift"):
        Robomimic("Juggle")
    two = {**SETTINGS, "robots": ["Panda", "Panda"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmft_fast.envs.robomimic.SETTINGS", two)
        with pytest.raises(InputError, match="one arm, got 2 robots"):
            Robomimic("TwoArmLift")


def test_pictures_follow_the_simulator_through_resets(lift):
    lift.reset(0)
    try:
        first = lift.render()
    except MissingDependencyError as error:
        pytest.skip(f"nothing draws here: {error}")
    lift.reset(1)
    second = lift.render()
    assert first.shape == (240, 240, 3) and first.std() > 20
    assert np.abs(first.astype(int) - second).max() > 50
