"""Couplings: optimal, seeded, fair to the prior and to conditions, clear in what they refuse."""

from __future__ import annotations

import itertools
import math
import sys
import warnings

import pytest
import torch

from fmft_fast.errors import CouplingWarning, InputError, MissingDependencyError
from fmft_fast.flow import COUPLINGS, make_coupling
from fmft_fast.flow.couplings import pair_by_ot
from fmft_fast.flow.transport import optimal_permutation

SMALL = {
    "ot-fixed": {"size": 64},
    "ot-semidiscrete": {"size": 64, "fit_steps": 50, "fit_batch": 64},
    "inversion": {"steps": 5},
}
# All but the one whose x1 are the field's own.
OF_THE_DATA = sorted(COUPLINGS.keys() - {"reflow"})
OT_NAMES = ("ot-minibatch", "ot-fixed", "ot-semidiscrete")


class Drift(torch.nn.Module):
    """dx/dt = 2: carries x0 to x0 + 2."""

    def forward(self, t, x, cond=None):
        return torch.full_like(x, 2.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_modes(n: int, share: float = 0.5, seed: int = 3) -> torch.Tensor:
    """Points near -3 and 3 on the first axis, exactly `share` of them on the right."""
    g = seeded(seed)
    side = torch.where(torch.arange(n) < share * n, 3.0, -3.0)
    x = 0.1 * torch.randn(n, 2, generator=g)
    x[:, 0] += side
    return x[torch.randperm(n, generator=g)]


def cost(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().sum())


def fitted(name: str, x1: torch.Tensor, cond=None, **options):
    coupling = make_coupling(name, **{**SMALL.get(name, {}), **options})
    return coupling.fit(x1, cond, field=Drift(), generator=seeded(5))


@pytest.mark.parametrize("solver", ["scipy", "ot"])
def test_assignment_is_the_best_of_all_permutations(solver, monkeypatch):
    pytest.importorskip(solver, reason=f"{solver} is not installed")
    monkeypatch.setitem(sys.modules, "ot" if solver == "scipy" else "scipy.optimize", None)
    a, b = torch.randn(2, 6, 3, generator=seeded())
    order = optimal_permutation(a, b)
    best = min(cost(a, b[list(p)]) for p in itertools.permutations(range(6)))
    assert cost(a, b[order]) == pytest.approx(best, rel=1e-6)


def test_large_and_small_solvers_agree():
    pytest.importorskip("ot", reason="POT is not installed")
    a, b = torch.randn(2, 600, 2, generator=seeded())
    from fmft_fast.flow import transport

    matrix = torch.cdist(a.double(), b.double()).square().numpy()
    by_pot, by_scipy = (f(matrix) for f in (transport._assign_pot, transport._assign_scipy))
    assert sorted(by_pot) == list(range(600))
    assert cost(a, b[by_pot]) == pytest.approx(cost(a, b[by_scipy]), rel=1e-6)


def test_assignment_without_scipy_and_pot_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingDependencyError, match=r"fmft-fast\[train\]"):
        optimal_permutation(torch.zeros(3, 1), torch.zeros(3, 1))


@pytest.mark.parametrize("name", OF_THE_DATA)
def test_pairs_are_drawn_from_the_data_and_repeat_by_seed(name):
    x1 = torch.randn(80, 2, 3, generator=seeded(1))
    draws = [fitted(name, x1).sample(40, generator=seeded(s)) for s in (7, 7, 8)]
    for pairs in draws:
        assert pairs.x0.shape == pairs.x1.shape == (40, 2, 3) and pairs.cond is None
        assert (pairs.x1[:, None] == x1).flatten(2).all(2).any(1).all()
    assert torch.equal(draws[0].x0, draws[1].x0) and torch.equal(draws[0].x1, draws[1].x1)
    assert not torch.equal(draws[0].x0, draws[2].x0)


@pytest.mark.parametrize("name", OF_THE_DATA)
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "vectors"])
def test_conditions_stay_with_their_data(name, labels):
    x1 = torch.randn(90, 2, generator=seeded(1))
    cond = torch.arange(90) % 3 if labels else x1 * 2
    pairs = fitted(name, x1, cond).sample(50, generator=seeded(2))
    row = (pairs.x1[:, None] == x1).all(2).int().argmax(1)
    assert torch.equal(pairs.cond, cond[row])


