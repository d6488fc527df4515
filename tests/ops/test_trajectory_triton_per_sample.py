"""Triton's solves with steps of every sample's own: numbers, and cubins without a GPU."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from kernel_sets import INTERPRETED
from networks import chain, make_inputs, viscosity
from triton_processes import compile_ahead, interpret_numbers, local_memory

from fmft_fast import fused, solve
from fmft_fast.fields import MLP
from fmft_fast.ops.network import Inputs
from fmft_fast.ops.trajectory import Control, Program, flatten, rebuild
from fmft_fast.solvers import whole_solve
from fmft_fast.solvers.methods import METHODS
from fmft_fast.solvers.per_sample import SolvedPerSample

pytest.importorskip("triton")
per_sample = pytest.importorskip("fmft_fast.kernels.per_sample", exc_type=ImportError)
source = pytest.importorskip("fmft_fast.kernels.per_sample_source", exc_type=ImportError)
launch = pytest.importorskip("fmft_fast.kernels.launch", exc_type=ImportError)
KERNELS = pytest.importorskip("fmft_fast.kernels.trajectory", exc_type=ImportError).KERNELS
CPU = pytest.importorskip("fmft_fast.ops.trajectory_cpu", exc_type=ImportError).KERNELS

on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
OPTIONS = {"first_step": 1.5, "max_step": 1.0, "safety": 0.8, "dfactor": 0.4, "ifactor": 3.0}
# Network, rows of the batch (a program takes 32, or 16 of wide layers), method, times, options.
CASES = {
    "one row": (chain(2, (16,), "tanh"), 1, "dopri5", (0.0, 1.0), {}),
    "back, tiles": (viscosity(2, 8), 34, "bosh3", (1.0, -0.5), {}),
    "conditions": (chain(3, (20, 33), "tanh", cond=True), 17, "bosh3", (0.0, 1.5), {}),
    "options": (chain(2, (16, 16), "silu", skips=True), 7, "tsit5", (0.0, 2.0), OPTIONS),
    "many stages": (chain(2, (16,), "tanh"), 5, "dopri8", (0.0, 2.5), {"first_step": 1.0}),
}


def to(inputs, *where):
    return rebuild(inputs, [x.to(*where) for x in flatten(inputs)])


def case(name):
    """Inputs in float64 whose rows need numbers of steps that differ."""
    (network, shapes), batch, method, times, options = CASES[name]
    inputs = make_inputs(network, shapes, batch, 0)
    inputs.parameters[0] = 1.5 * inputs.parameters[0]
    inputs.y0 = inputs.y0 * torch.linspace(0.1, 3, batch, dtype=torch.float64)[:, None]
    return network, METHODS[method].tableau, inputs, times, options


def run(kernels, network, tableau, inputs, times, keep="inputs", **options):
    control = Control(**{"rtol": 1e-2, "atol": 1e-2, **options})
    return kernels.adaptive_per_sample(network, tableau, control, inputs, *times, keep)


def everything(inputs):
    return rebuild(inputs, [True] * len(flatten(inputs)))


def replay(network, tableau, inputs, found, grad):
    """The final states by the accepted steps, and all gradients, by torch."""
    method, none = tableau.advancing, torch.empty(0, dtype=torch.float64)
    program = Program(network, method.a, method.b, none, none, ())
    solved = SolvedPerSample(KERNELS, program, found.y, found.kept, inputs, method.c)
    leaves = [x.clone().requires_grad_() for x in flatten(inputs)]
    y = solved.run(rebuild(inputs, leaves))
    gradients = torch.autograd.grad(y, leaves, grad.to(y.dtype), materialize_grads=True)
    return [y.detach(), *gradients]


@on_device
class TestNumbers:
    @pytest.mark.parametrize("name", CASES)
    def test_steps_values_and_gradients(self, name, device) -> None:
        network, tableau, inputs, times, options = case(name)
        there = to(inputs, device, torch.float32)
        found = run(KERNELS, network, tableau, there, times, **options)
        expected = run(CPU, network, tableau, inputs, times, **options)
        assert found.failed is None
        for x, y in zip(found[2:5], expected[2:5], strict=True):
            assert torch.equal(x, y)
        for r in range(len(inputs.y0)):
            (nodes, sizes), (_, h) = found.kept.steps(r), expected.kept.steps(r)
            assert len(nodes) == len(sizes) + 1 and (nodes[0], nodes[-1]) == times
            assert sizes == pytest.approx(h, rel=1e-2)
            assert found.kept.ended(r)[0] == "done"
        grad = torch.randn_like(inputs.y0)
        exact = replay(network, tableau, inputs, found, grad)
        plain = replay(network, tableau, to(inputs, torch.float32), found, grad)
        above = grad.float().to(device)
        below = KERNELS.backward_per_sample(found.kept, above, everything(inputs))
        for x, y, truth in zip([found.y, *flatten(below)], plain, exact, strict=True):
            assert x.shape == truth.shape and x.dtype == torch.float32
            scale = truth.abs().max() + 1e-30
            error, own = ((z.cpu().double() - truth).abs().max() / scale for z in (x, y))
            assert error <= 2 * own + 3e-6, f"error {error:.2e}, torch's own {own:.2e}"

    def test_stiff_and_easy_rows(self, device, monkeypatch) -> None:
        """Rows end at different times, in launches that have no room for all steps."""
        network, shapes = chain(1, (4,), "relu", time=None)
        inputs = make_inputs(network, shapes, 5, 0)
        # The rate of decay is 60.5 above zero and 0.5 below.
        rates = torch.tensor([[60.0, 0.0, 0.5, -0.5]], dtype=torch.float64)
        signs = torch.tensor([[1.0], [0.0], [1.0], [-1.0]], dtype=torch.float64)
        inputs.parameters = [signs, torch.zeros(4).double(), -rates, torch.zeros(1).double()]
        inputs.y0 = torch.tensor([[1.0], [-1.0], [2.0], [-2.0], [0.5]], dtype=torch.float64)
        tableau, there = METHODS["bosh3"].tableau, to(inputs, device, torch.float32)

        def found():
            whole = run(KERNELS, network, tableau, there, (0.0, 1.0), rtol=1e-3, atol=1e-3)
            gradients = KERNELS.backward_per_sample(
                whole.kept, torch.ones_like(there.y0), everything(inputs)
            )
            return whole, [whole.y, *whole[2:5], *flatten(gradients)]

        (whole, first), (_, again) = found(), found()
        assert whole.accepted[[1, 3]].max() < whole.accepted[[0, 2, 4]].min() / 2
        assert whole.rejected.max() > 0
        monkeypatch.setattr(per_sample, "MOST", 5)
        _, in_pieces = found()
        for x, y, z in zip(first, again, in_pieces, strict=True):
            assert torch.equal(x, y) and torch.equal(x, z)
        nothing = run(KERNELS, network, tableau, there, (0.0, 1.0), "nothing", rtol=1e-3, atol=1e-3)
        assert torch.equal(nothing.y, first[0]) and len(nothing.kept.inputs) == 1

    def test_rows_that_end_early_leave_the_others_alone(self, device) -> None:
        network, tableau, inputs, times, options = case("conditions")
        inputs = to(inputs, torch.float32)
        clean = run(KERNELS, network, tableau, to(inputs, device), times, **options)
        broken = Inputs(inputs.y0.clone(), inputs.parameters, [], inputs.conds)
        broken.y0[[4, 9], 1] = math.nan
        for first in (None, 0.2):
            found = run(KERNELS, network, tableau, to(broken, device), times, first_step=first)
            assert found.failed == 4 and found.kept.ended(9)[0] == "not finite"
            assert found.accepted[[4, 9]].max() == 0 and found.kept.ended(5)[0] == "done"
            others = [r for r in range(17) if r not in (4, 9)]
            assert first or torch.equal(found.y[others], clean.y[others])
        found = run(KERNELS, network, tableau, to(inputs, device), times, first_step=0.0)
        assert found.failed == 0 and found.kept.ended(0)[0] == "underflow"
        short = {"max_num_steps": 3, "max_step": 0.2}
        found = run(KERNELS, network, tableau, to(inputs, device), times, **short)
        assert found.kept.ended(16)[0] == "too many steps"
        assert torch.equal(found.accepted + found.rejected, torch.full((17,), 3))

    def test_solve(self, device, monkeypatch) -> None:
        field = MLP(2, (16,), cond_dim=3)
        x0, cond = torch.randn(6, 2), torch.randn(6, 3)

        def found(kernels, *where):
            monkeypatch.setattr(whole_solve, "choose_trajectory", lambda *_: kernels)
            mine = copy.deepcopy(field).to(*where)
            tensors = [x.to(*where).requires_grad_() for x in (x0, cond)]
            with fused("require"):
                y = solve(
                    mine,
                    *(tensors[0], 0.0, 1.0),
                    cond=tensors[1],
                    method="bosh3",
                    rtol=1e-3,
                    atol=1e-3,
                    options={"per_sample": True, "first_step": 0.3},
                )
            rows = (y.stats.rows_accepted, y.stats.rows_rejected, y.stats.rows_evaluations)
            leaves = [*tensors, *mine.parameters()]
            first = torch.autograd.grad(y.y.square().sum(), leaves, create_graph=True)
            return rows, [y.y, *first], torch.autograd.grad(first[0].square().sum(), leaves[0])

        rows, values, second = found(KERNELS, device)
        expected, exact, exact_second = found(CPU, torch.float64)
        assert all(torch.equal(x, y) for x, y in zip(rows, expected, strict=True))
        for x, y in zip([*values, *second], [*exact, *exact_second], strict=True):
            assert (x.cpu() - y).abs().max() < 1e-3 * y.abs().max()


def test_numbers_in_the_interpreter() -> None:
    interpret_numbers(__file__)


TYPES = dict.fromkeys(("log", "state", "given", "method"), "*fp64") | {"counts": "*i32"}
TYPES |= dict.fromkeys(("batch", "rounds", "phase", "keep", "steps"), "i32")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("stages, capability", [(4, 90), (7, 80)])
def test_cubins(direction, stages, capability) -> None:
    network, shapes = chain(2, (64,) * 3)
    config = launch.configs(direction, network, "ieee")[0]
    options = launch.options(config, "ieee")
    fixed = {name: options.pop(name) for name in ("BLOCK", "PRECISION")}
    arguments = (network, tuple(shapes))
    if direction == "forward":
        kernel = source.rows_kernel(*arguments, stages, config.tile)
    else:
        wanted = source.Wanted((True,) * len(shapes), (), ())
        kernel = source.rows_backward_kernel(*arguments, stages - 1, config.tile, wanted)
    compiled = compile_ahead(kernel, fixed, TYPES, capability, options)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024
    assert local_memory(compiled.asm["cubin"]) <= 64
