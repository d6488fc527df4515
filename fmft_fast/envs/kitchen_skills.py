"""How to do each task of the kitchen: the way of the hand, and a posture of the arm to keep near.

Places are in metres in the world's frame: x to the right, y away from the arm's base, z up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmft_fast.envs.kitchen_arm import Move, Pose

TRAVEL = 0.8  # m/s, between things
OPEN = 0.04  # metres, of each finger
# Turned to the right, the sixth joint keeps clear of its limit while the hand pushes a knob.
SIDEWAYS = -0.4  # rad
AHEAD = 0.15  # rad by which the hand leads a door that it pulls
STEADY = 0.3  # share of the disturbance where the hand grips or has little room


@dataclass(frozen=True)
class Skill:
    """A way of doing one task.

    Attributes:
        moves: function of mujoco's data, as it is when the task begins, that gives the way. Its
            first move goes through free space; what comes before a thing may vary there.
        posture: of the seven joints, rad, that leaves them room for the whole way.
    """

    moves: Callable[[Any], list[Move]]
    posture: tuple[float, ...]


def _pose(x: float, y: float, z: float, yaw: float = 0.0, pitch: float = 0.0) -> Pose:
    return Pose(np.array([x, y, z]), yaw, pitch)


def _joint(name: str) -> Callable[[Any], float]:
    return lambda data: float(data.joint(name).qpos[0])


def _microwave(data: Any) -> list[Move]:
    return _pull_door(
        data,
        site="microhandle_site",
        hinge="microdoorroot",
        angle=_joint("microwave"),
        opening=-1.0,
        open_at=0.57,
        height=0.05,
        depth=0.005,
        yaw=0.3,
        turn=0.6,
        pitch=-0.5,
    )


def _hinge_cabinet(data: Any) -> list[Move]:
    return _pull_door(
        data,
        site="hinge_site2",
        hinge="hingerightdoor",
        angle=_joint("right_hinge_cabinet"),
        opening=1.0,
        open_at=1.22,
        height=-0.08,
        depth=0.015,
        yaw=0.0,
        turn=0.5,
        pitch=0.0,
    )


def _pull_door(
    data: Any,
    *,
    site: str,
    hinge: str,
    angle: Callable[[Any], float],
    opening: float,
    open_at: float,
    height: float,
    depth: float,
    yaw: float,
    turn: float,
    pitch: float,
) -> list[Move]:
    """Grip the upright handle of a door, lead it about the hinge, let go.

    Args:
        data: mujoco's, with the door as it is now.
        site, hinge: names of the handle's middle and of the body that turns.
        angle: of the door, rad.
        opening: sign of the angle of the open door.
        open_at: rad at which to let go.
        height: of the grip above the handle's middle.
        depth: how far before the handle's axis the hand stops.
        yaw: of the closed door, rad.
        turn: share of the door's angle by which the hand turns along.
        pitch: of the hand.
    """
    pivot = data.body(hinge).xpos.copy()
    arm = data.site(site).xpos - pivot
    begin = angle(data)

    def at(door: float, before: float) -> Pose:
        """Give the hand's pose at the handle when the door is at that angle."""
        by = door - begin
        cos, sin = np.cos(by), np.sin(by)
        facing = yaw + door
        return _pose(
            pivot[0] + cos * arm[0] - sin * arm[1] + before * np.sin(facing),
            pivot[1] + sin * arm[0] + cos * arm[1] - before * np.cos(facing),
            pivot[2] + arm[2] + height,
            yaw + turn * door,
            pitch,
        )

    # The handle is followed where it is, not where it should be: so a grip that slips holds.
    lead = Move(
        lambda now: at(angle(now) + opening * AHEAD, depth),
        0.5,
        near=0.0,
        steps=90,
        gain=5.0,
        done=lambda now: opening * angle(now) > open_at,
        calm=STEADY,
    )
    end = opening * (open_at + 0.1)
    return [
        Move(at(begin, 0.18), TRAVEL, near=0.06, opening=OPEN),
        Move(at(begin, 0.10), 0.6, near=0.03, opening=OPEN),
        Move(at(begin, depth), 0.4, near=0.014, opening=OPEN, calm=STEADY),
        Move(at(begin, depth), 0.2, near=0.0, steps=5, calm=STEADY),
        lead,
        Move(at(end, 0.05), 0.2, near=0.0, steps=3, opening=OPEN, calm=STEADY),
        Move(at(end, 0.2), 0.6, near=0.06, opening=OPEN),
    ]


