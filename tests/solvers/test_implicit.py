"""Claims about implicit Runge-Kutta steps and the Broyden iteration that solves their stages."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from problems import PROBLEMS, NeuralField, random_state
from torch import Tensor

from fmft_fast.solvers.implicit import NOT_CONVERGED, BroydenStepper, broyden
from fmft_fast.solvers.implicit_tableaux import IMPLICIT_TABLEAUX
from fmft_fast.solvers.inputs import Perturb
from fmft_fast.solvers.methods import METHODS

NAMES = tuple(IMPLICIT_TABLEAUX)
SYMMETRIC = ("implicit_midpoint", "trapezoid", "gl4", "gl6")
# The stability function vanishes at infinity: stiff parts die out however large the step.
L_STABLE = ("implicit_euler", "radauIIA3", "radauIIA5", "sdirk2", "trbdf2")


def make_stepper(name: str, field: Callable, y0: Tensor, **kwargs) -> BroydenStepper:
    def func(t: Tensor, y: Tensor, perturb: Perturb = Perturb.NONE) -> Tensor:
        return field(t.to(y.dtype.to_real()), y)

    diagonal = METHODS[name].diagonal
    return BroydenStepper(func, y0, IMPLICIT_TABLEAUX[name], diagonal=diagonal, **kwargs)


def integrate(stepper: BroydenStepper, t: Tensor, y: Tensor) -> Tensor:
    for t0, t1 in zip(t[:-1], t[1:], strict=True):
        y, _ = stepper.step(t0, t1, t1 - t0, y)
    return y


def exact_stepper(name: str, field: Callable, y0: Tensor) -> BroydenStepper:
    """A stepper whose stages are solved to rounding, so that only the method's error is left."""
    stepper = make_stepper(name, field, y0)
    stepper.tol = 1e-13
    return stepper


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem", ["forced", "logistic"])
def test_errors_fall_with_the_order(name, problem):
    problem = PROBLEMS[problem]
    order = IMPLICIT_TABLEAUX[name].order
    coarse = 12 if order >= 5 else 24
    y1 = problem.y_exact(problem.times(2))[1]
    errors = []
    for steps in (coarse, 2 * coarse):
        t = problem.times(steps + 1)
        y0 = problem.start(t)
        y = integrate(exact_stepper(name, problem.make_field(), y0), t, y0)
        errors.append((y - y1).abs().max().item())
    print(errors, math.log2(errors[0] / errors[1]))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("perturb", [False, True])
def test_field_is_evaluated_at_the_nodes_once_per_stage(name, perturb):
    """A constant field converges at once: one evaluation at the start, one per implicit stage."""
    calls = []

    def field(t: Tensor, y: Tensor, perturb: Perturb) -> Tensor:
        calls.append((t.item(), perturb))
        return torch.ones_like(y)

    tableau = IMPLICIT_TABLEAUX[name]
    y0 = torch.zeros(2, dtype=torch.float64)
    stepper = BroydenStepper(field, y0, tableau, perturb=perturb, diagonal=METHODS[name].diagonal)
    t0, t1 = torch.tensor([0.5, 0.75], dtype=torch.float64)
    y1, f0 = stepper.step(t0, t1, t1 - t0, y0)
    start = Perturb.NEXT if perturb else Perturb.NONE
    stages = [
        (0.75, Perturb.PREV) if c == 1 else (pytest.approx(0.5 + 0.25 * c), Perturb.NONE)
        for c in tableau.c
        if c != 0
    ]
    assert calls == [(0.5, start), *stages]
    torch.testing.assert_close(y1, torch.full_like(y0, 0.25))
    torch.testing.assert_close(f0, torch.ones_like(y0))


