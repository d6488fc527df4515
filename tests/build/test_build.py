"""What the build promises: no instruction set leaks, a failing CUDA build is no failing install."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "setup.py", "pyproject.toml", "LICENSE", "README.md", "fmft_fast", "kernels")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has several instruction sets")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_only_dispatched_functions_use_wide_registers() -> None:
    """A baseline processor never meets an AVX instruction, whatever machine built the module."""
    module = pytest.importorskip("fmft_fast._cpu", exc_type=ImportError)
    listing = subprocess.run(
        ["objdump", "-d", "--demangle", "--no-show-raw-insn", str(module.__file__)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wide = {"ymm": set(), "zmm": set()}
    function = ""
    for line in listing.splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = heading[1]
        for register in wide:
            if f"%{register}" in line:
                wide[register].add(function)
    assert wide["ymm"] and wide["zmm"], "the wide variants are missing"
    assert [f for f in wide["ymm"] if "::avx2::" not in f and "::avx512::" not in f] == []
    assert [f for f in wide["zmm"] if "::avx512::" not in f] == []


def test_the_best_instruction_set_is_in_use() -> None:
    module = pytest.importorskip("fmft_fast._cpu", exc_type=ImportError)
    assert module.instruction_set() == module.instruction_sets()[0]
    assert module.instruction_sets()[-1] == "portable"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, tmp_path / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, tmp_path / name)
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run build_ext in the checkout."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_failing_nvcc_fails_the_build_only_on_demand(checkout: Path) -> None:
    for needed in ("setuptools", "pybind11"):
        pytest.importorskip(needed)
    nvcc = checkout / "nvcc"
    nvcc.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    nvcc.chmod(0o755)
    built = build(checkout, NVCC=str(nvcc), FMFT_CUDA="auto")
    assert built.returncode == 0, built.stderr
    assert "built without its CUDA kernels" in built.stderr
    assert list(checkout.glob("out/fmft_fast/_cpu*.so"))
    assert not list(checkout.glob("out/fmft_fast/_cuda*.so"))
    built = build(checkout, NVCC=str(nvcc), FMFT_CUDA="1")
    assert built.returncode != 0
    assert "error: compilation failed" in built.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FMFT_CUDA": "yes"}, "FMFT_CUDA must be auto, 1 or 0, got 'yes'"),
        ({"FMFT_CUDA": "1", "FMFT_CUDA_ARCHS": "hopper"}, "FMFT_CUDA_ARCHS must look like '80;90'"),
    ],
)
def test_a_wrong_setting_is_named(checkout: Path, environment, message) -> None:
    for needed in ("setuptools", "pybind11"):
        pytest.importorskip(needed)
    setup = checkout / "setup.py"
    setup.write_text(setup.read_text().replace('names = ["fmft_fast._cpu"]', "names = []"))
    built = build(checkout, NVCC="/bin/true", **environment)
    assert built.returncode != 0
    assert message in built.stderr


def test_the_version_is_that_of_the_installed_package() -> None:
    package = importlib.import_module("fmft_fast")
    assert re.fullmatch(r"\d+\.\d+\.\d+", package.__version__)
    assert package.__version__ in (ROOT / "fmft_fast/version.py").read_text()
