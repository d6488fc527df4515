"""The trainers learn, resume, take what users bring, and refuse what cannot work."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
import toys
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fmft_fast.errors import ConfigError, InputError, InputTypeError, NonFiniteError
from fmft_fast.fields import MLP
from fmft_fast.flow import sample
from fmft_fast.train import (
    FinetuneConfig,
    FlowMatchingTrainer,
    MLEFineTuner,
    PretrainConfig,
)

QUICK = {"steps": 30, "eval_every": 10, "batch_size": 64, "device": "cpu", "log_every": 5}


@pytest.fixture(scope="module")
def field():
    return toys.pretrained()


def tune(field, data=None, *, resume=False, out=None, evaluate=None, heldout=None, **settings):
    config = FinetuneConfig(**{**QUICK, "coupling_options": {"size": 256}, **settings})
    tuner = MLEFineTuner(
        copy.deepcopy(field),
        toys.two_modes() if data is None else data,
        config=config,
        out=out,
        evaluate=evaluate,
        heldout=heldout,
        progress=False,
    )
    return tuner.run(resume=resume)


def same(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def off_modes(field, steps):
    x = sample(field, 2000, state=(1,), steps=steps)
    return float(((x.abs() - 2).abs() > 0.3).double().mean())


def test_pretraining_learns_the_two_modes(field):
    assert off_modes(field, 50) < 0.3
    assert 1.6 < float(sample(field, 2000, state=(1,), steps=50).std()) < 2.4


def test_finetuning_puts_few_step_samples_on_the_modes(field):
    result = tune(field, steps=300, lr=3e-3, solver_steps=(2,), eval_every=50)
    assert off_modes(result.model, 2) < 0.6 * off_modes(field, 2)
    assert result.metrics["heldout"] == min(row["heldout"] for row in result.history)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver_steps": (1, 2, 4)},
        {"fm_weight": 0.5, "sigma": 0.05},
        {"coupling": "ot-semidiscrete", "coupling_options": {"size": 64, "fit_steps": 50}},
        {"coupling": "inversion", "coupling_options": {"steps": 4}},
        {"coupling": "ot-minibatch", "coupling_options": {}},
        {"method": "rk4", "solver_steps": (2,), "dtype": "float64"},
        {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3, "batch_size": 16, "steps": 6},
        {"gradient": "backprop", "ema_decay": 0.9},
    ],
    ids=lambda settings: next(iter(settings)) + "=" + str(next(iter(settings.values()))),
)
def test_every_setting_resumes_bit_for_bit(field, tmp_path, settings):
    whole = tune(field, out=tmp_path / "whole", checkpoint_every=5, **settings)
    total = whole.step

    class Stop(Exception):
        pass

    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 2:
            raise Stop
        return {}

    options = {"eval_every": max(1, total // 2), "checkpoint_every": 5, **settings}
    whole = tune(field, out=tmp_path / "again", evaluate=lambda model: {}, **options)
    with pytest.raises(Stop):
        tune(field, out=tmp_path / "cut", evaluate=evaluate, **options)
    resumed = tune(field, out=tmp_path / "cut", evaluate=lambda model: {}, resume=True, **options)
    assert same(whole, resumed)


def test_number_of_steps_is_drawn_from_the_list(field, monkeypatch):
    from fmft_fast.train import finetune

    seen = []
    solve = finetune.solve

    def spy(*arguments, **options):
        if options["gradient"] != "none":
            seen.append(options["steps"])
        return solve(*arguments, **options)

    monkeypatch.setattr(finetune, "solve", spy)
    tune(field, solver_steps=(1, 2, 4))
    assert len(seen) == 30 and set(seen) == {1, 2, 4}


class Conditional(nn.Module):
    """v(t, x, cond) of a user, on states [batch, 2, 3] with labels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.net = nn.Sequential(nn.Linear(6 + 8 + 1, 32), nn.SiLU(), nn.Linear(32, 6))

    def forward(self, t, x, label):
        time = t.expand(len(x)).unsqueeze(1)
        return self.net(torch.cat([x.flatten(1), self.embed(label), time], 1)).reshape(x.shape)


@pytest.mark.parametrize("coupling", ["ot-fixed", "ot-minibatch", "inversion"])
@pytest.mark.parametrize("streamed", [True, False])
def test_conditions_and_any_state_shape_go_through_both_trainers(coupling, streamed):
    label = torch.randint(4, (200,))
    x1 = torch.randn(200, 2, 3) + label[:, None, None]
    data = (
        DataLoader(TensorDataset(x1, label), batch_size=50, shuffle=True)
        if streamed
        else (x1, label)
    )
    pretrain = PretrainConfig(**QUICK, coupling="independent")
    first = FlowMatchingTrainer(
        Conditional(), data, config=pretrain, heldout=(x1[:40], label[:40]), progress=False
    ).run()
    assert first.history[-1]["heldout"] < first.history[0]["heldout"]
    tuned = tune(
        first.model,
        data,
        heldout=(x1[:40], label[:40]),
        coupling=coupling,
        coupling_options={},
        solver_steps=(2,),
        lr=5e-3,
    )
    assert tuned.history[-1]["heldout"] < tuned.history[0]["heldout"]


def test_a_users_measure_can_pick_the_best_model(field):
    values = iter([3.0, 1.0, 2.0, 4.0])
    result = tune(field, metric="mine", evaluate=lambda model: {"mine": next(values)})
    assert result.selected_step == 10