@pytest.mark.parametrize("name", sorted(COUPLINGS))
def test_noise_alone_stays_standard_normal(name):
    """A pairing may not change the law that sampling starts from (Kolmogorov-Smirnov, .1 %)."""
    x1 = torch.randn(600, 2, generator=seeded(1)) + 2
    x0 = fitted(name, x1).sample(600, generator=seeded(2)).x0.unique(dim=0)
    n = len(x0)
    level = torch.special.ndtr(x0.double().sort(dim=0).values)
    steps = torch.arange(n + 1)[:, None] / n
    gap = torch.maximum((steps[1:] - level).abs(), (level - steps[:-1]).abs()).amax(0)
    assert (gap * math.sqrt(n) < 1.95).all()


@pytest.mark.parametrize("name", OT_NAMES)
def test_transport_pairs_noise_with_the_nearer_mode(name):
    x1 = two_modes(400)
    pairs = fitted(name, x1, **({} if name == "ot-minibatch" else {"size": 400}))
    pairs = pairs.sample(300, generator=seeded(4))
    far = pairs.x0[:, 0].abs() > 0.4
    assert (pairs.x0[far, 0].sign() == pairs.x1[far, 0].sign()).float().mean() > 0.98


def test_semidiscrete_cells_hold_the_shares_of_all_the_data():
    x1 = two_modes(5000, share=0.3)
    coupling = fitted("ot-semidiscrete", x1, size=100, fit_steps=2000, fit_batch=256)
    pairs = coupling.sample(50_000, generator=seeded(1))
    right = (pairs.x1[:, 0] > 0).float().mean()
    assert abs(float(right) - 0.3) < 0.015
    assert len(pairs.x1.unique(dim=0)) > 4000
    assert pairs.x0.mean().abs() < 0.02 and abs(float(pairs.x0.std()) - 1) < 0.02


def test_fixed_pairing_holds_as_many_noise_points_as_data():
    coupling = fitted("ot-fixed", torch.randn(100, 2, generator=seeded()), size=30)
    pairs = coupling.sample(2000, generator=seeded(1))
    assert len(pairs.x0.unique(dim=0)) == len(pairs.x1.unique(dim=0)) == 30


@pytest.mark.parametrize("name", OT_NAMES)
def test_noise_stays_independent_of_labels(name):
    """Blind transport would give the two labels the two halves of the noise."""
    x1 = two_modes(600)
    label = (x1[:, 0] > 0).long()
    coupling = fitted(name, x1, label, **({} if name == "ot-minibatch" else {"size": 600}))
    pairs = coupling.sample(600, generator=seeded(1))
    for k in (0, 1):
        assert pairs.x0[pairs.cond == k, 0].mean().abs() < 0.2


@pytest.mark.parametrize("name", OT_NAMES)
def test_a_large_weight_keeps_noise_independent_of_vector_conditions(name):
    x1 = two_modes(600)
    cond = x1[:, :1].sign()
    mean = {}
    for weight in (0.0, 1e3, math.inf):
        size = {} if name == "ot-minibatch" else {"size": 600}
        pairs = fitted(name, x1, cond, cond_weight=weight, **size).sample(600, generator=seeded(1))
        mean[weight] = float((pairs.x0[:, 0] * pairs.cond[:, 0]).mean())
    assert mean[0.0] > 0.7
    assert abs(mean[1e3]) < 0.15 and abs(mean[math.inf]) < 0.15


@pytest.mark.parametrize("name", OT_NAMES)
def test_the_default_weight_keeps_noise_independent_of_conditions_that_fix_the_data(name):
    angle = 2 * math.pi * torch.rand(600, generator=seeded())
    cond = angle[:, None] / 2
    x1 = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    size = {} if name == "ot-minibatch" else {"size": 600}
    related = {}
    for weight in ({"cond_weight": 10.0}, {}):
        pairs = fitted(name, x1, cond, **size, **weight).sample(600, generator=seeded(1))
        side = torch.stack([pairs.x0[:, 0], (2 * pairs.cond[:, 0]).cos()])
        related[len(weight)] = abs(float(torch.corrcoef(side)[0, 1]))
    assert related[0] < 0.15 < 0.25 < related[1]


def test_every_label_keeps_an_anchor_however_few_there_are():
    x1 = torch.randn(200, 2, generator=seeded())
    label = torch.zeros(200, dtype=torch.long)
    label[17] = 1
    coupling = fitted("ot-semidiscrete", x1, label, size=2)
    assert set(coupling.sample(4000, generator=seeded()).cond.tolist()) == {0, 1}


