"""Claims about the bridge to SciPy: accuracy, dtypes, and failures that speak."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from problems import PROBLEMS, REAL_PROBLEMS, random_state
from torch import Tensor

import fmft_fast
from fmft_fast.errors import MissingDependencyError, NonFiniteError, StepUnderflowError
from fmft_fast.solvers.scipy_bridge import integrate_with_scipy

pytest.importorskip("scipy", reason="the bridge needs SciPy")
SOLVERS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
TWO = torch.tensor([0.0, 2.0], dtype=torch.float64)


def solve(field, y0: Tensor, t: Tensor, **kwargs) -> Tensor:
    kwargs = {"rtol": 1e-7, "atol": 1e-9, **kwargs}
    return integrate_with_scipy(lambda t, y, perturb: field(t, y), y0, t, **kwargs)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", REAL_PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_solver_is_accurate(solver, problem, reverse):
    reverse = reverse and problem.name != "stiff"  # which is unstable backwards
    t = problem.times(5, reverse=reverse)
    y = solve(problem.make_field(), problem.start(t), t, solver=solver)
    assert not y.requires_grad
    torch.testing.assert_close(y, problem.y_exact(t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_complex_states(solver):
    problem = PROBLEMS["rotation"]
    t = problem.times(5)
    atol = torch.full((2,), 1e-8, dtype=torch.float64)
    y = solve(problem.make_field(), problem.start(t), t, solver=solver, atol=atol)
    assert y.dtype == torch.complex128
    torch.testing.assert_close(y, problem.y_exact(t), rtol=1e-5, atol=1e-5)


def test_float32_states_stay_float32_and_unchanged():
    y0 = random_state(2, 3).float()
    before = y0.clone()
    y = solve(lambda t, y: -y, y0, TWO)
    assert y.dtype == torch.float32 and y.shape == (2, 2, 3)
    assert torch.equal(y[0], y0) and torch.equal(y0, before)
    torch.testing.assert_close(y[1], y0 * torch.exp(torch.tensor(-2.0)), rtol=1e-5, atol=1e-6)


def test_single_time_returns_the_initial_state_without_an_evaluation():
    def field(t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    y0 = random_state(3)
    assert torch.equal(solve(field, y0, TWO[:1]), y0[None])


@pytest.mark.parametrize("solver", SOLVERS)
def test_blow_up_raises_with_the_time_instead_of_a_short_result(solver):
    """The solution 1 / (1 - t) ends at t = 1; LSODA would creep towards it for ever."""
    with pytest.raises(
        (StepUnderflowError, NonFiniteError), match=f"{solver} could not .* t = (1|0.99)"
    ):
        solve(lambda t, y: y * y, torch.ones(1, dtype=torch.float64), TWO, solver=solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_in_the_field_is_reported_with_its_time(solver):
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.5, torch.full_like(y, float("nan")), -y)

    with pytest.raises(NonFiniteError, match=r"NaN or infinite at t = 0\.[5-9]"):
        solve(field, torch.ones(2, dtype=torch.float64), TWO, solver=solver)


def test_tolerances_may_differ_between_elements():
    t = PROBLEMS["oscillator"].times(3)
    y0 = PROBLEMS["oscillator"].start(t)
    field = PROBLEMS["oscillator"].make_field()
    exact = PROBLEMS["oscillator"].y_exact(t)
    loose = torch.full((8,), 1e-3, dtype=torch.float64)
    tight = torch.full((8,), 1e-10, dtype=torch.float64)

    def error(tol: Tensor) -> float:
        return (solve(field, y0, t, solver="RK45", rtol=tol, atol=tol) - exact).abs().max().item()

    assert error(tight) < 1e-7 < error(loose)


@pytest.mark.parametrize("solver", ["RK45", "LSODA"])
def test_min_step_warns_where_the_solver_has_none(solver):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y0 = torch.ones(1, dtype=torch.float64)
        solve(lambda t, y: -y, y0, TWO, solver=solver)
        assert not caught
        solve(lambda t, y: -y, y0, TWO, solver=solver, min_step=1e-6)
    assert bool(caught) == (solver == "RK45")


def test_max_step_bounds_the_steps():
    times = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        times.append(t.item())
        return -0.01 * y

    solve(field, torch.ones(1, dtype=torch.float64), TWO, solver="RK45", max_step=0.1)
    assert len(times) >= 20 * 6


def test_missing_scipy_is_named_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(MissingDependencyError, match="pip install scipy"):
        solve(lambda t, y: -y, torch.ones(1), TWO)
    with pytest.raises(ImportError):
        fmft_fast.odeint(lambda t, y: -y, torch.ones(1), TWO, method="scipy_solver")
