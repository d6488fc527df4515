"""Triton's whole trajectories: numbers in the interpreter or on a GPU, and cubins without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_sets import INTERPRETED
from networks import (
    RESIDUALS,
    activation_alone,
    chain,
    make_inputs,
    make_program,
    odd_arguments,
    residual,
    viscosity,
)
from triton_processes import compile_ahead, interpret_numbers, local_memory

from fmft_fast.ops.network import ACTIVATIONS, Inputs, Layer, Network, Term, activate
from fmft_fast.ops.trajectory import Program, Reference, flatten, rebuild

pytest.importorskip("triton")
trajectory = pytest.importorskip("fmft_fast.kernels.trajectory", exc_type=ImportError)
source = pytest.importorskip("fmft_fast.kernels.trajectory_source", exc_type=ImportError)
launch = pytest.importorskip("fmft_fast.kernels.launch", exc_type=ImportError)
KERNELS, REFERENCE = trajectory.KERNELS, Reference()

on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
)

CASES = {
    "one layer": (chain(1, (5,), "tanh"), 1, "euler", 3, (0, 1, 3)),
    "linear": (chain(7, (), time="column"), 15, "midpoint", 2, None),
    "tables and conditions": (
        chain(3, (20, 33), "silu", time="tables", cond=True),
        63,
        "rk4",
        1,
        None,
    ),
    "skips": (chain(2, (16,) * 5, "gelu", skips=True, cond=True), 15, "heun2", 2, (1, 2)),
    "wide state": (chain(32, (24,), "elu", slope=0.7), 33, "bosh3", 1, (0, 1)),
    "two tiles": (chain(2, (100, 70), "selu"), 5, "heun3", 1, None),
    "many stages": (chain(2, (16, 16), "softplus", slope=2.0), 3, "dopri5", 2, (2,)),
    "tsit5": (viscosity(2, 8), 17, "tsit5", 1, None),
    "viscosity": (viscosity(3, 20, branches=2, base=True), 40, "euler", 3, (1, 2)),
    "shared weights": (
        (
            Network(
                3,
                (
                    Layer(20, (Term(0, 2),), activation="tanh"),
                    Layer(20, (Term(1, 0),), 1, activation="silu"),
                    Layer(20, (Term(2, 0),), 1, activation="silu"),
                    Layer(3, (Term(3, 3), Term(0, None))),
                ),
            ),
            [(20, 20), (20,), (20, 3), (3, 20)],
        ),
        9,
        "euler",
        2,
        None,
    ),
}


def case(name):
    """A program and its inputs in float64."""
    (network, shapes), batch, method, steps, outputs = CASES[name]
    program = make_program(network, method, steps, outputs, uneven=True)
    return program, make_inputs(network, shapes, batch, steps * program.stages)


def solve(kernels, program, inputs, grad, wanted=None):
    """The outputs and all gradients."""
    wanted = wanted or rebuild(inputs, [True] * len(flatten(inputs)))
    out, kept = kernels.forward(program, inputs, "inputs")
    return [out, *flatten(kernels.backward(program, inputs, kept, grad, wanted))]


def to(inputs, *where):
    return rebuild(inputs, [x.to(*where) for x in flatten(inputs)])


def check(program: Program, inputs: Inputs, device: str, roundings: float = 1e-6):
    """Compare with float64; the error is at most twice torch's own in float32."""
    assert inputs.y0 is not None
    batch, stages = inputs.y0.shape[0], program.stages
    assert KERNELS.refuses(program.network, stages, batch, torch.float32) is None
    grad = torch.randn(len(program.outputs), batch, program.network.state, dtype=torch.float64)
    exact = solve(REFERENCE, program, inputs, grad)
    plain = solve(REFERENCE, program, to(inputs, torch.float32), grad.float())
    found = solve(KERNELS, program, to(inputs, device, torch.float32), grad.float().to(device))
    for x, y, truth in zip(found, plain, exact, strict=True):
        assert x.shape == truth.shape and x.dtype == torch.float32
        scale = truth.abs().max() + 1e-30
        error, own = ((z.cpu().double() - truth).abs().max() / scale for z in (x, y))
        assert error <= 2 * own + roundings, f"error {error:.2e}, torch's own {own:.2e}"
    return found


