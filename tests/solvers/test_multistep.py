"""Claims about the Adams steps: their weights, history, corrector and order."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from problems import PROBLEMS, NeuralField, random_state
from torch import Tensor

import fmft_fast
from fmft_fast.errors import InputError
from fmft_fast.solvers.implicit import NOT_CONVERGED
from fmft_fast.solvers.inputs import Perturb
from fmft_fast.solvers.multistep import MAX_ORDER, AdamsStepper, adams_weights

TIGHT = dict(rtol=1e-13, atol=1e-13, max_iters=50)


def make_stepper(field: Callable, y0: Tensor, *, implicit: bool, **kwargs) -> AdamsStepper:
    def func(t: Tensor, y: Tensor, perturb: Perturb = Perturb.NONE) -> Tensor:
        return field(t.to(y.dtype.to_real()), y)

    kwargs = {"rtol": 1e-7, "atol": 1e-9, **kwargs}
    return AdamsStepper(func, y0, implicit=implicit, **kwargs)


def integrate(stepper: AdamsStepper, t: Tensor, y: Tensor) -> Tensor:
    for t0, t1 in zip(t[:-1], t[1:], strict=True):
        y, _ = stepper.step(t0, t1, t1 - t0, y)
    return y


@pytest.mark.parametrize(
    ("implicit", "denominator", "numerators"),
    [
        (False, 1, (1,)),
        (False, 2, (3, -1)),
        (False, 12, (23, -16, 5)),
        (False, 24, (55, -59, 37, -9)),
        (False, 720, (1901, -2774, 2616, -1274, 251)),
        (True, 1, (1,)),
        (True, 2, (1, 1)),
        (True, 12, (5, 8, -1)),
        (True, 24, (9, 19, -5, 1)),
        (True, 720, (251, 646, -264, 106, -19)),
    ],
)
def test_weights_are_the_classical_ones(implicit, denominator, numerators):
    expected = tuple(float(Fraction(n, denominator)) for n in numerators)
    assert adams_weights(len(numerators), implicit=implicit) == expected


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("nodes", range(1, MAX_ORDER + 1))
def test_weights_integrate_polynomials_below_their_order_exactly(implicit, nodes):
    weights = [Fraction(w) for w in adams_weights(nodes, implicit=implicit)]
    newest = 1 if implicit else 0

    def defect(power: int) -> float:
        total = sum(w * Fraction(newest - i) ** power for i, w in enumerate(weights))
        return float(total - Fraction(1, power + 1))

    size = float(sum(abs(w) for w in weights))
    for power in range(nodes):
        assert abs(defect(power)) <= 1e-15 * size * max(1, nodes - 1) ** power
    assert abs(defect(nodes)) > 1e-3


@pytest.mark.parametrize(
    ("implicit", "max_order", "order"), [(False, 4, 3), (False, 5, 4), (True, 4, 4), (True, 5, 5)]
)
@pytest.mark.parametrize("problem", ["forced", "logistic"])
def test_errors_fall_with_the_order(implicit, max_order, order, problem):
    """The explicit method of max_order m uses m - 1 slopes."""
    problem = PROBLEMS[problem]
    y1 = problem.y_exact(problem.times(2))[1]
    errors = []
    for steps in (80, 160):
        t = problem.times(steps + 1)
        y0 = problem.start(t)
        stepper = make_stepper(
            problem.make_field(), y0, implicit=implicit, max_order=max_order, **TIGHT
        )
        errors.append((integrate(stepper, t, y0) - y1).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("perturb", [False, True])
def test_field_is_evaluated_at_these_times_and_no_others(implicit, perturb):
    """A constant field: two steps of Kutta's 3/8 rule, then one predictor, and one correction."""
    calls = []

    def func(t: Tensor, y: Tensor, perturb: Perturb) -> Tensor:
        calls.append((round(t.item() * 3, 9), perturb))
        return torch.ones_like(y)

    y0 = torch.zeros(2, dtype=torch.float64)
    stepper = AdamsStepper(func, y0, implicit=implicit, rtol=1e-6, atol=1e-8, perturb=perturb)
    y = integrate(stepper, torch.arange(5, dtype=torch.float64), y0)
    torch.testing.assert_close(y, torch.full_like(y0, 4.0))
    at_start = Perturb.NEXT if perturb else Perturb.NONE
    at_end = Perturb.PREV if perturb else Perturb.NONE
    expected = []
    for start in (0, 3):
        inner = [(start + 1, Perturb.NONE), (start + 2, Perturb.NONE)]
        expected += [(start, at_start), *inner, (start + 3, at_end)]
    for start in (6, 9):
        expected += [(start, at_start), *([(start + 3, at_end)] if implicit else [])]
    assert calls == expected