def test_inversion_gives_noise_that_the_field_carries_to_the_data():
    x1 = torch.randn(50, 2, generator=seeded())
    pairs = fitted("inversion", x1, batch=7).sample(20, generator=seeded(1))
    torch.testing.assert_close(pairs.x0, pairs.x1 - 2.0)
    with pytest.raises(InputError, match="field=field"):
        make_coupling("inversion").fit(x1)


def test_reflow_gives_noise_and_where_the_field_carries_it_for_every_condition():
    x1, cond = torch.randn(50, 2, generator=seeded()), torch.arange(50)
    coupling = fitted("reflow", x1, cond, copies=3, batch=7)
    pairs = coupling.sample(4000, generator=seeded(1))
    torch.testing.assert_close(pairs.x1, pairs.x0 + 2.0)
    assert len(pairs.x0.unique(dim=0)) == 150 and len(pairs.cond.unique()) == 50
    again = coupling.sample(4000, generator=seeded(1))
    assert torch.equal(again.x0, pairs.x0) and torch.equal(again.cond, pairs.cond)
    with pytest.raises(InputError, match="field=field"):
        make_coupling("reflow").fit(x1)


def test_independent_pairs_warn_in_proportion_to_what_would_be_lost():
    x1 = two_modes(300)
    independent = make_coupling("independent")
    with pytest.warns(CouplingWarning, match="100%"):
        independent.check_reconstruction(x1)
    with pytest.warns(CouplingWarning, match="variance"):
        independent.check_reconstruction(x1, torch.zeros(300, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        independent.check_reconstruction(x1, x1[:, :1])
        for name in OT_NAMES:
            make_coupling(name).check_reconstruction(x1)


def test_pairing_a_batch_keeps_the_data_in_place():
    x1 = torch.randn(16, 2, generator=seeded())
    pairs = make_coupling("ot-minibatch").pair(x1, generator=seeded(1))
    assert pairs.x1 is x1
    noise = torch.randn(16, 2, generator=seeded(1))
    assert cost(pairs.x0, x1) < cost(noise, x1)
    assert torch.equal(pairs.x0.sort(0)[0], noise.sort(0)[0])


def test_wrong_use_is_refused_with_its_remedy():
    x1 = torch.zeros(4, 2)
    with pytest.raises(InputError, match="'ot-best'.*independent.*ot-semidiscrete"):
        make_coupling("ot-best")
    with pytest.raises(InputError, match="no option 'k'; it takes size, cond_weight, refresh$"):
        make_coupling("ot-fixed", k=3)
    with pytest.raises(InputError, match="'independent' has no option 'name'; it takes none"):
        make_coupling("independent", name="x")
    with pytest.raises(InputError, match="size must be at least 1, got 0"):
        make_coupling("ot-semidiscrete", size=0)
    with pytest.raises(InputError, match="call fit"):
        make_coupling("ot-fixed").sample(3)
    with pytest.raises(InputError, match="whole data set"):
        make_coupling("ot-fixed").pair(x1)
    with pytest.raises(InputError, match="one per row"):
        make_coupling("independent").fit(x1, torch.zeros(3))
    with pytest.raises(InputError, match="NaN"):
        make_coupling("ot-fixed").fit(torch.full((4, 2), math.nan))
    with pytest.raises(InputError, match="floating point"):
        make_coupling("ot-fixed").fit(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(InputError, match="share one shape"):
        pair_by_ot(x1[:2], x1, None)


@pytest.mark.parametrize("name", ["ot-fixed", "inversion"])
def test_refreshed_noise_stays_near_its_partner_and_normal(name):
    x1 = torch.randn(3000, 2, generator=seeded(2)) + 2  # what Drift makes of N(0, I)
    size = {"size": 3000} if name == "ot-fixed" else {}
    for share in (0.0, 0.3, 1.0):
        coupling = fitted(name, x1, refresh=share, **size)
        own, again = coupling.sample(20_000, generator=seeded(1)), fitted(name, x1, **size)
        kept = again.sample(20_000, generator=seeded(1))
        assert torch.equal(own.x1, kept.x1)
        rest = own.x0 - math.sqrt(1 - share**2) * kept.x0
        assert float(rest.std()) == pytest.approx(share, abs=0.01)
        assert float(own.x0.std()) == pytest.approx(1, abs=0.03)
        assert (own.x0.unique(dim=0).shape[0] > 19_000) == (share > 0)


def test_a_share_of_new_noise_beyond_one_is_refused():
    for name in ("ot-fixed", "inversion"):
        with pytest.raises(InputError, match=r"refresh must lie in \[0, 1\], got 1.5"):
            make_coupling(name, refresh=1.5)
