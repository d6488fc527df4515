"""robomimic: manipulation from robomimic's low-dimensional demonstrations (HDF5)."""

from __future__ import annotations

import numpy as np

from fmft_fast.data import Episodes
from fmft_fast.tasks.base import register
from fmft_fast.tasks.robot import RobotTask

OBSERVATIONS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


class RobomimicTask(RobotTask):
    """A data set of robomimic, low_dim_*.hdf5, of any of its one-armed tasks.

    `success` is the share of episodes that reach the goal. Roll-outs need robosuite and robomimic;
    without them models are measured by their actions on held-out demonstrations.

    Source: Mandlekar et al. 2021, What Matters in Learning from Offline Human Demonstrations for
    Robot Manipulation (arXiv 2108.03298).
    """

    name = "robomimic"
    summary = "robomimic's low-dimensional demonstrations; needs --data, to roll out also robosuite"
    measure = "success"
    arrays = (*(f"obs/{name}" for name in OBSERVATIONS), "actions")

    def simulator(self) -> str:
        """Name the simulator that the file of demonstrations describes."""
        path = self.data()
        return self.name if path is None else f"{self.name}:{path}"

    def columns(self, episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
        """Give object, hand and gripper states side by side, and the actions."""
        seen = (f"obs/{name}" for name in OBSERVATIONS)
        return episodes.columns(*seen), episodes.columns("actions")


TASK = register(RobomimicTask())
