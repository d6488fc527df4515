"""Triton's adaptive solves: numbers in the interpreter or on a GPU, and cubins without one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from kernel_sets import INTERPRETED
from networks import chain, make_inputs, viscosity
from triton_processes import compile_ahead, interpret_numbers, local_memory

from fmft_fast import fused, odeint, record_stats
from fmft_fast.errors import MaxStepsError, NonFiniteError
from fmft_fast.fields import MLP
from fmft_fast.ops.trajectory import Control, Reference, flatten, rebuild
from fmft_fast.solvers import whole_solve
from fmft_fast.solvers.methods import METHODS

pytest.importorskip("triton")
adaptive = pytest.importorskip("fmft_fast.kernels.adaptive", exc_type=ImportError)
KERNELS = pytest.importorskip("fmft_fast.kernels.trajectory", exc_type=ImportError).KERNELS
CPU = pytest.importorskip("fmft_fast.ops.trajectory_cpu", exc_type=ImportError).KERNELS
REFERENCE = Reference()

on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
GRID, BACK = (0.0, 0.3, 0.35, 1.0), (1.0, 0.2, 0.15, -0.5)
# Network, rows of the batch (a program takes 32, or 16 of wide layers), method, times, meet.
CASES = {
    "alone": (chain(2, (16,), "tanh"), 15, "dopri5", GRID, {}),
    "alone, meet, back": (viscosity(2, 8), 7, "tsit5", BACK, {"meet": True}),
    "tiles": (chain(3, (16,), "selu"), 34, "tsit5", GRID, {}),
    "tiles, meet": (chain(2, (16, 16), "silu", skips=True), 33, "dopri5", GRID, {"meet": True}),
    "conditions, back": (chain(3, (20, 33), "tanh", cond=True), 20, "bosh3", BACK, {}),
    "two tiles of columns": (chain(2, (70,), "gelu"), 5, "bosh3", (0.0, 0.5), {}),
    "linear": (chain(5, (), time=None), 40, "dopri5", (0.0, 1.0, 3.0), {}),
    "many stages": (chain(2, (16,), "tanh"), 3, "dopri8", (0.0, 1.0, 2.5), {"first_step": 1.0}),
    "many outputs": (chain(2, (16,), "tanh"), 3, "bosh3", tuple(i / 40 for i in range(41)), {}),
}


def case(name):
    """Network, tableau, times and inputs in float64 whose errors are well above rounding."""
    (network, shapes), batch, method, t, options = CASES[name]
    inputs = make_inputs(network, shapes, batch, 0)
    inputs.parameters[0] = 1.5 * inputs.parameters[0]
    return network, METHODS[method].tableau, t, inputs, dict(options)


def solve(kernels, network, tableau, t, inputs, keep="inputs", **control):
    control = Control(**{"rtol": 1e-2, "atol": 1e-2, **control})
    return kernels.adaptive(network, tableau, control, inputs, list(t), keep)


def to(inputs, *where):
    return rebuild(inputs, [x.to(*where) for x in flatten(inputs)])


def everything(inputs):
    return rebuild(inputs, [True] * len(flatten(inputs)))


def assert_as_good_as_torch(found, plain, exact):
    """Compare with float64; the error is at most twice torch's own in float32."""
    for x, y, truth in zip(found, plain, exact, strict=True):
        assert x.shape == truth.shape and x.dtype == torch.float32
        scale = truth.abs().max() + 1e-30
        error, own = ((z.cpu().double() - truth).abs().max() / scale for z in (x, y))
        assert error <= 2 * own + 3e-6, f"error {error:.2e}, torch's own {own:.2e}"


def assert_same_steps(found, expected, rtol=2e-3):
    """The errors, from which sizes follow, are rounded in float32."""
    assert found.outcome == expected.outcome
    assert found.rejected == expected.rejected
    assert found.evaluations == expected.evaluations
    torch.testing.assert_close(found.program.h, expected.program.h, rtol=rtol, atol=1e-6)
    assert found.program.outputs == expected.program.outputs


