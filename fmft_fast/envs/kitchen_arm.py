"""Drives the kitchen's arm: from where the hand shall go to actions of the simulator."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

HELD_S = 0.08  # how long the simulator holds an action
UNIT = 2.0  # rad/s, or m/s of a finger, that an action of 1 stands for
TURN_LIMIT = 2.0  # rad/s
TURN_GAIN = 4.0  # 1/s
# Metres that count like a radian where not both place and direction can be met.
DRIFT_GAIN = 2.5  # 1/s, towards the posture
LEVER_M = 0.3
DAMPING = 1e-3


@dataclass(frozen=True)
class Pose:
    """Where the hand shall be.

    Attributes:
        place: of the point between the finger tips, metres, [3].
        yaw: direction of the fingers about the vertical, rad; 0 is away from the base (along y),
            positive values turn to the left.
        pitch: rad; negative values point down.
    """

    place: np.ndarray
    yaw: float = 0.0
    pitch: float = 0.0

    def moved(self, by: np.ndarray) -> Pose:
        """Give the pose moved by some metres, [3]."""
        return Pose(self.place + by, self.yaw, self.pitch)

    @property
    def axes(self) -> np.ndarray:
        """Directions of the hand as columns: its upper side, its right, along the fingers."""
        along = np.array(
            [
                -np.sin(self.yaw) * np.cos(self.pitch),
                np.cos(self.yaw) * np.cos(self.pitch),
                np.sin(self.pitch),
            ]
        )
        right = np.cross(along, (0.0, 0.0, 1.0))
        right /= np.linalg.norm(right)
        return np.stack([np.cross(right, along), right, along], axis=1)


@dataclass(frozen=True)
class Move:
    """One stretch of the hand's way.

    Attributes:
        goal: a pose, or a function of mujoco's data that gives one that moves along.
        speed: at most, m/s.
        near: distance to the goal, metres, at which the move is over.
        steps: after which it is over in any case.
        opening: of each finger, metres, from 0 to 0.04.
        gain: speed per distance, 1/s.
        stiff: bound the speed along each axis alone: the hand keeps to its line while pushing.
        done: function of mujoco's data that ends the move.
        calm: share of the disturbance that the hand bears here.
    """

    goal: Pose | Callable[[Any], Pose]
    speed: float
    near: float = 0.05
    steps: int = 40
    opening: float = 0.0
    gain: float = 4.0
    stiff: bool = False
    done: Callable[[Any], bool] | None = None
    calm: float = 1.0


class Arm:
    """Damped least squares from the velocity of the hand to those of the joints.

    It knows the model's gravity and the lag of its controllers, and makes up for both. Joints that
    the hand's velocity leaves free drift towards a given posture.

    Args:
        model, data: mujoco's, of the kitchen.
    """

    def __init__(self, model: Any, data: Any) -> None:
        # Its functions are compiled in: type checkers do not see them.
        self._mujoco: Any = importlib.import_module("mujoco")
        self._model, self._data = model, data
        self._hand = model.site("end_effector").id
        self._stiffness = model.actuator_gainprm[:7, 0]
        # Share of the way to its target that a joint goes while an action is held: the joint's
        # damper against its controller's spring; inertia matters little.
        self._share = 1 - np.exp(-HELD_S * self._stiffness / model.dof_damping[:7])

    @property
    def place(self) -> np.ndarray:
        """Where the point between the finger tips is, metres, [3]."""
        return self._data.site_xpos[self._hand].copy()

    def act(self, move: Move, goal: Pose, posture: np.ndarray) -> np.ndarray:
        """Give the action, [9] in [-1, 1], that goes on towards `goal`.

        Args:
            move: says how fast, and how wide the hand is open.
            goal: where to.
            posture: of the seven joints, for what the hand's velocity leaves free, rad.
        """
        velocity = self._joint_velocity(self._twist(move, goal), posture)
        sag = self._data.qfrc_bias[:7] / self._stiffness
        joints = velocity / self._share + sag / HELD_S
        fingers = (move.opening - self._data.qpos[7:9]) / HELD_S
        return np.clip(np.concatenate([joints, fingers]) / UNIT, -1.0, 1.0)

    def _twist(self, move: Move, goal: Pose) -> np.ndarray:
        """Give the wanted velocity of the hand: m/s [3], then rad/s times LEVER_M [3]."""
        way = move.gain * (goal.place - self.place)
        if move.stiff:
            way = np.clip(way, -move.speed, move.speed)
        else:
            way *= min(1.0, move.speed / max(float(np.linalg.norm(way)), 1e-9))
        axes = self._data.site_xmat[self._hand].reshape(3, 3)
        quaternion, turn = np.zeros(4), np.zeros(3)
        self._mujoco.mju_mat2Quat(quaternion, (goal.axes @ axes.T).ravel())
        self._mujoco.mju_quat2Vel(turn, quaternion, 1.0)
        turn *= TURN_GAIN
        turn *= min(1.0, TURN_LIMIT / max(float(np.linalg.norm(turn)), 1e-9))
        return np.concatenate([way, LEVER_M * turn])

    def _joint_velocity(self, twist: np.ndarray, posture: np.ndarray) -> np.ndarray:
        along = np.zeros((3, self._model.nv))
        about = np.zeros((3, self._model.nv))
        self._mujoco.mj_jacSite(self._model, self._data, along, about, self._hand)
        jacobian = np.vstack([along[:, :7], LEVER_M * about[:, :7]])
        inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + DAMPING * np.eye(6))
        drift = DRIFT_GAIN * (posture - self._data.qpos[:7])
        return inverse @ twist + drift - inverse @ (jacobian @ drift)
