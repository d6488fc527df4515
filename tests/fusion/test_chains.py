"""Layers on the condition: by a chain where they are one, else by torch, with the same values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fmft_fast import fused, solve
from fmft_fast.ops.chain import Chain


class Field(nn.Module):
    """A network that is told something of its condition, and of another layer."""

    def __init__(self, tell, *layers):
        super().__init__()
        torch.manual_seed(0)
        self.tell, self.layers = tell, nn.ModuleList(layers)
        self.enter, self.leave = nn.Linear(3, 7), nn.Linear(7, 3)

    def forward(self, t, x, cond):
        return self.leave(torch.tanh(self.enter(x) + self.tell(self.layers, cond)))


def deep(layers, cond):
    return layers[1](F.elu(layers[0](cond), 0.7))


LAYERS = {
    "one layer": (lambda m, c: m[0](c), [nn.Linear(5, 7)]),
    "two layers": (deep, [nn.Linear(5, 11), nn.Linear(11, 7, bias=False)]),
    "an activation last": (lambda m, c: F.gelu(m[0](c)), [nn.Linear(5, 7)]),
    "a layer by names": (
        lambda m, c: F.linear(input=c, weight=m[0].weight, bias=m[0].bias),
        [nn.Linear(5, 7)],
    ),
}
OTHERS = {
    "no layer": (lambda m, c: c @ torch.ones(5, 7), []),
    "a sine": (lambda m, c: m[0](c.sin()), [nn.Linear(5, 7)]),
    "a sum": (lambda m, c: m[0](c) + m[1](c), [nn.Linear(5, 7), nn.Linear(5, 7)]),
    "a weight that is computed": (
        lambda m, c: m[0](c),
        [parametrizations.weight_norm(nn.Linear(5, 7))],
    ),
    "an unknown elu": (lambda m, c: m[0](F.celu(c, 2.0)), [nn.Linear(5, 7)]),
    "one number as bias": (
        lambda m, c: F.linear(c, m[0].weight, m[1].bias),
        [nn.Linear(5, 7), nn.Linear(1, 1)],
    ),
    "an activation by names": (lambda m, c: torch.tanh(input=m[0](c)), [nn.Linear(5, 7)]),
}


@pytest.fixture
def chained(monkeypatch):
    """How often chains gave values."""
    found, run = [], Chain.run

    def watched(chain, x):
        values = run(chain, x)
        found.append(values is not None)
        return values

    monkeypatch.setattr(Chain, "run", watched)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", [*LAYERS, *OTHERS])
def test_few_rows_take_a_chain_where_there_is_one(chained, name):
    tell, layers = (LAYERS | OTHERS)[name]
    field = Field(tell, *layers)
    for batch in (1, 4, 5):
        x, cond = torch.randn(batch, 3), torch.randn(batch, 5)
        exact = solve(field, x, steps=3, cond=cond, backend="reference").y
        chained.clear()
        with fused("require"):
            y = solve(field, x, steps=3, cond=cond).y
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-6)
        assert chained[-1:] == ([batch < 5] if name in LAYERS else [])


def test_gradients_do_not_pass_a_chain_by(chained):
    field = Field(*LAYERS["two layers"][:1], *LAYERS["two layers"][1])
    x, cond = torch.randn(2, 3), torch.randn(2, 5, requires_grad=True)
    with fused("require"):
        y = solve(field, x, steps=2, cond=cond).y
    y.square().sum().backward()
    assert cond.grad is not None and cond.grad.abs().sum() > 0 and chained[-1] is False
    assert all(p.grad is not None for p in field.layers.parameters())
