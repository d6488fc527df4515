"""Fast, exact fine-tuning of flow-matching models through their ODE solve."""

from .solvers import (
    METHODS,
    DenseSolution,
    Solution,
    SolveStats,
    cuda_graphs,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
    patch_torchdiffeq,
    patched_torchdiffeq,
    record_stats,
    solve,
    stage_time_table,
    unpatch_torchdiffeq,
)
from .version import __version__

__all__ = [
    "__version__",
    "METHODS",
    "DenseSolution",
    "Solution",
    "SolveStats",
    "cuda_graphs",
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
