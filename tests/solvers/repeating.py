"""What the tests of repeated solves share (fixtures in conftest)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fmft_fast import fused, odeint, solve
from fmft_fast.solvers.repeated import likeness

needs_comparison = pytest.mark.skipif(
    likeness((torch.zeros(1),)) is None, reason="this torch cannot compare tensors in one call"
)
D = 3
T = torch.linspace(0.0, 1.0, 5)


class Field(nn.Module):
    """Reads a flag and a buffer besides its layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.ELU(), nn.Linear(8, D, bias=False))
        self.register_buffer("shift", torch.randn(D))
        self.skip = True
        self.unread = None

    def forward(self, t, x):
        out = self.net(x) + self.shift
        return out + x if self.skip else out


def by_odeint(field, y, t=T):
    return odeint(field, y, t, method="euler")


def by_solve(field, y, t=T):
    return solve(field, y, 0.0, 1.0, steps=len(t) - 1, save="all").y


CALLS = {"odeint": by_odeint, "solve": by_solve}


def warm(call, field, y, taken, **kwargs):
    """Ask until the short way is taken."""
    for _ in range(2):
        call(field, y, **kwargs)
    assert not taken
    call(field, y, **kwargs)
    assert taken == [True]
    taken.clear()


def numbers(call, field, y, **kwargs):
    """The solution, and the gradients of everything that requires grad."""
    leaves = [x for x in (*field.parameters(), y) if x.requires_grad]
    out = call(field, y, **kwargs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    grads = [None] * len(leaves)
    if out.requires_grad:
        grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    pairs = zip(grads, leaves, strict=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in pairs)]


def assert_right(call, field, y, **kwargs):
    found = numbers(call, field, y, **kwargs)
    with fused("off"):
        want = numbers(call, field, y, **kwargs)
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
