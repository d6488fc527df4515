"""The Triton kernels with no GPU: the interpreter's numbers, and cubins for two GPU generations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_sets import ROOT, load

triton = pytest.importorskip("triton")
FLOATS = ("fp32",) * 3
STAGES = 7


def test_numbers_in_the_interpreter() -> None:
    """All of test_kernels.py passes on the Triton kernels in a process that interprets them."""
    tests = Path(__file__).with_name("test_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    result = subprocess.run(
        [*command, "-k", "triton"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def kernel_sources(dtype: str, k_dtype: str, on_device: bool):
    """Yield every kernel with the signature of a 7-stage method and the values of its constants."""
    step = load("triton_step", ROOT / "kernels/triton/step.py")
    fixed = {"STAGES": STAGES, "ON_DEVICE": on_device, "BLOCK": step.BLOCK}
    given = {"out": f"*{dtype}", "y": f"*{dtype}", "k": (f"*{k_dtype}",) * STAGES, "size": "i32"}
    given["h"] = "*fp64" if on_device else f"*{dtype}"
    weights, partials = FLOATS * STAGES, {"partials": "*fp64"}
    yield step._combine_kernel, given | {"w": weights}, fixed
    tolerances = {"b": weights, "b_err": weights, "tolerances": FLOATS * 2}
    yield step._finish_kernel, given | partials | tolerances, fixed
    ratio = {"ratio": f"*{dtype}", "blocks": "i32", "size": "i32"}
    yield step._ratio_kernel, ratio | partials, {"BLOCK": step.MAX_BLOCKS}
    dense = {"p": FLOATS * STAGES * 4, "theta": "*fp64"}
    yield step._dense_kernel, given | dense, fixed | {"DEGREE": 4}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "k_dtype", "on_device"),
    [("fp32", "fp32", False), ("fp64", "fp64", True), ("fp32", "bf16", True)],
)
def test_kernels_compile_ahead_of_time(capability, dtype, k_dtype, on_device) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, given, fixed in kernel_sources(dtype, k_dtype, on_device):
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={name: given.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in fixed.items()},
        )
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": True},
        )
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 0
