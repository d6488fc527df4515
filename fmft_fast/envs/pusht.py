"""Push-T: push a T-shaped block on its outline with a round finger, in the plane (gym-pusht)."""

from __future__ import annotations

import functools
import math
import os
import warnings
from typing import Any

import numpy as np

from fmft_fast.envs.base import register
from fmft_fast.errors import InputError, MissingDependencyError

FIRST_SEED = 100_000  # of the published evaluation starts
SUCCESS = 0.95  # coverage of the goal
SIDE = 512.0  # pixels; actions lie in [0, 512]
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
    obs = np.empty((*state.shape[:-1], 20), dtype=np.float32)
    obs[..., 0:18:2] = state[..., 2:3] + cos * KEYPOINTS[:, 0] - sin * KEYPOINTS[:, 1]
    obs[..., 1:18:2] = state[..., 3:4] + sin * KEYPOINTS[:, 0] + cos * KEYPOINTS[:, 1]
    obs[..., 18:] = state[..., :2]
    return obs


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

    The physics are those of gym-pusht, bit for bit. Only what costs time and changes nothing is
    left out: counts of contacts, and overlaps that cannot exceed the best one so far.

    Raises:
        MissingDependencyError: gym-pusht is not installed.

    Example:
        env = PushT()
        obs = env.reset(0)
        obs, done = env.step(np.array([256.0, 256.0]))
        env.scores()  # {"score": 0.0, "success": 0.0}
    """

    name = "pusht"
    obs_dim, action_dim = 20, 2
    max_steps = 300
    measures: tuple[str, ...] = ("score", "success")
    frame_rate = 10.0

    def __init__(self) -> None:
        self._sim = _simulator()(
            obs_type="state", visualization_width=FRAME_SIZE, visualization_height=FRAME_SIZE
        )
        self.reset(0)

    def reset(self, start: int) -> np.ndarray:
        """Begin at a start of the published evaluation; see `Environment`."""
        # Published states are set position first: the angle, which turns the block about its
        # centre of gravity, then moves the position. The state that results is the start.
        self._sim.reset(options={"reset_to_state": published_state(start)})
        self._coverage = _Coverage(self._sim)
        return observe(self.state)

    def reset_to(self, state: np.ndarray) -> np.ndarray:
        """Begin at a recorded state, [5], laid out as `state`, and give its observation.

        Raises:
            InputError: it is not five finite numbers.
        """
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (5,) or not np.isfinite(state).all():
            raise InputError(f"state: expected 5 finite numbers, got {state.tolist()}")
        agent_x, agent_y, x, y, angle = state.tolist()
        sim = self._sim
        sim.reset(options={"reset_to_state": [agent_x, agent_y, x, y, angle]})
        sim._setup()  # a new space, without what the step of that reset has left in it
        sim.agent.position = agent_x, agent_y
        # Turning the block moves its position, so that the position comes last.
        sim.block.angle = angle
        sim.block.position = x, y
        sim.space.step(sim.dt)
        self._coverage = _Coverage(sim)
        return observe(self.state)

    @property
    def state(self) -> np.ndarray:
        """Finger x, y and block x, y in pixels, and the block's angle in [0, 2 pi), [5]."""
        agent, block = self._sim.agent.position, self._sim.block
        return np.array([*agent, *block.position, block.angle % (2 * math.pi)])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Drive the finger to `action`, [2], for a tenth of a second; see `Environment`."""
        x, y = (min(max(float(place), 0.0), SIDE) for place in action)
        sim, agent, space = self._sim, self._sim.agent, self._sim.space
        sim._last_action = (x, y)  # for the cross in pictures
        k_p, k_v, dt = sim.k_p, sim.k_v, sim.dt
        # Nothing but this controller changes the velocity of the finger, a kinematic body.
        v_x, v_y = agent.velocity
        for _ in range(int(1 / (dt * sim.control_hz))):
            p_x, p_y = agent.position
            v_x += (k_p * (x - p_x) + k_v * (0 - v_x)) * dt
            v_y += (k_p * (y - p_y) + k_v * (0 - v_y)) * dt
            agent.velocity = v_x, v_y
            space.step(dt)
        self._coverage.update()
        return observe(self.state), self._coverage.best > SUCCESS

    def scores(self) -> dict[str, float]:
        """Give `score` and `success`; see the class."""
        best = self._coverage.best
        return {"score": min(best / SUCCESS, 1.0), "success": float(best > SUCCESS)}

    def render(self) -> np.ndarray:
        """Draw goal, block, finger and the last action's cross, uint8 [192, 192, 3]."""
        return self._sim.render()

    def close(self) -> None:
        """Free the simulator."""
        self._sim.close()


class _Coverage:
    """The largest share of the goal that the block has covered after a step of an episode.

    Overlaps of polygons are half of the cost of a step. One is computed only where it could be a
    new best, by a bound: moving each point of the block by at most d adds at most its area's
    growth by a margin of that width, perimeter * d + pi * d^2 (Steiner's formula).
    """

    AREA, PERIMETER = 6300.0, 480.0  # of the block, a bar of 120 x 30 and a stem of 30 x 90
    REACH = 77.0  # from the block's centre of gravity to its farthest point, rounded up

    def __init__(self, sim: Any) -> None:
        from gym_pusht.envs.pusht import pymunk_to_shapely

        self._block = sim.block
        # gym-pusht takes bar and stem in the order of a set, which changes the last bits of an
        # overlap from instance to instance. Here the bar, the larger one, comes first.
        shapes = sorted(sim.block.shapes, key=lambda shape: -shape.area)
        self._outlines = [shape.get_vertices() for shape in shapes]
        self._goal = pymunk_to_shapely(sim.get_goal_pose_body(sim.goal_pose), shapes)
        self._goal_area = self._goal.area
        self._pose, self._value = (math.inf, math.inf, math.inf), 0.0
        self.best = 0.0

    def update(self) -> None:
        """Take the block's present place into account."""
        block = self._block
        x, y = block.local_to_world(block.center_of_gravity)
        pose = x, y, block.angle
        if pose == self._pose:
            return
        way = math.hypot(x - self._pose[0], y - self._pose[1])
        way += self.REACH * abs(pose[2] - self._pose[2])
        growth = (self.PERIMETER * way + math.pi * way * way) / self.AREA
        # 1e-9 lies far above the rounding of both sides.
        if self._value + growth + 1e-9 >= self.best:
            self._pose, self._value = pose, self._measure()
            self.best = max(self.best, self._value)

    def _measure(self) -> float:
        """Give the share of the goal that the block covers, as gym-pusht computes it."""
        import shapely

        place = self._block.local_to_world
        corners = np.array([[place(corner) for corner in ring] for ring in self._outlines])
        parts: Any = shapely.polygons(corners)
        block = shapely.multipolygons(parts)
        return self._goal.intersection(block).area / self._goal_area


@functools.cache
def _simulator() -> Any:
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

    class Simulator(PushTEnv):
        """Counts no contacts: asking for them costs more than the physics."""

        def _handle_collision(self, arbiter: Any, space: Any, data: Any) -> None:
            pass

    return Simulator


register(PushT.name, PushT)
