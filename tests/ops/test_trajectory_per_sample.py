"""Adaptive solves with steps of every row's own, against their replay in torch."""

from __future__ import annotations

import pytest
import torch
from ops.networks import chain, make_inputs, viscosity

from fmft_fast.ops.network import Inputs, Layer, Network, Term, evaluate
from fmft_fast.ops.trajectory import Control, flatten, rebuild
from fmft_fast.solvers.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

cpu = pytest.importorskip("fmft_fast.ops.trajectory_cpu", exc_type=ImportError)
KERNELS = cpu.KERNELS
NETWORKS = {
    "64 x 2": chain(2, (64, 64)),
    "odd widths, conditions": chain(3, (20, 33), "tanh", cond=True),
    "scalar": chain(1, (7,), "gelu", time="none"),
    "skips": chain(7, (24, 24), "silu", skips=True),
    "several panels, conditions": chain(32, (70, 130), "softplus", 1.5, cond=True),
    "viscosity on an MLP": viscosity(7, 40, 3, base=True),
    "one layer": chain(5, ()),
}
TIMES = ((0.0, 1.0), (1.0, -0.5))


def uneven(network, shapes, batch, dtype=torch.float64):
    """Inputs whose rows need numbers of steps that differ."""
    inputs = make_inputs(network, shapes, batch, 0, dtype)
    inputs.parameters[0] = 2 * inputs.parameters[0]
    inputs.y0 = inputs.y0 * torch.linspace(0.1, 3, batch, dtype=dtype)[:, None]
    return inputs


def row_of(inputs, r):
    return Inputs(inputs.y0[r : r + 1], inputs.parameters, [], [x[r : r + 1] for x in inputs.conds])


def solve(network, inputs, method="dopri5", times=TIMES[0], keep="inputs", **control):
    control = Control(**{"rtol": 1e-4, "atol": 1e-5, **control})
    tableau = METHODS[method].tableau
    return KERNELS.adaptive_per_sample(network, tableau, control, inputs, *times, keep)


def everything(inputs):
    return rebuild(inputs, [True] * len(flatten(inputs)))


def weights_of(y):
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)


def replay(network, inputs, method, kept):
    """The final states by the accepted steps of every row, one row at a time, with a graph."""
    tableau, ends = METHODS[method].tableau.advancing, []
    dtype = inputs.y0.dtype
    for r in range(len(inputs.y0)):
        row = row_of(inputs, r)
        y = row.y0
        nodes, sizes = kept.steps(r)
        assert len(nodes) == len(sizes) + 1
        for n, h in enumerate(sizes):
            k = []
            for c, weights in zip(tableau.c, tableau.a, strict=True):
                t = nodes[n + 1] if c == 1 else nodes[n] + c * h
                x = y + h * sum(w * f for w, f in zip(weights, k, strict=True))
                k.append(evaluate(network, row, torch.tensor(t, dtype=dtype), 0, x))
            y = y + h * sum(w * f for w, f in zip(tableau.b, k, strict=True))
        ends.append(y)
    return torch.cat(ends)


def replayed(network, inputs, method, kept, grad):
    """The final states and all gradients of the replay, in the precision of the inputs."""
    leaves = [x.clone().requires_grad_() for x in flatten(inputs)]
    y = replay(network, rebuild(inputs, leaves), method, kept)
    found = torch.autograd.grad(y, leaves, grad.to(y.dtype), materialize_grads=True)
    return [y.detach(), *found]


def compare(network, shapes, batch, method, times):
    inputs = uneven(network, shapes, batch)
    found = solve(network, inputs, method, times)
    assert found.failed is None
    assert all(found.kept.steps(r)[0][-1] == times[1] for r in range(batch))
    grad = weights_of(found.y)
    expected = replayed(network, inputs, method, found.kept, grad)
    gradients = KERNELS.backward_per_sample(found.kept, grad, everything(inputs))
    for x, y in zip(expected, [found.y, *flatten(gradients)], strict=True):
        assert (y - x).abs().max() <= 1e-11 * x.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_are_those_of_the_accepted_steps(isa, name):
    network, shapes = NETWORKS[name]
    for batch, times in ((1, TIMES[0]), (15, TIMES[1])):
        compare(network, shapes, batch, "bosh3", times)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8"])
