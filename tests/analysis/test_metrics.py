"""Metrics against values known in closed form, their floors, and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from fmft_fast.analysis import metrics
from fmft_fast.errors import InputError


def normal(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_off_mode_share_of_a_gaussian_in_the_plane_is_exp_minus_half_radius_squared():
    share = metrics.off_mode_share(0.2 * normal(100_000, 2, 0), torch.zeros(1, 2), 0.2)
    assert abs(share - math.exp(-4.5)) < 4 * math.sqrt(math.exp(-4.5) / 100_000)


def test_balance_of_modes_is_the_total_variation_of_their_shares():
    x = torch.tensor([[0.1], [-0.2], [0.0], [1.1]])
    shares = metrics.mode_shares(x, torch.tensor([[0.0], [1.0]]))
    assert shares.tolist() == [0.75, 0.25]
    assert metrics.total_variation(shares) == 0.25
    assert metrics.total_variation(shares, torch.tensor([0.5, 0.5])) == 0.25
    assert metrics.total_variation(shares, shares) == 0.0


def test_energy_distance_equals_its_definition_for_every_block_size():
    a, b = normal(37, 3, 1), normal(23, 3, 2) + 0.4
    d = torch.cdist(a.double(), a.double()).sum() / (37 * 36)
    e = torch.cdist(b.double(), b.double()).sum() / (23 * 22)
    expected = float(2 * torch.cdist(a.double(), b.double()).mean() - d - e)
    for block in (5, 23, 64):
        assert metrics.energy_distance(a, b, block=block) == pytest.approx(expected, abs=1e-5)


def test_energy_distance_is_unbiased_where_the_laws_agree():
    values = [
        metrics.energy_distance(normal(50, 2, 2 * i), normal(50, 2, 2 * i + 1)) for i in range(200)
    ]
    mean, spread = torch.tensor(values).mean(), torch.tensor(values).std()
    assert abs(mean) < 3 * spread / math.sqrt(200)
    assert min(values) < 0 < max(values)


def test_energy_distance_of_far_data_keeps_its_digits():
    a, b = normal(400, 2, 1), normal(400, 2, 2) + 0.2
    near, far = metrics.energy_distance(a, b), metrics.energy_distance(a + 1000, b + 1000)
    assert far == pytest.approx(near, abs=2e-3)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_dim():
    a = normal(500, 4, 3)
    shift = torch.tensor([3.0, 0.0, 0.0, 0.0])
    assert metrics.sliced_wasserstein(a, a + shift, projections=4000) == pytest.approx(
        1.5, rel=0.05
    )
    assert metrics.sliced_wasserstein(a, a[torch.randperm(500)]) < 1e-6


def test_reconstruction_rms_is_a_distance_per_sample():
    assert metrics.reconstruction_rms(torch.zeros(3, 4), torch.ones(3, 4)) == 2.0


def test_nearest_neighbour_ratio_tells_copies_from_fresh_data():
    train, fresh = normal(600, 5, 0), normal(300, 5, 1)
    assert metrics.nearest_neighbour_ratio(train[:100], train, fresh) == 0.0
    assert 0.9 < metrics.nearest_neighbour_ratio(normal(300, 5, 2), train, fresh) < 1.1
    copies = train[:300] + 0.05 * normal(300, 5, 3)
    assert metrics.nearest_neighbour_ratio(copies, train, fresh) < 0.2


def test_frechet_distance_of_gaussians_follows_its_formula():
    a, b = normal(40_000, 2, 4), 3 * normal(40_000, 2, 5) + torch.tensor([1.0, 0.0])
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 2 * (3 - 1) ** 2, rel=0.03)
    assert abs(metrics.frechet_distance(a, a)) < 1e-9


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same = [
        metrics.kernel_distance(normal(60, 3, 2 * i), normal(60, 3, 2 * i + 1)) for i in range(100)
    ]
    same = torch.tensor(same)
    assert abs(same.mean()) < 3 * same.std() / 10
    assert metrics.kernel_distance(normal(60, 3, 0), normal(60, 3, 1) + 2) > 10 * same.std()


def test_samples_that_do_not_match_are_refused():
    with pytest.raises(InputError, match=r"\[3, 2\] and \[3, 4\]"):
        metrics.energy_distance(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(InputError, match="as many samples of each, got 3 and 4"):
        metrics.sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(InputError, match="at least 2 rows"):
        metrics.energy_distance(torch.zeros(1, 2), torch.zeros(4, 2))
    with pytest.raises(InputError, match="positive"):
        metrics.off_mode_share(torch.zeros(3, 2), torch.zeros(1, 2), 0.0)
