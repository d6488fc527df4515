"""Velocity fields: modules with `forward(t, x, cond=None)`."""

from fmft_fast.fields.certificate import Certificate, Verification
from fmft_fast.fields.conditional_mlp import ConditionalMLP
from fmft_fast.fields.contraction import BRANCH_ACTIVATIONS
from fmft_fast.fields.gav import GAV
from fmft_fast.fields.mlp import ACTIVATIONS, MLP
from fmft_fast.fields.residual import Residual
from fmft_fast.fields.second_order import Augmented, SecondOrderGAV
from fmft_fast.fields.transformer import ActionTransformer
from fmft_fast.fields.unet1d import ConditionalUnet1d

__all__ = [
    "ACTIVATIONS",
    "BRANCH_ACTIVATIONS",
    "GAV",
    "MLP",
    "ActionTransformer",
    "Augmented",
    "Certificate",
    "ConditionalMLP",
    "ConditionalUnet1d",
    "Residual",
    "SecondOrderGAV",
    "Verification",
]
