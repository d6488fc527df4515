"""Tables of time that are kept from solve to solve: never older than what gives them."""

from __future__ import annotations

import torch
from torch import nn

from fmft_fast import fused, solve
from fmft_fast.fusion import Plan, find_plan


class Timed(nn.Module):
    """A field with an embedding of time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.enter, self.leave = nn.Linear(1, 7), nn.Linear(3, 7), nn.Linear(7, 3)

    def forward(self, t, x):
        told = torch.sin(self.embed(t.reshape(1)))
        return self.leave(torch.tanh(self.enter(x) + told))


def is_right(field, x, t1):
    """Whether a solve gives what single steps in plain torch give."""
    with fused("require"):
        y = solve(field, x, 0.0, t1, steps=3).y
    return torch.allclose(y, solve(field, x, 0.0, t1, steps=3, backend="reference").y, atol=1e-6)


@torch.no_grad()
def test_tables_follow_every_change_of_what_gives_them():
    field, x = Timed(), torch.randn(2, 3)
    weight = field.embed.weight
    changes = (
        lambda: None,
        lambda: weight.data.mul_(2),
        lambda: weight.numpy().__setitem__((0, 0), 3.0),
        lambda: setattr(weight, "data", torch.randn(7, 1)),
        lambda: setattr(weight, "data", torch.randn(7, 2)[:, :1]),
        lambda: weight.data.mul_(2),
        lambda: setattr(field, "embed", nn.Linear(1, 7)),
    )
    for change in changes:
        change()
        assert is_right(field, x, 1.0) and is_right(field, x, 0.7) and is_right(field, x, 0.7)


@torch.no_grad()
def test_another_thread_may_drop_the_tables_at_any_moment(monkeypatch):
    field, x = Timed(), torch.randn(2, 3)
    plan = find_plan(field, x)
    assert isinstance(plan, Plan) and is_right(field, x, 1.0)
    kept, kind = plan._kept, type(plan._kept)
    found = [vars(kept).pop("_last")]
    assert found[0] is not None

    # Gives the tables to who asks first, as if they were dropped right then.
    last = property(lambda self: found.pop() if found else None, lambda self, value: None)
    monkeypatch.setattr(kept, "__class__", type("Dropped", (kind,), {"_last": last}))
    assert is_right(field, x, 1.0) and not found