def test_first_steps_are_those_of_rk4():
    y0 = random_state(4, 3)
    t = torch.tensor([0.0, 0.2, 0.4], dtype=torch.float64)
    expected = fmft_fast.odeint(NeuralField(), y0, t, method="rk4")[-1]
    y = integrate(make_stepper(NeuralField(), y0, implicit=False), t, y0)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("max_order", [1, 2, 3])
def test_low_orders_warn_and_stay_with_rk4(max_order):
    y0 = random_state(4, 3)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    with pytest.warns(UserWarning, match="reduces to `rk4`"):
        stepper = make_stepper(NeuralField(), y0, implicit=True, max_order=max_order)
    expected = fmft_fast.odeint(NeuralField(), y0, t, method="rk4")[-1]
    torch.testing.assert_close(integrate(stepper, t, y0), expected, rtol=1e-13, atol=1e-13)


def test_orders_above_twelve_are_refused():
    with pytest.raises(InputError, match="at most 12, got 13"):
        make_stepper(NeuralField(), random_state(1, 3), implicit=True, max_order=13)


def test_step_without_convergence_warns_and_forgets_the_oldest_slope():
    y0 = random_state(4, 3)
    stepper = make_stepper(NeuralField(), y0, implicit=True, max_iters=1, rtol=1e-14, atol=1e-14)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    y = integrate(stepper, t[:3], y0)
    assert len(stepper.history) == 2
    for t0, t1 in zip(t[2:-1], t[3:], strict=True):
        with pytest.warns(UserWarning, match=NOT_CONVERGED):
            y, _ = stepper.step(t0, t1, t1 - t0, y)
        assert len(stepper.history) == 2


@pytest.mark.parametrize("implicit", [False, True])
def test_solve_back_returns_to_the_start(implicit):
    problem = PROBLEMS["oscillator"]
    t = problem.times(81)
    y0 = problem.start(t)
    options: dict[str, Any] = dict(implicit=implicit, max_order=6, **TIGHT)
    there = integrate(make_stepper(problem.make_field(), y0, **options), t, y0)
    back = integrate(make_stepper(problem.make_field(), y0, **options), t.flip(0), there)
    torch.testing.assert_close(there, problem.y_exact(t)[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back, y0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implicit", [False, True])
def test_complex_and_float32_states_keep_their_dtype(implicit):
    problem = PROBLEMS["rotation"]
    t = problem.times(81)
    y0 = problem.start(t)
    options: dict[str, Any] = dict(implicit=implicit, max_order=6, rtol=1e-5, atol=1e-6)
    y = integrate(make_stepper(problem.make_field(), y0, **options), t, y0)
    torch.testing.assert_close(y, problem.y_exact(t)[-1], rtol=1e-6, atol=1e-6)

    y0 = random_state(4, 3)
    double = integrate(make_stepper(NeuralField(), y0, **options), t, y0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepper = make_stepper(NeuralField().float(), y0.float(), **options)
        single = integrate(stepper, t, y0.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implicit", [False, True])
def test_gradients_are_those_of_the_computation(implicit):
    field = NeuralField(dim=2, width=3)
    y0 = random_state(1, 2).requires_grad_()
    t = torch.linspace(0, 1, 6, dtype=torch.float64).requires_grad_()
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def solve(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        def scaled(time: Tensor, y: Tensor) -> Tensor:
            return weight * field(time, y)

        return integrate(make_stepper(scaled, y0, implicit=implicit, **TIGHT), t, y0)

    assert torch.autograd.gradcheck(solve, (y0, t, weight), rtol=1e-5, atol=1e-7)
