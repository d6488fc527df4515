"""ActionTransformer: size, what sees what, gradients, dropout, refusals."""

from __future__ import annotations

import pytest
import torch
from fields import sequence_fields as checks
from solvers.recording import double  # noqa: F401
from torch.nn import functional as F

from fmft_fast import solve
from fmft_fast.errors import InputError
from fmft_fast.fields import ActionTransformer
from fmft_fast.fields.transformer import Attention


def make(state=(5, 2), cond_dim=6, n_obs=2, **options):
    settings = {"width": 8, "layers": 2, "heads": 2, **options}
    return ActionTransformer(state, cond_dim, n_obs, **settings)


def test_the_defaults_have_the_reference_size():
    with torch.device("meta"):
        field = ActionTransformer((16, 2), cond_dim=40, n_obs=2)
    assert 8.5e6 < sum(p.numel() for p in field.parameters()) < 10e6
    assert field.state == (16, 2) and field.cond_dim == 40


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    attention = Attention(8, heads=2, dropout=0.0).double()
    z, others = torch.randn(3, 4, 8).double(), torch.randn(3, 5, 8).double()
    weights = torch.cat([attention.query.weight, attention.key_value.weight])
    biases = torch.cat([attention.query.bias, attention.key_value.bias])
    hidden = torch.rand(4, 5) < 0.4
    hidden[:, 0] = False
    expected, _ = F.multi_head_attention_forward(
        *(v.transpose(0, 1) for v in (z, others, others)),
        8,
        2,
        weights,
        biases,
        None,
        None,
        False,
        0.0,
        attention.leave.weight,
        attention.leave.bias,
        attn_mask=hidden,
    )
    torch.testing.assert_close(attention(z, others, hidden), expected.transpose(0, 1))


@pytest.mark.parametrize("causal", [True, False])
def test_which_actions_an_action_sees(causal):
    field = make(causal=causal).double()
    t, x, cond = checks.data(field)
    jacobian = torch.autograd.functional.jacobian(lambda z: field(t, z, cond)[0].sum(1), x)
    seen = jacobian[:, 0].abs().sum(2) > 0  # [place, place]
    everything = torch.ones(5, 5).bool()
    assert torch.equal(seen, everything.tril() if causal else everything)


@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_every_action_sees_the_whole_condition_and_places_matter(encoder_layers):
    field = make(encoder_layers=encoder_layers).double()
    t, x, cond = checks.data(field)
    cond.requires_grad_()
    for place in range(5):
        (grad,) = torch.autograd.grad(field(t, x, cond)[:, place].sum(), cond)
        assert (grad.abs() > 0).all()
    # Swapped observations are told apart, and so are equal actions at different places.
    swapped = cond.detach().unflatten(1, (2, 3)).flip(1).flatten(1)
    assert (field(t, x, swapped) - field(t, x, cond)).abs().amin() > 1e-6
    v = field(t, torch.zeros_like(x), cond)
    assert (v[:, 1:] - v[:, :-1]).abs().amin() > 1e-6


@pytest.mark.parametrize("cond_dim", [0, 6])
def test_times(cond_dim):
    checks.check_times(make(cond_dim=cond_dim))


@pytest.mark.parametrize("settings", [{"steps": 3}, {"steps": 2, "method": "rk4", "save": "all"}])
@pytest.mark.parametrize("options", [{}, {"cond_dim": 0}, {"encoder_layers": 1}])
def test_the_gradient_of_a_solve_is_exact(options, settings):
    depends = checks.check_gradient(make(**options), **settings)
    # With the time as the only token to look at, it does not matter who looks.
    assert all(depends) if "cond_dim" not in options else sum(depends) > 0.7 * len(depends)


def test_dropout_acts_in_training_only_and_its_masks_are_repeated_by_the_gradient():
    field = make(dropout=0.3).double()
    t, x, cond = checks.data(field)
    assert not torch.equal(field(t, x, cond), field(t, x, cond))
    found = []
    for gradient in ("discrete", "backprop"):
        torch.manual_seed(3)
        found.append(checks.gradients(field, x, cond, gradient, steps=3))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    field.eval()
    assert torch.equal(field(t, x, cond), field(t, x, cond))
    twice = [solve(field, x, cond=cond, steps=2).y for _ in range(2)]
    assert torch.equal(*twice)


def test_steps_can_be_recorded(double):  # noqa: F811
    checks.check_replay(make(), double)


def test_nothing_is_read_back():
    checks.check_nothing_read_back(make())
    checks.check_nothing_read_back(make(cond_dim=0, encoder_layers=1, causal=False))


def test_torch_func():
    checks.check_functional(make((3, 1), layers=1, encoder_layers=1))


def test_copies_and_saved_weights():
    checks.check_copies(make)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_trainers_take_it(dtype):
    checks.check_training(make((4, 2)), dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": (5, 2, 1)}, r"\(horizon, action_dim\).*got \(5, 2, 1\)"),
        ({"cond_dim": 7}, "n_obs to divide cond_dim.*n_obs = 2, cond_dim = 7"),
        ({"heads": 3}, "heads to divide width.*heads = 3, width = 8"),
        ({"width": 9, "heads": 3}, "even width.*got 9; take 10"),
        ({"layers": 0}, "layers: expected a whole number from 1 on, got 0"),
        ({"encoder_layers": -1}, "encoder_layers: .* from 0 on, got -1"),
        ({"n_obs": 1.0}, "n_obs: expected a whole number.*got 1.0"),
        ({"dropout": 1.0}, "dropout: expected a probability.*got 1.0"),
    ],
)
def test_bad_architecture_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make(**arguments)


def test_bad_calls_are_refused():
    field, t = make(), torch.tensor(0.0)
    x, cond = torch.zeros(3, 5, 2), torch.zeros(3, 6)
    with pytest.raises(InputError, match=r"x must be \[batch, 5, 2\], got \[3, 4, 2\]"):
        field(t, x[:, 1:], cond)
    with pytest.raises(InputError, match=r"cond must be \[3, 6\] .*got \[3, 2, 3\]"):
        field(t, x, cond.unflatten(1, (2, 3)))
    with pytest.raises(InputError, match="cond must be none"):
        make(cond_dim=0)(t, x, cond)
    with pytest.raises(InputError, match=r"t must be 0-d or \[3\].*got \[3, 1\]"):
        field(torch.zeros(3, 1), x, cond)
