"""Step control of the CUDA kernels, on the host: steps, values, gradients, ends and pauses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from networks import chain, make_inputs, viscosity
from test_trajectory_cuda_source import all_of, cast, on_host, relative

from fmft_fast import odeint, solve
from fmft_fast.errors import InputError
from fmft_fast.fields import MLP
from fmft_fast.ops import cuda_adaptive
from fmft_fast.ops.cuda_adaptive import Progress
from fmft_fast.ops.network import Inputs
from fmft_fast.ops.trajectory import Control, Program, Reference, flatten, rebuild
from fmft_fast.ops.trajectory_cpu import KERNELS as CPU
from fmft_fast.solvers import whole_solve
from fmft_fast.solvers.methods import METHODS
from fmft_fast.solvers.per_sample import SolvedPerSample

REFERENCE = Reference()
NETWORKS = {  # with a batch and how steep the first layer is
    "one row": (chain(1, (17,), "tanh"), 1, 1),
    "several blocks": (chain(2, (16,), "silu"), 75, 2),
    "condition": (chain(3, (20,), "gelu", cond=True), 33, 2),
    "no time, skips": (chain(16, (16, 16), "tanh", time=None, skips=True), 17, 2),
    "viscosity on an MLP": (viscosity(2, 9, 2, base=True), 15, 1),
}
TIMES = {"forth": [0.0, 1.0], "back": [1.0, 0.9, 0.3, -0.5]}


@pytest.fixture
def kernels():
    return on_host().KERNELS


def case(name, steeper=1):
    """A field whose rows need different steps, in float64."""
    (network, shapes), batch, steep = NETWORKS[name]
    inputs = make_inputs(network, shapes, batch, 0)
    inputs.parameters[0] = steeper * steep * inputs.parameters[0]
    inputs.y0 = inputs.y0 * torch.linspace(0.1, 3, batch, dtype=torch.float64)[:, None]
    return network, inputs


# Errors of this size are found in float32 as in float64, unless a first guess is far too small.
TOLERANCES = {"rtol": 1e-3, "atol": 1e-4}
NEAR = {"rtol": 1e-2, "atol": 1e-2}


def control(**options) -> Control:
    return Control(**{**TOLERANCES, **options})


def single(inputs: Inputs) -> Inputs:
    return cast(inputs, torch.float32)


def weights_of(y):
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)


def assert_close(found, exact, torchs) -> None:
    """Assert errors against float64 of twice those of torch in float32, and some roundings."""
    for i, (mine, truth, other) in enumerate(zip(found, exact, torchs, strict=True)):
        allowed = 2 * relative(other, truth) + 5e-6
        assert relative(mine, truth) <= allowed, f"tensor {i}: {relative(mine, truth):.2e}"


def run(kernels, network, inputs, t, method="dopri5", keep="inputs", **options):
    tableau = METHODS[method].tableau
    return kernels.adaptive(network, tableau, control(**options), inputs, t, keep)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_values_and_gradients_are_those_of_the_accepted_steps(kernels, name, method):
    network, inputs = case(name)
    for meet, times in ((False, "back"), (True, "forth")):
        found = run(kernels, network, single(inputs), TIMES[times], method, meet=meet)
        assert found.outcome == "done"
        program = found.program

        def solved(inputs, program=program):
            out, _ = REFERENCE.forward(program, inputs, "nothing")
            grad = weights_of(out).to(out)
            grads = REFERENCE.backward(program, inputs, None, grad, all_of(inputs))
            return [out, *flatten(grads)]

        grad = weights_of(found.out).float()
        grads = kernels.backward(program, single(inputs), found.kept, grad, all_of(inputs))
        assert_close([found.out, *flatten(grads)], solved(inputs), solved(single(inputs)))


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
@pytest.mark.parametrize(
    "options",
    [{"max_step": 0.06}, {"first_step": 0.1}, {"min_step": 0.2}, {"first_step": 0.9}],
)
def test_the_steps_are_those_of_the_cpu(kernels, method, options):
    network, inputs = case("condition", steeper=2)
    for t in TIMES.values():
        found = run(kernels, network, single(inputs), t, method, **options)
        exact = run(CPU, network, inputs, t, method, **options)
        assert found.outcome == exact.outcome == "done"
        assert found.program.steps == exact.program.steps
        assert (found.rejected, found.evaluations) == (exact.rejected, exact.evaluations)
        assert found.program.outputs == exact.program.outputs
        torch.testing.assert_close(found.program.h, exact.program.h, rtol=0.02, atol=0.005)
        torch.testing.assert_close(found.out.double(), exact.out, **NEAR)
    assert "first_step" not in options or found.program.h[0].abs() <= options["first_step"]


def test_rejected_steps(kernels):
    network, inputs = case("several blocks", steeper=2)
    found = run(kernels, network, single(inputs), [0.0, 1.0], first_step=0.9)
    exact = run(CPU, network, inputs, [0.0, 1.0], first_step=0.9)
    assert found.rejected == exact.rejected > 0
    torch.testing.assert_close(found.out.double(), exact.out, **NEAR)


def test_how_solves_end_early(kernels):
    network, inputs = case("condition")
    few = run(kernels, network, single(inputs), [0.0, 1.0], max_num_steps=2)
    assert (few.outcome, few.program.steps, few.kept) == ("too many steps", 2, None)
    lost = single(inputs)
    lost.y0[3, 1] = torch.nan
    assert run(kernels, network, lost, [0.0, 1.0]).outcome == "not finite"
    assert run(kernels, network, lost, [0.0, 1.0], first_step=0.1).outcome == "not finite"
    far = run(
        kernels, network, single(inputs), [1e9, 1e9 + 1.0], rtol=1e-7, atol=1e-9, max_step=1e-9
    )
    assert far.outcome == "underflow"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pauses_for_want_of_room_change_nothing(kernels, monkeypatch, steps):
    network, inputs = case("several blocks")
    one_go = run(kernels, network, single(inputs), TIMES["back"])
    rows = (network, METHODS["bosh3"].tableau, control(), single(inputs), 0.0, 1.0, "inputs")
    own = kernels.adaptive_per_sample(*rows)
    monkeypatch.setattr(cuda_adaptive, "FEWEST", steps)
    monkeypatch.setattr(cuda_adaptive, "MOST", steps)
    paused = run(kernels, network, single(inputs), TIMES["back"])
    assert one_go.program.steps > 3
    for name in ("h", "times", "weights"):
        assert torch.equal(getattr(paused.program, name), getattr(one_go.program, name))
    assert torch.equal(paused.out, one_go.out)
    assert torch.equal(paused.kept.inputs, one_go.kept.inputs)
    own_paused = kernels.adaptive_per_sample(*rows)
    assert torch.equal(own_paused.y, own.y)
    grads = [
        flatten(kernels.backward_per_sample(x.kept, weights_of(own.y).float(), all_of(inputs)))
        for x in (own, own_paused)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert all(own_paused.kept.steps(r) == own.kept.steps(r) for r in range(75))


def test_runs_are_equal_to_the_bit_in_any_order_of_the_threads(kernels, monkeypatch):
    network, inputs = case("several blocks")
    rows = (network, METHODS["bosh3"].tableau, control(), single(inputs), 0.0, 1.0, "inputs")

    def everything():
        shared, own = run(kernels, network, single(inputs), [0.0, 1.0]), None
        own = kernels.adaptive_per_sample(*rows)
        grad = weights_of(own.y).float()
        grads = kernels.backward_per_sample(own.kept, grad, all_of(inputs))
        return [shared.out, shared.program.h, shared.kept.inputs, own.y, *flatten(grads)]

    forwards = everything()
    monkeypatch.setenv("FMFT_HOST_ORDER", "reverse")
    torch.testing.assert_close(everything(), forwards, rtol=0, atol=0)


def per_sample(kernels, network, inputs, t0=0.0, t1=1.0, method="bosh3", keep="inputs", **options):
    tableau = METHODS[method].tableau
    return kernels.adaptive_per_sample(network, tableau, control(**options), inputs, t0, t1, keep)


def replayed(kept, network, inputs, method):
    """The final states and all gradients by the accepted steps of every row, in plain torch."""
    method, none = METHODS[method].tableau.advancing, torch.empty(0)
    program = Program(network, method.a, method.b, none, none, ())
    solved = SolvedPerSample(None, program, None, kept, None, method.c)
    leaves = [x.clone().requires_grad_() for x in flatten(inputs)]
    y = solved.run(rebuild(inputs, leaves))
    grads = torch.autograd.grad(y, leaves, weights_of(y).to(y), materialize_grads=True)
    return [y.detach(), *grads]


def check_rows(kernels, network, inputs, found, method):
    grad = weights_of(found.y).float()
    grads = kernels.backward_per_sample(found.kept, grad, all_of(inputs))
    exact, torchs = (replayed(found.kept, network, x, method) for x in (inputs, single(inputs)))
    assert_close([found.y, *flatten(grads)], exact, torchs)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_values_and_gradients_are_those_of_the_rows_own_steps(kernels, name, method):
    network, inputs = case(name)
    t0, t1 = (0.0, 1.0) if method == "bosh3" else (1.0, -0.5)
    found = per_sample(kernels, network, single(inputs), t0, t1, method)
    assert found.failed is None
    exact = per_sample(CPU, network, inputs, t0, t1, method)
    assert (found.accepted - exact.accepted).abs().max() <= 1
    assert len(set(found.accepted.tolist())) > 1 or len(found.y) == 1
    if method != "tsit5":  # whose estimate of a small error is mostly rounding in float32
        torch.testing.assert_close(found.y.double(), exact.y, **NEAR)
    assert all(found.kept.steps(r)[0][-1] == t1 for r in range(len(found.y)))
    check_rows(kernels, network, inputs, found, method)


def test_a_row_does_not_depend_on_the_others(kernels):
    network, inputs = case("condition")
    inputs = single(inputs)
    found = per_sample(kernels, network, inputs)
    for r in (0, 15, 16, 32):
        row = slice(r, r + 1)
        own = replace(inputs, y0=inputs.y0[row], conds=[x[row] for x in inputs.conds])
        alone = per_sample(kernels, network, own)
        assert torch.equal(alone.y[0], found.y[r])
        assert alone.kept.steps(0) == found.kept.steps(r)
        assert alone.evaluations[0] == found.evaluations[r]


def test_rows_that_do_not_reach_the_end(kernels):
    network, inputs = case("condition")
    inputs = single(inputs)
    good = per_sample(kernels, network, inputs)
    inputs.y0[20] = torch.inf
    found = per_sample(kernels, network, inputs)
    assert found.failed == 20
    assert found.kept.ended(20)[0] == "not finite"
    assert found.kept.ended(19)[0] == "done"
    others = [r for r in range(33) if r != 20]
    assert torch.equal(found.y[others], good.y[others])
    few = per_sample(kernels, network, single(case("condition")[1]), max_num_steps=3)
    assert few.failed is not None
    assert few.kept.ended(few.failed)[0] == "too many steps"
    assert int(few.accepted.max()) == 3


@pytest.mark.parametrize("parts", [False, True])
def test_gradients_of_weights_after_the_kernel(kernels, monkeypatch, parts):
    network, inputs = case("condition")
    module = on_host()
    stages = METHODS["bosh3"].tableau.stages
    sizes = [module.plan(network, 3, 1, stages, True, deferred, True).bytes for deferred in (0, 1)]
    assert sizes[1] < sizes[0]
    monkeypatch.setattr(module, "_limits", lambda device: (sizes[0] - 1, 2))
    if parts:
        monkeypatch.setattr(module, "ROOM", 0)
        monkeypatch.setattr(module, "MIN_ROWS", 16)
    found = per_sample(kernels, network, single(inputs))
    torch.full((1 << 20,), torch.nan)  # what memory that is not written may hold
    check_rows(kernels, network, inputs, found, "bosh3")


def test_a_solve_holds_no_more_than_its_steps(kernels):
    network, inputs = case("several blocks")
    shared = run(kernels, network, single(inputs), TIMES["back"]).kept.inputs
    own = per_sample(kernels, network, single(inputs)).kept.found.inputs
    for kept in (shared, own):
        assert kept.untyped_storage().nbytes() == 4 * kept.numel() > 0


def test_what_a_device_says_of_many_rows():
    fields = [(0.5, 0.1, 0.25, 7, 2, 5, 1, 0), (0.7, 0.2, math.inf, 9, 1 << 40, 3, 1, 2)]
    table = b"".join(cuda_adaptive.PROGRESS.pack(*x) for x in fields)
    found = Progress(torch.frombuffer(bytearray(table), dtype=torch.uint8).view(2, -1))
    assert found.ratio.tolist() == [0.25, math.inf]
    assert (found.rejected.tolist(), found.accepted.tolist()) == ([2, 1 << 40], [5, 3])
    assert found.outcome.tolist() == [0, 2]


def test_steps_of_the_rows_own_need_some_more_room(kernels, monkeypatch):
    network, inputs = case("condition")
    module, stages = on_host(), METHODS["bosh3"].tableau.stages
    sizes = [module.plan(network, 2, 1, stages, True, True, own).bytes for own in (False, True)]
    assert sizes[0] < sizes[1]
    monkeypatch.setattr(module, "_limits", lambda device: (sizes[1] - 1, 2))
    before = torch.get_float32_matmul_precision()
    try:
        # Where two terms of a number suffice for the tolerance, but do not fit, one is taken.
        torch.set_float32_matmul_precision("medium")
        assert run(kernels, network, single(inputs), [0.0, 1.0], "bosh3").kept.split == 2
        own = per_sample(kernels, network, single(inputs))
        assert own.kept.split == 1
        kernels.backward_per_sample(own.kept, own.y, all_of(inputs))
        torch.set_float32_matmul_precision("high")
        with pytest.raises(InputError, match=f"take {sizes[1]} bytes"):
            per_sample(kernels, network, single(inputs))
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_are_more_exact_than_the_tolerance(kernels):
    network, inputs = case("condition")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        fine = run(kernels, network, single(inputs), [0.0, 1.0], rtol=1e-5, atol=1e-6)
        rough = run(kernels, network, single(inputs), [0.0, 1.0], rtol=1e-2, atol=1e-2)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (fine.kept.split, rough.kept.split) == (3, 2)
    exact = run(CPU, network, inputs, [0.0, 1.0], rtol=1e-5, atol=1e-6)
    assert fine.program.steps == exact.program.steps


def test_odeint_and_solve_take_this_path(kernels, monkeypatch):
    monkeypatch.setattr(whole_solve, "choose_trajectory", lambda *args: kernels)
    torch.manual_seed(0)
    field, x0 = MLP(2, hidden=(16, 16), activation="silu"), torch.randn(20, 2, requires_grad=True)
    t = torch.linspace(0, 1, 3)
    tolerances = {"rtol": 1e-4, "atol": 1e-5}
    tensors = [x0, *field.parameters()]

    def gradients(y):
        return [y, *torch.autograd.grad((y * weights_of(y).float()).sum(), tensors)]

    ways = (
        lambda: odeint(field, x0, t, method="dopri5", **tolerances),
        lambda: solve(field, x0, method="tsit5", **tolerances).y,
        lambda: solve(field, x0, method="bosh3", options={"per_sample": True}, **tolerances).y,
    )
    found = [gradients(way()) for way in ways]
    monkeypatch.undo()
    for mine, way in zip(found, ways, strict=True):
        for a, b in zip(mine, gradients(way()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
