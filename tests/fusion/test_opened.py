"""Conditions that a function closes over."""

from __future__ import annotations

import pytest
import torch

from fmft_fast import explain, fused, odeint
from fmft_fast.fields import MLP
from fmft_fast.fusion import find_plan, open_condition

T = torch.linspace(0, 1, 4, dtype=torch.float64)


def solve(model, x0, cond):
    return odeint(lambda t, x: model(t, x, cond), x0, T, method="midpoint")


def test_each_solve_sees_its_own_condition_and_gives_it_a_gradient():
    model = MLP(2, (8, 8), cond_dim=3).double()
    x0 = torch.randn(5, 2, dtype=torch.float64)
    for _ in range(3):
        cond = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        found = []
        for mode in ("require", "off"):
            with fused(mode):
                y = solve(model, x0, cond)
            found.append((y, *torch.autograd.grad(y.square().sum(), [cond, *model.parameters()])))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_plan_is_found_again_for_another_condition_and_batch():
    model = MLP(2, (8,), cond_dim=3)

    def plan(batch):
        cond = torch.randn(batch, 3)
        opened, found = open_condition(lambda t, x: model(t, x, cond), torch.zeros(batch, 2))
        assert found is cond
        return find_plan(opened, torch.zeros(batch, 2), found)

    assert plan(5) is plan(5) is plan(7)
    model.act = torch.nn.Tanh()
    changed = plan(5)
    assert changed.network.layers[0].activation == "tanh"


def test_a_matrix_with_as_many_rows_as_the_batch_is_still_a_matrix():
    w = torch.randn(4, 4, requires_grad=True)
    x0 = torch.randn(4, 4)
    y = []
    for mode in ("require", "off"):
        with fused(mode):
            y.append(odeint(lambda t, x: torch.tanh(x @ w) @ w.T, x0, T.float(), method="euler"))
    torch.testing.assert_close(*y)


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_that_all_samples_share_are_no_condition_of_one_sample(rows):
    model = MLP(2, (8,), cond_dim=3)
    cond = torch.randn(rows, 3)
    field = lambda t, x: model(t, x, cond.expand(len(x), -1) if rows == 1 else cond)  # noqa: E731
    x0 = torch.randn(4, 2)
    y = []
    for mode in ("auto", "off"):
        with fused(mode):
            y.append(odeint(field, x0, T.float(), method="euler"))
    torch.testing.assert_close(*y)
    assert rows == 1 or explain(field, x0).fused


def test_what_mixes_the_rows_of_a_condition_computes_the_same():
    cond, x0 = torch.randn(4, 2), torch.randn(4, 2)
    y = []
    for mode in ("auto", "off"):
        with fused(mode):
            field = lambda t, x: torch.tanh(x) + cond.mean(0) + cond.flip(0)  # noqa: E731
            y.append(odeint(field, x0, T.float(), method="euler"))
    torch.testing.assert_close(*y)
