"""kitchen: Franka Kitchen, where an arm opens, turns and moves things, from demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmft_fast.data import Episodes
from fmft_fast.errors import InputError
from fmft_fast.tasks.base import register
from fmft_fast.tasks.robot import RobotOptions, RobotTask

# What the readers call observations and actions, in the order in which they are looked for:
# scripted demonstrations, Minari (nested and flat, also D4RL), relay-policy-learning.
OBSERVATIONS = ("obs", "observations/observation", "observations", "observations_seq")
ACTIONS = ("action", "actions", "actions_seq")


class KitchenTask(RobotTask):
    """FrankaKitchen-v1 of gymnasium-robotics: 59 numbers seen, 9 joint velocities acted.

    `p1` to `p4` are the shares of episodes in which at least so many things were done, `tasks` is
    their mean number. Demonstrations in other conventions (those of Diffusion Policy have 60
    numbers and absolute actions) train, but their policies do not fit this simulator.
    """

    name = "kitchen"
    summary = "an arm opens, turns and moves things; needs --data and gymnasium-robotics"
    measure = "tasks"

    def columns(self, episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
        """Give observations and actions under whichever names the format has for them."""
        return _first(episodes, OBSERVATIONS), _first(episodes, ACTIONS)


def _first(episodes: Episodes, names: Sequence[str]) -> np.ndarray:
    """Give the first of these arrays that is there."""
    for name in names:
        if name in episodes.arrays:
            return episodes.columns(name)
    raise InputError(
        f"data: expected demonstrations of kitchen, with an array {' or '.join(names)}, got "
        f"{', '.join(episodes.arrays)}; see `fmft demonstrate kitchen`"
    )


TASK = register(KitchenTask(RobotOptions(n_action=2, horizon=8)))