@on_device
class TestNumbers:
    @pytest.mark.parametrize("name", CASES)
    def test_steps_values_and_gradients(self, name, device) -> None:
        network, tableau, t, inputs, options = case(name)
        batch = inputs.y0.shape[0]
        assert KERNELS.refuses(network, tableau.stages, batch, torch.float32) is None
        there = to(inputs, device, torch.float32)
        found = solve(KERNELS, network, tableau, t, there, **options)
        assert_same_steps(found, solve(CPU, network, tableau, t, inputs, **options))
        out, kept = KERNELS.forward(found.program, there, "inputs")
        for x, y in ((found.out, out), (found.kept[: len(kept)], kept)):
            assert torch.equal(x, y) if INTERPRETED else torch.allclose(x, y, 1e-5, 1e-5)
        grad = torch.randn(len(t), batch, network.state, dtype=torch.float64)

        def replay(inputs, dtype):
            out, _ = REFERENCE.forward(found.program, inputs, "inputs")
            wanted = everything(inputs)
            gradients = REFERENCE.backward(found.program, inputs, None, grad.to(dtype), wanted)
            return [out, *flatten(gradients)]

        above = grad.float().to(device)
        below = KERNELS.backward(found.program, there, found.kept, above, everything(there))
        assert_as_good_as_torch(
            [found.out, *flatten(below)],
            replay(to(inputs, torch.float32), torch.float32),
            replay(inputs, torch.float64),
        )

    @pytest.mark.parametrize(
        "options",
        [
            {"first_step": 0.7},
            {"first_step": 0.01, "max_step": 0.06},
            {"min_step": 0.2},
            {"rtol": 1e-1, "atol": 1e-1, "safety": 0.5, "ifactor": 2.0, "dfactor": 0.6},
            {"first_step": 1.0, "dfactor": 0.5, "meet": True},
        ],
        ids=str,
    )
    def test_options_and_rejected_steps(self, options, device) -> None:
        network, shapes = viscosity(2, 8)
        inputs = make_inputs(network, shapes, 9, 0)
        inputs.parameters[0] = 8 * inputs.parameters[0]
        tableau = METHODS["bosh3"].tableau
        expected = solve(CPU, network, tableau, GRID, inputs, **options)
        there = to(inputs, device, torch.float32)
        found = solve(KERNELS, network, tableau, GRID, there, **options)
        assert_same_steps(found, expected)
        assert expected.rejected > 0 or options.get("first_step") != 0.7
        error = (found.out.cpu() - expected.out).abs().max() / expected.out.abs().max()
        assert error < 1e-4

    @pytest.mark.parametrize("batch", [3, 33])
    def test_what_ends_early(self, batch, device) -> None:
        network, shapes = chain(2, (16,), "tanh")
        tableau = METHODS["dopri5"].tableau

        def compare(y0=0.0, outcome="", **options):
            inputs = make_inputs(network, shapes, batch, 0, torch.float32)
            inputs.y0[-1, 1] += y0
            expected = solve(CPU, network, tableau, GRID, inputs, **options)
            found = solve(KERNELS, network, tableau, GRID, to(inputs, device), **options)
            assert found.outcome == expected.outcome == outcome
            assert found.program.steps == expected.program.steps
            assert found.kept is None

        compare(outcome="too many steps", max_num_steps=2, max_step=0.1)
        compare(outcome="too many steps", max_num_steps=0)
        compare(outcome="underflow", first_step=0.0)
        compare(outcome="not finite", y0=math.nan)
        compare(outcome="not finite", y0=math.nan, first_step=0.1)

    def test_attempts_that_are_not_finite_are_made_again(self, device) -> None:
        network, shapes = chain(2, ())
        inputs = make_inputs(network, shapes, 5, 0, torch.float32)
        inputs.parameters[0] = 100 * inputs.parameters[0]
        tableau = METHODS["dopri5"].tableau
        options = {"first_step": 1e6, "max_step": 1e6, "max_num_steps": 200}
        expected = solve(CPU, network, tableau, (0.0, 0.1), inputs, **options)
        there = to(inputs, device)
        found = solve(KERNELS, network, tableau, (0.0, 0.1), there, **options)
        assert found.outcome == expected.outcome == "done"
        assert expected.rejected > 5
        assert abs(found.rejected - expected.rejected) <= (0 if INTERPRETED else 1)
        # A step that cannot be made smaller ends the solve.
        options = {"first_step": 1e30, "min_step": 1e30, "max_step": 1e30}
        assert solve(CPU, network, tableau, (0.0, 0.1), inputs, **options).outcome == "not finite"
        found = solve(KERNELS, network, tableau, (0.0, 0.1), there, **options)
        assert found.outcome == "not finite"

    @pytest.mark.parametrize("name", ["alone", "tiles, meet"])
    def test_bits_do_not_depend_on_the_looks_of_the_host(self, name, device, monkeypatch) -> None:
        network, tableau, t, inputs, options = case(name)
        inputs = to(inputs, device, torch.float32)
        options["max_step"] = 0.3
        grad = torch.randn(len(t), *inputs.y0.shape, device=device)

        def run():
            found = solve(KERNELS, network, tableau, t, inputs, **options)
            below = KERNELS.backward(found.program, inputs, found.kept, grad, everything(inputs))
            return [found.program.h, found.out, *flatten(below)]

        first, again = run(), run()
        monkeypatch.setattr(adaptive, "FIRST_ATTEMPTS", 1)
        monkeypatch.setattr(adaptive, "MOST_ATTEMPTS", 2)
        in_pieces = run()
        for x, y, z in zip(first, again, in_pieces, strict=True):
            assert torch.equal(x, y) and torch.equal(x, z)
        nothing = solve(KERNELS, network, tableau, t, inputs, "nothing", **options)
        assert torch.equal(nothing.out, first[1]) and nothing.kept is None

    @pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
    def test_odeint(self, method, device, monkeypatch) -> None:
        monkeypatch.setattr(whole_solve, "choose_trajectory", lambda *_: KERNELS)
        field, y0, t = MLP(2, (16, 16)), torch.randn(33, 2), torch.tensor([1.0, 0.5, 0.0])
        options = {"method": method, "rtol": 1e-3, "atol": 1e-3, "options": {"first_step": 0.3}}

        def run(mode, *where):
            mine = copy.deepcopy(field).to(*where)
            with fused(mode), record_stats() as log:
                start = y0.to(*where)
                y = odeint(mine, start, t.to(start.device), **options)
            gradients = torch.autograd.grad(y.square().sum(), [*mine.parameters()])
            return log[0], [y, *gradients]

        stats, found = run("require", device)
        single, plain = run("off", torch.float64)
        assert stats.accepted == single.accepted and stats.rejected == single.rejected
        assert stats.evaluations == single.evaluations
        for x, y in zip(found, plain, strict=True):
            assert (x.cpu() - y).abs().max() < 1e-3 * y.abs().max()

    def test_odeint_says_what_went_wrong(self, device, monkeypatch) -> None:
        monkeypatch.setattr(whole_solve, "choose_trajectory", lambda *_: KERNELS)
        field, y0 = MLP(2, (16,)).to(device), torch.randn(4, 2).to(device)
        t = torch.tensor(GRID).to(device)
        with pytest.raises(MaxStepsError):
            odeint(field, y0, t, method="dopri5", options={"max_num_steps": 1, "max_step": 0.05})
        y0[2, 1] = math.nan
        with pytest.raises(NonFiniteError):
            odeint(field, y0, t, method="dopri5")


