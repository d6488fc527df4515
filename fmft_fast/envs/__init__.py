"""Simulators, roll-outs of policies in them, and what is made of the results."""

from fmft_fast.envs import pusht
from fmft_fast.envs.base import ENVIRONMENTS, Environment, make_environment, register
from fmft_fast.envs.evaluate import evaluate_policy
from fmft_fast.envs.rollout import Episode, roll_out

__all__ = [
    "ENVIRONMENTS",
    "Environment",
    "Episode",
    "evaluate_policy",
    "make_environment",
    "pusht",
    "register",
    "roll_out",
]