def _kettle(data: Any) -> list[Move]:
    """Push it from behind, low so that it does not tip."""
    x, y, _ = data.joint("kettle").qpos[:3]
    return [
        Move(_pose(x, 0.08, 1.92, pitch=-0.6), TRAVEL, near=0.06),
        Move(_pose(x, y - 0.2, 1.73, pitch=-1.1), 0.5, near=0.03),
        Move(_pose(x + 0.02, y - 0.02, 1.72, pitch=-1.1), 0.35, near=0.03),
        Move(
            _pose(x + 0.03, y + 0.23, 1.72, pitch=-1.0),
            0.35,
            near=0.03,
            steps=30,
            done=lambda now: now.joint("kettle").qpos[1] > 0.6,
        ),
        Move(_pose(x, 0.35, 1.95, pitch=-0.6), TRAVEL, near=0.1),
    ]


def _slide_cabinet(data: Any) -> list[Move]:
    """Push its handle to the right."""
    x, y, z = data.site("slide_site").xpos
    opened = _joint("slide_cabinet")
    return [
        Move(_pose(x - 0.1, y - 0.15, z), TRAVEL, near=0.06),
        Move(_pose(x - 0.07, y - 0.02, z), 0.5, near=0.02),
        Move(
            _pose(x + 0.36, y - 0.03, z),
            0.5,
            near=0.03,
            done=lambda now: opened(now) > 0.36,
        ),
        Move(_pose(x + 0.3, y - 0.17, z), TRAVEL, near=0.06),
    ]


def _light_switch(data: Any) -> list[Move]:
    """Push its lever to the left."""
    x, y, z = data.site("light_site").xpos
    lever = _joint("light_switch")
    return [
        Move(_pose(x + 0.1, y - 0.17, z), TRAVEL, near=0.06),
        Move(_pose(x + 0.075, y - 0.08, z), 0.5, near=0.02),
        Move(_pose(x + 0.06, y - 0.015, z), 0.4, near=0.02),
        Move(_pose(x - 0.1, y - 0.015, z), 0.35, near=0.02, done=lambda now: lever(now) < -0.6),
        Move(_pose(x - 0.05, y - 0.15, z), TRAVEL, near=0.06),
    ]


def _burner(site: str, joint: str, above: float) -> Callable[[Any], list[Move]]:
    """Push a knob's upper end to the right, `above` its axis."""

    def moves(data: Any) -> list[Move]:
        x, y, z = data.site(site).xpos + (0.0, -0.04, above)
        knob = _joint(joint)
        return [
            Move(_pose(x - 0.08, y - 0.15, z, yaw=SIDEWAYS), TRAVEL, near=0.06),
            Move(_pose(x - 0.065, y - 0.06, z, yaw=SIDEWAYS), 0.6, near=0.02),
            Move(_pose(x - 0.055, y, z, yaw=SIDEWAYS), 0.4, near=0.014, calm=STEADY),
            # The knob is stiff: the goal lies far beyond it, so that the hand pushes hard.
            Move(
                _pose(x + 0.2, y, z, yaw=SIDEWAYS),
                0.8,
                near=0.01,
                gain=14.0,
                stiff=True,
                calm=STEADY,
                done=lambda now: knob(now) < -0.8,
            ),
            Move(_pose(x, y - 0.12, z), 0.6, near=0.06),
        ]

    return moves


_UNDER_HOOD = (-1.2, -1.18, 1.37, -2.31, -0.1, 1.97, 1.27)
SKILLS = {
    "microwave": Skill(_microwave, (-1.02, -1.48, 1.96, -1.84, -0.48, 1.57, 2.07)),
    "kettle": Skill(_kettle, (-0.41, -1.32, 2.46, -2.53, 2.18, 1.06, 0.12)),
    "bottom burner": Skill(_burner("knob2_site", "knob_Joint_2", 0.038), _UNDER_HOOD),
    "top burner": Skill(_burner("knob4_site", "knob_Joint_4", 0.036), _UNDER_HOOD),
    "light switch": Skill(_light_switch, _UNDER_HOOD),
    "slide cabinet": Skill(_slide_cabinet, (-0.74, -0.5, 0.79, -1.93, 0.04, 1.57, 0.32)),
    "hinge cabinet": Skill(_hinge_cabinet, (-1.42, -0.9, 1.42, -1.09, 0.11, 0.98, 0.8)),
}
