"""Simulators, roll-outs of policies in them, and what is made of the results."""

from fmft_fast.envs import pusht
from fmft_fast.envs.base import ENVIRONMENTS, Environment, make_environment, register

__all__ = ["ENVIRONMENTS", "Environment", "make_environment", "pusht", "register"]