@on_device
class TestNumbers:
    @pytest.mark.parametrize("name", CASES)
    def test_values_and_gradients(self, name, device) -> None:
        check(*case(name), device)

    @pytest.mark.parametrize("name", RESIDUALS)
    def test_v_and_gav_as_one_field(self, name, device) -> None:
        check(*residual(name, 19), device)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, activation, device) -> None:
        network, shapes = chain(2, (20,), activation, slope=0.3)
        inputs = make_inputs(network, shapes, 40, 1)
        inputs.y0 *= 5
        check(make_program(network, "euler", 1), inputs, device)

    @pytest.mark.parametrize("activation", ["softsign", "asinh", "clipped_cube"])
    def test_odd_arguments_of_activations(self, activation, device) -> None:
        z = odd_arguments(torch.float32)[:, None].to(device)
        inputs = Inputs(torch.zeros_like(z), [], [], [z])
        wanted = rebuild(inputs, [False, True])
        grad = torch.ones(1, *z.shape, device=device)
        out, *grads = solve(KERNELS, activation_alone(activation), inputs, grad, wanted)
        leaf = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(activate(leaf, activation, 1.0).sum(), leaf)
        expected = activate(z, activation, 1.0)
        tolerances = {"rtol": 1e-6, "atol": 1e-37, "equal_nan": True}  # of "atol", what flushes
        torch.testing.assert_close(out[0], expected, **tolerances)
        known = ~z.isnan()
        tolerances["atol"] = 2e-7
        torch.testing.assert_close(grads[-1][known], slope[known], **tolerances)

    def test_dense_output(self, device) -> None:
        network, shapes = chain(2, (16,), "tanh")
        program = make_program(network, "rk4", 3, (0, 0, 2))
        program = replace(program, weights=torch.rand(3, 4, dtype=torch.float64))
        check(program, make_inputs(network, shapes, 15, 12), device)

    def test_no_steps(self, device) -> None:
        network, shapes = chain(2, (16,), "tanh")
        program = make_program(network, "euler", 1, (0,))
        program = replace(program, times=program.times[:0], h=program.h[:0], outputs=(0, 0))
        check(program, make_inputs(network, shapes, 3, 1), device)

    def test_only_what_is_wanted(self, device) -> None:
        network, shapes = chain(3, (16,), "silu", time="tables", cond=True)
        program = make_program(network, "heun2", 1)
        inputs = to(make_inputs(network, shapes, 15, 2), device, torch.float32)
        grad = torch.randn(1, 15, 3, device=device)
        everything = solve(KERNELS, program, inputs, grad)[1:]
        for start in range(3):
            flags = [i % 3 == start for i in range(len(everything))]
            found = solve(KERNELS, program, inputs, grad, rebuild(inputs, flags))[1:]
            for flag, x, y in zip(flags, found, everything, strict=True):
                assert torch.equal(x, y) if flag else x is None

    def test_the_same_bits_again_and_any_strides(self, device) -> None:
        program, inputs = case("skips")
        inputs = to(inputs, device, torch.float32)
        strided = rebuild(
            inputs,
            [torch.stack([x, -x], -1)[..., 0] if x.ndim > 1 else x for x in flatten(inputs)],
        )
        assert strided.y0 is not None and not strided.y0.is_contiguous()
        grad = torch.randn(2, 15, 2, device=device)
        first, second = (solve(KERNELS, program, x, grad) for x in (inputs, strided))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_nothing_is_kept_for_values_alone(self, device) -> None:
        program, inputs = case("many stages")
        inputs = to(inputs, device, torch.float32)
        out, kept = KERNELS.forward(program, inputs, "nothing")
        assert kept.shape[0] == 1
        assert torch.equal(out, KERNELS.forward(program, inputs, "inputs")[0])


