"""Velocity fields: modules with `forward(t, x, cond=None)`."""

from fmft_fast.fields.certificate import Certificate, Verification
from fmft_fast.fields.contraction import BRANCH_ACTIVATIONS
from fmft_fast.fields.gav import GAV
from fmft_fast.fields.mlp import ACTIVATIONS, MLP
from fmft_fast.fields.residual import Residual
from fmft_fast.fields.second_order import Augmented, SecondOrderGAV

__all__ = [
    "ACTIVATIONS",
    "BRANCH_ACTIVATIONS",
    "GAV",
    "MLP",
    "Augmented",
    "Certificate",
    "Residual",
    "SecondOrderGAV",
    "Verification",
]
