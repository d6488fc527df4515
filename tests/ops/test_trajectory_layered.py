"""Trajectories layer by layer against the contract in plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from networks import RESIDUALS, chain, make_inputs, make_program, residual, viscosity
from torch.utils._python_dispatch import TorchDispatchMode

from fmft_fast.ops import trajectory_layered
from fmft_fast.ops.network import ACTIVATIONS, Layer, Network, Term
from fmft_fast.ops.trajectory import Reference, flatten, rebuild
from fmft_fast.ops.trajectory_layered import KERNELS

REFERENCE = Reference()


def everything(inputs):
    return rebuild(inputs, [True] * len(flatten(inputs)))


def solve(kernels, program, inputs, keep, grad, wanted=None):
    """Outputs and gradients in one list."""
    out, kept = kernels.forward(program, inputs, keep)
    grads = kernels.backward(program, inputs, kept, grad, wanted or everything(inputs))
    return [out, *flatten(grads)]


def check(program, shapes, batch, keep="activations", wanted=None):
    """Compare float64 with the reference, and float32 with torch's own error there."""
    stages = program.steps * program.stages
    return compare(program, make_inputs(program.network, shapes, batch, stages), keep, wanted)


def compare(program, inputs, keep, wanted=None):
    """As `check`, of given tensors."""
    grad = torch.randn(len(program.outputs), *inputs.y0.shape, dtype=torch.float64)
    true = solve(REFERENCE, program, inputs, keep, grad, wanted)
    got = solve(KERNELS, program, inputs, keep, grad, wanted)
    low = rebuild(inputs, [x.float() for x in flatten(inputs)])
    plain = solve(REFERENCE, program, low, keep, grad.float(), wanted)
    ours = solve(KERNELS, program, low, keep, grad.float(), wanted)
    for x, y, p, z in zip(true, got, plain, ours, strict=True):
        assert (x is None) == (y is None) == (z is None)
        if x is not None:
            assert (x - y).norm() <= 1e-12 * x.norm()
            assert z.dtype == torch.float32
            assert (x - z).norm() <= 2 * (x - p).norm() + 1e-6 * x.norm()
    return true


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_and_without_skips(activation, keep):
    slope = 0.7 if activation in ("leaky_relu", "elu", "softplus") else 1.0
    for skips in (False, True):
        network, shapes = chain(3, (7, 7), activation, slope, skips=skips)
        check(make_program(network, "midpoint", 2, uneven=True), shapes, 5, keep)


@pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
def test_activations_whose_result_does_not_tell_the_argument(activation):
    network, shapes = chain(2, (5, 5), activation, -0.4, skips=True)
    check(make_program(network, "euler", 2), shapes, 4)


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("time", ["column", "tables", None])
@pytest.mark.parametrize("cond", [False, True])
def test_time_and_conditions(time, cond, keep):
    network, shapes = chain(2, (6, 5), "silu", time=time, cond=cond)
    check(make_program(network, "rk4", 2, uneven=True), shapes, 3, keep)


@pytest.mark.parametrize("batch", [1, 15, 63])
@pytest.mark.parametrize("state", [1, 2, 7, 32])
def test_sizes(batch, state):
    for hidden in ((), (9,), (8, 33, 15, 4, 6)):
        network, shapes = chain(state, hidden)
        check(make_program(network, "euler", 3), shapes, batch)


@pytest.mark.parametrize("method", ["heun2", "dopri5", "tsit5", "dopri8"])
def test_methods(method):
    network, shapes = chain(3, (6,), cond=True)
    check(make_program(network, method, 2, (0, 1, 1, 2), uneven=True), shapes, 4, "inputs")


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("base", [False, True])
def test_several_terms(base, keep):
    network, shapes = viscosity(5, 9, branches=3, base=base)
    check(make_program(network, "rk4", 3), shapes, 6, keep)


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("name", RESIDUALS)
def test_v_and_gav_as_one_field(name, keep):
    compare(*residual(name, 33, "rk4"), keep)


def test_an_identity_term_a_shared_matrix_and_a_dead_layer():
    network = Network(
        3,
        (
            Layer(4, (Term(0, 0, 1),), 1, activation="tanh", time=(0, 0)),
            Layer(4, (Term(1, 2),), activation="relu", skips=(1, 1)),
            Layer(4, (Term(1, 2), Term(2, None)), 1, cond=0),
            Layer(4, (Term(2, 2),), 1, activation="gelu"),
            Layer(3, (Term(3, 3), Term(0, None)), skips=(0,)),
        ),
    )
    true = check(make_program(network, "midpoint", 3), [(4, 6), (4,), (4, 4), (3, 4)], 5)
    assert torch.all(true[2][:, 4:] == 0) and torch.any(true[2][:, :4] != 0)


def test_a_layer_of_skips_alone_and_one_that_ignores_the_state():
    network = Network(2, (Layer(2, (), 0, activation="elu"), Layer(2, (), skips=(1,))))
    check(make_program(network, "euler", 2), [(2,)], 3)
    network = Network(2, (Layer(2, (Term(0, None),), cond=0, table=0),))
    check(make_program(network, "euler", 2), [], 3)