@pytest.mark.gpu
@pytest.mark.parametrize("precision, roundings", [("high", 1e-5), ("medium", 3e-2)])
@pytest.mark.parametrize("name", ["skips", "viscosity", "many stages"])
def test_tensor_cores(name, precision, roundings) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(*case(name), "cuda", roundings)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_graph_capture() -> None:
    program, inputs = case("skips")
    inputs = to(inputs, "cuda", torch.float32)
    grad = torch.randn(2, 15, 2, device="cuda")
    expected = solve(KERNELS, program, inputs, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solve(KERNELS, program, inputs, grad)
    trajectory._copied.cache_clear()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_numbers_in_the_interpreter() -> None:
    interpret_numbers(__file__)


def test_refusals() -> None:
    network, _ = chain(2, (16,))
    assert "float32" in KERNELS.refuses(network, 1, 4, torch.float64)
    assert "empty" in KERNELS.refuses(network, 1, 0, torch.float32)
    assert "128" in KERNELS.refuses(chain(2, (129,))[0], 1, 4, torch.float32)
    assert "products" in KERNELS.refuses(chain(2, (128,) * 9)[0], 1, 4, torch.float32)
    assert "stages" in KERNELS.refuses(chain(128, (16,))[0], 4, 4, torch.float32)
    overlap = Network(2, (Layer(2, (Term(0, 0), Term(0, 0, 1))),))
    assert "columns" in KERNELS.refuses(overlap, 1, 4, torch.float32)


def test_winners_of_tuning_are_remembered(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    winners = {"a device, a solve": launch.Config(32, 4, 32)}
    launch.remember(winners)
    launch.remembered.cache_clear()
    assert launch.remembered() == winners
    (tmp_path / "fmft_fast/triton.json").write_text("no JSON")
    launch.remembered.cache_clear()
    assert launch.remembered() == {}
    launch.remembered.cache_clear()


# Direction, hidden layers, stages, precision, capability, bytes of local memory of a thread.
CUBINS = [
    ("forward", (64,) * 3, 1, "highest", 90, 64),
    ("forward", (64,) * 2, 6, "high", 80, 700),
    ("forward", (64,) * 3, 1, "medium", 90, 64),
    ("backward", (64,) * 3, 1, "highest", 90, 64),
    ("backward", (64,) * 3, 1, "high", 80, 64),
    ("backward", (32,) * 2, 4, "medium", 80, 300),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("direction, hidden, stages, precision, capability, local", CUBINS)
def test_cubins(direction, hidden, stages, precision, capability, local, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    network, shapes = chain(2, hidden)
    compiled = compile_for(network, tuple(shapes), direction, stages, capability)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    # Also what devices of capability 8.6 and 8.9 have.
    assert compiled.metadata.shared <= 99 * 1024
    assert local_memory(compiled.asm["cubin"]) <= local


def compile_for(network, shapes, direction, stages, capability):
    """The default kernel of a network, compiled ahead of time."""
    how = launch.precision(direction, network)
    config = launch.configs(direction, network, how)[0]
    if direction == "forward":
        kernel = trajectory.forward_kernel(network, shapes, stages, config.tile)
    else:
        wanted = source.Wanted((True,) * len(shapes), (), ())
        kernel = trajectory.backward_kernel(network, shapes, stages, config.tile, wanted)
    options = launch.options(config, how)
    fixed = {name: options.pop(name) for name in ("BLOCK", "PRECISION")}
    types = {"first": "*i32"} | dict.fromkeys(("batch", "steps", "keep"), "i32")
    return compile_ahead(kernel, fixed, types, capability, options)
