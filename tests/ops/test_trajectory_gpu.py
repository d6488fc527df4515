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

from fmft_fast import fused, odeint
from fmft_fast import solve as solve_exactly
from fmft_fast.errors import InputError
from fmft_fast.fields import MLP
from fmft_fast.ops.network import ACTIVATIONS, Inputs, Network
from fmft_fast.ops.trajectory import Control, Program, Reference, flatten, rebuild
from fmft_fast.solvers.methods import METHODS
from fmft_fast.solvers.per_sample import SolvedPerSample

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


CONTROL = Control(rtol=1e-4, atol=1e-5)
ADAPTIVE = {
    "one block": (chain(2, (64, 64), "silu"), 31),
    "small": (chain(2, (64, 64, 64), "selu"), 4096),
    "condition": (chain(3, (40,), "gelu", cond=True), 1023),
    "more rows than blocks hold": (chain(7, (32,), "silu"), 20_003),
}


def steep(name) -> tuple[Network, Inputs]:
    """A field and inputs whose rows need different steps."""
    (network, shapes), batch = ADAPTIVE[name]
    inputs = to(make_inputs(network, shapes, batch, 0, device="cuda"), torch.float32)
    size = torch.linspace(0.1, 3, batch, device="cuda")[:, None]
    return network, replace(inputs, y0=size * inputs.y0)


def both_ways(kernels, name, method, t):
    """A solve with step control, and all gradients of a fixed sum of its outputs."""
    network, inputs = steep(name)
    found = kernels.adaptive(network, METHODS[method].tableau, CONTROL, inputs, t, "inputs")
    wanted = rebuild(inputs, [True] * len(flatten(inputs)))
    grad = torch.linspace(-1, 1, found.out.numel(), device="cuda").reshape(found.out.shape)
    grads = kernels.backward(found.program, inputs, found.kept, grad, wanted)
    return found, grad, [found.out, *flatten(grads)]


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_steps_with_control(kernels, name, method) -> None:
    found, grad, mine = both_ways(kernels, name, method, [1.0, 0.7, -0.5])
    assert found.outcome == "done"
    again = both_ways(kernels, name, method, [1.0, 0.7, -0.5])[2]
    torch.testing.assert_close(again, mine, rtol=0, atol=0)
    _, inputs = steep(name)
    wanted = rebuild(inputs, [True] * len(flatten(inputs)))
    solved = []
    for dtype in (torch.float32, torch.float64):
        own = to(inputs, dtype)
        out, _ = REFERENCE.forward(found.program, own, "nothing")
        grads = REFERENCE.backward(found.program, own, None, grad.to(dtype), wanted)
        solved.append([out, *flatten(grads)])
    for i, (x, single, exact) in enumerate(zip(mine, *solved, strict=True)):
        assert relative(x, exact) <= 2 * relative(single, exact) + 1e-5, f"tensor {i}"


@pytest.mark.parametrize("name", ["one block", "condition", "more rows than blocks hold"])
def test_steps_of_the_rows_own(kernels, name) -> None:
    (network, inputs), tableau = steep(name), METHODS["bosh3"].tableau
    wanted = rebuild(inputs, [True] * len(flatten(inputs)))

    def run():
        found = kernels.adaptive_per_sample(network, tableau, CONTROL, inputs, 0.0, 1.0, "inputs")
        assert found.failed is None
        grad = torch.linspace(-1, 1, found.y.numel(), device="cuda").reshape(found.y.shape)
        return found, grad, flatten(kernels.backward_per_sample(found.kept, grad, wanted))

    (found, grad, grads), (again, _, grads_again) = run(), run()
    torch.testing.assert_close([again.y, *grads_again], [found.y, *grads], rtol=0, atol=0)
    assert len(set(found.accepted.tolist())) > 1
    method, none = tableau.advancing, torch.empty(0)
    program = Program(network, method.a, method.b, none, none, ())
    solved = SolvedPerSample(kernels, program, found.y, found.kept, inputs, method.c)
    leaves = [x.double().requires_grad_() for x in flatten(inputs)]
    y = solved.run(rebuild(inputs, leaves))
    exact = torch.autograd.grad(y, leaves, grad.double(), materialize_grads=True)
    for mine, truth in zip([found.y, *grads], [y.detach(), *exact], strict=True):
        assert relative(mine, truth) <= 2e-5


def test_odeint_controls_its_steps_on_the_device(kernels) -> None:
    torch.manual_seed(0)
    field, x0 = MLP(2, hidden=(64, 64)).cuda(), torch.randn(500, 2, device="cuda")
    t = torch.tensor([0.0, 0.3, 1.0], device="cuda")
    own = {"per_sample": True}
    with fused("require"):
        found = odeint(field, x0, t, rtol=1e-6, atol=1e-6, method="dopri5")
        rows = solve_exactly(field, x0, method="dopri5", rtol=1e-6, atol=1e-6, options=own).y
    exact = odeint(field.double(), x0.double(), t.double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows.double(), exact[-1], rtol=1e-3, atol=1e-3)


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
    both_ways(KERNELS, "one block", "bosh3", [0.0, 1.0])
    network, inputs = steep("one block")
    given = METHODS["bosh3"].tableau, CONTROL, inputs, 0.0, 1.0, "inputs"
    rows = KERNELS.adaptive_per_sample(network, *given)
    every = rebuild(inputs, [True] * len(flatten(inputs)))
    KERNELS.backward_per_sample(rows.kept, torch.ones_like(rows.y), every)
    torch.cuda.synchronize()
