"""Measures of samples (`metrics`), of flows and of their errors, and figures (with matplotlib)."""

from fmft_fast.analysis.bounds import ErrorBound, ExactPath, error_bound, exact_path
from fmft_fast.analysis.curvature import Slopes, Stiffness, path_ratio, slopes, stiffness

__all__ = [
    "ErrorBound",
    "ExactPath",
    "Slopes",
    "Stiffness",
    "error_bound",
    "exact_path",
    "path_ratio",
    "slopes",
    "stiffness",
]
