"""Tasks of robomimic's data sets, simulated by robosuite as the demonstrations were recorded."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fmft_fast.data import hdf5
from fmft_fast.envs.base import register
from fmft_fast.envs.drawing import Canvas
from fmft_fast.errors import ConfigWarning, InputError, MissingDependencyError

OBSERVATIONS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
FIRST_SEED = 100_000  # of the published evaluation starts
FRAME_SIZE = 240  # pixels
# Steps of an episode, by robosuite's name of the task; 400 for all others.
STEPS = {"ToolHang": 700}
# How the low-dimensional demonstrations of one arm were recorded.
SETTINGS: dict[str, Any] = {
    "robots": ["Panda"],
    "control_freq": 20,
    "reward_shaping": False,
    "controller_configs": {
        "type": "OSC_POSE",
        "input_max": 1,
        "input_min": -1,
        "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
        "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
        "kp": 150,
        "damping_ratio": 1,
        "impedance_mode": "fixed",
        "kp_limits": [0, 300],
        "damping_ratio_limits": [0, 10],
        "position_limits": None,
        "orientation_limits": None,
        "uncouple_pos_ori": True,
        "control_delta": True,
        "interpolation": None,
        "ramp_ratio": 0.2,
    },
}
# States and goals are read from the simulator, which need not draw for that.
BLIND = {
    "has_renderer": False,
    "has_offscreen_renderer": False,
    "use_camera_obs": False,
    "use_object_obs": True,
    "ignore_done": True,
}


class Robomimic:
    """A task of one robot arm behind `Environment`, by robosuite.

    An observation joins the arrays `OBSERVATIONS` of robomimic's files in that order. An action is
    the one of the file: for its data sets, changes of the hand's place and direction and the
    gripper, [7] in [-1, 1].

    Start number i is what robosuite draws from the seed 100000 + i.

    Measure: `success`, 1 once the task's goal has been reached, which also ends an episode.

    Args:
        source: a file of robomimic, whose own description of the simulator is used, or robosuite's
            name of a task ("Lift", "PickPlaceCan", "NutAssemblySquare", ...), which is then
            simulated as robomimic's data sets are. From `make_environment` and in evaluations, it
            follows a colon: "robomimic:low_dim.hdf5".

    Raises:
        MissingDependencyError: robosuite is not installed, or h5py for a file.
        InputError: there is no such file or task, the file does not describe a simulator of
            robosuite, or the task is not one for a single arm.

    Example:
        env = Robomimic("Lift")
        obs = env.reset(0)
        obs, done = env.step(np.zeros(env.action_dim))
        env.scores()  # {"success": 0.0}

    Source:
        Mandlekar et al. 2021, What Matters in Learning from Offline Human Demonstrations for
        Robot Manipulation (arXiv:2108.03298).
    """

    name = "robomimic"
    measures: tuple[str, ...] = ("success",)

    def __init__(self, source: str | Path = "Lift") -> None:
        task, settings = _describe(source)
        suite = _robosuite()
        if task not in suite.ALL_ENVIRONMENTS:
            raise InputError(
                f"source: expected a file or a task of robosuite, got {str(source)!r}; there are "
                f"{', '.join(sorted(suite.ALL_ENVIRONMENTS))}"
            )
        if len(settings["robots"]) != 1:
            raise InputError(
                f"{task}: expected a task for one arm, got {len(settings['robots'])} robots; "
                f"policies for several need other observations"
            )
        self.sim = suite.make(task, **{**_for_version(suite, settings), **BLIND})
        self.action_dim = int(self.sim.action_dim)
        self.max_steps = STEPS.get(task, 400)
        self.frame_rate = float(self.sim.control_freq)
        self._canvas: Canvas | None = None
        self._drawn: Any = None
        self.obs_dim = len(self.reset(0))

    def reset(self, start: int) -> np.ndarray:
        """Begin with what robosuite draws for start number `start`; see `Environment`."""
        self._success = False
        with _seeded(self.sim, FIRST_SEED + start):
            return _observe(self.sim.reset())

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Do an action, [action_dim]; see `Environment`."""
        obs, _, _, _ = self.sim.step(np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0))
        self._success = self._success or bool(self.sim._check_success())
        return _observe(obs), self._success

    def scores(self) -> dict[str, float]:
        """Give `success`; see the class."""
        return {"success": float(self._success)}

    def render(self) -> np.ndarray:
        """Draw the table from the front, uint8 [240, 240, 3]; see `Canvas`.

        Raises:
            MissingDependencyError: nothing draws here.
        """
        model, data = self.sim.sim.model._model, self.sim.sim.data._data
        if self._drawn is not model:  # a reset may make a new one
            self._drop_canvas()
            self._canvas, self._drawn = Canvas(model, data, FRAME_SIZE, "frontview"), model
        assert self._canvas is not None
        return self._canvas.draw()

    def close(self) -> None:
        """Free the simulator and what draws it."""
        self._drop_canvas()
        self.sim.close()

    def _drop_canvas(self) -> None:
        if self._canvas is not None:
            self._canvas.close()
        self._canvas = self._drawn = None