def test_training_rows_and_heldout_rows_are_apart(field):
    tuner = MLEFineTuner(
        copy.deepcopy(field), toys.two_modes(100), config=FinetuneConfig(**QUICK), progress=False
    )
    trained = set(tuner._batches.coupling.sample(5000).x1.flatten().tolist())
    held = set(tuner._heldout[1].flatten().tolist())
    assert (len(trained), len(held)) == (90, 10)
    assert not trained & held


def test_watched_rows_are_a_fair_sample_of_sorted_data(field):
    """The first rows alone would be one mode: pairs without the other, and a wrong spread."""
    data = toys.two_modes(6000).sort(0).values
    config = FinetuneConfig(**QUICK, coupling_options={"size": 64})
    tuner = MLEFineTuner(copy.deepcopy(field), data, heldout=data, config=config, progress=False)
    for x1 in (tuner._sight[0], tuner._heldout[1]):
        assert len(x1) == 1024 and 0.4 < float((x1 > 0).double().mean()) < 0.6


def test_a_streaming_trainer_sees_the_same_rows_whatever_the_global_stream(field):
    loader = DataLoader(toys.two_modes(), batch_size=50, shuffle=True)
    config = FinetuneConfig(**QUICK, coupling="ot-minibatch")
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        tuner = MLEFineTuner(copy.deepcopy(field), loader, config=config, progress=False)
        seen.append(tuner._sight[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*seen)


def test_an_interrupted_run_goes_on_with_the_same_trainer(field, tmp_path):
    def train(out, evaluate):
        config = FinetuneConfig(**QUICK, coupling="inversion", coupling_options={"steps": 4})
        return MLEFineTuner(
            copy.deepcopy(field),
            toys.two_modes(),
            config=config,
            evaluate=evaluate,
            out=out,
            progress=False,
        )

    def evaluate(model):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    calls: list[int] = []
    tuner = train(tmp_path / "cut", evaluate)
    with pytest.raises(KeyboardInterrupt, match="step 10, saved in"):
        tuner.run()
    assert same(tuner.run(resume=True), train(tmp_path / "whole", lambda model: {}).run())


@pytest.mark.parametrize(
    ("data", "coupling"),
    [
        (DataLoader(toys.two_modes(), batch_size=64), "ot-minibatch"),
        (toys.two_modes()[:3], "ot-fixed"),
    ],
)
def test_without_held_out_rows_the_last_model_is_the_result(field, data, coupling):
    settings = {"coupling": coupling, "coupling_options": {}}
    with pytest.warns(UserWarning, match="last model is kept.*heldout="):
        result = tune(field, data, **settings)
    assert result.step == QUICK["steps"] and "heldout" not in result.history[-1]
    with pytest.raises(ConfigError, match="metric: expected one of curvature"):
        tune(field, data, patience=1, **settings)
    values = iter([3.0, 1.0, 2.0, 4.0])
    result = tune(field, data, evaluate=lambda model: {"heldout": next(values)}, **settings)
    assert result.selected_step == 10


def test_a_handful_of_rows_is_no_evidence_of_collapse(field):
    result = tune(field, torch.full((5, 1), 2.0), select="last")
    assert result.findings == () and "spread" not in result.history[-1]


def test_fields_that_cannot_work_are_refused_at_once():
    x1 = torch.randn(50, 2)

    class Exchanged(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            return self.scale * x

    class OfOneTime(nn.Linear):
        def forward(self, t, x):
            return super().forward(torch.cat([x, t.expand(len(x), 1)], -1))

    with pytest.raises(InputError, match=r"t of shape \[2\].*one for all: t.reshape"):
        FlowMatchingTrainer(OfOneTime(3, 2), x1, progress=False)
    with pytest.raises(InputError, match=r"expected field\(t, x\) to return.*exchanged"):
        FlowMatchingTrainer(Exchanged(), x1, progress=False)
    with pytest.raises(InputError, match=r"as many conditions as data.*\[50, 40\]"):
        FlowMatchingTrainer(MLP(2), (x1, torch.zeros(40, 1)), progress=False)
    with pytest.raises(InputTypeError, match="floating-point data x1, got torch.uint8"):
        FlowMatchingTrainer(MLP(2), x1.byte(), progress=False)
    with pytest.raises(InputTypeError, match="expected an nn.Module"):
        FlowMatchingTrainer(lambda t, x: x, x1, progress=False)
    with pytest.raises(InputTypeError, match="expected config = FinetuneConfig.*Pretrain"):
        MLEFineTuner(MLP(2), x1, config=PretrainConfig(), progress=False)
    with pytest.raises(InputError, match="unknown coupling 'best'"):
        FlowMatchingTrainer(MLP(2), x1, config=PretrainConfig(coupling="best"), progress=False)


def test_a_diverging_solve_names_the_training_step(field, tmp_path):
    broken = copy.deepcopy(field)
    seen = []

    def evaluate(model):
        seen.append(1)
        if len(seen) == 2:
            with torch.no_grad():
                broken.linears[0].weight.fill_(float("nan"))
        return {}

    config = FinetuneConfig(**QUICK)
    tuner = MLEFineTuner(
        broken, toys.two_modes(), config=config, evaluate=evaluate, out=tmp_path, progress=False
    )
    with pytest.raises(NonFiniteError, match="at step 11; last good checkpoint: .*step 0"):
        tuner.run()