@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_dense_output(keep):
    network, shapes = chain(2, (5,), "tanh")
    program = make_program(network, "rk4", 4)
    weights = torch.rand(3, 4, dtype=torch.float64)
    check(dataclasses.replace(program, outputs=(1, 1, 3), weights=weights), shapes, 3, keep)


@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_chunks_of_any_size(keep, monkeypatch):
    network, shapes = chain(3, (6, 6), "gelu", time="tables", cond=True, skips=True)
    program = make_program(network, "midpoint", 5)
    per_step = 2 * 4 * 15 * 8 * (1 if keep == "activations" else 3)
    for steps in (0, 1, 2, 4):
        monkeypatch.setattr(trajectory_layered, "BUDGET", steps * per_step)
        assert trajectory_layered.steps_per_chunk(
            program, torch.empty(4, 3, dtype=torch.float64), keep == "activations"
        ) == max(1, steps)
        check(program, shapes, 4, keep)


def test_only_wanted_gradients():
    network, shapes = chain(2, (4, 4), time="tables", cond=True)
    program = make_program(network, "midpoint", 2)
    inputs = make_inputs(network, shapes, 3, 4)
    count = len(flatten(inputs))
    for only in range(count):
        check(program, shapes, 3, wanted=rebuild(inputs, [i == only for i in range(count)]))


def test_runs_repeat_bit_for_bit():
    network, shapes = chain(7, (33, 33), "selu")
    program = make_program(network, "rk4", 3, (0, 2, 3))
    inputs = make_inputs(network, shapes, 63, 12, torch.float32)
    grad = torch.randn(3, 63, 7)
    runs = [solve(KERNELS, program, inputs, "activations", grad) for _ in range(2)]
    assert all(map(torch.equal, *runs))
    torch.testing.assert_close(KERNELS.forward(program, inputs, "nothing")[0], runs[0][0])


def test_parameters_that_require_grad_and_lie_apart_are_only_read():
    network, shapes = chain(2, (4,), cond=True)
    program = make_program(network, "euler", 2)
    inputs = make_inputs(network, shapes, 3, 2)
    apart = [torch.stack((x, x), -1)[..., 0].requires_grad_() for x in flatten(inputs)]
    grad = torch.ones(1, 3, 2, dtype=torch.float64)
    a = solve(KERNELS, program, inputs, "inputs", grad)
    b = solve(KERNELS, program, rebuild(inputs, apart), "inputs", grad)
    assert all(map(torch.equal, a, b)) and not any(x.requires_grad for x in b)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_solve_needs_the_bytes_that_it_names(activation, steps):
    network, shapes = chain(3, (64, 64), activation)
    program = make_program(network, "midpoint", steps, (0, steps))
    inputs = make_inputs(network, shapes, 50, 2 * steps)
    grad = torch.ones(2, 50, 3, dtype=torch.float64)

    def peak(work):
        """Most bytes alive at once, of those that the work asks for."""
        with torch.profiler.profile(profile_memory=True) as profile:
            work()
        alive = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                most = max(most, alive)
        return most

    for keep in ("nothing", "inputs", "activations"):
        named = KERNELS.working_bytes(program, inputs.y0, keep)
        if keep == "nothing":
            used = peak(lambda: KERNELS.forward(program, inputs, "nothing"))
        else:
            used = peak(lambda: solve(KERNELS, program, inputs, keep, grad))  # noqa: B023
        results = sum(x.nbytes for x in flatten(inputs)) + 8 * inputs.y0.nbytes
        assert used <= named + 2 * results
        assert named <= 2.1 * used


class Counted(TorchDispatchMode):
    """Counts what would be kernels on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or "empty" in str(func))
        return func(*args, **kwargs or {})


def test_a_step_of_euler_takes_no_more_passes_than_its_products_and_activations():
    network, shapes = chain(3, (8, 8, 8), "selu")

    def passes(steps):
        program = make_program(network, "euler", steps)
        inputs = make_inputs(network, shapes, 5, steps)
        grad = torch.ones(1, 5, 3, dtype=torch.float64)
        with Counted() as forward:
            _, kept = KERNELS.forward(program, inputs, "activations")
        with Counted() as backward:
            KERNELS.backward(program, inputs, kept, grad, everything(inputs))
        return forward.count, backward.count

    (few, few_back), (more, more_back) = passes(8), passes(9)
    assert more - few == 4 + 3 + 1  # and the state after the step
    assert more_back - few_back == 4 + 3 + 2  # and the gradients of the slope and of the state


def test_refuses_other_dtypes():
    network, _ = chain(2, (4,))
    assert KERNELS.refuses(network, 1, 8, torch.float32) is None
    assert "bfloat16" in KERNELS.refuses(network, 1, 8, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_on_a_gpu(keep):
    network, shapes = chain(5, (64, 64), "selu", cond=True)
    program = make_program(network, "rk4", 4)
    inputs = make_inputs(network, shapes, 33, 16)
    grad = torch.randn(1, 33, 5, dtype=torch.float64)
    true = solve(REFERENCE, program, inputs, keep, grad)
    there = rebuild(inputs, [x.cuda() for x in flatten(inputs)])
    for x, y in zip(true, solve(KERNELS, program, there, keep, grad.cuda()), strict=True):
        torch.testing.assert_close(y.cpu(), x, rtol=1e-10, atol=1e-10)
