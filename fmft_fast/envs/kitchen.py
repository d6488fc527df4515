"""Franka Kitchen: an arm opens, turns and moves things in a kitchen (gymnasium-robotics)."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fmft_fast.envs.base import register
from fmft_fast.envs.drawing import Canvas
from fmft_fast.errors import InputError, MissingDependencyError

# The seven of the published evaluation, each with a goal that the simulator checks.
TASKS = (
    "microwave",
    "kettle",
    "bottom burner",
    "top burner",
    "light switch",
    "slide cabinet",
    "hinge cabinet",
)
FIRST_SEED = 100_000  # of the published evaluation starts
FRAME_SIZE = 240  # pixels
CAMERA = {"distance": 2.2, "azimuth": 70.0, "elevation": -35.0, "lookat": (-0.2, 0.5, 2.0)}
# In 3.12 the simulator's model no longer loads; before 3.1.6 gymnasium-robotics refuses.
MUJOCO_FROM, MUJOCO_BELOW = (3, 1, 6), (3, 12)


class Kitchen:
    """FrankaKitchen-v1 behind `Environment`.

    An observation is the 59 numbers of the simulator, its sensor noise included: 9 joint places
    of arm and fingers, their 9 velocities, 21 places and 20 velocities of the things in the
    kitchen. An action is 9 joint velocities in [-1, 1], in units of 2 rad/s (fingers: 2 m/s),
    held for 0.08 s.

    An episode begins in the one state that the benchmark defines. Start number i seeds the sensor
    noise, which the arm's controller sees as well, with 100000 + i.

    Measures: `tasks`, how many have been done, and `p1` to `p4`, 1 once at least so many have
    been done; their means over starts are the published p1 to p4. A task that has been done stays
    done, even if its thing moves again.

    Args:
        tasks: those that count, of `TASKS`, also as text with commas, which may follow a colon in
            `make_environment("kitchen:microwave,kettle")`. Done for good is when all of them are.

    Attributes:
        sim: gymnasium-robotics' KitchenEnv, with mujoco's `model` and `data`.

    Raises:
        MissingDependencyError: gymnasium-robotics is not installed, or no fitting mujoco.
        InputError: a task is unknown or named twice, or there is none.

    Example:
        env = Kitchen()
        obs = env.reset(0)
        obs, done = env.step(np.zeros(9))
        env.scores()  # {"p1": 0.0, "p2": 0.0, "p3": 0.0, "p4": 0.0, "tasks": 0.0}
    """

    name = "kitchen"
    obs_dim, action_dim = 59, 9
    max_steps = 280
    measures: tuple[str, ...] = ("p1", "p2", "p3", "p4", "tasks")
    frame_rate = 12.5

    def __init__(self, tasks: Sequence[str] | str = TASKS) -> None:
        tasks = tasks.split(",") if isinstance(tasks, str) else tasks
        wrong = [task for task in tasks if task not in TASKS or list(tasks).count(task) > 1]
        if wrong or not tasks:
            raise InputError(
                f"tasks: expected different ones of {', '.join(TASKS)}, at least one, got "
                f"{', '.join(tasks) or 'none'}; leave them out for all"
            )
        self.sim = _simulator()(tasks_to_complete=list(tasks))
        self._canvas: Canvas | None = None
        self.reset(0)

    def reset(self, start: int) -> np.ndarray:
        """Begin with the sensor noise of start number `start`; see `Environment`."""
        obs, _ = self.sim.reset(seed=FIRST_SEED + start)
        return obs["observation"].astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Drive the joints at `action`, [9], for 0.08 s; see `Environment`."""
        obs, _, done, _, _ = self.sim.step(np.asarray(action, dtype=np.float64))
        return obs["observation"].astype(np.float32), bool(done)

    @property
    def completed(self) -> tuple[str, ...]:
        """Tasks done so far in this episode, in the order of their completion."""
        return tuple(self.sim.episode_task_completions)

    def scores(self) -> dict[str, float]:
        """Give p1 to p4 and `tasks`; see the class."""
        done = len(self.completed)
        return {**{f"p{k}": float(done >= k) for k in (1, 2, 3, 4)}, "tasks": float(done)}

    def render(self) -> np.ndarray:
        """Draw the kitchen from behind the arm, uint8 [240, 240, 3].

        Needs no screen. On Linux OSMesa draws, unless $MUJOCO_GL names another backend.

        Raises:
            MissingDependencyError: the backend does not work here.
        """
        if self._canvas is None:
            self._canvas = Canvas(self.sim.model, self.sim.data, FRAME_SIZE, CAMERA)
        return self._canvas.draw()

    def close(self) -> None:
        """Free the simulator and what draws it."""
        if self._canvas is not None:
            self._canvas.close()
            self._canvas = None
        self.sim.close()


@functools.cache
def _simulator() -> Any:
    """Import the simulator, having checked the version of mujoco."""
    try:
        import mujoco

        # The package prints news about other simulators when it is imported.
        with contextlib.redirect_stderr(io.StringIO()):
            from gymnasium_robotics.envs.franka_kitchen import KitchenEnv
    except ImportError as error:
        raise MissingDependencyError(
            f"Franka Kitchen needs the packages gymnasium-robotics and mujoco ({error}); "
            f"pip install 'fmft-fast[kitchen]'"
        ) from error
    check_mujoco(mujoco.__version__)
    return KitchenEnv


def check_mujoco(version: str) -> None:
    """Refuse a version of mujoco with which Franka Kitchen does not work.

    Raises:
        MissingDependencyError: it is too old or too new.

    Example:
        >>> check_mujoco("3.2.0")
    """
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if not MUJOCO_FROM <= numbers < MUJOCO_BELOW:
        raise MissingDependencyError(
            f"Franka Kitchen needs mujoco >=3.1.6 and <3.12, got {version}; "
            f"pip install 'mujoco>=3.1.6,<3.12'"
        )


register(Kitchen.name, Kitchen)
