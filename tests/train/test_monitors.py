"""Monitors speak when their failure happens, once, and are silent otherwise."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import toys

from fmft_fast.errors import CouplingWarning
from fmft_fast.train import (
    CurvatureGrowth,
    FinetuneConfig,
    MLEFineTuner,
    OverfittingSpike,
    VarianceCollapse,
    read_metrics,
)
from fmft_fast.train.monitors import spread


def feed(monitor, rows):
    found = [monitor.update(step, metrics) for step, metrics in enumerate(rows)]
    return [finding.step for finding in found if finding is not None]


def curves(loss, heldout):
    return [{"loss": a, "heldout": b} for a, b in zip(loss, heldout, strict=True)]


def test_overfitting_is_named_when_heldout_spikes_over_a_level_training_loss():
    rows = curves([1.0, 0.5, 0.3, 0.28, 0.27, 0.27], [1.0, 0.6, 0.5, 0.52, 0.7, 0.9])
    assert feed(OverfittingSpike(), rows) == [5]


def test_overfitting_is_named_when_the_loss_itself_spikes_after_its_plateau():
    rows = curves([1.0, 0.5, 0.5, 0.49, 1.1, 0.5, 1.2], [1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert feed(OverfittingSpike(), rows) == [4, 6]


@pytest.mark.parametrize(
    ("loss", "heldout"),
    [
        ([1.0, 0.6, 0.4, 0.3, 0.3, 0.29], [1.1, 0.7, 0.5, 0.4, 0.4, 0.41]),
        ([1.0, 0.7, 0.72, 0.69, 0.71, 0.7], [1.1, 0.9, 0.95, 0.88, 0.97, 0.9]),
        ([1.0, 0.5, 0.4, 0.3, 0.3, 0.3], [1.0, 1.4, 0.9, 0.8, 0.7, 0.7]),
    ],
    ids=["falling", "noisy", "first steps"],
)
def test_overfitting_monitor_is_silent_on_healthy_curves(loss, heldout):
    assert feed(OverfittingSpike(), curves(loss, heldout)) == []


def test_curvature_is_compared_with_the_first_value():
    rows = [{"curvature": value} for value in (1.1, 1.2, 2.1, 2.3, 2.4, 1.5, 2.5)]
    assert feed(CurvatureGrowth(limit=2.0), rows) == [3, 6]


def test_missing_numbers_leave_every_monitor_silent():
    for monitor in (OverfittingSpike(), CurvatureGrowth(), VarianceCollapse()):
        assert feed(monitor, [{}, {"other": 9.0}]) == []


@pytest.mark.parametrize("monitor", [OverfittingSpike, CurvatureGrowth, VarianceCollapse])
def test_restored_monitor_goes_on_as_the_first_did(monitor):
    values = (1.0, 0.4, 0.38, 0.37, 0.9, 2.5, 2.6)
    rows = [{"loss": v, "heldout": v, "curvature": v + 1, "spread": v} for v in values]
    first, second = monitor(), monitor()
    feed(first, rows[:4])
    second.load_state(first.state())
    assert feed(second, rows[4:]) == feed(first, rows[4:])


def test_spread_is_the_ratio_of_standard_deviations():
    data = torch.randn(100, 3, 2)
    assert spread(0.25 * data + 7, data) == pytest.approx(0.25, rel=1e-5)


@pytest.fixture(scope="module")
def field():
    return toys.pretrained()


def finetune(field, tmp_path, **settings):
    config = FinetuneConfig(
        **{
            "steps": 120,
            "eval_every": 20,
            "lr": 5e-3,
            "batch_size": 128,
            "device": "cpu",
            "solver_steps": (4,),
            "select": "last",
            **settings,
        }
    )
    tuner = MLEFineTuner(
        copy.deepcopy(field), toys.two_modes(), config=config, out=tmp_path, progress=False
    )
    return tuner.run()


def test_independent_pairs_collapse_the_toy_and_the_run_says_so(field, tmp_path):
    with pytest.warns(CouplingWarning, match="ot-semidiscrete"):
        result = finetune(field, tmp_path, coupling="independent")
    names = [finding.name for finding in result.findings]
    assert "variance collapse" in names
    assert result.history[-1]["spread"] < 0.3
    events = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "event"]
    assert [event["event"] for event in events] == names
    assert all("coupling" in e["message"] for e in events if e["event"] == "variance collapse")


@pytest.mark.parametrize(
    ("coupling", "options"),
    [("inversion", {"steps": 8}), ("ot-semidiscrete", {"size": 512, "fit_steps": 300})],
)
def test_healthy_runs_keep_the_spread_and_are_silent(field, tmp_path, coupling, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CouplingWarning)
        result = finetune(field, tmp_path, lr=1e-3, coupling=coupling, coupling_options=options)
    assert result.findings == ()
    assert 0.8 < result.history[-1]["spread"] < 1.2
    assert result.history[-1]["heldout"] < result.history[0]["heldout"]


def test_learning_a_few_pairs_by_heart_is_named(field, tmp_path):
    result = finetune(field, tmp_path, lr=5e-3, coupling_options={"size": 32})
    assert "over-fitting spike" in [finding.name for finding in result.findings]


def test_far_too_large_steps_make_trajectories_curved_and_the_run_says_so(field, tmp_path):
    result = finetune(
        field, tmp_path, lr=0.3, grad_clip=None, coupling_options={"size": 256}, curvature_limit=1.2
    )
    assert "curvature growth" in [finding.name for finding in result.findings]
