"""Observation noise: its size per dimension, its kinds, and its text form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fmft_fast.data import Normalizer
from fmft_fast.envs import ObservationNoise
from fmft_fast.errors import InputError


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def test_gaussian_noise_has_the_scale_of_each_dimension():
    noise = ObservationNoise("gaussian", 0.5, scale=(1.0, 0.0, 20.0), offset=(0.0,) * 3)
    obs = torch.full((4000, 3), 7.0)
    error = noise.apply(obs, generators(len(obs))) - obs
    # The standard error of a standard deviation of 4,000 numbers is 1.1 % of it.
    torch.testing.assert_close(error.std(0), torch.tensor([0.5, 0.0, 10.0]), rtol=0.05, atol=0.0)
    assert (error.mean(0).abs() <= 0.07 * torch.tensor([0.5, 0.0, 10.0])).all()
    assert abs(torch.corrcoef(error[:, [0, 2]].T)[0, 1]) < 0.07


def test_salt_and_pepper_sets_numbers_to_the_ends_of_the_range():
    noise = ObservationNoise("salt-pepper", 0.3, scale=(1.0, 5.0), offset=(0.0, 10.0))
    obs = torch.tensor([[0.25, 9.0]]).expand(4000, 2)
    seen = noise.apply(obs, generators(len(obs)))
    for i, (low, high) in enumerate([(-1.0, 1.0), (5.0, 15.0)]):
        kept, salt, pepper = ((seen[:, i] == v).float().mean() for v in (obs[0, i], high, low))
        assert kept + salt + pepper == pytest.approx(1.0)
        assert abs(salt - 0.15) < 0.024 and abs(pepper - 0.15) < 0.024


@pytest.mark.parametrize("kind", ["gaussian", "salt-pepper"])
def test_rows_follow_their_own_generators(kind):
    noise = ObservationNoise(kind, 0.5, scale=(1.0,) * 4, offset=(0.0,) * 4)
    obs = torch.zeros(3, 4)
    together = noise.apply(obs, generators(3))
    alone = [noise.apply(obs[i : i + 1], generators(1, seed=i)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])


def test_levels_are_compared_on_the_same_draws():
    def seen(kind, level):
        noise = ObservationNoise(kind, level, scale=(1.0,) * 50, offset=(0.0,) * 50)
        return noise.apply(torch.full((1, 50), 0.5), generators(1))

    torch.testing.assert_close(2 * (seen("gaussian", 0.1) - 0.5), seen("gaussian", 0.2) - 0.5)
    few, many = seen("salt-pepper", 0.2), seen("salt-pepper", 0.6)
    hit = few != 0.5
    assert 0 < hit.sum() < (many != 0.5).sum() and torch.equal(few[hit], many[hit])


def test_none_and_level_zero_change_nothing():
    obs = torch.randn(2, 3)
    assert ObservationNoise().apply(obs, []) is obs
    for kind in ("gaussian", "salt-pepper"):
        noise = ObservationNoise(kind, 0.0, scale=(1.0,) * 3, offset=(0.0,) * 3)
        assert torch.equal(noise.apply(obs, generators(2)), obs)


def test_the_policy_s_normaliser_fills_in_what_was_not_given():
    normalizer = Normalizer.fit(torch.tensor([[0.0, 5.0], [4.0, 15.0]]))
    policy = SimpleNamespace(obs_normalizer=normalizer)
    noise = ObservationNoise.parse("gaussian:0.1").for_policy(policy)
    assert noise.scale == (2.0, 5.0) and noise.offset == (2.0, 10.0)
    given = ObservationNoise("gaussian", 0.1, scale=(9.0, 0.0)).for_policy(policy)
    assert given.scale == (9.0, 0.0) and given.offset == (2.0, 10.0)


@pytest.mark.parametrize("text", ["none", "gaussian:0.1", "salt-pepper:0.05", "gaussian:2"])
def test_the_text_form_goes_both_ways(text):
    assert str(ObservationNoise.parse(text)) == text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ObservationNoise.parse("fog:0.1"), "gaussian:LEVEL .* got 'fog:0.1'"),
        (lambda: ObservationNoise.parse("gaussian:much"), "got 'gaussian:much'"),
        (lambda: ObservationNoise.parse("gaussian"), "gaussian:LEVEL .* got 'gaussian'"),
        (lambda: ObservationNoise("gaussian", -0.1), "level of gaussian: expected from 0 on"),
        (lambda: ObservationNoise("gaussian", float("nan")), "got nan"),
        (lambda: ObservationNoise("salt-pepper", 1.5), "from 0 to 1, got 1.5"),
        (lambda: ObservationNoise("gaussian", 1, scale=(1, -1)), "scale: expected finite numbers"),
        (lambda: ObservationNoise("gaussian", 1).for_policy(None), "expected scale and offset"),
        (
            lambda: ObservationNoise("gaussian", 1, (1, 1)).apply(torch.zeros(1, 3), generators(1)),
            "expected 3 numbers, one for each dimension of an observation, got 2",
        ),
        (
            lambda: ObservationNoise("gaussian", 1, (1,)).apply(torch.zeros(2, 1), generators(1)),
            r"expected \[1, obs_dim\]",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
