"""Push-T: push a T-shaped block on its outline with a round finger, in the plane (gym-pusht)."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import numpy as np

from fmft_fast.envs.base import register
from fmft_fast.errors import InputError, MissingDependencyError

FIRST_SEED = 100_000  # of the published evaluation starts
SUCCESS = 0.95  # coverage of the goal
FRAME_SIZE = 192  # pixels
# The nine keypoints in the frame of the block, pixels: medians over the 25,650 recorded steps.
KEYPOINTS = np.array(
    [
        (9.2698, 90.0410),
        (-60.9835, -1.1867),
        (60.9128, -1.3934),
        (-0.2705, 25.5436),
        (-14.0649, 122.8158),
        (39.0027, 32.8574),
        (-39.9664, 32.7297),
        (-16.8243, 62.8632),
        (23.5415, -1.7003),
    ]
)


def observe(state: np.ndarray) -> np.ndarray:
    """Give the observation of a state: nine keypoints on the block, then the finger.

    Args:
        state: [..., 5]: finger x, y and block x, y in pixels, block's angle in radians.

    Returns:
        float32, [..., 20], pixels: x and y of each keypoint, then of the finger.

    Source: Chi et al. 2023, Diffusion Policy (arXiv 2303.04137), state-based Push-T.

    Example:
        >>> observe(np.array([10.0, 20.0, 256.0, 256.0, 0.0]))[-4:]
        array([279.5415, 254.2997,  10.    ,  20.    ], dtype=float32)
    """
    state = np.asarray(state, dtype=np.float64)
    cos, sin = np.cos(state[..., 4:]), np.sin(state[..., 4:])
    x = state[..., 2:3] + cos * KEYPOINTS[:, 0] - sin * KEYPOINTS[:, 1]
    y = state[..., 3:4] + sin * KEYPOINTS[:, 0] + cos * KEYPOINTS[:, 1]
    points = np.stack((x, y), -1).reshape(*state.shape[:-1], 18)
    return np.concatenate((points, state[..., :2]), -1, dtype=np.float32, casting="same_kind")


def published_state(start: int) -> np.ndarray:
    """Give the state that evaluation start number `start` is set to, [5].

    Source: the evaluation of Diffusion Policy, seeds from 100,000 on.

    Example:
        >>> published_state(0)[:4]
        array([235., 124., 335., 128.])
    """
    if not 0 <= start < 2**32 - FIRST_SEED:
        raise InputError(f"start: expected a whole number from 0 on, got {start}")
    random = np.random.RandomState(FIRST_SEED + start)
    finger = random.randint(50, 450), random.randint(50, 450)
    block = random.randint(100, 400), random.randint(100, 400)
    return np.array([*finger, *block, random.randn() * 2 * np.pi - np.pi])


class PushT:
    """The simulator of Push-T behind `Environment`, for state policies.

    An action is the place, in pixels, that the finger is driven to for a tenth of a second.

    Measures: `score`, the largest of min(coverage / 0.95, 1) so far, and `success`, 1 once the
    coverage has exceeded 0.95, which also ends an episode.

    Raises:
        MissingDependencyError: gym-pusht is not installed.
    """

    name = "pusht"
    obs_dim, action_dim = 20, 2
    max_steps = 300
    measures: tuple[str, ...] = ("score", "success")
    frame_rate = 10.0

    def __init__(self) -> None:
        self._sim = _load_simulator()(
            obs_type="state", visualization_width=FRAME_SIZE, visualization_height=FRAME_SIZE
        )
        self._best = 0.0

    def reset(self, start: int) -> np.ndarray:
        """Begin at a start of the published evaluation; see `Environment`."""
        # The published states are set position first: the angle, which turns the block about its
        # centre of gravity, then moves the position. Their set is the one that results.
        self._sim.reset(options={"reset_to_state": published_state(start)})
        self._best = 0.0
        return observe(self.state)

    def reset_to(self, state: np.ndarray) -> np.ndarray:
        """Begin at a recorded state, [5], so that `self.state` becomes it, and observe it."""
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (5,) or not np.isfinite(state).all():
            raise InputError(f"state: expected 5 finite numbers, got {state.tolist()}")
        self._sim.reset()
        self._sim._setup()
        self._sim.agent.position = tuple(state[:2].tolist())
        # Turning moves the position, so that comes last.
        self._sim.block.angle = float(state[4])
        self._sim.block.position = tuple(state[2:4].tolist())
        self._sim.space.step(self._sim.dt)
        self._best = 0.0
        return observe(self.state)

    @property
    def state(self) -> np.ndarray:
        """Finger x, y and block x, y in pixels, and the block's angle in [0, 2 pi), [5]."""
        agent, block = self._sim.agent.position, self._sim.block
        return np.array([*agent, *block.position, block.angle % (2 * math.pi)])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Drive the finger to `action`, [2], for a tenth of a second; see `Environment`."""
        action = np.clip(np.asarray(action, dtype=np.float64), 0.0, 512.0)
        _, _, _, _, info = self._sim.step(action)
        self._best = max(self._best, float(info["coverage"]))
        return observe(self.state), self._best > SUCCESS

    def scores(self) -> dict[str, float]:
        """Give `score` and `success`; see the class."""
        return {"score": min(self._best / SUCCESS, 1.0), "success": float(self._best > SUCCESS)}

    def render(self) -> np.ndarray:
        """Draw goal, block, finger and the last action's cross, uint8 [192, 192, 3]."""
        return self._sim.render()

    def close(self) -> None:
        """Free the simulator."""
        self._sim.close()


def _load_simulator() -> Any:
    """Import gym-pusht such that it needs no screen and prints no greeting."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from gym_pusht.envs.pusht import PushTEnv
    except ImportError as error:
        raise MissingDependencyError(
            "the simulator of Push-T needs the package gym-pusht, which is not installed; "
            "pip install 'fmft-fast[pusht]'"
        ) from error
    return PushTEnv


register(PushT.name, PushT)