def test_every_method(method):
    network, shapes = NETWORKS["odd widths, conditions"]
    for batch, times in ((63, TIMES[0]), (3, TIMES[1])):
        compare(network, shapes, batch, method, times)


def test_an_activated_velocity_and_layers_that_nothing_reads():
    layers = (
        Layer(9, (Term(0, 0),), 1, activation="relu"),
        Layer(4, (Term(0, 3),), activation="tanh"),
        Layer(3, (Term(1, 2), Term(0, None)), time=(2, 9), activation="silu"),
    )
    shapes = [(9, 3), (9,), (3, 10), (4, 3)]
    compare(Network(3, layers), shapes, 11, "dopri5", TIMES[0])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_does_not_depend_on_the_others(isa, name, dtype):
    """More rows than a tile has, so that rows take over the places of others."""
    network, shapes = NETWORKS[name]
    inputs = uneven(network, shapes, 101, dtype)
    found = solve(network, inputs, "tsit5")
    for r in range(0, 101, 20):
        alone = solve(network, row_of(inputs, r), "tsit5")
        assert alone.kept.steps(0) == found.kept.steps(r)
        torch.testing.assert_close(alone.y[0], found.y[r], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
@pytest.mark.parametrize("times", TIMES)
def test_one_row_takes_the_steps_of_an_ordinary_adaptive_solve(method, times):
    network, shapes = NETWORKS["odd widths, conditions"]
    tableau = METHODS[method].tableau
    for options in (
        {},
        {"safety": 0.8, "ifactor": 3.0, "dfactor": 0.4, "max_step": 0.3, "first_step": 1.5},
        {"rtol": 1e-8, "atol": 1e-8, "min_step": 0.2},
    ):
        inputs = uneven(network, shapes, 5)
        found = solve(network, inputs, method, times, **options)
        for r in range(5):
            control = Control(**{"rtol": 1e-4, "atol": 1e-5, **options}, meet=True)
            one = KERNELS.adaptive(
                network, tableau, control, row_of(inputs, r), list(times), "nothing"
            )
            counts = (found.accepted[r], found.rejected[r], found.evaluations[r])
            assert (one.program.steps, one.rejected, one.evaluations) == tuple(map(int, counts))
            h = torch.tensor(found.kept.steps(r)[1], dtype=torch.float64)
            torch.testing.assert_close(h, one.program.h, rtol=1e-6, atol=0)
            torch.testing.assert_close(found.y[r], one.out[-1, 0], rtol=1e-7, atol=1e-8)


def decay():
    """A state that decays at the rate 60.5 above zero and at 0.5 below it."""
    layers = (
        Layer(2, (Term(0, 0),), activation="relu"),
        Layer(2, (Term(1, 1), Term(0, 2))),
    )
    network = Network(2, layers)
    parameters = [
        torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64),
        torch.tensor([[-60.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
        torch.tensor([[-0.5, 0.0], [0.0, 0.0]], dtype=torch.float64),
    ]
    return network, parameters


def test_stiff_and_easy_rows_have_their_own_numbers_of_steps():
    network, parameters = decay()
    y0 = torch.ones(40, 2, dtype=torch.float64)
    y0[::4, 0], y0[1::4, 0] = -1.0, -2.0
    found = solve(network, Inputs(y0, parameters))
    easy = y0[:, 0] < 0
    assert found.accepted[easy].max() < found.accepted[~easy].min() / 2
    exact = y0 * torch.exp(torch.where(easy, -0.5, -60.5))[:, None]
    torch.testing.assert_close(found.y[:, 0], exact[:, 0], rtol=1e-3, atol=1e-4)
    assert torch.equal(found.evaluations, 2 + 6 * (found.accepted + found.rejected))


def test_float32_errs_at_most_twice_as_much_as_torch():
    network, shapes = NETWORKS["odd widths, conditions"]
    inputs = uneven(network, shapes, 63, torch.float32)
    found = solve(network, inputs)
    grad = weights_of(found.y)
    gradients = KERNELS.backward_per_sample(found.kept, grad, everything(inputs))
    rough = replayed(network, inputs, "dopri5", found.kept, grad)
    wide = rebuild(inputs, [x.double() for x in flatten(inputs)])
    exact = replayed(network, wide, "dopri5", found.kept, grad)
    for x, y, z in zip(exact, rough, [found.y, *flatten(gradients)], strict=True):
        assert z.dtype == torch.float32
        allowed = 2 * (y.double() - x).abs().max() + 1e-6 * x.abs().max()
        assert (z.double() - x).abs().max() <= allowed


def test_subsets_of_gradients_and_kept_inputs():
    network, shapes = NETWORKS["odd widths, conditions"]
    inputs = uneven(network, shapes, 17)
    found = solve(network, inputs)
    grad = weights_of(found.y)
    whole = flatten(KERNELS.backward_per_sample(found.kept, grad, everything(inputs)))
    for chosen in range(len(whole)):
        wanted = rebuild(inputs, [i == chosen for i in range(len(whole))])
        one = flatten(KERNELS.backward_per_sample(found.kept, grad, wanted))
        assert [x is not None for x in one] == flatten(wanted)
        torch.testing.assert_close(one[chosen], whole[chosen], rtol=1e-12, atol=1e-13)
    nothing = solve(network, inputs, keep="nothing")
    assert torch.equal(nothing.y, found.y)
    with pytest.raises(ValueError, match="kept its stage inputs"):
        KERNELS.backward_per_sample(nothing.kept, grad, everything(inputs))


def test_bits_are_the_same_from_run_to_run_and_threads_share_the_batch():
    network, shapes = NETWORKS["odd widths, conditions"]
    inputs = uneven(network, shapes, 257)

    def run():
        found = solve(network, inputs)
        grad = weights_of(found.y)
        return [
            found.y,
            *flatten(KERNELS.backward_per_sample(found.kept, grad, everything(inputs))),
        ]

    one = run()
    poison = rebuild(inputs, [torch.full_like(x, torch.nan) for x in flatten(inputs)])
    solve(network, poison)  # what it leaves in memory must not be read
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again, last = run(), run()
        assert all(torch.equal(x, y) for x, y in zip(again, last, strict=True))
        assert torch.equal(again[0], one[0])
        for x, y in zip(one, again, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_rows_that_end_early_say_why_and_leave_the_others_alone():
    network, shapes = NETWORKS["odd widths, conditions"]
    inputs = uneven(network, shapes, 101)
    clean = solve(network, inputs)
    for start in (None, 0.1):
        inputs.y0[[70, 80], 1] = torch.nan
        found = solve(network, inputs, first_step=start)
        assert found.failed == 70 and found.kept.ended(80)[0] == "not finite"
        assert found.kept.ended(69)[0] == "done"
    found = solve(network, inputs)
    others = ~inputs.y0.isnan().any(1)
    assert torch.equal(found.y[others], clean.y[others])
    inputs = uneven(network, shapes, 30)
    assert solve(network, inputs, first_step=0.0).kept.ended(0)[0] == "underflow"
    most = int(clean.accepted.min()) + 1
    found = solve(network, inputs, max_num_steps=most)
    slow = [r for r in range(30) if found.kept.ended(r)[0] == "too many steps"]
    assert slow and slow[0] == found.failed
    attempts = found.accepted + found.rejected
    assert attempts[slow].eq(most).all() and attempts.max() == most


def test_no_rows():
    network, shapes = NETWORKS["64 x 2"]
    inputs = make_inputs(network, shapes, 0, 0)
    found = solve(network, inputs)
    assert found.failed is None and found.y.shape == (0, 2)
    gradients = KERNELS.backward_per_sample(found.kept, found.y, everything(inputs))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in flatten(gradients))
