"""MLP: layout of its inputs, conditions, names of activations, refusals."""

from __future__ import annotations

import pytest
import torch

from fmft_fast.errors import InputError
from fmft_fast.fields import ACTIVATIONS, MLP


def test_layers_see_state_then_condition_then_time():
    field = MLP(2, hidden=(), cond_dim=3).double()
    (layer,) = field.linears
    x, cond, t = torch.randn(5, 2).double(), torch.randn(5, 3).double(), torch.rand(5).double()
    expected = torch.cat([x, cond, t[:, None]], 1) @ layer.weight.T + layer.bias
    torch.testing.assert_close(field(t, x, cond), expected)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_field_equals_its_layers_applied_by_hand(name):
    torch.manual_seed(0)
    field = MLP(3, hidden=(8, 6), activation=name)
    x, t = torch.randn(4, 3), torch.tensor(0.3)
    z = torch.cat([x, t.expand(4, 1)], 1)
    for linear in list(field.linears)[:-1]:
        z = ACTIVATIONS[name]()(linear(z))
    torch.testing.assert_close(field(t, x), field.linears[-1](z))


def test_one_time_for_all_equals_the_same_time_for_each():
    field = MLP(2)
    x = torch.randn(6, 2)
    one = field(torch.tensor(0.7, dtype=torch.float64), x)
    assert one.dtype == x.dtype
    torch.testing.assert_close(one, field(torch.full((6,), 0.7), x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim = 0"),
        ({"dim": 2, "hidden": (8, 0)}, r"hidden = \(8, 0\)"),
        ({"dim": 2, "activation": "sine"}, "'sine'.*selu.*tanh"),
    ],
)
def test_bad_architecture_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        MLP(**arguments)


def test_bad_call_is_refused():
    t = torch.tensor(0.0)
    with pytest.raises(InputError, match=r"x must be \[batch, 2\], got \[3, 4\]"):
        MLP(2)(t, torch.zeros(3, 4))
    with pytest.raises(InputError, match=r"cond must be \[3, 1\] .*got none"):
        MLP(2, cond_dim=1)(t, torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"cond must be \[3, 1\] .*got \[3\]"):
        MLP(2, cond_dim=1)(t, torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(InputError, match="cond must be none"):
        MLP(2)(t, torch.zeros(3, 2), torch.zeros(3, 1))
