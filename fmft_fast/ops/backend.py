"""The only place that picks a backend, and the report of why each is or is not available."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fmft_fast.errors import InputError, MissingBackendError
from fmft_fast.ops import library
from fmft_fast.ops.contract import FUSED_DTYPES, REFERENCE, StepKernels, fuse, is_traced
from fmft_fast.ops.network import Network
from fmft_fast.ops.trajectory import TrajectoryKernels

DEVICE_OF = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# Layer by layer, by torch's matrix products: for fields too wide for the others, on any device.
LAYERED = "layered"
REBUILD = "reinstall from source with a C++17 compiler: pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here; `reason` says why, `cure` what to do if it cannot."""

    name: str
    available: bool
    reason: str
    cure: str = ""


def choose_kernels(state: Tensor, backend: str = "auto") -> StepKernels:
    """Return the step ops for a solve whose state looks like `state` [*state].

    "auto" takes the compiled kernels of the state's device, on a GPU else those of Triton; while
    torch traces, and for a state in neither float32 nor float64, the plain torch reference.

    Args:
        state: a tensor of the shape, dtype and device of the state.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        InputError: if `backend` is no backend's name.
        MissingBackendError: if `backend` is named and cannot run this state here.
    """
    if backend == "reference":
        return REFERENCE
    if backend == "auto":
        if is_traced() or state.dtype not in FUSED_DTYPES:
            return REFERENCE
        for name in ORDER.get(state.device.type, ()):
            if _status(name).available:
                return _kernels(name)
        return REFERENCE
    if backend not in DEVICE_OF:
        names = ("auto", "reference", *DEVICE_OF)
        raise InputError(f"backend must be one of {names}, got {backend!r}")
    _check(state, backend)
    return _kernels(backend)


def choose_trajectory(
    network: Network, stages: int, batch: int, state: Tensor, backend: str = "auto"
) -> TrajectoryKernels | str:
    """Return the kernels for a whole solve, or why no backend takes it.

    Args:
        network: the field.
        stages: of one step of the method.
        batch: rows of the state.
        state: a tensor of the dtype and device of the state.
        backend: as in `choose_kernels`.

    Raises:
        InputError, MissingBackendError: as `choose_kernels`.
    """
    if backend == "reference":
        return "the backend reference takes single steps in plain torch"
    if backend == "auto":
        names = ORDER.get(state.device.type, ())
    else:
        names = (choose_kernels(state, backend).name,)
    reasons = []
    for name in (*names, LAYERED):
        if name != LAYERED and not _status(name).available:
            continue
        found = _trajectory(name)
        reason = found.refuses(network, stages, batch, state.dtype)
        if reason is None:
            return found
        reasons.append(f"{name}: {reason}")
    return "; ".join(reasons)


def backend_report() -> list[BackendStatus]:
    """Return the status of every backend, in the order reference, cpu, triton, cuda."""
    return [
        BackendStatus("reference", True, "plain torch runs everywhere"),
        *(_status(name) for name in DEVICE_OF),
    ]


def _check(state: Tensor, backend: str) -> None:
    status = _status(backend)
    if not status.available:
        raise MissingBackendError(
            f"backend {backend!r} is not available: {status.reason}. Cure: {status.cure}."
        )
    if state.device.type != DEVICE_OF[backend]:
        raise MissingBackendError(
            f"backend {backend!r} expects a state on {DEVICE_OF[backend]}, got {state.device}; "
            f"move the state or use backend='auto'"
        )
    if state.dtype not in FUSED_DTYPES:
        raise MissingBackendError(
            f"backend {backend!r} expects a state in float32 or float64, got {state.dtype}; "
            "use backend='auto'"
        )


@functools.cache
def _kernels(name: str) -> StepKernels:
    module = "fmft_fast.kernels.step" if name == "triton" else f"fmft_fast.ops.{name}"
    return fuse(name, importlib.import_module(module).KERNELS)


@functools.cache
def _trajectory(name: str) -> TrajectoryKernels:
    triton = name == "triton"
    module = "fmft_fast.kernels.trajectory" if triton else f"fmft_fast.ops.trajectory_{name}"
    return importlib.import_module(module).KERNELS


@functools.cache
def _status(name: str) -> BackendStatus:
    if DEVICE_OF[name] == "cuda" and not torch.cuda.is_available():
        build = "for CUDA" if torch.version.cuda else "without CUDA"
        return BackendStatus(
            name,
            False,
            f"torch {torch.__version__}, built {build}, sees no CUDA device",
            "run on a machine with an NVIDIA GPU, its driver and a CUDA build of torch",
        )
    return {"cpu": _cpu_status, "triton": _triton_status, "cuda": _cuda_status}[name]()


def _cpu_status() -> BackendStatus:
    try:
        module = importlib.import_module("fmft_fast._cpu")
    except ImportError as error:
        return BackendStatus("cpu", False, f"fmft_fast._cpu does not import ({error})", REBUILD)
    return BackendStatus("cpu", True, f"compiled, uses {module.instruction_set()} instructions")


def _triton_status() -> BackendStatus:
    try:
        importlib.import_module("fmft_fast.kernels.step")
    except ImportError as error:
        return BackendStatus(
            "triton",
            False,
            f"the Triton kernels do not import ({error})",
            "pip install triton, and in a checkout pip install -e .",
        )
    version = importlib.import_module("triton").__version__
    return BackendStatus("triton", True, f"triton {version}")


def _cuda_status() -> BackendStatus:
    try:
        module = importlib.import_module("fmft_fast._cuda")
    except ImportError as error:
        return BackendStatus(
            "cuda",
            False,
            f"fmft_fast._cuda does not import ({error})",
            "install the CUDA toolkit (nvcc), then "
            "FMFT_CUDA=1 pip install --force-reinstall --no-deps .",
        )
    capability = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    device, built = "{}{}".format(*capability), module.architectures()
    if int(device) < min(int(arch.rstrip("af")) for arch in built):
        return BackendStatus(
            "cuda",
            False,
            f"compiled for compute capabilities {', '.join(built)}; the device has {device}",
            f"FMFT_CUDA=1 FMFT_CUDA_ARCHS={device} pip install --force-reinstall --no-deps .",
        )
    return BackendStatus("cuda", True, f"compiled for compute capabilities {', '.join(built)}")


library.register(choose_kernels)
