"""Every term of the bound is what it says, the bounds hold, and they fail when a term is too small.

The slopes and accelerations that the fields must have are known: linear fields in closed form, and
a mixture of Gaussians whose exact velocity is the reference.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

from fmft_fast.analysis.bounds import KINDS, error_bound, exact_path, refine
from fmft_fast.analysis.curvature import jacobian
from fmft_fast.errors import InputError, NonFiniteError
from fmft_fast.fields import MLP
from fmft_fast.flow import GaussianMixture, flow_matching_loss
from fmft_fast.solvers import solve

A = torch.tensor([[0.4, 2.0], [-0.5, -1.0]], dtype=torch.float64)
SHIFT = torch.tensor([0.03, -0.04], dtype=torch.float64)


def linear(t, x):
    return x @ A.T


def shifted(t, x):
    return linear(t, x) + SHIFT


def mixture():
    angle = 2 * math.pi * torch.arange(5) / 5
    return GaussianMixture(2 * torch.stack([angle.cos(), angle.sin()], 1), 0.1)


class Perturbed(nn.Module):
    """The exact field and something smooth beside it."""

    def __init__(self, exact, size=0.05):
        super().__init__()
        self.exact, self.size = exact, size

    def forward(self, t, x):
        return self.exact(t, x) + self.size * torch.sin(3 * x + t.unsqueeze(-1))


@functools.cache
def known_path():
    """Trajectories of the mixture from `noise(200)`, made once."""
    return exact_path(mixture(), noise(200), 400)


def noise(n, dim=2, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_terms_are_exact_on_a_linear_field():
    x0, n = noise(20), 4
    found = error_bound(shifted, linear, x0, n)
    t = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    psi = torch.stack([x0 @ torch.linalg.matrix_exp(A * s).T for s in t])
    phi = [x0]
    for _ in range(n):
        phi.append(phi[-1] + (phi[-1] @ A.T + SHIFT) / n)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(found.error, (psi[-1] - phi[-1]).norm(dim=1), **close)
    torch.testing.assert_close(found.delta, torch.full((n, 20), 0.05).double(), **close)
    norm = torch.linalg.matrix_norm(A, 2).expand(n, 20)
    torch.testing.assert_close(found.lipschitz, norm, **close)
    mu = torch.linalg.eigvalsh((A + A.T) / 2)[-1].expand(n, 20)
    torch.testing.assert_close(found.one_sided, mu, **close)
    # psi'' = A^2 psi; its norm is largest at points of the fine grid up to that grid's spacing.
    fine = torch.linspace(0, 1, 8001, dtype=torch.float64)
    second = torch.stack([(x0 @ torch.linalg.matrix_exp(A * s).T) @ (A @ A).T for s in fine])
    blocks = second.norm(dim=2)[:-1].view(n, -1, 20).amax(1)
    torch.testing.assert_close(found.curvature, blocks, rtol=1e-3, atol=0)
    assert (found.initial == 0).all()


def test_sums_are_those_of_the_theorem():
    x0, n = noise(6), 5
    b = error_bound(shifted, linear, x0, n)
    constant, m = b.lipschitz[0, 0], b.curvature.amax(0)
    wide = torch.exp(constant * (n - 1) / n)
    torch.testing.assert_close(b.amplification("theorem"), wide.expand(6))
    torch.testing.assert_close(b.field_term("theorem"), wide * 0.05 * torch.ones(6).double())
    torch.testing.assert_close(b.step_term("theorem"), wide * m / (2 * n))
    powers = (1 + constant / n) ** torch.arange(n - 1, -1, -1)
    torch.testing.assert_close(b.field_term("lipschitz"), (powers.sum() * 0.05 / n).expand(6))
    steps = (powers[:, None] * b.curvature).sum(0) / (2 * n * n)
    torch.testing.assert_close(b.step_term("lipschitz"), steps)
    total = b.field_term("one_sided") + b.step_term("one_sided")
    torch.testing.assert_close(b.bound("one_sided"), total)
    largest = torch.exp(constant * (n - 1) / n) * (0.05 + m.max() / (2 * n))
    assert b.uniform_log10 == pytest.approx(math.log10(largest))


def test_bounds_are_attained_where_every_term_points_the_same_way():
    """For u = a t, and v smaller by a constant, nothing in the bound is wasted."""
    x0 = noise(3, dim=1)
    b = error_bound(lambda t, x: _ramp(t, x) - 0.2, _ramp, x0, 4)
    for kind in KINDS:
        torch.testing.assert_close(b.bound(kind), b.error, rtol=1e-9, atol=1e-9)
        assert b.holds(kind).all()
    assert not dataclasses.replace(b, delta=0.99 * b.delta).holds("theorem").any()
    assert not dataclasses.replace(b, curvature=0.99 * b.curvature).holds("theorem").any()


def _ramp(t, x):
    return 3 * t.unsqueeze(-1) + 0 * x


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_bounds_hold_for_every_sample_on_the_mixture_and_grow_coarser(steps):
    law = mixture()
    b = error_bound(Perturbed(law), law, noise(200), steps, path=known_path())
    for kind in KINDS:
        assert b.holds(kind).all()
    sharp, middle, coarse = (b.bound(kind) for kind in ("one_sided", "lipschitz", "theorem"))
    assert (sharp <= middle * (1 + 1e-12)).all() and (middle <= coarse * (1 + 1e-12)).all()
    assert (b.error <= b.field_error + b.step_error + 1e-12).all()
    assert b.uniform_log10 >= float(coarse.max().log10()) - 1e-9


def test_bound_holds_for_a_trained_field():
    law, random = mixture(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    field = MLP(2, hidden=(32, 32))
    optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
    for _ in range(200):
        x1 = law.sample(256, random)
        loss = flow_matching_loss(
            field, torch.randn(256, 2, generator=random), x1, generator=random
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for steps in (2, 20):
        b = error_bound(field, law, noise(200), steps, path=known_path())
        assert b.delta.max() > 0.1, "an untrained or exact field would show nothing"
        assert all(bool(b.holds(kind).all()) for kind in KINDS)
    assert next(field.parameters()).dtype == torch.float32, "the caller's field was changed"


def test_bound_is_violated_when_delta_is_understated():
    law = mixture()
    b = error_bound(Perturbed(law), law, noise(200), 200, path=known_path())
    assert b.holds("one_sided").all()
    understated = dataclasses.replace(b, delta=0.25 * b.delta)
    broken = ~understated.holds("one_sided")
    assert broken.double().mean() > 0.2
    without = dataclasses.replace(b, delta=0 * b.delta)
    assert (~without.holds("one_sided")).double().mean() > 0.5


def test_initial_error_is_amplified_too():
    """The summary of the theorem adds it once; where all else is exact that is too little."""
    x0 = torch.zeros(1, 1, dtype=torch.float64)

    def grow(t, x):
        return 3 * x

    b = error_bound(grow, grow, x0, 100, start=x0 - 0.1)
    only_added = b.field_term() + b.step_term() + b.initial
    assert float(only_added) == pytest.approx(0.1)
    assert float(b.error) == pytest.approx(0.1 * 1.03**100)
    assert float(b.bound()) == pytest.approx(0.1 * math.exp(3))
    assert all(bool(b.holds(kind).all()) for kind in KINDS) and b.error > only_added


def test_unequal_steps_and_given_paths_agree_with_their_own():
    law, x0 = mixture(), noise(20)
    grid = torch.tensor([0.0, 0.05, 0.3, 0.9, 1.0], dtype=torch.float64)
    b = error_bound(Perturbed(law), law, x0, grid, path=exact_path(law, x0, refine(grid, 200)))
    assert all(bool(b.holds(kind).all()) for kind in KINDS)
    phi = solve(Perturbed(law).double(), x0, steps=grid, gradient="none").y
    psi = solve(law, x0, method="rk4", steps=200, gradient="none").y
    torch.testing.assert_close(b.error, (phi - psi).norm(dim=1), rtol=1e-5, atol=1e-6)
    own = error_bound(Perturbed(law), law, x0[:3], grid)
    torch.testing.assert_close(own.error, b.error[:3], rtol=1e-5, atol=1e-6)
    assert known_path().accuracy < 1e-5


def test_the_given_constants_are_covered_by_denser_samples_and_safety():
    law, x0, path = mixture(), noise(200), known_path()
    few, many = (error_bound(Perturbed(law), law, x0, 5, segment=n, path=path) for n in (9, 257))
    assert (many.lipschitz >= few.lipschitz * (1 - 1e-12)).all()
    # A sampled supremum is a lower estimate: here nine points miss a few per cent at most.
    assert float((many.lipschitz / few.lipschitz).max()) < 1.5
    safe = error_bound(Perturbed(law), law, x0, 5, safety=1.5, path=path)
    torch.testing.assert_close(safe.lipschitz, 1.5 * few.lipschitz)
    torch.testing.assert_close(safe.curvature, 1.5 * few.curvature)
    torch.testing.assert_close(safe.one_sided, few.one_sided + 0.5 * few.lipschitz)
    assert (safe.lipschitz >= many.lipschitz).all()


def test_large_states_use_the_power_iteration_with_the_same_outcome():
    torch.manual_seed(0)
    field, other = MLP(130, hidden=(8,), activation="tanh"), MLP(130, hidden=(8,))
    x0 = noise(5, dim=130)
    b = error_bound(other, field, x0, 3, path=exact_path(field, x0, 30))
    exact = torch.linalg.matrix_norm(jacobian(field.double(), torch.zeros(5).double(), x0), 2)
    torch.testing.assert_close(b.lipschitz[0], exact, rtol=1e-3, atol=0)
    assert all(bool(b.holds(kind).all()) for kind in KINDS)


def test_states_may_be_images():
    def decay(t, x):
        return -x

    x0 = noise(8, dim=12).view(8, 3, 2, 2)
    b = error_bound(lambda t, x: -x + 0.01, decay, x0, 4)
    flat = error_bound(lambda t, x: -x + 0.01, decay, x0.flatten(1), 4)
    torch.testing.assert_close(b.bound("one_sided"), flat.bound("one_sided"))


def test_no_error_in_field_and_steps_gives_a_bound_of_zero_even_if_factors_overflow():
    x0 = torch.zeros(2, 1, dtype=torch.float64)
    b = error_bound(lambda t, x: 1e-3 * x, lambda t, x: 1e-3 * x, x0, 2)
    huge = dataclasses.replace(b, lipschitz=b.lipschitz + 1e6)
    assert (huge.bound() == 0).all() and huge.uniform_log10 == -math.inf


def test_report_and_dictionary_say_what_was_found():
    law = mixture()
    b = error_bound(Perturbed(law), law, noise(200), 100, path=known_path())
    text, table = str(b), b.to_dict()
    assert "N = 100, 200 samples" in text and "measured error" in text
    assert text.count("200 (") == 3
    assert table["steps"] == 100 and table["bounds"]["theorem"]["holds"] == 1.0
    assert table["error"]["max"] == float(b.error.max())
    log10 = table["bounds"]["one_sided"]["bound_log10"]
    assert log10["median"] == pytest.approx(float(b.bound("one_sided").median().log10()))


def test_bounds_beyond_float64_are_reported_as_infinite_not_as_nan():
    b = error_bound(shifted, linear, noise(8), 4)
    huge = dataclasses.replace(b, lipschitz=b.lipschitz + 1e4)
    assert bool(huge.bound().isinf().all()) and "nan" not in str(huge) and "inf" in str(huge)
    log10 = huge.to_dict()["bounds"]["theorem"]["bound_log10"]
    assert log10["max"] == pytest.approx(math.log10(torch.finfo(torch.float64).max))
    assert huge.uniform_log10 > 3000, "in logarithms the theorem's own value is known"


def test_a_solve_that_blows_up_is_named():
    with pytest.raises(NonFiniteError, match="in step 0 of 2"):
        error_bound(lambda t, x: x / 0.0, linear, noise(3), 2)


def test_refined_grids_keep_every_time():
    grid = torch.tensor([0.0, 0.001, 0.5, 1.0], dtype=torch.float64)
    fine = refine(grid, 100)
    assert torch.isin(grid, fine).all() and (fine.diff() > 0).all() and len(fine) == 8 + 50 + 50 + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": torch.tensor([0.0, 0.5])}, "must run from 0 to 1"),
        ({"start": torch.zeros(3, 2)}, r"x0 and start must be \[batch"),
        ({"segment": 1}, "segment >= 2"),
        ({"safety": 0.5}, "safety >= 1"),
        ({"steps": 3, "path": exact_path(linear, noise(4), 10)}, "contain every time"),
        ({"path": exact_path(linear, noise(5), 10)}, "path must start at x0"),
    ],
)
def test_what_cannot_be_bounded_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        error_bound(shifted, linear, noise(4), **{"steps": 2, **change})
