"""A configuration is checked when made, read from TOML and command line, and written back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fmft_fast.errors import ConfigError
from fmft_fast.train import config as cfg
from fmft_fast.train.config import FinetuneConfig, FitConfig, PretrainConfig, parse_overrides


@pytest.mark.parametrize("cls", [FitConfig, PretrainConfig, FinetuneConfig])
def test_round_trips_through_toml_and_json(cls, tmp_path):
    made = cls(steps=7, lr=1e-9, ema_decay=0.5, grad_clip=None, tensorboard=True)
    if cls is FinetuneConfig:
        made = cls(solver_steps=(2, 10), coupling_options={"size": 64}, rtol=1e-5)
    file = tmp_path / "config.toml"
    file.write_text(made.to_toml("run"))
    assert cls.from_dict(cfg.read_toml(file)["run"]) == made
    assert cls.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_unknown_key_is_refused_by_name_with_the_nearest_one():
    with pytest.raises(ConfigError, match="'batchsize'.*did you mean 'batch_size'"):
        PretrainConfig.from_dict({"batchsize": 3})
    with pytest.raises(ConfigError, match="'zzz'; known: .*batch_size"):
        PretrainConfig.from_dict({"zzz": 3})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"steps": "many"}, r"steps: expected a whole number, got 'many' \(str\)"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"steps": 1.5}, "steps: expected a whole number"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"lr": 0}, "lr: expected more than 0"),
        ({"lr": float("nan")}, "lr: expected a finite number"),
        ({"ema_decay": 1.5}, "ema_decay: expected at most 1"),
        ({"schedule": "cosin"}, "expected one of constant, cosine.*did you mean 'cosine'"),
        ({"tensorboard": 1}, "tensorboard: expected"),
        ({"solver_steps": []}, "at least one value"),
        ({"solver_steps": [2, 0]}, "solver_steps: expected at least 1, got 0"),
        ({"coupling_options": 3}, "coupling_options: expected a table"),
    ],
)
def test_wrong_values_are_refused_with_expected_and_got(table, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig.from_dict(table)


def test_options_become_what_a_file_gives_back():
    options = {
        "activation": ("tanh", "asinh"),
        "center": torch.tensor([0.5, 1.0]),
        "rate": np.float64(0.5),
        "deep": {"sizes": (8, np.int64(4))},
    }
    made = FinetuneConfig(mode="residual", residual_options=options)
    assert made.residual_options == {
        "activation": ["tanh", "asinh"],
        "center": [0.5, 1.0],
        "rate": 0.5,
        "deep": {"sizes": [8, 4]},
    }
    saved = json.loads(json.dumps(made.to_dict()))
    assert cfg.changes(saved, made.to_dict()) == ""


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), [torch.tensor([1.0, np.inf])]])
def test_options_that_no_file_can_keep_are_refused(value):
    with pytest.raises(ConfigError, match="residual_options.center: expected finite numbers"):
        FinetuneConfig(mode="residual", residual_options={"center": value})


def test_values_take_the_type_of_their_key():
    made = FinetuneConfig.from_dict({"lr": 1, "solver_steps": 4, "grad_clip": "none"})
    assert (made.lr, made.solver_steps, made.grad_clip) == (1.0, (4,), None)
    assert isinstance(made.lr, float)


@pytest.mark.parametrize(
    ("words", "table"),
    [
        (["--lr", "1e-3", "--steps=5"], {"lr": 1e-3, "steps": 5}),
        (["--finetune.solver-steps=2,10"], {"finetune": {"solver_steps": [2, 10]}}),
        (["--coupling_options.size", "64"], {"coupling_options": {"size": 64}}),
        (
            ["--coupling", "ot-fixed", "--tensorboard=true"],
            {"coupling": "ot-fixed", "tensorboard": True},
        ),
        (["--lr=.5", "--x=-1"], {"lr": 0.5, "x": -1}),
        (["--x", "-1"], {"x": -1}),
    ],
)
def test_overrides_of_the_command_line(words, table):
    assert parse_overrides(words) == table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr", "3"], "expected --key value"),
        (["--lr"], "--lr: expected a value"),
        (["--a=1", "--a.b=2"], "given a value before"),
    ],
)
def test_malformed_overrides_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides(words)


def test_section_lies_over_shared_keys_and_overrides_lie_over_both():
    table = {"seed": 3, "pretrain": {"lr": 0.1, "seed": 4}, "finetune": {"lr": 0.2}}
    sections = ("pretrain", "finetune")
    assert cfg.section(table, "pretrain", sections) == {"seed": 4, "lr": 0.1}
    assert cfg.section(table, "finetune", sections) == {"seed": 3, "lr": 0.2}
    assert cfg.merge({"a": {"x": 1, "y": 2}}, {"a": {"x": 5}}) == {"a": {"x": 5, "y": 2}}


def test_unreadable_files_are_named(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("steps = \n")
    with pytest.raises(ConfigError, match="bad.toml is not valid TOML"):
        cfg.read_toml(bad)
    with pytest.raises(ConfigError, match="cannot read the configuration .*absent.toml"):
        cfg.read_toml(tmp_path / "absent.toml")
