"""Flow matching: paths, couplings, losses and sampling.

Vocabulary: noise x0 at t = 0, data x1 at t = 1, a point x_t between them and its velocity u_t.
"""

from fmft_fast.flow.couplings import COUPLINGS, Coupling, Pairs, make_coupling
from fmft_fast.flow.losses import flow_matching_loss, reconstruction_loss
from fmft_fast.flow.mixture import GaussianMixture
from fmft_fast.flow.paths import CondOTPath, LinearPath, Path, PathSample
from fmft_fast.flow.sampling import integrate, sample

__all__ = [
    "COUPLINGS",
    "CondOTPath",
    "Coupling",
    "GaussianMixture",
    "LinearPath",
    "Pairs",
    "Path",
    "PathSample",
    "flow_matching_loss",
    "integrate",
    "make_coupling",
    "reconstruction_loss",
    "sample",
]
