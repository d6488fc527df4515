"""Intervals over starts: against a plain bootstrap, their coverage, and pairing."""

from __future__ import annotations

import numpy as np
import pytest

from fmft_fast.envs import paired_difference, summarise
from fmft_fast.errors import InputError


def rows(values, **settings):
    return [{"start": i, "score": float(v), **settings} for i, v in enumerate(values)]


def test_intervals_are_those_of_a_plain_bootstrap():
    values = np.random.default_rng(1).beta(2, 1, size=50)
    found = summarise(rows(values, steps=4))[4,]["score"]
    drawn = np.random.default_rng(2).integers(50, size=(20_000, 50))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    assert found.n == 50 and found.mean == pytest.approx(values.mean())
    # Both ends scatter by about a percent of the standard error of .03.
    assert found.low == pytest.approx(low, abs=0.003)
    assert found.high == pytest.approx(high, abs=0.003)


def test_intervals_hold_the_truth_as_often_as_they_say():
    random, hits = np.random.default_rng(0), 0
    for _ in range(300):
        found = summarise(rows(random.beta(2, 1, size=50), steps=1), resamples=500)[1,]["score"]
        hits += found.low <= 2 / 3 <= found.high
    # At level .95 this share has a standard error of .013; such intervals are a little short.
    assert 0.90 < hits / 300 < 0.98


def test_seeds_of_a_start_stay_together():
    values = np.random.default_rng(0).random(30)
    one = rows(values, steps=1, seed=0)
    three = [{**row, "seed": seed} for seed in range(3) for row in one]
    found, wanted = (vars(summarise(table)[1,]["score"]) for table in (three, one))
    assert found == pytest.approx(wanted, abs=1e-12)


def test_settings_are_kept_apart_in_the_order_of_the_rows():
    mixed = rows([1, 1], steps=4, noise="none") + rows([0, 0], steps=1, noise="none")
    found = summarise(mixed, by=("steps", "noise"))
    assert list(found) == [(4, "none"), (1, "none")]
    assert str(found[4, "none"]["score"]) == "1.000 [1.000, 1.000]"


def test_measures_are_the_floats_unless_named():
    table = [{"steps": 1, "start": 0, "length": 300, "score": 0.5, "success": 1.0}]
    assert list(summarise(table)[1,]) == ["score", "success"]
    assert list(summarise(table, measures=["length"])[1,]) == ["length"]


def test_pairing_takes_out_what_makes_a_start_hard():
    random = np.random.default_rng(0)
    hard = random.random(60)
    ours, base = rows(hard + 0.05 + 0.01 * random.standard_normal(60)), rows(hard)
    found = paired_difference(ours, base)["score"]
    assert found.mean == pytest.approx(np.mean([r["score"] for r in ours]) - hard.mean())
    assert 0.04 < found.low < found.mean < found.high < 0.06 and found.n == 60
    apart = summarise(rows(hard, steps=1))[1,]["score"]
    assert found.high - found.low < 0.1 * (apart.high - apart.low)


def test_pairing_goes_by_start_and_not_by_order():
    base = rows(np.arange(10))
    assert paired_difference(base[::-1], base)["score"].high == 0.0


def test_starts_count_alike_whatever_their_seeds():
    base = rows([0.0, 0.0])
    ours = rows([1.0, 0.0]) + rows([1.0])
    assert paired_difference(ours, base)["score"].mean == 0.5


def test_swapping_the_sides_turns_the_interval_round():
    a, b = rows(np.random.default_rng(0).random(20)), rows(np.random.default_rng(1).random(20))
    there, back = paired_difference(a, b)["score"], paired_difference(b, a)["score"]
    np.testing.assert_allclose(
        [there.mean, there.low, there.high], [-back.mean, -back.high, -back.low], atol=1e-12
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: summarise([]), "expected at least one row"),
        (lambda: summarise(rows([1.0])), "expected 'steps' in every row"),
        (lambda: summarise(rows([1.0], steps=1), level=1.0), r"a level in \(0, 1\)"),
        (lambda: summarise(rows([1.0], steps=1), resamples=0), "at least 1 resample"),
        (lambda: summarise(rows([1.0], steps=1), measures=["luck"]), "'luck' in every row"),
        (lambda: paired_difference(rows([1, 2]), rows([1])), r"same starts .* got \[1\] on one"),
    ],
)
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()
