"""Claims about BDF2: its coefficients on any grid, its order, its stability and its failures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from problems import PROBLEMS, NeuralField, random_state
from torch import Tensor

from fmft_fast import odeint, odeint_adjoint, odeint_dense, odeint_event, record_stats, solve
from fmft_fast.errors import NonFiniteWarning
from fmft_fast.solvers.bdf import BDF2Stepper
from fmft_fast.solvers.implicit import NOT_CONVERGED
from fmft_fast.solvers.inputs import Perturb

F64 = torch.float64


def uneven(steps: int) -> Tensor:
    """[steps + 1] times from 0 to 1 whose steps differ up to thirty-fold."""
    s = torch.linspace(0, 1, steps + 1, dtype=F64)
    return s + 0.15 * torch.sin(2 * math.pi * s)


def even(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=F64)


@pytest.mark.parametrize("grid", [even, uneven])
@pytest.mark.parametrize("problem", ["forced", "logistic", "linear", "oscillator"])
def test_errors_fall_with_order_two(problem: str, grid: Callable[[int], Tensor]) -> None:
    case = PROBLEMS[problem]
    errors = []
    for steps in (100, 200):
        t = case.t0 + (case.t1 - case.t0) * grid(steps)
        y = odeint(case.make_field(), case.start(t), t, method="bdf2")[-1]
        errors.append((y - case.y_exact(t)[-1]).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.2


@pytest.mark.parametrize("reverse", [False, True])
def test_parabolas_are_exact_on_any_grid(reverse: bool) -> None:
    """A method of order two has no error for them; wrong weights for uneven steps would show."""
    t = uneven(12).flip(0) if reverse else uneven(12)
    rates = torch.tensor([[0.3, -2.0], [1.0, 0.7]], dtype=F64)
    y = odeint(
        lambda t, y: rates[0] + 2 * rates[1] * t, torch.zeros(2, dtype=F64), t, method="bdf2"
    )
    exact = rates[0] * t[:, None] + rates[1] * t[:, None] ** 2
    torch.testing.assert_close(y, exact - exact[0], rtol=1e-12, atol=1e-12)


def test_equal_steps_are_those_of_the_textbook() -> None:
    field = NeuralField()
    y = odeint(field, random_state(4, 3), even(6), method="bdf2")
    for n in range(2, 7):
        formula = 4 / 3 * y[n - 1] - 1 / 3 * y[n - 2] + 2 / 3 / 6 * field(even(6)[n], y[n])
        torch.testing.assert_close(y[n], formula, rtol=1e-8, atol=1e-8)


def test_first_step_is_one_of_trbdf2() -> None:
    y0, t = random_state(4, 3), torch.tensor([0.2, 0.5], dtype=F64)
    first, same = (odeint(NeuralField(), y0, t, method=m)[-1] for m in ("bdf2", "trbdf2"))
    assert torch.equal(first, same)


@pytest.mark.parametrize("perturb", [False, True])
def test_later_steps_evaluate_the_field_at_their_end_only(perturb: bool) -> None:
    calls = []

    def field(t: Tensor, y: Tensor, perturb: Perturb) -> Tensor:
        calls.append((t.item(), perturb))
        return torch.ones_like(y)

    stepper = BDF2Stepper(field, torch.zeros(2, dtype=F64), perturb=perturb)
    y, t = torch.zeros(2, dtype=F64), torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64)
    for t0, t1 in zip(t[:-1], t[1:], strict=True):
        y, f0 = stepper.step(t0, t1, t1 - t0, y)
        torch.testing.assert_close(y, t1.expand(2))
        assert torch.equal(f0, torch.ones(2, dtype=F64))
    start = [(0.0, Perturb.NEXT if perturb else Perturb.NONE)]
    middle = [(pytest.approx(0.25 * (2 - math.sqrt(2))), Perturb.NONE)]
    ends = [(end, Perturb.PREV) for end in (0.25, 0.5, 1.0)]
    assert calls == start + middle + ends


def test_stiff_parts_die_out_in_steps_a_thousand_times_too_long() -> None:
    """L-stability; the implicit midpoint rule, which is only A-stable, flips their sign instead."""

    def ends(method: str) -> Tensor:
        y0 = torch.ones(1, dtype=F64)
        return odeint(lambda t, y: -1e4 * y, y0, even(10), method=method)[:, 0].abs()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = ends("bdf2")
    assert (y[1:] < 5e-3).all() and y[-1] < 1e-9
    assert ends("implicit_midpoint")[-1] > 0.95


def test_stiff_systems_follow_the_slow_solution() -> None:
    """Rates 1 and 1e5 mixed by a rotation; explicit Euler would need 50,000 steps."""
    mix = torch.linalg.qr(random_state(3, 3)).Q
    rates = torch.tensor([1.0, 30.0, 1e5], dtype=F64)
    matrix = -mix @ torch.diag(rates) @ mix.T
    y0 = mix @ torch.ones(3, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = odeint(lambda t, y: matrix @ y, y0, even(100), method="bdf2")[-1]
    torch.testing.assert_close(mix.T @ y, torch.exp(-rates), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("angle", [95, 120, 150, 180])
@pytest.mark.parametrize("size", [0.1, 3.0, 100.0])
def test_decay_stays_decay_whatever_the_step(angle: int, size: float) -> None:
    """A-stability: eigenvalues all over the left half plane, by thirty steps of length one."""
    rate = size * torch.exp(torch.tensor(1j * math.radians(angle), dtype=torch.complex128))
    y0 = torch.ones(1, dtype=torch.complex128)
    t = torch.arange(61, dtype=F64)
    y = odeint(lambda t, y: rate * y, y0, t, method="bdf2")[:, 0].abs()
    assert y[30:].max() < y[:30].max() and y[-1] < 0.9


def test_backward_solves_are_those_of_the_mirrored_field() -> None:
    field, y0, t = NeuralField(), random_state(4, 3), uneven(9)
    back = odeint(field, y0, t.flip(0), method="bdf2")
    mirrored = odeint(lambda t, y: -field(-t, y), y0, -t.flip(0), method="bdf2")
    torch.testing.assert_close(back, mirrored, rtol=1e-13, atol=1e-13)
    there = odeint(field, y0, even(200), method="bdf2")[-1]
    again = odeint(field, there, even(200).flip(0), method="bdf2")[-1]
    assert (there - y0).abs().max() > 0.1
    torch.testing.assert_close(again, y0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_outputs_between_steps(interp: str) -> None:
    case = PROBLEMS["linear"]
    t = torch.tensor([0.0, 0.333, 0.8, 1.9], dtype=F64)
    options = {"step_size": 0.01, "interp": interp}
    y = odeint(case.make_field(), case.start(t), t, method="bdf2", options=options)
    tolerance = 5e-4 if interp == "linear" else 1e-4
    torch.testing.assert_close(y, case.y_exact(t), rtol=tolerance, atol=tolerance)
    dense = odeint_dense(
        case.make_field(), case.start(t), t[0], t[-1], method="bdf2", options={"step_size": 0.01}
    )
    torch.testing.assert_close(dense(t), case.y_exact(t), rtol=1e-4, atol=1e-4)


def test_events_end_a_solve() -> None:
    t, y = odeint_event(
        lambda t, y: -y,
        torch.ones(1, dtype=F64),
        torch.tensor(0.0, dtype=F64),
        event_fn=lambda t, y: y[0] - 0.5,
        method="bdf2",
        options={"step_size": 0.01, "interp": "cubic"},
    )
    assert t.item() == pytest.approx(math.log(2), abs=1e-4)
    assert y[-1].item() == pytest.approx(0.5, abs=1e-6)


def test_float32_keeps_its_dtype_and_converges_for_many_entries() -> None:
    """The 2-norm of 100,000 rounding errors is above the absolute tolerance."""
    y0 = random_state(4096, 32)
    weight = random_state(32, 32, seed=2) / 6
    with warnings.catch_warnings(), record_stats() as log:
        warnings.simplefilter("error")
        exact = odeint(lambda t, y: torch.tanh(y @ weight), y0, even(8), method="bdf2")
        single = odeint(
            lambda t, y: torch.tanh(y @ weight.float()), y0.float(), even(8).float(), method="bdf2"
        )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)
    assert log[1].evaluations <= log[0].evaluations


def test_complex_and_tuple_states() -> None:
    case = PROBLEMS["rotation"]
    t = case.times(101)
    y = odeint(case.make_field(), case.start(t), t, method="bdf2")
    torch.testing.assert_close(y, case.y_exact(t), rtol=1e-3, atol=1e-3)

    def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1], -y[0]

    start = (torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    sine, cosine = odeint(pair, start, even(100), method="bdf2")
    assert (sine[-1] - math.sin(1)).abs().max() < 1e-4
    assert (cosine[-1] - math.cos(1)).abs().max() < 1e-4


def test_continuous_adjoint_is_near_the_exact_gradient() -> None:
    y0 = random_state(4, 3).requires_grad_()
    gradients = []
    for solver in (odeint, odeint_adjoint):
        field = NeuralField()
        y = solver(field, y0, even(2), method="bdf2", options={"step_size": 0.01})
        found = torch.autograd.grad(y[-1].square().sum(), [y0, *field.parameters()])
        gradients.append(torch.cat([g.flatten() for g in found]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_the_iteration() -> None:
    field, y0 = NeuralField(dim=2, width=3), random_state(1, 2).requires_grad_()
    t = torch.tensor([0.1, 0.4, 0.6, 0.7], dtype=F64, requires_grad=True)

    def end(y0: Tensor, t: Tensor) -> Tensor:
        stepper, y = BDF2Stepper(lambda t, y, perturb: field(t, y), y0), y0
        stepper.tol = 1e-13
        for t0, t1 in zip(t[:-1], t[1:], strict=True):
            y, _ = stepper.step(t0, t1, t1 - t0, y)
        return y

    assert torch.autograd.gradcheck(end, (y0, t), rtol=1e-5, atol=1e-7)


def test_equations_that_are_not_solved_warn() -> None:
    with pytest.warns(UserWarning, match=NOT_CONVERGED):
        y = odeint(
            NeuralField(), random_state(4, 3), even(2), method="bdf2", options={"max_iters": 1}
        )
    assert torch.isfinite(y).all()


def test_the_step_that_breaks_is_named() -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.62, torch.inf, 1.0) * torch.ones_like(y)

    for run in (odeint, lambda f, y, t, method: solve(f, y, steps=t, method=method)):
        with pytest.warns(NonFiniteWarning, match="step 6 of 10"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NOT_CONVERGED)
            run(broken, torch.ones(2, dtype=F64), even(10), method="bdf2")
