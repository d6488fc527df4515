"""Every set of raw step kernels that can run here, by name, and the data to try them on."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fmft_fast.ops.contract import StepKernels

ROOT = Path(__file__).resolve().parents[2]
# Triton decides when it is imported whether it interprets, so that its interpreter needs a process
# of its own: test_triton.py starts one.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = (
    ("triton-interpreter",)
    if INTERPRETED
    else (
        "cpu-portable",
        "cpu-avx2",
        "cpu-avx512",
        "cuda-on-host",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    )
)


@dataclass(frozen=True)
class KernelSet:
    """Raw kernels and the device they run on."""

    kernels: StepKernels
    device: str


@contextmanager
def kernel_set(name: str) -> Iterator[KernelSet]:
    """Yield the kernels called `name`; skip, saying why, where they cannot run."""
    if name.startswith("cpu-"):
        cpu = pytest.importorskip("fmft_fast.ops.cpu", exc_type=ImportError)
        with instruction_set(name.removeprefix("cpu-")):
            yield KernelSet(cpu.KERNELS, "cpu")
    elif name == "cuda-on-host":
        yield KernelSet(with_binding("cuda").KERNELS, "cpu")
    elif name == "triton-interpreter":
        pytest.importorskip("triton")
        yield KernelSet(load("interpreted", ROOT / "kernels/triton/step.py").KERNELS, "cpu")
    else:
        module = "fmft_fast.ops.cuda" if name == "cuda" else "fmft_fast.kernels.step"
        yield KernelSet(pytest.importorskip(module, exc_type=ImportError).KERNELS, "cuda")


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Use one instruction set of the CPU module for a while."""
    module = importlib.import_module("fmft_fast._cpu")
    if name not in module.instruction_sets():
        pytest.skip(f"this processor has {module.instruction_sets()}, not {name}")
    before = module.instruction_set()
    module.use_instruction_set(name)
    try:
        yield
    finally:
        module.use_instruction_set(before)


@functools.cache
def cuda_on_host(*more_flags: str) -> ModuleType:
    """Return the CUDA kernels and launchers, compiled by g++ against host_cuda/cuda_runtime.h."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the CUDA source for the host")
    pybind11 = pytest.importorskip("pybind11")
    folder = Path(tempfile.mkdtemp(prefix="fmft-cuda-on-host-"))
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [ROOT / "csrc/bindings/cuda.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", "-DFMFT_CUDA_ARCHS=0"]
    flags += [f"-I{ROOT / 'tests/ops/host_cuda'}", f"-I{pybind11.get_include()}"]
    flags += [f"-I{sysconfig.get_path('include')}", *more_flags]
    objects = [str(folder / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, to: str) -> None:
        command = [compiler, *flags, "-c", "-x", "c++", str(source), "-o", to]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    subprocess.run([compiler, "-shared", *more_flags, *objects, "-o", str(library)], check=True)
    binding = load("_cuda", library)
    shutil.rmtree(folder)
    return binding


def with_binding(name: str, *more_flags: str) -> ModuleType:
    """Return a copy of the module fmft_fast.ops.`name` that runs `cuda_on_host` on CPU tensors."""
    import fmft_fast

    real = fmft_fast.__dict__.get("_cuda")
    fmft_fast._cuda = cuda_on_host(*more_flags)
    try:
        module = load(f"{name}_on_host", ROOT / f"fmft_fast/ops/{name}.py")
    finally:
        if real is None:
            del fmft_fast._cuda
        else:
            fmft_fast._cuda = real
    module._queue = lambda y: (0, 0)
    module._device = lambda: 0
    return module


def load(name: str, path: Path) -> ModuleType:
    """Import the file `path` as a module of its own, beside any other copy."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Compiled kernels have an instance for each of 1 to 7 stages and one for more; some weights are 0.
WEIGHTS = {
    n: tuple(0.0 if i == 2 else (-1.0) ** i / (i + 1.5) for i in range(n))
    for n in ((2, 7) if INTERPRETED else (2, 3, 7, 8, 13))
}


def stages(
    shape: tuple[int, ...], count: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, list[Tensor]]:
    """Return a state in float32, or in float64 if `dtype` is, and stages in `dtype`."""
    y_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.randn(shape, dtype=y_dtype, device=device)
    return y, [torch.randn(shape, dtype=y_dtype, device=device).to(dtype) for _ in range(count)]


def exact(values: list[Tensor]) -> list[Tensor]:
    """Return float64 copies."""
    return [value.double() for value in values]


def assert_as_good_as_torch(found: Tensor, reference: Tensor, truth: Tensor) -> None:
    """Assert an error against float64 of at most twice torch's own plus a few roundings."""
    scale = max(1.0, truth.abs().max().item())
    roundings = 1e-14 if found.dtype == torch.float64 else 1e-6
    allowed = 2 * (reference.double() - truth).abs().max() + roundings * scale
    error = (found.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
