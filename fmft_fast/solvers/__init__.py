"""Solvers of initial value problems and their gradients."""

from .alias import patch_torchdiffeq, patched_torchdiffeq, unpatch_torchdiffeq
from .continuous_adjoint import odeint_adjoint
from .dense import DenseSolution
from .drop_in import odeint, odeint_dense, odeint_event
from .exact import solve, stage_time_table
from .explanation import Explanation, explain
from .inputs import Perturb
from .methods import METHODS, Method, find_method
from .recorder import cuda_graphs
from .solution import Solution
from .stats import SolveStats, record_stats
from .tableau import Tableau
from .whole_solve import fused

__all__ = [
    "METHODS",
    "DenseSolution",
    "Explanation",
    "Method",
    "Perturb",
    "Solution",
    "SolveStats",
    "Tableau",
    "cuda_graphs",
    "explain",
    "find_method",
    "fused",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "patch_torchdiffeq",
    "patched_torchdiffeq",
    "record_stats",
    "solve",
    "stage_time_table",
    "unpatch_torchdiffeq",
]
