"""Weights that are derived from other parameters: read as calls on parameters alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from fmft_fast import fused, solve
from fmft_fast.fusion import NotFusable, Plan, find_plan

D = 3


class Skew(nn.Module):
    def forward(self, raw):
        upper = raw.triu(1)
        return upper - upper.mT


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.3))

    def forward(self, raw):
        return raw * torch.exp(self.log)


class Hurwitz(nn.Module):
    """Q diag(-softplus d) Q^T tanh(x) with Q from the Cayley map of a parametrized skew matrix."""

    def __init__(self):
        super().__init__()
        self.turn, self.d = nn.Linear(D, D), nn.Parameter(torch.randn(D))
        parametrize.register_parametrization(self.turn, "weight", Skew())
        parametrize.register_parametrization(self.turn, "weight", Scaled())

    def forward(self, t, x):
        one, k = torch.eye(D, dtype=x.dtype, device=x.device), self.turn.weight
        q = torch.linalg.solve(one + k, one - k)
        return torch.tanh(x + self.turn.bias) @ (q @ torch.diag(-F.softplus(self.d)) @ q.T)


class Layers(nn.Module):
    def __init__(self, change, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D))
        for layer in (self.net[0], self.net[2]):
            change(layer, **options)

    def forward(self, t, x):
        return self.net(x)


FIELDS = {
    "cayley by solve": Hurwitz,
    "weight norm": lambda: Layers(parametrizations.weight_norm),
    **{
        f"orthogonal, {name}": lambda name=name: Layers(
            parametrizations.orthogonal, orthogonal_map=name
        )
        for name in ("matrix_exp", "cayley", "householder")
    },
}


def values_and_gradients(field, x0):
    y = solve(field, x0, method="midpoint", steps=3).y
    return y, *torch.autograd.grad(y.square().sum(), [x0, *field.parameters()])


def assert_one_call_gives_the_same(field, x0):
    with fused("require"):
        found = values_and_gradients(field, x0)
    with fused("off"):
        expected = values_and_gradients(field, x0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    return found


@pytest.mark.parametrize("name", FIELDS)
def test_values_gradients_and_changes_in_place(name):
    torch.manual_seed(0)
    field = FIELDS[name]().double()
    x0 = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    before = assert_one_call_gives_the_same(field, x0)
    plan = find_plan(field, x0)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.2 * torch.randn_like(p))
    after = assert_one_call_gives_the_same(field, x0)
    assert not torch.allclose(before[0], after[0])
    assert isinstance(plan, Plan) and find_plan(field, x0) is plan


def test_another_parametrization_is_noticed():
    torch.manual_seed(0)
    field = Hurwitz().double()
    x0 = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    first = assert_one_call_gives_the_same(field, x0)[0]
    parametrize.register_parametrization(field.turn, "weight", Scaled().double())
    second = assert_one_call_gives_the_same(field, x0)[0]
    kind, derived = type(field.turn), type(field.turn).weight
    kind.weight = property(lambda self: 2 * derived.fget(self))
    twice = solve(field, x0, method="midpoint", steps=3).y
    kind.weight = derived
    torch.testing.assert_close(solve(field, x0, method="midpoint", steps=3).y, second)
    parametrize.remove_parametrizations(field.turn, "weight")
    third = assert_one_call_gives_the_same(field, x0)[0]
    assert not torch.allclose(first, second) and not torch.allclose(second, twice)
    torch.testing.assert_close(second, third)


def test_a_cache_of_parametrized_tensors_is_left_alone():
    field, x0 = Layers(parametrizations.weight_norm), torch.randn(4, D)
    with parametrize.cached():
        assert isinstance(find_plan(field, x0), NotFusable)
        assert not parametrize._cache
    assert isinstance(find_plan(field, x0), Plan)
