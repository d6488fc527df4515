"""Slopes are singular values and eigenvalues of the Jacobian; paths are as long as they are."""

from __future__ import annotations

import math

import pytest
import torch

from fmft_fast.analysis.curvature import (
    acceleration,
    jacobian,
    path_ratio,
    path_ratios,
    slopes,
    stiffness,
)
from fmft_fast.errors import InputError
from fmft_fast.fields import MLP


def net(dim, activation="silu"):
    torch.manual_seed(dim)
    field = MLP(dim, hidden=(48, 48), activation=activation).double()
    for linear in field.linears:
        linear.weight.data *= 3
    return field


def rows(n, dim):
    random = torch.Generator().manual_seed(7)
    x = torch.randn(n, dim, generator=random, dtype=torch.float64)
    return torch.rand(n, generator=random, dtype=torch.float64), x


def test_jacobian_is_that_of_autograd():
    field, (t, x) = net(3), rows(6, 3)
    expected = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda a, i=i: field(t[i], a[None])[0], x[i])
            for i in range(6)
        ]
    )
    torch.testing.assert_close(jacobian(field, t, x), expected)


def test_slopes_are_singular_value_and_eigenvalue():
    field, (t, x) = net(4), rows(30, 4)
    j = jacobian(field, t, x)
    found = slopes(field, t, x)
    torch.testing.assert_close(found.lipschitz, torch.linalg.svdvals(j)[:, 0])
    values = torch.linalg.eigvalsh(j + j.mT)[:, -1] / 2
    torch.testing.assert_close(found.one_sided, values)
    assert (found.one_sided <= found.lipschitz + 1e-12).all()


@pytest.mark.parametrize("dim", [2, 20])
def test_power_iteration_equals_the_decomposition(dim):
    field, (t, x) = net(dim), rows(25, dim)
    exact = slopes(field, t, x, exact_dim=64)
    settled = slopes(field, t, x, exact_dim=1, iterations=20_000, rtol=1e-12)
    torch.testing.assert_close(settled.lipschitz, exact.lipschitz, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(settled.one_sided, exact.one_sided, rtol=1e-6, atol=1e-6)
    usual = slopes(field, t, x, exact_dim=1)
    assert (usual.lipschitz <= exact.lipschitz * (1 + 1e-9)).all(), "an estimate from below"
    torch.testing.assert_close(usual.lipschitz, exact.lipschitz, rtol=1e-2, atol=0)


def test_power_iteration_takes_images_and_fields_without_slope():
    def field(t, x):
        return 2 * x.flip(3) * torch.tensor([1.0, -1.0])

    t, x = torch.zeros(3), torch.randn(3, 2, 5, 2)
    found = slopes(field, t, x, exact_dim=1, iterations=2000, rtol=1e-9)
    torch.testing.assert_close(found.lipschitz, torch.full((3,), 2.0))
    torch.testing.assert_close(found.one_sided, torch.zeros(3), atol=1e-5, rtol=0)
    still = slopes(lambda t, x: torch.ones_like(x) + 0 * x, t, x, exact_dim=1)
    assert (still.lipschitz == 0).all() and (still.one_sided == 0).all()


def test_acceleration_is_the_second_derivative_of_the_solution():
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    x = torch.stack([torch.exp(t * t), torch.cos(t)], 1)  # solves x' = 2 t x in the first entry

    def field(t, x):
        return torch.stack([2 * t * x[:, 0], -torch.sin(t)], 1)

    expected = torch.stack([(2 + 4 * t * t) * torch.exp(t * t), -torch.cos(t)], 1)
    torch.testing.assert_close(acceleration(field, t, x), expected)


def test_stiffness_of_a_rotation_and_a_decay_is_known():
    def field(t, x):
        a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=x.dtype)
        return math.pi * x @ a.T

    found = stiffness(field, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), steps=200)
    torch.testing.assert_close(found.peak, torch.full((2,), math.pi).double())
    torch.testing.assert_close(found.growth, torch.zeros(2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        found.path_ratio, torch.full((2,), math.pi / 2).double(), rtol=1e-4, atol=0
    )
    decay = stiffness(lambda t, x: -4 * t.unsqueeze(-1) * x, torch.ones(3, 2), steps=50)
    torch.testing.assert_close(decay.growth, torch.full((3,), -2.0).double())
    torch.testing.assert_close(decay.peak, torch.full((3,), 4.0).double())
    table = decay.to_dict()
    assert table["growth"]["median"] == pytest.approx(-2)
    assert "integral of the one-sided constant" in str(decay)


def test_growth_bounds_how_neighbours_part():
    field = net(2)
    x0 = rows(40, 2)[1]
    found = stiffness(field, x0, steps=200)
    nudge = 1e-6 * torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).double()
    other = stiffness(field, x0 + nudge, steps=200).end
    parted = (other - found.end).norm(dim=1) / nudge.norm(dim=1)
    assert (parted <= torch.exp(found.growth) * (1 + 1e-3)).all()


def test_path_ratio_of_each_sample_and_of_all():
    angle = torch.linspace(0, torch.pi, 1000)
    circle = torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)[:, None]
    line = torch.linspace(0, 1, 1000)[:, None, None] * torch.tensor([1.0, 1.0])
    both = torch.cat([circle, line], 1)
    expected = torch.tensor([torch.pi / 2, 1.0]).double()
    torch.testing.assert_close(path_ratios(both), expected, rtol=1e-5, atol=0)
    mean = (torch.pi + math.sqrt(2)) / (2 + math.sqrt(2))
    assert path_ratio(both) == pytest.approx(mean, rel=1e-5)


def test_nothing_to_measure_is_refused():
    with pytest.raises(InputError, match="at least one row"):
        slopes(lambda t, x: x, torch.zeros(0), torch.zeros(0, 2))
    with pytest.raises(InputError, match=r"must take times \[4\] and give \[4, 1\]"):
        slopes(lambda t, x: t * x, torch.zeros(4), torch.zeros(4, 1))
    with pytest.raises(InputError, match=r"steps \+ 1, batch"):
        path_ratios(torch.zeros(1, 4, 2))
