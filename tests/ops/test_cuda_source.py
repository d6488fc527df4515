"""The CUDA kernels compile for every generation, keep to registers, and import without a GPU."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_sets import ROOT

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
# One kernel of 256 threads: at 96 registers two blocks share a multiprocessor.
MAX_REGISTERS = {"combine": 64, "finish": 64, "dense": 96}


@pytest.mark.skipif(NVCC is None, reason="needs nvcc of the CUDA toolkit")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("source", sorted(MAX_REGISTERS))
def test_kernels_neither_spill_nor_use_many_registers(source, capability, tmp_path: Path) -> None:
    command = [str(NVCC), "-std=c++20", "-O3", f"-arch=sm_{capability}", "-Xptxas", "-v", "-cubin"]
    file = ROOT / f"csrc/cuda/{source}.cu"
    report = subprocess.run(
        [*command, str(file), "-o", str(tmp_path / "out.cubin")],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(frames) == len(registers) >= 8, report[-2000:]
    assert set(frames) == {("0", "0", "0")}
    assert max(registers) <= MAX_REGISTERS[source]


def test_the_module_imports_without_a_gpu_and_its_failure_is_clear() -> None:
    module = pytest.importorskip("fmft_fast._cuda", exc_type=ImportError)
    assert all(arch.rstrip("af").isdigit() for arch in module.architectures())
    assert module.runtime_version() >= 12000
    if torch.cuda.is_available():
        assert module.device_count() == torch.cuda.device_count()
        return
    assert module.device_count() == 0
    with pytest.raises(RuntimeError, match="CUDA"):
        module.rk_combine(16, 16, [16], 0.1, 0, 1, [1.0], 4, 0, 0, 0, 0)


def test_bindings_refuse_what_a_kernel_cannot_take() -> None:
    module = pytest.importorskip("fmft_fast._cpu")
    with pytest.raises(ValueError, match="one weight per stage"):
        module.rk_combine(0, 0, [0], 0.1, [1.0, 2.0], 0, 0, 0, 1)
    with pytest.raises(ValueError, match="at most 16 stages"):
        module.rk_combine(0, 0, [0] * 17, 0.1, [1.0] * 17, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="number type"):
        module.rk_combine(0, 0, [0], 0.1, [1.0], 0, 9, 0, 1)
    with pytest.raises(ValueError, match="float32 or float64"):
        module.rk_combine(0, 0, [0], 0.1, [1.0], 0, 2, 2, 1)
    with pytest.raises(ValueError, match="instruction set"):
        importlib.import_module("fmft_fast._cpu").use_instruction_set("mmx")
