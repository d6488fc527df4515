"""pusht: push a T-shaped block onto its outline, from 206 human demonstrations."""

from __future__ import annotations

import numpy as np

from fmft_fast.data import Episodes
from fmft_fast.tasks.base import register
from fmft_fast.tasks.robot import RobotTask


class PushTTask(RobotTask):
    """Diffusion Policy's Push-T from states: 20 numbers seen, 2 pixels of a target acted.

    `score` is the mean over starts of the largest min(coverage / 0.95, 1) of an episode, `success`
    the share of episodes that exceed a coverage of 0.95.

    Source: Chi et al. 2023, Diffusion Policy (arXiv 2303.04137), whose demonstrations these are.
    """

    name = "pusht"
    summary = "push a T onto its outline, from human demonstrations; needs --data and gym-pusht"
    measure = "score"
    arrays = ("state", "keypoint", "action")

    def columns(self, episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
        """Give the keypoints of the block and the finger's place, and the actions, pixels."""
        seen = np.concatenate(
            [episodes.columns("keypoint"), episodes.columns("state")[:, :2]], axis=1
        )
        return seen, episodes.columns("action")


TASK = register(PushTTask())