def dense_broyden(residual: Callable, x: Tensor, iterations: int) -> list[Tensor]:
    """Iterates of the textbook form with a dense Jacobian."""
    jacobian = torch.eye(x.numel(), dtype=x.dtype)
    iterates, r = [x], residual(x)
    for _ in range(iterations):
        s = -torch.linalg.solve(jacobian, r.flatten())
        x = x + s.reshape(x.shape)
        r = residual(x)
        jacobian = jacobian + torch.outer(r.flatten(), s.conj()) / torch.vdot(s, s)
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_iterates_are_those_of_the_dense_jacobian(dtype):
    matrix = torch.eye(6, dtype=dtype) + 0.3 * random_state(6, 6, dtype=dtype)
    shift = random_state(2, 3, dtype=dtype, seed=2)
    seen = []

    def residual(x: Tensor) -> Tensor:
        seen.append(x)
        return (matrix @ x.reshape(-1)).reshape(2, 3) + 0.1 * x * x - shift

    _, converged = broyden(residual, torch.zeros_like(shift), tol=1e-12, max_iters=100)
    iterates, seen = seen, []
    expected = dense_broyden(residual, torch.zeros_like(shift), len(iterates) - 1)
    assert converged and len(iterates) > 8
    for x, reference in zip(iterates, expected, strict=True):
        torch.testing.assert_close(x, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_linear_systems_are_solved_in_twice_their_size(dtype):
    """Gay, "Some convergence properties of Broyden's method", SIAM J. Numer. Anal. 16 (1979)."""
    matrix = torch.eye(4, dtype=dtype) + 0.5 * random_state(4, 4, dtype=dtype)
    shift = random_state(4, dtype=dtype, seed=2)
    x, converged = broyden(lambda x: matrix @ x - shift, shift, tol=1e-9, max_iters=9)
    assert converged
    torch.testing.assert_close(matrix @ x, shift)


def test_singular_jacobian_stops_the_iteration_at_a_finite_iterate():
    """A residual that does not react to the step makes the updated Jacobian singular."""
    x, converged = broyden(lambda x: torch.ones_like(x), torch.zeros(3), tol=1e-6, max_iters=50)
    assert not converged
    torch.testing.assert_close(x, torch.full((3,), -1.0))


def test_state_of_twenty_thousand_elements_needs_no_matrix():
    """A dense Jacobian of all three stages would hold 60,000^2 numbers, 29 GB."""
    y0 = random_state(20_000)
    stepper = make_stepper("radauIIA5", lambda t, y: torch.roll(y, 1) - y - 0.1 * y**3, y0)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y1 = integrate(stepper, torch.linspace(0, 0.4, 5, dtype=torch.float64), y0)
    assert torch.isfinite(y1).all()
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize("name", L_STABLE)
def test_stiff_decay_dies_out_in_large_steps(name):
    y0 = torch.ones(1, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    y = integrate(make_stepper(name, lambda t, y: -1000.0 * y, y0), t, y0)
    assert y.abs().item() < 1e-3


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_methods_run_back_to_their_start(name):
    y0 = random_state(4, 3)
    stepper = exact_stepper(name, NeuralField(), y0)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    there = integrate(stepper, t, y0)
    back = integrate(stepper, t.flip(0), there)
    assert (there - y0).abs().max() > 0.1
    torch.testing.assert_close(back, y0, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_complex_states_converge_to_the_exact_solution(name):
    problem = PROBLEMS["rotation"]
    t = problem.times(81)
    y0 = problem.start(t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = integrate(make_stepper(name, problem.make_field(), y0), t, y0)
    tolerance = {1: 5e-2, 2: 1e-3}.get(IMPLICIT_TABLEAUX[name].order, 1e-5)
    torch.testing.assert_close(y, problem.y_exact(t)[-1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_float32_keeps_its_dtype_and_follows_float64(name):
    y0 = random_state(4, 3)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    exact = integrate(make_stepper(name, NeuralField(), y0), t, y0)
    single = integrate(make_stepper(name, NeuralField().float(), y0.float()), t, y0.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_iteration(name):
    field = NeuralField(dim=2, width=3)
    y0 = random_state(1, 2).requires_grad_()
    t = torch.tensor([0.1, 0.4, 0.6], dtype=torch.float64, requires_grad=True)

    def solve(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        def scaled(time: Tensor, y: Tensor) -> Tensor:
            return weight * field(time, y)

        return integrate(exact_stepper(name, scaled, y0), t, y0)

    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (y0, t, weight), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["gl6", "trbdf2"])
def test_too_few_iterations_warn_and_return_the_last_iterate(name):
    y0 = random_state(4, 3)
    stepper = make_stepper(name, NeuralField(), y0, max_iters=1)
    t0, t1 = torch.tensor([0.0, 0.5], dtype=torch.float64)
    with pytest.warns(UserWarning, match=NOT_CONVERGED):
        y1, _ = stepper.step(t0, t1, 0.5, y0)
    assert torch.isfinite(y1).all()
