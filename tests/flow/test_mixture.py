"""A mixture gives the velocity that it claims to give, and that makes the mixture from noise."""

from __future__ import annotations

import math

import pytest
import torch

from fmft_fast.analysis import metrics
from fmft_fast.errors import InputError
from fmft_fast.flow import GaussianMixture
from fmft_fast.solvers import odeint, solve

MEANS = torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
SIGMA = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def mixture():
    return GaussianMixture(MEANS, SIGMA, WEIGHTS)


def plain_velocity(t, x):
    """The formula as it is written, by densities and without care for rounding."""
    s2 = (1 - t) ** 2 + t**2 * SIGMA.square()
    gap = x[:, None] - t * MEANS
    density = WEIGHTS * torch.exp(-gap.square().sum(-1) / (2 * s2)) / s2
    p = density / density.sum(1, keepdim=True)
    each = MEANS + ((t * SIGMA.square() - (1 - t)) / s2)[:, None] * gap
    return (p[..., None] * each).sum(1), p


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_velocity_and_posterior_are_the_formula(t):
    x = torch.randn(50, 2, dtype=torch.float64)
    velocity, posterior = plain_velocity(t, x)
    torch.testing.assert_close(mixture().velocity(t, x), velocity, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mixture().posterior(t, x), posterior, rtol=1e-11, atol=1e-11)


def test_velocity_is_the_mean_of_x1_minus_x0_given_x_t():
    """By simulation: pairs whose x_t fell into a small cell, in one dimension, at three times."""
    law = GaussianMixture(torch.tensor([[-1.0], [2.0]]), torch.tensor([0.4, 0.7]))
    random = torch.Generator().manual_seed(0)
    n, width = 2_000_000, 0.05
    x1 = law.sample(n, random)
    x0 = torch.randn(n, 1, generator=random)
    for t in (0.2, 0.5, 0.8):
        x_t, u = (1 - t) * x0 + t * x1, (x1 - x0)[:, 0]
        for at in (-0.5, 0.4, 1.2):
            cell = (x_t[:, 0] - at).abs() < width / 2
            error = float(u[cell].std()) / math.sqrt(int(cell.sum()))
            exact = float(law.velocity(t, x_t[cell]).mean())
            assert abs(float(u[cell].mean()) - exact) < 4 * error
            assert error < 0.03, "the cell holds too few pairs to tell anything"


def test_velocity_satisfies_the_continuity_equation():
    """The rate d p/dt + div(p u) is 0 for the density p of x_t, which is known as well."""
    law = mixture()

    def density(t, x):
        s2 = (1 - t) ** 2 + t**2 * SIGMA.square()
        parts = torch.exp(-(x - t * MEANS).square().sum(-1) / (2 * s2)) / (2 * math.pi * s2)
        return (WEIGHTS / WEIGHTS.sum() * parts).sum()

    for t in torch.tensor([0.1, 0.6, 0.95], dtype=torch.float64):
        for x in torch.randn(5, 2, dtype=torch.float64):
            rate = torch.func.grad(density)(t, x)
            flux = torch.func.jacrev(lambda x, t=t: density(t, x) * law(t, x))(x)
            torch.testing.assert_close(rate, -flux.trace(), rtol=1e-9, atol=1e-12)


def test_an_accurate_solve_makes_the_mixture_from_noise():
    law = mixture()
    random = torch.Generator().manual_seed(1)
    x0 = torch.randn(4000, 2, generator=random, dtype=torch.float64)
    end = solve(law, x0, method="rk4", steps=100, gradient="none").y
    shares = metrics.mode_shares(end, MEANS)
    assert (shares - WEIGHTS / 6).abs().max() < 0.02
    for k in range(3):
        near = end[(end - MEANS[k]).norm(dim=1) < 3 * SIGMA[k]]
        assert near.std(0).sub(SIGMA[k]).abs().max() < 0.1 * SIGMA[k]
    fresh = [law.sample(4000, random, dtype=torch.float64) for _ in range(2)]
    floor = abs(metrics.energy_distance(*fresh))
    assert metrics.energy_distance(end, fresh[0]) < max(5 * floor, 2e-3)


