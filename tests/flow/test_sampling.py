"""Sampling: the solve's own states, whatever the batch; seeded noise; clear refusals."""

from __future__ import annotations

import pytest
import torch

from fmft_fast import fused, record_stats, solve
from fmft_fast.errors import InputError, NonFiniteError
from fmft_fast.fields import MLP
from fmft_fast.flow import integrate, sample


def test_samples_are_the_euler_solve_in_batches_of_any_size():
    torch.manual_seed(0)
    field = MLP(3, hidden=(16,))
    x0 = torch.randn(10, 3)
    x = x0
    with torch.no_grad():
        for i in range(4):
            x = x + field(torch.tensor(i / 4), x) / 4
    for batch in (3, 10, 64):
        y = sample(field, x0, steps=4, batch=batch)
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)
        assert not y.requires_grad


def test_conditions_go_with_their_rows():
    cond = torch.arange(10.0)[:, None]
    y = sample(lambda t, x, c: c.expand_as(x), torch.zeros(10, 2), steps=5, cond=cond, batch=3)
    torch.testing.assert_close(y, cond.expand(10, 2))


def test_reverse_integration_undoes_forward_integration():
    def field(t, x):
        return torch.sin(3 * t + x)

    x0 = torch.randn(6, 2, dtype=torch.float64)
    there = integrate(field, x0, steps=60, method="rk4")
    back = integrate(field, there, t0=1.0, t1=0.0, steps=60, method="rk4")
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-7)


def test_noise_by_number_is_standard_normal_and_seeded():
    field = MLP(2)
    still = sample(lambda t, x: 0 * x, 4000, state=(2,), steps=1)
    assert abs(float(still.std()) - 1) < 0.05
    assert torch.equal(sample(field, 5, steps=2, seed=3), sample(field, 5, steps=2, seed=3))
    assert not torch.equal(sample(field, 5, steps=2, seed=3), sample(field, 5, steps=2, seed=4))
    assert sample(field.double(), 5, steps=2).dtype == torch.float64


def test_adaptive_sampling_meets_the_exact_solution():
    x0 = torch.randn(5, 2, dtype=torch.float64)
    y = sample(lambda t, x: -x, x0, method="dopri5", rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(y, x0 * torch.exp(torch.tensor(-1.0)), rtol=1e-6, atol=1e-7)


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="pass state"):
        sample(lambda t, x: x, 3, steps=1)
    with pytest.raises(InputError, match="at least 1, got 0"):
        sample(MLP(2), 0, steps=1)
    with pytest.raises(InputError, match="one per row"):
        sample(MLP(2), torch.zeros(3, 2), steps=1, cond=torch.zeros(2, 1))
    with pytest.raises(InputError, match="batch"):
        sample(MLP(2), torch.zeros(3, 2), steps=1, batch=0)


def test_equal_steps_in_one_call_end_where_solve_ends():
    """At once where kernels take the field, else by single steps; each counted, each on request."""
    field, x = MLP(2, (16,)), torch.randn(7, 2)

    def branching(t, x):
        return -x if float(x.sum()) > 0 else x  # a branch on a value cannot be fused

    for velocity in (field, branching):
        for method in ("euler", "rk4", "implicit_euler"):
            with record_stats() as log:
                found = integrate(velocity, x, steps=3, method=method, batch=4)
            want = solve(velocity, x[:4], 0.0, 1.0, steps=3, method=method, gradient="none")
            torch.testing.assert_close(found[:4], want.y)
            assert [s.accepted for s in log] == [3, 3]
            assert log[0].evaluations == want.stats.evaluations
            if velocity is branching or method == "implicit_euler":
                with fused("require"), pytest.raises(InputError, match="cannot be fused"):
                    integrate(velocity, x, steps=3, method=method)
    with pytest.raises(InputError, match="steps"):
        integrate(field, x, steps=0)
    with pytest.raises(NonFiniteError, match="step 1 of 3"):
        integrate(lambda t, x: x * torch.where(t > 0.3, torch.inf, 1.0), x, steps=3)
