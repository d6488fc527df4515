"""What tests of Triton's kernels need: its interpreter, and cubins without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from kernel_sets import INTERPRETED


def interpret_numbers(file: str) -> None:
    """Run the class TestNumbers of a file in a process that interprets, see `kernel_sets`."""
    if INTERPRETED:
        pytest.skip("this is the process that interprets")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    result = subprocess.run(
        [*command, "-k", "TestNumbers"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def compile_ahead(
    kernel: Any,
    fixed: Mapping[str, Any],
    types: Mapping[str, str],
    capability: int,
    options: Mapping[str, Any],
) -> Any:
    """A kernel compiled for a GPU; arguments without a value or type point to float32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    given = {**types, **dict.fromkeys(fixed, "constexpr")}
    signature = {name: given.get(name, "*fp32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*")
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def local_memory(cubin: bytes) -> int:
    """The bytes of stack of the kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip(f"needs {tool}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])
