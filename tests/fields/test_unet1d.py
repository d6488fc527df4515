"""ConditionalUnet1d: size, any horizon, what it sees, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from fields import sequence_fields as checks
from solvers.recording import double  # noqa: F401

from fmft_fast.errors import InputError
from fmft_fast.fields import ConditionalUnet1d


def make(state=(6, 2), cond_dim=3, **options):
    settings = {"channels": (8, 16), "kernel": 3, "groups": 2, "embedding": 8, **options}
    return ConditionalUnet1d(state, cond_dim, **settings)


def test_the_defaults_have_the_reference_size():
    with torch.device("meta"):
        field = ConditionalUnet1d((16, 2), cond_dim=40)
    assert 65.0e6 < sum(p.numel() for p in field.parameters()) < 66.0e6
    assert field.state == (16, 2) and field.cond_dim == 40


@pytest.mark.parametrize("horizon", [1, 2, 3, 5, 7, 8, 13])
def test_any_horizon_will_do(horizon):
    field = make((horizon, 3), channels=(8, 16, 16))
    t, x, cond = checks.data(field, dtype=torch.float32)
    v = field(t, x, cond)
    assert v.shape == x.shape and torch.isfinite(v).all()
    if horizon > 2:  # every place depends on every other one through the narrowest level
        x.requires_grad_()
        (grad,) = torch.autograd.grad(field(t, x, cond)[:, 0].sum(), x)
        assert (grad.abs().amax((0, 2)) > 0).all()


def test_a_block_is_its_layers_by_hand():
    torch.manual_seed(0)
    block = make().down[1][0].double()
    z, film = torch.randn(3, 8, 5).double(), torch.randn(3, 32, 1).double()

    def part(layers, z):
        conv, norm, _ = layers
        z = torch.nn.functional.conv1d(z, conv.weight, conv.bias, padding=1)
        grouped = z.reshape(3, 2, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        z = (centred / (centred.square().mean(2, keepdim=True) + norm.eps).sqrt()).reshape(z.shape)
        z = z * norm.weight[:, None] + norm.bias[:, None]
        return z * torch.tanh(torch.log1p(z.exp()))

    middle = part(block.enter, z) * (1 + film[:, :16]) + film[:, 16:]
    expected = part(block.leave, middle) + block.skip(z)
    torch.testing.assert_close(block(z, film), expected)


def test_each_block_has_scales_and_shifts_of_its_own():
    field = make()
    t, x, cond = checks.data(field, dtype=torch.float32)
    v = field(t, x, cond)
    ends = [0, *torch.tensor(field.sizes).cumsum(0).tolist()]
    assert ends[-1] == field.film.out_features and len(field.sizes) == 8
    for start, stop in zip(ends, ends[1:], strict=False):
        kept = field.film.bias.detach().clone()
        with torch.no_grad():
            field.film.bias[start:stop] += 1
            assert not torch.equal(field(t, x, cond), v)
            field.film.bias.copy_(kept)


@pytest.mark.parametrize("cond_dim", [0, 3])
def test_times(cond_dim):
    checks.check_times(make(cond_dim=cond_dim))


@pytest.mark.parametrize("settings", [{"steps": 3}, {"steps": 2, "method": "rk4", "save": "all"}])
@pytest.mark.parametrize(("state", "cond_dim"), [((6, 2), 3), ((5, 1), 0)])
def test_the_gradient_of_a_solve_is_exact(state, cond_dim, settings):
    assert all(checks.check_gradient(make(state, cond_dim), **settings))


def test_steps_can_be_recorded(double):  # noqa: F811
    checks.check_replay(make((5, 2)), double)


def test_nothing_is_read_back():
    checks.check_nothing_read_back(make((7, 2)))
    checks.check_nothing_read_back(make(cond_dim=0))


def test_what_is_read_back_would_be_seen():
    class Peeks(ConditionalUnet1d):
        def forward(self, t, x, cond=None):
            return super().forward(t, x, cond) if x.sum() < 1e9 else x

    field = Peeks((6, 2), 3, channels=(8,), groups=2, embedding=8)
    with pytest.raises(AssertionError, match="makes the host wait"):
        checks.check_nothing_read_back(field)


def test_torch_func():
    checks.check_functional(make((3, 1), channels=(8,)))


def test_copies_and_saved_weights():
    checks.check_copies(make)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_trainers_take_it(dtype):
    checks.check_training(make((4, 2)), dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": (16,)}, r"\(horizon, action_dim\).*got \(16,\)"),
        ({"state": (0, 2)}, r"from 1 on, got \(0, 2\)"),
        ({"cond_dim": -1}, "cond_dim: expected a whole number from 0 on, got -1"),
        ({"channels": ()}, "channels: .*got none"),
        ({"channels": (8, 18), "groups": 4}, r"multiples of groups = 4.*got \(8, 18\); change 18"),
        ({"channels": (8,), "groups": 8}, "at least two channels per group.*fewer groups"),
        ({"channels": (8, 16.0)}, "channels: expected a whole number .*got 16.0"),
        ({"kernel": 4}, "kernel: expected an odd number, got 4; take 5"),
        ({"kernel": True}, "kernel: expected a whole number.*got True"),
        ({"groups": 0}, "groups: .*got 0"),
        ({"embedding": 7}, "even width.*got 7; take 8"),
    ],
)
def test_bad_architecture_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make(**arguments)


def test_bad_calls_are_refused():
    field, t = make(), torch.tensor(0.0)
    x, cond = torch.zeros(3, 6, 2), torch.zeros(3, 3)
    with pytest.raises(InputError, match=r"x must be \[batch, 6, 2\], got \[3, 2, 6\]"):
        field(t, x.transpose(1, 2), cond)
    with pytest.raises(InputError, match=r"x must be \[batch, 6, 2\], got \[3, 12\]"):
        field(t, x.flatten(1), cond)
    with pytest.raises(InputError, match=r"cond must be \[3, 3\] .*got none"):
        field(t, x)
    with pytest.raises(InputError, match=r"cond must be \[3, 3\] .*got \[1, 3\]"):
        field(t, x, cond[:1])
    with pytest.raises(InputError, match="cond must be none"):
        make(cond_dim=0)(t, x, cond)
    with pytest.raises(InputError, match=r"t must be 0-d or \[3\].*got \[2\]"):
        field(torch.zeros(2), x, cond)
