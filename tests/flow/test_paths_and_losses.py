"""Paths hit their ends with the velocity they claim; losses have their closed-form values."""

from __future__ import annotations

import math

import pytest
import torch

from fmft_fast.errors import InputError
from fmft_fast.flow import CondOTPath, LinearPath, flow_matching_loss, reconstruction_loss


@pytest.mark.parametrize("path", [LinearPath(), CondOTPath(0.1)], ids=repr)
def test_velocity_is_the_time_derivative_of_the_point(path):
    x0, x1 = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    h = 1e-6
    slope = (path.sample(t + h, x0, x1).x_t - path.sample(t - h, x0, x1).x_t) / (2 * h)
    point = path.sample(t, x0, x1)
    torch.testing.assert_close(point.u_t, slope, rtol=1e-6, atol=1e-8)
    assert point.dx_t is point.u_t


def test_paths_start_in_noise_and_end_in_data():
    x0, x1 = torch.randn(2, 5, 3)
    for t, end in ((0.0, x0), (1.0, x1)):
        torch.testing.assert_close(LinearPath().sample(torch.tensor(t), x0, x1).x_t, end)
    last = CondOTPath(0.1).sample(torch.tensor(1.0), x0, x1).x_t
    torch.testing.assert_close(last, x1 + 0.1 * x0)


def test_linear_path_spreads_by_sigma_from_the_generator():
    x0, x1 = torch.zeros(20_000, 2), torch.ones(20_000, 2)
    draws = [
        LinearPath(0.3).sample(
            torch.tensor(0.5), x0, x1, generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    ]
    assert torch.equal(draws[0].x_t, draws[1].x_t)
    assert torch.equal(draws[0].u_t, x1 - x0)
    assert abs(float(draws[0].x_t.std()) - 0.3) < 0.01


def test_paths_refuse_what_they_cannot_serve():
    x = torch.zeros(4, 2)
    with pytest.raises(InputError, match=r"\[4, 2\] and \[3, 2\]"):
        LinearPath().sample(torch.tensor(0.5), x, x[:3])
    with pytest.raises(InputError, match=r"0-d or \[4\], got \[3\]"):
        LinearPath().sample(torch.zeros(3), x, x)
    with pytest.raises(InputError, match="sigma"):
        LinearPath(-1.0)
    with pytest.raises(InputError, match="sigma_min"):
        CondOTPath(1.0)


def test_flow_matching_loss_of_the_zero_field_is_the_mean_squared_velocity():
    x0, x1 = torch.randn(2, 64, 3)
    loss = flow_matching_loss(lambda t, x: torch.zeros_like(x), x0, x1)
    torch.testing.assert_close(loss, (x1 - x0).square().mean())


def test_flow_matching_loss_draws_one_time_per_row_and_repeats_by_seed():
    seen = []

    def field(t, x, cond):
        seen.append((t, cond))
        return torch.sin(5 * x) * t[:, None]

    x0, x1 = torch.randn(2, 64, 3)
    cond = torch.arange(64)
    losses = [
        flow_matching_loss(field, x0, x1, cond=cond, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert seen[0][0].shape == (64,) and seen[0][0].unique().numel() == 64
    assert seen[0][1] is cond
    with pytest.raises(InputError, match=r"\[64, 3\], got \[64, 1\]"):
        flow_matching_loss(lambda t, x: x[:, :1], x0, x1)


def test_reconstruction_loss_is_the_gaussian_negative_log_likelihood_per_dimension():
    phi, x1 = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    constant = math.log(2 * math.pi) / 2
    for sigma in (0.7, torch.rand(3).double() + 0.1, torch.rand(2, 3).double() + 0.1):
        law = torch.distributions.Normal(phi, torch.as_tensor(sigma).double())
        expected = -law.log_prob(x1).mean() - constant
        torch.testing.assert_close(reconstruction_loss(phi, x1, sigma=sigma), expected)


def test_a_trainable_sigma_settles_at_the_rms_error():
    phi, x1 = torch.zeros(1000, 2), 0.3 * torch.randn(1000, 2)
    rms = x1.square().mean().sqrt()
    log_sigma = rms.log().requires_grad_()
    reconstruction_loss(phi, x1, sigma=log_sigma.exp()).backward()
    assert log_sigma.grad.abs() < 1e-5


def test_a_fitted_sigma_gives_the_exponential_of_the_best_likelihood():
    phi, x1 = torch.randn(2, 50, 3, dtype=torch.float64)
    best = min(
        float(reconstruction_loss(phi, x1, sigma=s)) for s in torch.linspace(0.5, 3, 2001).tolist()
    )
    fitted = reconstruction_loss(phi, x1, sigma=None)
    assert float(fitted.log()) + 0.5 == pytest.approx(best, abs=1e-5)
    exact = x1.clone().requires_grad_()
    reconstruction_loss(exact, x1, sigma=None).backward()
    assert exact.grad.isfinite().all()


def test_reconstruction_loss_refuses_what_does_not_fit():
    x = torch.zeros(4, 3)
    for sigma in (torch.ones(2), torch.ones(4, 3)):
        with pytest.raises(InputError, match=r"broadcast to a state \[3\]"):
            reconstruction_loss(x, x, sigma=sigma)
    with pytest.raises(InputError, match="positive, got 0"):
        reconstruction_loss(x, x, sigma=0.0)
    with pytest.raises(InputError, match=r"\[4, 3\] and \[4\]"):
        reconstruction_loss(x, x[:, 0])
