"""Residual fine-tuning beside a field that changes by itself when it is trained."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fmft_fast.flow import GaussianMixture
from fmft_fast.train import FinetuneConfig, MLEFineTuner, load_model

X1 = 1 + torch.randn(200, 2, generator=torch.Generator().manual_seed(0))


class Restless(nn.Module):
    """Batch normalisation, dropout and a buffer: all that training moves but the optimiser."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 2)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.register_buffer("shift", torch.randn(2))

    def forward(self, t, x):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x)).unsqueeze(1)
        y = self.norm(torch.tanh(self.first(torch.cat([x, t], 1))))
        return self.last(self.drop(y)) + self.shift


def restless(seed=0):
    torch.manual_seed(seed)
    return Restless()


def bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def settings(**changed):
    return FinetuneConfig(
        **{
            "steps": 8,
            "coupling_options": {"size": 128},
            "coupling": "ot-fixed",
            "solver_steps": 2,
            "batch_size": 32,
            "lr": 0.05,
            "weight_decay": 0.5,
            "schedule": "constant",
            "eval_every": 4,
            "checkpoint_every": 4,
            "device": "cpu",
        }
        | changed
    )


def tuner(config, out):
    return MLEFineTuner(restless(), X1, config=config, out=out, progress=False)


@pytest.mark.parametrize(("ema_decay", "select"), [(None, "last"), (0.9, "best")])
@pytest.mark.parametrize("mode", ["residual", "residual-mlp"])
def test_a_frozen_base_stays_in_evaluation_and_as_it_was(mode, ema_decay, select, tmp_path):
    config = settings(mode=mode, ema_decay=ema_decay, select=select)
    result = tuner(config, tmp_path).run()
    assert same(bits(result.model.base), bits(restless()))
    assert same(bits(load_model(restless(seed=1), tmp_path)), bits(result.model))
    result.model.train()
    x, t = X1[:5], torch.tensor(0.5)
    assert torch.equal(result.model(t, x), result.model(t, x)), "dropout or statistics are at work"


def test_a_joint_base_is_trained_with_all_that_belongs_to_it(tmp_path):
    before = bits(restless())
    after = bits(tuner(settings(mode="residual", joint=True, select="last"), tmp_path).run().model)
    for name in ("first.weight", "norm.running_mean", "norm.num_batches_tracked"):
        assert not torch.equal(after[f"base.{name}"], before[name]), name
    assert torch.equal(after["base.shift"], before["shift"])


@pytest.mark.parametrize("joint", [False, True])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(joint, tmp_path):
    config = settings(mode="residual", joint=joint, ema_decay=0.9, anchor_weight=0.1)
    whole = tuner(config, tmp_path / "whole").run()
    tuner(dataclasses.replace(config, steps=4), tmp_path / "parts").run()
    parts = tuner(config, tmp_path / "parts").run(resume=True)
    assert same(bits(whole.model), bits(parts.model))
    assert whole.history == parts.history


GIVEN = [
    ("residual", {"activation": ("tanh", "asinh"), "center": (0.0, 1.0)}),
    ("residual", {"center": torch.tensor([0.1, 1.0])}),
    ("residual-mlp", {"hidden": (8, 8)}),
]


@pytest.mark.parametrize(("mode", "options"), GIVEN, ids=["tuples", "tensor", "widths"])
def test_options_as_python_spells_them_survive_a_resume(mode, options, tmp_path):
    config = settings(mode=mode, residual_options=options)
    tuner(dataclasses.replace(config, steps=4), tmp_path).run()
    model = tuner(config, tmp_path).run(resume=True).model
    loaded = load_model(restless(seed=1), tmp_path)
    assert same(bits(loaded), bits(model)) and loaded.recipe == model.recipe


class Still(nn.Module):
    """v = -x, without a tensor of its own."""

    def forward(self, t, x):
        return -x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bare", [False, True], ids=["buffers", "nothing"])
def test_a_base_without_parameters_comes_back_from_disk(bare, dtype, tmp_path):
    def base():
        field = Still() if bare else GaussianMixture(torch.ones(3, 2), 0.5)
        return field.to(getattr(torch, dtype))

    config = settings(mode="residual", dtype=dtype)
    model = MLEFineTuner(base(), X1, config=config, out=tmp_path, progress=False).run().model
    assert same(bits(load_model(base(), tmp_path)), bits(model))
