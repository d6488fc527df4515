"""A field that cannot be fused is not looked at in full by every solve."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fmft_fast import explain, fused, odeint, solve
from fmft_fast.errors import InputError
from fmft_fast.fusion import NotFusable, Plan, find, find_plan
from fmft_fast.fusion.guards import Guards

D = 3


class Field(nn.Module):
    """Fusable as long as it does not square, or drop."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout, self.square = nn.Linear(D, D), nn.Dropout(0.5), True

    def forward(self, t, x):
        out = self.dropout(self.layer(x))
        return out * x if self.square else out


@pytest.fixture
def looks(monkeypatch):
    """Counts how often everything that a field reads is looked at."""
    seen, whole = [], Guards.hold

    def hold(self):
        seen.append(self)
        return whole(self)

    monkeypatch.setattr(Guards, "hold", hold)
    return seen


ASKS = {
    "solve": lambda field, x: solve(field, x, steps=2).y,
    "without gradient": lambda field, x: solve(field, x, steps=2, gradient="none").y,
    "odeint": lambda field, x: odeint(field, x, torch.linspace(0, 1, 3), method="euler"),
    "lambda": lambda field, x: solve(lambda t, x: field(t, x), x, steps=2, gradient="none").y,
}


@pytest.fixture(params=ASKS)
def ask(request):
    return ASKS[request.param]


def test_few_looks(ask, looks):
    field, x = Field().eval(), 0.1 * torch.randn(4, D)
    with fused("off"):
        want = ask(field, x)
    for _ in range(3 * find._TRUST):
        assert ask(field, x).equal(want)
    assert 2 <= len(looks) <= 4


def test_a_field_that_can_be_fused_by_now_soon_is(ask):
    field, x = Field().eval(), torch.randn(4, D)
    for _ in range(5):
        ask(field, x)
    field.square = False
    for _ in range(find._TRUST):
        torch.testing.assert_close(ask(field, x), ask(lambda t, x: field.layer(x), x))
    assert isinstance(find_plan(field, x, trusting=True), Plan)


def test_who_asks_why_gets_the_answer_of_now():
    field, x = Field().eval(), torch.randn(4, D)
    for change in (False, True, False):
        for _ in range(3):
            solve(field, x, steps=2)
            assert explain(field, x).fused is not field.square
        field.square = change
        assert explain(field, x).fused is not change
        field.square = not change
        for _ in range(3):
            solve(field, x, steps=2)
        field.square = change
        with fused("require"):
            if change:
                with pytest.raises(InputError, match="multiplied by a value"):
                    solve(field, x, steps=2)
            else:
                solve(field, x, steps=2)


def test_the_end_of_training_is_seen_at_once():
    field, x = Field(), torch.randn(4, D)
    field.square = False
    for part in (field, lambda t, x: field(t, x)):
        field.train()
        for _ in range(3):
            assert isinstance(find_plan(part, x, trusting=True), NotFusable)
        field.eval()
        assert isinstance(find_plan(part, x, trusting=True), Plan)
    field.train()
    with torch.no_grad():  # half of the entries are dropped
        assert not solve(field, torch.ones(400, D), steps=1).y.equal(
            solve(field, torch.ones(400, D), steps=1).y
        )


def test_a_plan_is_never_trusted(looks):
    field, x = Field().eval(), torch.randn(4, D)
    field.square = False
    for _ in range(3):
        assert isinstance(find_plan(field, x, trusting=True), Plan)
    field.square = True
    assert isinstance(find_plan(field, x, trusting=True), NotFusable)
    assert len(looks) == 3
