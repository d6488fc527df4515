"""On a GPU: the CUDA trajectory kernels are right, repeatable, capturable and free of races."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import chain, make_inputs, make_program, viscosity

from fmft_fast.errors import InputError
from fmft_fast.ops.network import ACTIVATIONS, Inputs
from fmft_fast.ops.trajectory import Program, Reference, flatten, rebuild

pytestmark = pytest.mark.gpu
REFERENCE = Reference()
ALLOWED = {"highest": 1e-6, "high": 1e-4, "medium": 2e-2}
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "/usr/local/cuda/bin/compute-sanitizer"
)


@pytest.fixture
def kernels():
    return pytest.importorskip("fmft_fast.ops.trajectory_cuda", exc_type=ImportError).KERNELS


@pytest.fixture(params=ALLOWED)
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def to(inputs: Inputs, *args) -> Inputs:
    return rebuild(inputs, [x.to(*args) for x in flatten(inputs)])


def solve(kernels, program: Program, inputs: Inputs):
    """Return the outputs and the gradients of a fixed random sum of them, in one list."""
    out, kept = kernels.forward(program, inputs, "inputs")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = rebuild(inputs, [True] * len(flatten(inputs)))
    return [out, *flatten(kernels.backward(program, inputs, kept, grad.to(out), wanted))]


def relative(found, truth) -> float:
    truth = truth.double()
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def make(network, shapes, method, batch, steps=4, outputs=None) -> tuple[Program, Inputs]:
    program = make_program(network, method, steps, outputs, uneven=True)
    inputs = make_inputs(network, shapes, batch, program.times.numel(), device="cuda")
    return program, to(inputs, torch.float32)


FIELDS = {
    "five layers": lambda: make(*chain(1, (33,) * 5, "tanh"), "euler", 1),
    "small": lambda: make(*chain(2, (64, 64, 64), "silu"), "euler", 4096, 16),
    "odd": lambda: make(*chain(3, (64, 40), "gelu", time="tables", cond=True), "rk4", 1023),
    "many": lambda: make(*chain(7, (32, 32), "silu"), "midpoint", 100_003),
    "skips": lambda: make(*chain(16, (16, 16, 16), "tanh", skips=True), "heun2", 63),
    "viscosity": lambda: make(*viscosity(32, 18), "midpoint", 15),
    "viscosity on an MLP": lambda: make(*viscosity(2, 48, 3, base=True), "rk4", 999),
    "weights' gradients outside": lambda: make(*chain(2, (128, 128), "silu"), "euler", 333),
    "all states": lambda: make(*chain(2, (16,)), "dopri5", 17, outputs=(0, 1, 2, 3, 4)),
}


@pytest.mark.parametrize("name", FIELDS)
def test_values_and_gradients(kernels, precision, name) -> None:
    program, inputs = FIELDS[name]()
    batch = inputs.y0.shape[0]
    assert kernels.refuses(program.network, program.stages, batch, torch.float32) is None
    truth = solve(REFERENCE, program, to(inputs, torch.float64))
    torch.set_float32_matmul_precision("highest")
    single = solve(REFERENCE, program, inputs)
    torch.set_float32_matmul_precision(precision)
    found = solve(kernels, program, inputs)
    for i, (mine, torchs, exact) in enumerate(zip(found, single, truth, strict=True)):
        allowed = 2 * relative(torchs, exact) + ALLOWED[precision]
        assert relative(mine, exact) <= allowed, f"tensor {i}: {relative(mine, exact):.2e}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(kernels, precision, activation) -> None:
    """On the device exp, tanh and division are other instructions than on the host."""
    program, inputs = make(*chain(2, (32,), activation), "euler", 8192, steps=1)
    inputs = replace(inputs, y0=3 * inputs.y0)
    truth = solve(REFERENCE, program, to(inputs, torch.float64))
    for mine, exact in zip(solve(kernels, program, inputs), truth, strict=True):
        assert relative(mine, exact) <= 3 * ALLOWED[precision]


def test_runs_are_equal_to_the_bit(kernels) -> None:
    for name in ("odd", "many", "viscosity on an MLP"):
        program, inputs = FIELDS[name]()
        first, second = (solve(kernels, program, inputs) for _ in range(2))
        torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_a_solve_is_captured_and_replayed(kernels) -> None:
    program, inputs = FIELDS["odd"]()
    wanted = rebuild(inputs, [True] * len(flatten(inputs)))
    grad = torch.randn(1, *inputs.y0.shape, device="cuda")

    def both():
        out, kept = kernels.forward(program, inputs, "inputs")
        return [out, *flatten(kernels.backward(program, inputs, kept, grad, wanted))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for tensor in (*flatten(inputs), grad):
        tensor.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(captured, both(), rtol=0, atol=0)


def test_a_solve_that_never_ran_is_not_captured(kernels) -> None:
    program, inputs = make(*chain(2, (16,)), "euler", 5, steps=7)
    with pytest.raises(InputError, match="once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        kernels.forward(program, inputs, "nothing")


def test_a_repeated_solve_does_not_wait_for_the_device(kernels) -> None:
    program, inputs = FIELDS["odd"]()
    wanted = rebuild(inputs, [True] * len(flatten(inputs)))
    out, _ = kernels.forward(program, inputs, "inputs")
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, kept = kernels.forward(program, inputs, "inputs")
        kernels.backward(program, inputs, kept, out, wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer of the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool) -> None:
    # The name of torch's kernels as it is mangled; some of torch's calls fail by design.
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude"]
    command += ["kernel_substring=2at6native"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, __file__]
    folder = Path(__file__).parent
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=500)
    if "Failed to initialize" in run.stdout or "not supported" in run.stdout:
        pytest.skip(f"compute-sanitizer does not run here: {run.stdout[-300:]}")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]


if __name__ == "__main__":
    from fmft_fast.ops.trajectory_cuda import KERNELS

    for field in ("five layers", "skips", "viscosity", "weights' gradients outside"):
        solve(KERNELS, *FIELDS[field]())
    torch.cuda.synchronize()
