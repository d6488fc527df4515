"""No two threads of the CUDA kernels write and read one number without a barrier in between.

The trajectory kernels run on the host, where host_cuda/watch.h tells ThreadSanitizer what their
barriers order.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_sets import with_binding
from networks import chain, make_inputs, make_program

from fmft_fast.ops import cuda_adaptive
from fmft_fast.ops.network import Network
from fmft_fast.ops.trajectory import Control, flatten, rebuild
from fmft_fast.solvers.methods import METHODS

OPTIONS = "exitcode=0 ignore_noninstrumented_modules=1"
REPORT = "WARNING: ThreadSanitizer: data race"
FIELDS = {
    "condition": lambda: (*chain(3, (20,), "gelu", cond=True), 40),
    "tables, skips": lambda: (*chain(3, (32, 32), "tanh", time="tables", skips=True), 17),
}


def sanitizer() -> str:
    """The library that has to be loaded before all others."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the CUDA source for the host")
    command = [compiler, "-print-file-name=libtsan.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip("needs libtsan of g++")
    return path


def run(*arguments: str) -> str:
    """What a process says that runs this file with ThreadSanitizer."""
    environment = {"LD_PRELOAD": sanitizer(), "TSAN_OPTIONS": OPTIONS}
    found = subprocess.run(
        [sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | environment,
        timeout=900,
    )
    said = found.stdout
    if "FATAL: ThreadSanitizer" in said:
        pytest.skip(f"ThreadSanitizer does not run here: {said[-300:]}")
    assert found.returncode == 0 and "all solved" in said, said[-3000:]
    return said


@pytest.mark.slow
def test_there_are_no_races() -> None:
    quiet, _, deaf = run(*FIELDS).partition("deaf to barriers")
    assert REPORT not in quiet, quiet[:5000]
    assert REPORT in deaf


def solve(kernels, network: Network, shapes, batch: int) -> None:
    """Every kernel once, those with step control with pauses."""
    program = make_program(network, "midpoint", 2, None, uneven=True)
    inputs = make_inputs(network, shapes, batch, program.times.numel())
    inputs = rebuild(inputs, [x.float() for x in flatten(inputs)])
    every = rebuild(inputs, [True] * len(flatten(inputs)))
    out, kept = kernels.forward(program, inputs, "inputs")
    kernels.backward(program, inputs, kept, out, every)
    if inputs.tables:
        return
    inputs = replace(inputs, y0=torch.linspace(0.1, 3, batch)[:, None] * inputs.y0)
    given = network, METHODS["bosh3"].tableau, Control(rtol=1e-2, atol=1e-2), inputs
    shared = kernels.adaptive(*given, [0.0, 0.3, 1.0], "inputs")
    kernels.backward(shared.program, inputs, shared.kept, shared.out, every)
    own = kernels.adaptive_per_sample(*given, 0.0, 1.0, "inputs")
    kernels.backward_per_sample(own.kept, own.y, every)


if __name__ == "__main__":
    del os.environ["LD_PRELOAD"]  # the compiler does without
    watched = with_binding("trajectory_cuda", "-fsanitize=thread", "-g1").KERNELS
    cuda_adaptive.FEWEST, cuda_adaptive.MOST = 2, 2
    for name in sys.argv[1:]:
        solve(watched, *FIELDS[name]())
    # Races would be seen.
    print("deaf to barriers", flush=True)
    os.environ["FMFT_HOST_DEAF"] = "1"
    solve(watched, *FIELDS["condition"]())
    print("all solved")
