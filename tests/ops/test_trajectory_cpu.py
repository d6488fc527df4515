"""The compiled trajectory kernels against plain torch in float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from ops.networks import (
    RESIDUALS,
    activation_alone,
    chain,
    make_inputs,
    make_program,
    odd_arguments,
    residual,
    viscosity,
)

from fmft_fast.ops.backend import choose_kernels
from fmft_fast.ops.network import ACTIVATIONS, Inputs, Layer, Network, Term, activate, evaluate
from fmft_fast.ops.trajectory import Control, Program, Reference, flatten, rebuild
from fmft_fast.solvers.adaptive import AdaptiveSolver, integrate_adaptive
from fmft_fast.solvers.inputs import normalise
from fmft_fast.solvers.methods import METHODS as METHODS_BY_NAME

pytestmark = pytest.mark.usefixtures("one_thread")

cpu = pytest.importorskip("fmft_fast.ops.trajectory_cpu", exc_type=ImportError)
REFERENCE = Reference()
METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "bosh3", "dopri5", "tsit5")
NETWORKS = {
    "64 x 3": chain(2, (64, 64, 64)),
    "odd widths": chain(3, (20, 33), "tanh"),
    "tables, conditions, skips": chain(7, (24, 24), "silu", time="tables", cond=True, skips=True),
    "scalar": chain(1, (7,), "gelu", time="none"),
    "one layer": chain(5, ()),
    "several panels": chain(32, (70, 130), "softplus", 1.5),
    "six layers": chain(2, (8,) * 5, "sigmoid"),
    "viscosity": viscosity(2, 16),
    "viscosity on an MLP": viscosity(7, 40, 3, base=True),
}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return rebuild(inputs, [x.to(dtype) for x in flatten(inputs)])


def everything(inputs: Inputs) -> Inputs:
    return rebuild(inputs, [True] * len(flatten(inputs)))


def solve(kernels, program, inputs, keep="inputs", grad=None, wanted=None):
    """The outputs and all gradients of a solve."""
    wanted = everything(inputs) if wanted is None else wanted
    out, kept = kernels.forward(program, inputs, keep)
    if grad is None:
        grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    found = kernels.backward(program, inputs, kept, grad.to(out.dtype), wanted)
    return [out, *flatten(found)]


def check(program, inputs, keep, dtype=torch.float64):
    """Errors are at most twice those of torch in the same precision."""
    exact = solve(REFERENCE, program, inputs)
    rough = solve(REFERENCE, program, cast(inputs, dtype))
    found = solve(cpu.KERNELS, program, cast(inputs, dtype), keep)
    slack = 1e-6 if dtype == torch.float32 else 1e-13
    for x, y, z in zip(exact, rough, found, strict=True):
        assert z.dtype == dtype and z.shape == x.shape
        size = x.abs().max()
        allowed = 2 * (y.double() - x).abs().max() + slack * (size + 1e-3)
        assert (z.double() - x).abs().max() <= allowed


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(isa, name, keep) -> None:
    network, shapes = NETWORKS[name]
    program = make_program(network, "heun3", 3, outputs=(0, 2, 3), uneven=True)
    for batch in (1, 15, 63, 130):
        inputs = make_inputs(network, shapes, batch, 9)
        for dtype in (torch.float32, torch.float64):
            check(program, inputs, keep, dtype)


# Wide enough that a few rows read the weights where they lie; the last ones do not fit the cache.
WIDE = {
    "odd widths": (chain(37, (70, 131), "silu", time="tables", cond=True), 4),
    "narrow state": (chain(3, (150, 90), "tanh"), 3),
    "narrow value": (chain(40, (60, 5, 64), "gelu"), 2),
    "skips": (chain(45, (90, 90), "sigmoid", skips=True, cond=True), 6),
    "viscosity on an MLP": (viscosity(33, 72, 3, base=True), 4),
    "large": (chain(21, (300, 450), "softplus", 1.5, time="tables"), 9),
}


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("name", WIDE)
def test_few_rows_of_wide_networks(isa, name, keep) -> None:
    """Alone, in one block of rows, and in several: by one evaluation, and by many."""
    (network, shapes), most = WIDE[name]
    for batch in (1, 2, 3, most):
        for method, steps in (("euler", 1), ("midpoint", 1), ("heun3", 3)):
            program = make_program(network, method, steps)
            inputs = make_inputs(network, shapes, batch, program.steps * program.stages)
            for dtype in (torch.float32, torch.float64):
                check(program, inputs, keep, dtype)
                found, _ = cpu.KERNELS.forward(program, cast(inputs, dtype), "nothing")
                kept, _ = cpu.KERNELS.forward(program, cast(inputs, dtype), keep)
                assert torch.equal(found, kept)


def test_weights_are_read_within_their_rows(isa) -> None:
    """Next to the columns of a wide tensor lie NaN; nothing keeps the weights of an older solve."""
    network, shapes = chain(3, (150, 90), "tanh")
    program = make_program(network)
    for dtype in (torch.float32, torch.float64):
        inputs = make_inputs(network, shapes, 1, 1, dtype)
        expected, _ = cpu.KERNELS.forward(program, inputs, "nothing")
        wide = [
            torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=dtype)[..., :-3].copy_(x)
            for x in inputs.parameters
        ]
        found, _ = cpu.KERNELS.forward(program, rebuild(inputs, [inputs.y0, *wide]), "nothing")
        assert torch.equal(found, expected)
        inputs.parameters[2].data.neg_()
        changed, _ = cpu.KERNELS.forward(program, inputs, "nothing")
        exact = solve(REFERENCE, program, cast(inputs, torch.float64))[0]
        torch.testing.assert_close(changed.double(), exact, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(changed, expected)


def test_an_adaptive_solve_of_one_row_of_a_wide_network(isa) -> None:
    network, shapes = chain(21, (300, 450), "softplus", 1.5)
    tableau, control = METHODS_BY_NAME["bosh3"].tableau, Control(1e-4, 1e-4)
    inputs = make_inputs(network, shapes, 1, 0)
    for keep in ("inputs", "activations"):
        found = cpu.KERNELS.adaptive(network, tableau, control, inputs, [0.0, 1.0], keep)
        expected = solve(REFERENCE, found.program, inputs)
        grad = torch.linspace(-1, 1, found.out.numel(), dtype=torch.float64)
        gradients = cpu.KERNELS.backward(
            found.program, inputs, found.kept, grad.reshape(found.out.shape), everything(inputs)
        )
        for x, y in zip(expected, [found.out, *flatten(gradients)], strict=True):
            torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("name", RESIDUALS)
def test_v_and_gav_as_one_field(isa, name, keep) -> None:
    program, inputs = residual(name, 23, "heun3", outputs=(1, 2))
    for dtype in (torch.float32, torch.float64):
        check(program, inputs, keep, dtype)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method) -> None:
    network, shapes = chain(3, (20, 12))
    program = make_program(network, method, 4, outputs=(1, 4))
    inputs = make_inputs(network, shapes, 21, program.steps * program.stages)
    for keep in ("inputs", "activations"):
        for dtype in (torch.float32, torch.float64):
            check(program, inputs, keep, dtype)


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(isa, activation, keep) -> None:
    for slope in (0.3, 1.7) if activation == "softplus" else (0.3, -0.2):
        for skips in (False, True):
            network, shapes = chain(3, (12, 12), activation, slope, skips=skips)
            program = make_program(network, "midpoint", 2)
            inputs = make_inputs(network, shapes, 17, 4)
            for dtype in (torch.float32, torch.float64):
                check(program, inputs, keep, dtype)


@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_an_activated_velocity(keep) -> None:
    for activation in ("tanh", "silu"):
        layers = (
            Layer(9, (Term(0, 0),), 1, activation="relu"),
            Layer(3, (Term(1, 2),), activation=activation),
        )
        network = Network(3, layers)
        inputs = make_inputs(network, [(9, 3), (9,), (3, 9)], 10, 4)
        check(make_program(network, "rk4", 1), inputs, keep)


def test_layers_that_nothing_reads_and_a_constant_field() -> None:
    layers = (
        Layer(9, (Term(0, 0),), activation="tanh"),
        Layer(4, (), bias=1, activation="tanh"),
        Layer(3, (Term(2, 2),), time=(2, 4)),
    )
    network = Network(3, layers)
    inputs = make_inputs(network, [(9, 3), (4,), (3, 6)], 10, 4)
    check(make_program(network, "rk4", 1), inputs, "inputs")
    check(make_program(network, "rk4", 1), inputs, "activations")


def test_a_matrix_of_several_readers() -> None:
    """Column ranges, the same range twice, the identity, and a column that nothing reads."""
    layers = (
        Layer(6, (Term(0, 0),), 1, time=(0, 3), activation="tanh"),
        Layer(6, (Term(0, 0), Term(1, 0, 5), Term(1, None)), 1, time=(0, 4), activation="selu"),
        Layer(3, (Term(2, 2), Term(1, 2), Term(0, None))),
    )
    network = Network(3, layers)
    inputs = make_inputs(network, [(6, 12), (6,), (3, 6)], 19, 8)
    check(make_program(network, "rk4", 2), inputs, "inputs")
    found = solve(cpu.KERNELS, make_program(network, "rk4", 2), inputs, "activations")
    assert torch.equal(found[2][:, 11], torch.zeros(6, dtype=torch.float64))
    check(make_program(network, "rk4", 2), inputs, "activations")


@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_dense_output(isa, keep) -> None:
    network, shapes = chain(3, (20, 12))
    tableau = make_program(network, "dopri5", 3)
    generator = torch.Generator().manual_seed(0)
    outputs = (0, 1, 1, 1)  # a last step that nothing reads beyond its start
    weights = torch.rand(4, tableau.stages, generator=generator, dtype=torch.float64)
    program = Program(network, tableau.a, tableau.b, tableau.times, tableau.h, outputs, weights)
    check(program, make_inputs(network, shapes, 21, 18), keep)


def test_stages_that_nothing_reads(isa) -> None:
    network, shapes = chain(3, (20, 12))
    a = ((), (0.5,), (0.1, 0.2), (0.0, 1.0, 0.0), (0.2, 0.3, 0.0, 0.4))
    times = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = torch.full((3,), 0.3, dtype=torch.float64)
    program = Program(network, a, (0.5, 0.0, 0.0, 0.5, 0.0), times, h, (3,))
    for keep in ("inputs", "activations"):
        check(program, make_inputs(network, shapes, 21, 15), keep)
        fsal = torch.tensor([[0.3, 0.0, 0.0, 0.1, 0.6]], dtype=torch.float64)
        dense = Program(network, a, program.b, times, h, (1,), fsal)
        check(dense, make_inputs(network, shapes, 21, 15), keep)


def test_long_solves_flush_the_deltas() -> None:
    network, shapes = chain(2, (64, 64))
    program = make_program(network, "euler", 90)
    check(program, make_inputs(network, shapes, 50, 90), "inputs")
    check(program, make_inputs(network, shapes, 50, 90), "activations")


def test_subsets_of_gradients() -> None:
    network, shapes = chain(3, (20, 12), time="tables", cond=True)
    program = make_program(network, "midpoint", 3)
    inputs = make_inputs(network, shapes, 13, 6)
    whole = solve(cpu.KERNELS, program, inputs, "activations")
    for keep in ("inputs", "activations"):
        for chosen in range(len(whole) - 1):
            for flags in (
                [i == chosen for i in range(len(whole) - 1)],
                [i != chosen for i in range(len(whole) - 1)],
            ):
                wanted = rebuild(inputs, flags)
                found = solve(cpu.KERNELS, program, inputs, keep, wanted=wanted)
                for w, x, y in zip(flags, found[1:], whole[1:], strict=True):
                    assert (x is not None) == w
                    if w:
                        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_layouts_of_the_tensors() -> None:
    network, shapes = chain(3, (20, 12), cond=True)
    program = make_program(network, "midpoint", 3, outputs=(1, 3))
    inputs = make_inputs(network, shapes, 13, 6)
    expected = solve(cpu.KERNELS, program, inputs)
    strided = [
        torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
        for x in flatten(inputs)
    ]
    turned = [x.t().contiguous().t() for x in flatten(inputs)]
    wide = [
        torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)[..., :-3].copy_(x)
        for x in flatten(inputs)
    ]
    for tensors in (strided, turned, wide):
        found = solve(cpu.KERNELS, program, rebuild(inputs, tensors))
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def test_what_older_solves_left_in_memory_is_not_read(isa) -> None:
    """Memory comes back from a pool: a solve of NaN must not show in the next one."""
    network, shapes = chain(3, (20, 17), "silu", time="tables", cond=True, skips=True)
    program = make_program(network, "rk4", 3)
    for dtype in (torch.float32, torch.float64):
        inputs = make_inputs(network, shapes, 70, 12, dtype)
        poison = rebuild(inputs, [torch.full_like(x, torch.nan) for x in flatten(inputs)])
        for keep in ("inputs", "activations"):
            first = solve(cpu.KERNELS, program, inputs, keep)
            solve(cpu.KERNELS, program, poison, keep)
            again = solve(cpu.KERNELS, program, inputs, keep)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_threads_share_the_batch() -> None:
    network, shapes = chain(2, (64, 64, 64), cond=True)
    program = make_program(network, "rk4", 8, outputs=(0, 8))
    inputs = make_inputs(network, shapes, 257, 32)
    one = solve(cpu.KERNELS, program, inputs, "activations")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        two = solve(cpu.KERNELS, program, inputs, "activations")
        again = solve(cpu.KERNELS, program, inputs, "activations")
        for x, y, z in zip(one, two, again, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
            assert torch.equal(y, z)


def test_non_finite_values_stay_in_their_row() -> None:
    network, shapes = chain(2, (20, 20))
    program = make_program(network, "rk4", 2)
    inputs = make_inputs(network, shapes, 50, 8)
    clean, _ = cpu.KERNELS.forward(program, inputs, "nothing")
    flatten(inputs)[0][7, 0] = torch.nan
    out, kept = cpu.KERNELS.forward(program, inputs, "nothing")
    assert kept is None
    assert out[0, 7].isnan().all()
    others = torch.arange(50) != 7
    assert torch.equal(out[:, others], clean[:, others])


def test_no_rows() -> None:
    network, shapes = chain(2, (20, 20), cond=True)
    program = make_program(network, "euler", 2)
    found = solve(cpu.KERNELS, program, make_inputs(network, shapes, 0, 2), "activations")
    assert found[0].shape == (1, 0, 2)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found[2:])


def test_deep_networks() -> None:
    """With skips and small weights, so that roundings do not grow; and as many layers as may be."""
    network, shapes = chain(2, (4,) * 130, "tanh", skips=True)
    program = make_program(network, "midpoint", 2)
    inputs = make_inputs(network, shapes, 9, 4)
    inputs.parameters = [0.1 * x for x in inputs.parameters]
    for keep in ("inputs", "activations"):
        check(program, inputs, keep)
    layer = Layer(1, (Term(0, None),))
    layers = tuple(Layer(1, (Term(i, None),)) for i in range(cpu.MAX_LAYERS))
    found = solve(cpu.KERNELS, make_program(Network(1, layers)), Inputs(torch.ones(3, 1)))
    torch.testing.assert_close(found[0], torch.full((1, 3, 1), (4 / 3) ** 3))
    assert "1024 layers" in cpu.KERNELS.refuses(Network(1, (*layers, layer)), 1, 3, torch.float32)


def test_what_is_refused() -> None:
    network, _ = chain(2, (20,))
    assert cpu.KERNELS.refuses(network, 4, 16, torch.float32) is None
    assert "float16" in cpu.KERNELS.refuses(network, 4, 16, torch.float16)
    assert "16 stages" in cpu.KERNELS.refuses(network, 17, 16, torch.float32)


# Values are within 4 units in the last place; those of these activations, which torch computes with
# cancellation or from a rounded product too, within 4 epsilon of the larger of |value| and this.
FLOORS = {"gelu": 1.0, "gelu_tanh": 1.0, "softplus": 0.1}
BOUND = 4.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_accuracy_of_activations(isa, activation) -> None:
    slope = 0.7
    layer = Layer(1, (), cond=0, activation=activation, slope=slope)
    network = Network(1, (layer,))
    near = torch.logspace(-30, 0, 400, dtype=torch.float64)
    z = torch.cat([torch.linspace(-30, 30, 4001, dtype=torch.float64), near, -near])[:, None]
    # One Euler step with h = 1 from 0 gives the activation itself.
    h = torch.ones(1, dtype=torch.float64)
    program = Program(network, ((),), (1.0,), torch.zeros(1, 1, dtype=torch.float64), h, (1,))
    for dtype in (torch.float32, torch.float64):
        x = z.to(dtype).double().requires_grad_()
        exact = activate(x, activation, slope)
        (slope_exact,) = torch.autograd.grad(exact.sum(), x)
        inputs = Inputs(torch.zeros_like(z, dtype=dtype), [], [], [z.to(dtype)])
        wanted = rebuild(inputs, [False, True])
        out, *rest = solve(
            cpu.KERNELS, program, inputs, "activations", torch.ones(1, *z.shape), wanted
        )
        eps = torch.finfo(dtype).eps
        size = exact.abs().clamp(min=FLOORS.get(activation, 1e-30))
        assert ((out[0].double() - exact).abs() / size).max() <= BOUND * eps
        # In float64 the reference, which is torch's, errs by some eps |z| itself.
        own = 1 if dtype == torch.float32 else 1 + x.abs()
        assert ((rest[-1].double() - slope_exact).abs() / own).max() <= BOUND * eps


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("activation", ["softsign", "asinh", "clipped_cube"])
def test_odd_arguments_of_activations(isa, activation, keep) -> None:
    """Infinite, subnormal, huge numbers and those at the clip: as in torch, also their slopes."""
    for dtype in (torch.float32, torch.float64):
        z = odd_arguments(dtype)[:, None]
        inputs = Inputs(torch.zeros_like(z), [], [], [z])
        wanted = rebuild(inputs, [False, True])
        grad = torch.ones(1, *z.shape)
        out, *grads = solve(cpu.KERNELS, activation_alone(activation), inputs, keep, grad, wanted)
        leaf = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(activate(leaf, activation, 1.0).sum(), leaf)
        eps = torch.finfo(dtype).eps
        expected = activate(z, activation, 1.0)
        torch.testing.assert_close(out[0], expected, rtol=3 * eps, atol=0, equal_nan=True)
        known = ~z.isnan()
        torch.testing.assert_close(
            grads[-1][known], slope[known], rtol=4 * eps, atol=2 * eps, equal_nan=True
        )
        assert grads[-1][~known].isnan().all()


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("activation", ["silu", "sigmoid", "gelu", "gelu_tanh", "softplus"])
def test_large_arguments_of_activations(isa, activation, keep) -> None:
    """Far from zero an exponential is exactly zero, whatever it is multiplied by."""
    for dtype in (torch.float32, torch.float64):
        size = torch.tensor([50.0, 800.0, 1e10, torch.finfo(dtype).max / 4], dtype=dtype)
        z = torch.cat([-size, size])[:, None]
        inputs = Inputs(torch.zeros_like(z), [], [], [z])
        wanted = rebuild(inputs, [False, True])
        grad = torch.ones(1, *z.shape)
        out, *grads = solve(cpu.KERNELS, activation_alone(activation), inputs, keep, grad, wanted)
        leaf = z.clone().requires_grad_()
        expected = activate(leaf, activation, 1.0)
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        torch.testing.assert_close(out[0], expected.detach(), rtol=1e-6, atol=1e-15)
        known = slope.isfinite()  # that of gelu_tanh is not where the square of z is infinite
        assert known.sum() >= 6
        torch.testing.assert_close(grads[-1][known], slope[known], rtol=1e-6, atol=1e-15)


def generic(network, inputs, tableau, control, t):
    """The generic solver on the same field: the solver and the states at t."""

    def field(time, y):
        return evaluate(network, inputs, float(time), 0, y)

    options = {
        name: getattr(control, name)
        for name in ("safety", "ifactor", "dfactor", "min_step", "max_step", "first_step")
    }
    problem = normalise(
        field,
        inputs.y0,
        torch.tensor(t, dtype=torch.float64),
        rtol=control.rtol,
        atol=control.atol,
        method=tableau.name,
        options=options,
    )
    solver = AdaptiveSolver(problem, choose_kernels(inputs.y0, "reference"), problem.options)
    return solver, integrate_adaptive(problem, solver)


ADAPTIVE_TIMES = ([0.0, 0.05, 0.06, 0.9, 2.0], [1.0, -0.5])


@pytest.mark.parametrize("times", ADAPTIVE_TIMES)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8"])
def test_adaptive_steps_are_those_of_the_generic_solver(method, times) -> None:
    network, shapes = chain(3, (20, 24), "tanh", cond=True)
    tableau = METHODS_BY_NAME[method].tableau
    for control in (
        Control(1e-5, 1e-6),
        Control(1e-4, 1e-8, safety=0.8, ifactor=3.0, dfactor=0.4, max_step=0.4, first_step=1.5),
        Control(1e-7, 1e-7, min_step=0.3),
    ):
        inputs = make_inputs(network, shapes, 29, 0)
        inputs.parameters[0] = 4 * inputs.parameters[0]
        solver, expected = generic(network, inputs, tableau, control, times)
        for keep in ("nothing", "inputs", "activations"):
            found = cpu.KERNELS.adaptive(network, tableau, control, inputs, times, keep)
            assert found.outcome == "done"
            counts = (found.program.steps, found.rejected, found.evaluations)
            assert counts == (solver.accepted, solver.rejected, solver.field.evaluations)
            torch.testing.assert_close(found.out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_gradients_of_adaptive_solves(isa, method, keep) -> None:
    """The returned program is an ordinary one: its reference gives outputs and gradients."""
    tableau = METHODS_BY_NAME[method].tableau
    for network, shapes in (NETWORKS["64 x 3"], NETWORKS["viscosity on an MLP"], _activated()):
        for dtype, rtol, bound in ((torch.float64, 1e-4, 1e-11), (torch.float32, 1e-3, 1e-4)):
            for times in ADAPTIVE_TIMES:
                inputs = make_inputs(network, shapes, 70, 0)
                control = Control(rtol, rtol)
                small = cast(inputs, dtype)
                found = cpu.KERNELS.adaptive(network, tableau, control, small, times, keep)
                assert found.program.steps >= 3
                expected = solve(REFERENCE, found.program, inputs)
                shape = expected[0].shape
                grad = torch.linspace(-1, 1, expected[0].numel(), dtype=dtype).reshape(shape)
                gradients = cpu.KERNELS.backward(
                    found.program, small, found.kept, grad, everything(inputs)
                )
                for x, y in zip(expected, [found.out, *flatten(gradients)], strict=True):
                    assert (y.double() - x).abs().max() <= bound * x.abs().max()


def _activated():
    layers = (
        Layer(9, (Term(0, 0),), 1, activation="relu"),
        Layer(3, (Term(1, 2),), activation="tanh"),
    )
    return Network(3, layers), [(9, 3), (9,), (3, 9)]


def test_adaptive_solves_of_many_steps() -> None:
    """More steps than there is room for at first, on several threads."""
    network, shapes = chain(2, (32, 32))
    inputs = make_inputs(network, shapes, 300, 0)
    control = Control(1e-6, 1e-6, max_step=0.02)
    tableau = METHODS_BY_NAME["dopri5"].tableau
    torch.set_num_threads(2)
    found = cpu.KERNELS.adaptive(network, tableau, control, inputs, [0.0, 1.0], "activations")
    assert found.program.steps > 40
    grad = torch.linspace(-1, 1, found.out.numel(), dtype=torch.float64).reshape(2, 300, 2)
    gradients = cpu.KERNELS.backward(found.program, inputs, found.kept, grad, everything(inputs))
    torch.set_num_threads(1)
    expected = solve(REFERENCE, found.program, inputs)
    for x, y in zip(expected, [found.out, *flatten(gradients)], strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-10)


def test_adaptive_solves_that_end_early() -> None:
    tableau = METHODS_BY_NAME["dopri5"].tableau
    layers = (Layer(1, (Term(0, None),), activation="softplus", slope=1e-3),)
    network = Network(1, layers)

    def outcome(value, **bounds):
        inputs = Inputs(torch.full((3, 1), value, dtype=torch.float64))
        control = Control(1e-6, 1e-6, **bounds)
        found = cpu.KERNELS.adaptive(network, tableau, control, inputs, [0.0, 1.0], "inputs")
        assert (found.kept is None) == (found.outcome != "done")
        return found.outcome

    assert outcome(1.0) == "done"
    assert outcome(1.0, max_num_steps=1, max_step=0.1) == "too many steps"
    assert outcome(torch.nan) == "not finite"
    assert outcome(1.0, first_step=0.0) == "underflow"
