"""Kernels go by addresses: tensors whose memory moves, has another sign, or is not there."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import nn

from fmft_fast import METHODS, explain, odeint, odeint_adjoint, solve

T = torch.linspace(0, 1, 4)
ADAPTIVE = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}
CALLS = {
    "odeint": lambda f, y: odeint(f, y, T, method="euler"),
    "adaptive": lambda f, y: odeint(f, y, T, **ADAPTIVE),
    "solve": lambda f, y: solve(f, y, steps=3).y,
    "backprop": lambda f, y: solve(f, y, steps=3, method="rk4", gradient="backprop").y,
    "per sample": lambda f, y: solve(f, y, **ADAPTIVE, options={"per_sample": True}).y,
}
TURNS = 4  # from the third on, fixed steps take the short way


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 3))

    def forward(self, t, x):
        return self.net(x)


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def call(request):
    return request.param


def gradients(out, leaves):
    weights = torch.linspace(-1, 2, out.numel()).reshape(out.shape)
    return torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("other", [torch.clone, lambda x: torch.full_like(x, torch.nan)])
def test_parameters_may_be_given_other_memory_before_the_backward_pass(call, other):
    field, y = Field(), torch.randn(8, 3, requires_grad=True)
    leaves = [y, *field.parameters()]
    saved = [p.data for p in field.parameters()]
    want = gradients(call(field, y), leaves)
    for _ in range(TURNS):
        for p, x in zip(field.parameters(), saved, strict=True):
            p.data = x.clone()
        out = call(field, y)
        for p in field.parameters():
            p.data = other(p.data)
        # Takes the memory that was given back.
        junk = [torch.full_like(x, torch.nan) for x in saved for _ in range(20)]
        for found, right in zip(gradients(out, leaves), want, strict=True):
            assert found.equal(right)
        del junk


def test_gradients_that_are_negated_later_keep_their_sign(call):
    field, y = Field(), torch.randn(8, 3, requires_grad=True)
    for _ in range(TURNS):
        out = call(field, y)
        weights = torch.randn(out.shape)
        leaves = [y, *field.parameters()]
        want = torch.autograd.grad(out, leaves, -weights, retain_graph=True)
        for found, right in zip(
            torch.autograd.grad(out, leaves, torch._neg_view(weights)), want, strict=True
        ):
            assert found.equal(right)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_zeros_without_memory_are_zeros(method):
    field, y = Field(), torch.randn(8, 3, requires_grad=True)
    none, weight = torch._efficientzerotensor((8, 3)), torch._efficientzerotensor((3, 3))
    for _ in range(TURNS):
        usual = torchdiffeq.odeint(field, torch.zeros(8, 3), T, method=method)
        torch.testing.assert_close(odeint(field, none, T, method=method), usual)
        end = odeint(lambda t, x: torch.tanh(x @ weight + 1), y, T, method=method)[-1]
        torch.testing.assert_close(end, y + torch.tanh(torch.ones(())))
        end = solve(field, y, method=method, steps=3).y
        assert not torch.autograd.grad(end, y, none)[0].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [odeint, odeint_adjoint])
def test_an_empty_batch_has_gradients(call, method):
    if method == "scipy_solver":
        pytest.skip("it has no gradients")
    field, y = Field(), torch.zeros(0, 3, requires_grad=True)
    out = call(field, y, T, method=method)
    assert out.shape == (4, 0, 3)
    for found, leaf in zip(
        torch.autograd.grad(out.sum(), [y, *field.parameters()]),
        [y, *field.parameters()],
        strict=True,
    ):
        assert found.shape == leaf.shape and not found.any()


def test_the_fields_of_this_file_are_fused():
    assert explain(Field(), torch.zeros(8, 3), method="euler").fused