def test_a_single_gaussian_has_a_flow_in_closed_form():
    law = GaussianMixture(torch.tensor([[0.7, -0.2]]), 0.3)
    x0 = torch.randn(6, 2, dtype=torch.float64)
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    y = odeint(law, x0, t, method="rk4")
    s = ((1 - t).square() + t.square() * 0.09).sqrt()[:, None, None]
    torch.testing.assert_close(y, t[:, None, None] * law.means + s * x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e3, 1e8, 1e15, 1e30])
def test_far_states_give_finite_velocities_and_slopes(dtype, size):
    law = mixture()
    x = size * torch.randn(64, 2, generator=torch.Generator().manual_seed(2)).to(dtype)
    for t in (0.0, 0.5, 1.0):
        u, slope = torch.func.jvp(lambda x, t=t: law.velocity(t, x), (x,), (torch.ones_like(x),))
        assert u.dtype == dtype and bool(u.isfinite().all()) and bool(slope.isfinite().all())
        total = law.posterior(t, x).sum(1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_single_precision_is_accurate_far_away():
    """Squared distances would have no digit left there; the posterior of equal widths still has."""
    law = GaussianMixture(MEANS, 0.1)
    x = 1e5 * torch.randn(200, 2, generator=torch.Generator().manual_seed(3))
    x = torch.cat([x, torch.tensor([[0.0, 1e6]])])
    single, double = law.posterior(0.3, x), law.posterior(0.3, x.double())
    assert (single - double).abs().max() < 1e-3


def test_times_may_differ_from_row_to_row():
    x = torch.randn(5, 2, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    rows = torch.cat([mixture().velocity(t[i], x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(mixture()(t, x), rows)
    torch.testing.assert_close(mixture()(t[:, None], x.expand(5, 5, 2))[:, 2], mixture()(t, x[2]))


def test_sample_follows_weights_and_repeats():
    law = mixture()
    x = law.sample(60_000, torch.Generator().manual_seed(4))
    assert x.dtype == torch.float32
    mean = (WEIGHTS / 6) @ MEANS
    assert (x.double().mean(0) - mean).abs().max() < 0.02
    assert torch.equal(x, law.sample(60_000, torch.Generator().manual_seed(4)))
    chosen = law.sample(4000, component=torch.full((4000,), 2))
    assert (chosen.double().mean(0) - MEANS[2]).abs().max() < 0.02


def test_the_toy_is_such_a_mixture():
    from fmft_fast.tasks.toy_gmm import TASK

    law, x = TASK.mixture, TASK.draw(20_000, 5).double()
    assert law.means.shape == (5, 2)
    log_p = law.posterior(1.0, x)
    assert (log_p.mean(0) - 0.2).abs().max() < 0.02
    assert (x.var(0) - (law.means.square().mean(0) + 0.01)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 0.1), r"means must be \[k, dim\]"),
        ((MEANS, 0.0), "sigma > 0"),
        ((MEANS, torch.ones(2)), r"sigma must be a number or \[3\]"),
        ((MEANS, 0.1, torch.tensor([1.0, -1.0, 1.0])), "weights >= 0"),
        ((MEANS, 0.1, torch.zeros(3)), "positive sum"),
        ((MEANS * math.nan, 0.1), "finite means"),
    ],
)
def test_wrong_mixtures_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        GaussianMixture(*arguments)


def test_wrong_states_are_refused():
    with pytest.raises(InputError, match="floating point"):
        mixture().velocity(0.5, torch.zeros(3, 3))
    with pytest.raises(InputError, match="floating point"):
        mixture().velocity(0.5, torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(InputError, match=r"component must be \[4\]"):
        mixture().sample(4, component=torch.zeros(3, dtype=torch.long))
