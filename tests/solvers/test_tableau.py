"""Every explicit tableau has the order it claims, and its dense output fits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fmft_fast import METHODS, odeint, solve
from fmft_fast.errors import UnknownMethodError
from fmft_fast.solvers import Tableau, find_method

RK = [name for name, m in METHODS.items() if m.tableau is not None and m.tableau.explicit]
ADAPTIVE = [name for name in RK if METHODS[name].family == "adaptive"]


def tableau_of(name: str) -> Tableau:
    tableau = METHODS[name].tableau
    assert tableau is not None
    return tableau


def field(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[1] * torch.cos(t), torch.sin(t) - y[0] - 0.3 * y[1] ** 2))


def reference(t1: float) -> Tensor:
    y0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
    return solve(field, y0, 0.0, t1, method="dopri8", steps=200, gradient="none").y


@pytest.mark.parametrize("name", RK)
def test_order(name: str) -> None:
    y0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
    steps = 4 if name == "dopri8" else 32  # the eighth order soon meets the rounding errors
    exact = reference(2.0)
    errors = [
        (solve(field, y0, 0.0, 2.0, method=name, steps=n, gradient="none").y - exact).norm().item()
        for n in (steps, 2 * steps)
    ]
    slope = math.log2(errors[0] / errors[1])
    assert slope == pytest.approx(tableau_of(name).order, abs=0.2), slope


@pytest.mark.parametrize("name", ADAPTIVE)
def test_error_estimate_has_a_lower_order(name: str) -> None:
    tableau = tableau_of(name)
    assert tableau.b_err is not None
    weights = torch.tensor(tableau.b_err, dtype=torch.float64)
    nodes = torch.tensor(tableau.c, dtype=torch.float64)
    defects = [abs(float((weights * nodes**p).sum())) for p in range(tableau.order + 1)]
    assert defects[0] < 1e-12  # both solutions are consistent
    assert max(defects) > 1e-4  # and they differ


@pytest.mark.parametrize("name", ADAPTIVE)
def test_dense_output_meets_the_ends_and_slopes_of_the_step(name: str) -> None:
    tableau = tableau_of(name)
    p = torch.tensor(tableau.dense, dtype=torch.float64)
    first, last = torch.zeros(2, tableau.stages, dtype=torch.float64)
    first[0] = last[-1] = 1
    powers = torch.arange(1, 5, dtype=torch.float64)
    assert torch.allclose(p.sum(1), torch.tensor(tableau.b, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(p[:, 0], first)
    assert torch.allclose(p @ powers, last, atol=1e-11)
    assert tableau.mid is not None
    halves = p @ 0.5**powers
    assert torch.allclose(halves, torch.tensor(tableau.mid, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_smaller_tolerances_give_smaller_errors(name: str) -> None:
    y0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
    t = torch.tensor([0.0, 1.5], dtype=torch.float64)
    exact = reference(1.5)
    errors = [
        (odeint(field, y0, t, method=name, rtol=tol, atol=tol)[-1] - exact).abs().max().item()
        for tol in (1e-3, 1e-6)
    ]
    assert errors[1] < 0.1 * errors[0] and errors[1] < 1e-3


@pytest.mark.parametrize("name", RK)
def test_fields_are_evaluated_at_the_stage_times(name: str) -> None:
    times: list[float] = []

    def spy(t: Tensor, y: Tensor) -> Tensor:
        times.append(t.item())
        return -y

    y0 = torch.ones(2, dtype=torch.float64)
    solve(spy, y0, 1.0, 2.0, method=name, steps=2, gradient="none")
    c = tableau_of(name).advancing.c
    expected = [1.0 + 0.5 * (n + ci) for n in range(2) for ci in c]
    assert times == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", RK)
def test_reversal(name: str) -> None:
    y0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
    forth = solve(field, y0, 0.0, 1.0, method=name, steps=40, gradient="none").y
    back = solve(field, forth, 1.0, 0.0, method=name, steps=40, gradient="none").y
    tolerance = 10 * (forth - reference(1.0)).abs().max().item() + 1e-12
    assert (back - y0).abs().max() < tolerance


def test_an_inconsistent_tableau_is_refused() -> None:
    with pytest.raises(AssertionError, match="row sum"):
        Tableau("wrong", 1, c=(0.0, 0.5), a=((), (0.4,)), b=(0.0, 1.0))
    with pytest.raises(AssertionError, match="sum of b"):
        Tableau("wrong", 1, c=(0.0,), a=((),), b=(0.9,))


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(UnknownMethodError, match="rk5.*dopri5.*scipy_solver"):
        find_method("rk5")
