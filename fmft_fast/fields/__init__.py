"""Velocity fields: modules with `forward(t, x, cond=None)`."""

from fmft_fast.fields.mlp import ACTIVATIONS, MLP

__all__ = ["ACTIVATIONS", "MLP"]
