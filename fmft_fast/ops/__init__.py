"""The fused step ops: `choose_kernels` is the one place that picks a backend."""

from fmft_fast.ops.backend import BackendStatus, backend_report, choose_kernels
from fmft_fast.ops.contract import REFERENCE, StepKernels

__all__ = ["REFERENCE", "BackendStatus", "StepKernels", "backend_report", "choose_kernels"]
