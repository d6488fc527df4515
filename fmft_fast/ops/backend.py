"""The only place that picks a backend, and the report of why each is or is not available."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fmft_fast.errors import InputError, MissingBackendError
from fmft_fast.ops import library
from fmft_fast.ops.contract import REFERENCE, StepKernels, fuse, is_traced

BACKENDS = ("reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here; `reason` says why, `cure` what to do if it cannot."""

    name: str
    available: bool
    reason: str
    cure: str = ""


def choose_kernels(state: Tensor, backend: str = "auto") -> StepKernels:
    """Return the step ops for a solve whose state looks like `state` [*state].

    "auto" takes the compiled CUDA kernels, then Triton, for a state on a GPU, the compiled CPU kernels
    for float32 and float64 on the CPU, and the plain torch reference for all else, for a trace, and for
    states too small to gain.

    Raises:
        InputError: if `backend` is no backend's name.
        MissingBackendError: if `backend` is named and cannot run this state here.
    """
    if backend == "reference" or (backend == "auto" and is_traced()):
        return REFERENCE
    if backend == "auto":
        return REFERENCE
    if backend not in BACKENDS:
        raise InputError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    raise MissingBackendError(f"the {backend} backend cannot run here")


def backend_report() -> list[BackendStatus]:
    """Return the status of every backend, the reference first."""
    return [BackendStatus("reference", True, "plain torch")]


library.register(choose_kernels)
