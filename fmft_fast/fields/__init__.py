"""Velocity fields: modules with `forward(t, x, cond=None)`."""

from fmft_fast.fields.contraction import BRANCH_ACTIVATIONS
from fmft_fast.fields.gav import GAV
from fmft_fast.fields.mlp import ACTIVATIONS, MLP
from fmft_fast.fields.residual import Residual

__all__ = ["ACTIVATIONS", "BRANCH_ACTIVATIONS", "GAV", "MLP", "Residual"]
