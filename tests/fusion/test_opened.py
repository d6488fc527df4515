"""Conditions that a field holds: in a closure, a keyword or an attribute."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

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


class Bound(nn.Module):
    """A module with the condition as an attribute and a weight of its own."""

    def __init__(self, model, cond=None):
        super().__init__()
        self.model, self.cond, self.scale = model, cond, 1.0
        self.gain = nn.Parameter(torch.tensor([2.0, 0.5]))

    def forward(self, t, x):
        return self.gain * self.model(t, x, self.scale * self.cond)

    def velocity(self, t, x):
        return -self(t, x)


class Fresh(nn.Module):
    """A module without weights of its own, as it is written anew for every solve."""

    def __init__(self, model, cond):
        super().__init__()
        self.model, self.cond = model, cond

    def forward(self, t, x):
        return self.model(t, x, self.cond)


class Plain:
    """No module, but callable."""

    def __init__(self, model, cond):
        self.model, self.cond = model, cond

    def __call__(self, t, x):
        return self.model(t, x, self.cond)


def holders(model):
    """By name: a function that gives a field which holds a condition."""
    bound = Bound(model).to(next(model.parameters()).dtype)

    def attribute(cond):
        bound.cond = cond
        return bound

    return {
        "attribute": attribute,
        "method": lambda cond: attribute(cond).velocity,
        "fresh": lambda cond: Fresh(model, cond),
        "plain": lambda cond: Plain(model, cond),
        "keyword": lambda cond: functools.partial(model, cond=cond),
    }


@pytest.mark.parametrize("holder", ["attribute", "method", "fresh", "plain", "keyword"])
def test_whatever_holds_the_condition_is_read_once(holder):
    model = MLP(2, (8, 8), cond_dim=3).double()
    hold, plans, x0 = holders(model)[holder], [], torch.randn(5, 2, dtype=torch.float64)
    for _ in range(3):
        cond = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        field, found = hold(cond), []
        for mode in ("require", "off"):
            with fused(mode):
                y = odeint(field, x0, T, method="midpoint")
            found.append((y, *torch.autograd.grad(y.square().sum(), [cond, *model.parameters()])))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        opened = open_condition(field, x0)
        assert opened is not None and opened[1] is cond
        plans.append(find_plan(opened[0], x0, cond))
    assert plans[0] is plans[1] is plans[2]


def test_what_else_an_object_holds_may_not_change():
    field, x0 = Bound(MLP(2, (8,), cond_dim=3)), torch.randn(4, 2)

    def agrees():
        field.cond = torch.randn(4, 3)
        y = []
        for mode in ("require", "off"):
            with fused(mode):
                y.append(odeint(field, x0, T.float(), method="euler"))
        torch.testing.assert_close(*y)
        return y[0]

    agrees()
    field.scale = 3.0
    agrees()
    field.gain = nn.Parameter(torch.tensor([1.0, -1.0]))
    agrees()
    field.model.act = nn.Tanh()
    agrees()
    assert field.cond.shape == (4, 3)  # the object is as it was left


def test_hooks_on_an_object_with_a_condition_are_respected():
    field, x0, calls = Bound(MLP(2, (8,), cond_dim=3), torch.randn(4, 3)), torch.randn(4, 2), []
    odeint(field, x0, T.float(), method="euler")
    field.register_forward_hook(lambda *_: calls.append(1))
    odeint(field, x0, T.float(), method="euler")
    assert len(calls) == 3


def test_two_tensors_with_a_row_per_sample_are_left_where_they_are():
    model = MLP(2, (8,), cond_dim=3)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.a, self.b = model, torch.randn(4, 3), torch.randn(4, 3)

        def forward(self, t, x):
            return self.model(t, x, self.a) + self.model(t, x, self.b)

    field, x0 = Two(), torch.randn(4, 2)
    assert open_condition(field, x0) is None
    y = []
    for mode in ("auto", "off"):
        with fused(mode):
            y.append(odeint(field, x0, T.float(), method="euler"))
    torch.testing.assert_close(*y)


def test_an_object_that_ends_with_an_effect_is_not_copied():
    ended = []

    class Ends(Plain):
        def __del__(self):
            ended.append(1)

    field = Ends(MLP(2, (8,), cond_dim=3), torch.randn(4, 3))
    assert open_condition(field, torch.zeros(4, 2)) is None
    odeint(field, torch.zeros(4, 2), T.float(), method="euler")
    assert not ended


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
