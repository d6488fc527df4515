"""Simulators, roll-outs of policies in them, and what is made of the results."""

from fmft_fast.envs import kitchen, pusht, robomimic
from fmft_fast.envs.base import ENVIRONMENTS, Environment, make_environment, register
from fmft_fast.envs.evaluate import evaluate_policy
from fmft_fast.envs.noise import ObservationNoise
from fmft_fast.envs.rollout import Episode, roll_out
from fmft_fast.envs.scores import Interval, paired_difference, summarise
from fmft_fast.envs.video import contact_sheet, write_gif, write_video

__all__ = [
    "ENVIRONMENTS",
    "Environment",
    "Episode",
    "Interval",
    "ObservationNoise",
    "contact_sheet",
    "evaluate_policy",
    "kitchen",
    "make_environment",
    "paired_difference",
    "pusht",
    "register",
    "robomimic",
    "roll_out",
    "summarise",
    "write_gif",
    "write_video",
]