def read_env_args(path: str | Path) -> dict[str, Any]:
    """Give what a file of robomimic says about its simulator.

    Returns:
        "env_name", "env_kwargs", and mostly "env_version".

    Raises:
        InputError: the file is damaged or says nothing about a simulator of robosuite.
        MissingDependencyError: h5py is not installed.
    """
    with hdf5.open_file(Path(path)) as file:
        text = hdf5.group_of(file, "data").attrs.get("env_args")
    try:
        described = json.loads(text or "")
    except ValueError:
        described = {}
    kwargs = described.get("env_kwargs")
    # Type 1 is robosuite; the others are simulators of other packages.
    if described.get("type", 1) != 1 or not isinstance(kwargs, dict) or "robots" not in kwargs:
        raise InputError(
            f"{path}: expected the attribute env_args of data to describe a simulator of "
            f"robosuite, got {text!r:.80}; name the task instead, such as robomimic:Lift"
        )
    if isinstance(kwargs["robots"], str):
        described["env_kwargs"] = {**kwargs, "robots": [kwargs["robots"]]}
    return described


def _describe(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Give robosuite's name of the task and its settings."""
    if not Path(source).is_file():
        return str(source), SETTINGS
    described = read_env_args(source)
    _compare(str(described.get("env_version") or ""))
    return described["env_name"], described["env_kwargs"]


def _compare(recorded: str) -> None:
    """Warn where a file was recorded by an older or newer generation of robosuite."""
    version = _robosuite().__version__
    if recorded and _generation(recorded) != _generation(version):
        warnings.warn(
            f"the demonstrations were recorded with robosuite {recorded} and are simulated with "
            f"{version}, whose controllers and orientations differ; compare only with results of "
            f"the same version",
            ConfigWarning,
            stacklevel=4,
        )


def _generation(version: str) -> bool:
    """Whether the version has composite controllers."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) >= (1, 5)


def _for_version(suite: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Give settings as the installed version wants them: since 1.5, controllers have parts."""
    settings = copy.deepcopy(settings)
    if _generation(suite.__version__) and "controller_configs" in settings:
        factory = importlib.import_module(
            "robosuite.controllers.composite.composite_controller_factory"
        )
        settings["controller_configs"] = factory.refactor_composite_controller_config(
            settings["controller_configs"], settings["robots"][0], ["right"]
        )
    return settings


def _observe(obs: Any) -> np.ndarray:
    """Join what a policy sees, float32."""
    # robosuite's own name of what robomimic calls "object".
    parts = [obs["object-state" if name == "object" else name] for name in OBSERVATIONS]
    return np.concatenate(parts).astype(np.float32)


@contextlib.contextmanager
def _seeded(sim: Any, seed: int) -> Iterator[None]:
    """Seed what robosuite draws from: numpy's global stream, since 1.5 also one of its own."""
    before = np.random.get_state()
    np.random.seed(seed)
    if hasattr(sim, "rng"):  # its parts hold the same object, so that it must not be replaced
        sim.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
    try:
        yield
    finally:
        np.random.set_state(before)


@functools.cache
def _robosuite() -> Any:
    """Import robosuite, without its news and the drawing backend that it would choose for all."""
    chosen, logged = os.environ.get("MUJOCO_GL"), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        suite = importlib.import_module("robosuite")
    except ImportError as error:
        raise MissingDependencyError(
            f"roll-outs of robomimic's tasks need the package robosuite ({error}); "
            f"pip install robosuite"
        ) from error
    finally:
        logging.disable(logged)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    if chosen is None:
        os.environ.pop("MUJOCO_GL", None)
    return suite


register(Robomimic.name, Robomimic)
