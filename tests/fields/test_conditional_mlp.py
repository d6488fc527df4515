"""The conditional MLP: blocks that begin as the identity, and exact gradients in one call."""

from __future__ import annotations

import pytest
import torch

from fmft_fast import fused, solve
from fmft_fast.errors import InputError
from fmft_fast.fields import ConditionalMLP


def make(dtype=torch.float64, **options):
    """Give a field whose every weight is at work, states and conditions."""
    torch.manual_seed(3)
    field = ConditionalMLP(6, 4, **{"width": 16, "blocks": 2, **options}).to(dtype)
    with torch.no_grad():
        for linear in field.outer:
            linear.get_parameter("weight").normal_(0, 0.3)
    return field, torch.randn(9, 6, dtype=dtype), torch.randn(9, 4, dtype=dtype)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_call_gives_the_gradients_of_single_steps(dtype, steps):
    field, x0, cond = make(dtype)
    wanted = [x0.requires_grad_(), cond.requires_grad_(), *field.parameters()]

    def compute(**options):
        y = solve(field, x0, steps=steps, cond=cond, **options).y
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    with fused("require"):
        found = compute()
    with fused("off"):
        exact = compute(gradient="backprop")
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["midpoint", "rk4"])
def test_one_call_follows_changed_weights_and_other_conditions(method):
    field, x0, cond = make()
    for _ in range(2):
        with fused("require"):
            one = solve(field, x0, steps=2, method=method, cond=cond, gradient="none").y
        with fused("off"):
            steps = solve(field, x0, steps=2, method=method, cond=cond, gradient="none").y
        torch.testing.assert_close(one, steps, rtol=1e-12, atol=1e-12)
        cond = cond + 1
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.add_(0.05)


def test_velocity_depends_on_time_state_and_condition_row_by_row():
    field, x, cond = make()
    t = torch.rand(9, dtype=torch.float64)
    rows = [field(t[i], x[i : i + 1], cond[i : i + 1]) for i in range(9)]
    together = field(t, x, cond)
    torch.testing.assert_close(together, torch.cat(rows), rtol=1e-12, atol=1e-12)
    for other in (field(1 - t, x, cond), field(t, x + 1, cond), field(t, x, cond + 1)):
        assert (other - together).abs().amin(1).gt(0).all()


def test_a_new_block_changes_nothing():
    torch.manual_seed(0)
    field = ConditionalMLP(3, 2, width=8, blocks=3)
    x, cond = torch.randn(5, 3), torch.randn(5, 2)
    biases = torch.stack([linear.get_parameter("bias") for linear in field.outer]).sum(0)
    plain = field.leave(field.act(field.enter(x) + biases))
    torch.testing.assert_close(field(torch.tensor(0.3), x, cond), plain)


def test_sizes_and_inputs_that_do_not_fit_are_refused():
    field = ConditionalMLP(3, 2, width=8)
    t, x, cond = torch.tensor(0.0), torch.zeros(5, 3), torch.zeros(5, 2)
    for wrong_x, wrong_cond, message in (
        (x[:, :2], cond, r"x must be \[batch, 3\], got \[5, 2\]"),
        (x, cond[:4], r"cond must be \[5, 2\], got \[4, 2\]"),
        (x, None, r"cond must be \[5, 2\], got none"),
    ):
        with pytest.raises(InputError, match=message):
            field(t, wrong_x, wrong_cond)
    with pytest.raises(InputError, match="width = 0"):
        ConditionalMLP(3, 2, width=0)
    with pytest.raises(InputError, match="unknown activation 'sulu'; choose one of"):
        ConditionalMLP(3, 2, activation="sulu")