def test_numbers_in_the_interpreter() -> None:
    interpret_numbers(__file__)


def test_precision_of_errors(monkeypatch) -> None:
    network, _ = chain(2, (32,))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert adaptive.precision_of(network, 1e-3) == "ieee"
    assert adaptive.precision_of(network, 1e-2) == "tf32"


# Hidden layers, stages, whether a program is alone, capability, bytes of local memory of a thread.
CUBINS = [
    ((64,) * 3, 7, False, 80, 64),
    ((64,) * 3, 7, True, 90, 64),
    ((32,) * 2, 4, True, 80, 64),
]
TYPES = dict.fromkeys(("log", "sums", "state", "given"), "*fp64")
TYPES |= dict.fromkeys(("batch", "attempts", "keep", "outputs", "tiles"), "i32")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("hidden, stages, alone, capability, local", CUBINS)
def test_cubins(hidden, stages, alone, capability, local) -> None:
    launch = pytest.importorskip("fmft_fast.kernels.launch")
    network, shapes = chain(2, hidden)
    config = launch.configs("forward", network, "ieee")[0]
    kernel = adaptive.attempt_kernel(network, tuple(shapes), stages, config.tile)
    options = launch.options(config, "ieee")
    fixed = {name: options.pop(name) for name in ("BLOCK", "PRECISION")} | {"ALONE": alone}
    compiled = compile_ahead(kernel, fixed, TYPES, capability, options)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024
    assert local_memory(compiled.asm["cubin"]) <= local


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("stages, capability", [(4, 80), (7, 90)])
def test_cubins_of_the_control(stages, capability) -> None:
    kernel, fixed = adaptive.device.control_kernel, adaptive.places(stages)
    compiled = compile_ahead(kernel, fixed, TYPES, capability, {})
    assert local_memory(compiled.asm["cubin"]) <= 64
