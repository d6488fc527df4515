"""The commands with a branch beside the field: trained, killed, resumed, measured, tuned again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_task
import torch
from tiny_task import TinyTask

from fmft_fast import cli, commands
from fmft_fast.fields import GAV, MLP, Residual
from fmft_fast.tasks import TASKS, register
from fmft_fast.train import load_checkpoint
from fmft_fast.train.config import read_toml

TINY = ["--batch_size", "16", "--device", "cpu", "--quiet", "--measure", "1"]
RESIDUAL = ["--mode", "residual", "--residual_options.width", "8"]
LONG = [*TINY, *RESIDUAL, "--steps", "400", "--eval_every", "100", "--ema_decay", "0.9"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """Register the task, pre-train its field, and work in a folder of its own."""
    task = register(TinyTask())
    monkeypatch.chdir(tmp_path)
    assert fmft("pretrain", "tiny", *TINY, "--steps", "10") == 0
    yield task
    del TASKS["tiny"]


def fmft(*words):
    return cli.main([str(word) for word in words])


def results(folder):
    return json.loads(Path(folder, "results.json").read_text())["results"]


def loaded(task, run):
    return commands.load_field(task, run)[0]


def test_a_residual_is_trained_measured_and_built_on(tiny):
    run = ["finetune", "tiny", *TINY, "--steps", "10", "--eval_every", "5"]
    assert fmft(*run, *RESIDUAL, "--out", "one") == 0
    assert fmft("evaluate", "tiny", "--checkpoint", "one", "--steps", "1", "--out", "eval") == 0
    assert results("eval")["model"] == results("one")["after"]
    first = loaded(tiny, "one")
    assert isinstance(first, Residual) and isinstance(first.branch, GAV)
    base, pretrained = first.base.state_dict(), load_checkpoint("runs/tiny/pretrain").model
    assert all(torch.equal(base[name], pretrained[name]) for name in pretrained)

    assert fmft(*run, "--from", "one", "--out", "two", "--mode", "residual-mlp") == 0
    second = loaded(tiny, "two")
    assert isinstance(second.base, Residual) and isinstance(second.branch, MLP)
    assert fmft(*run, "--from", "one", "--out", "three", "--select", "last") == 0
    third = loaded(tiny, "three")
    assert isinstance(third.branch, GAV) and isinstance(third.base, MLP)
    assert results("three")["before"] == results("one")["after"]


def test_a_killed_residual_run_ends_in_the_same_weights_when_resumed(tiny):
    assert fmft("finetune", "tiny", *LONG, "--out", "whole") == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, tiny_task.__file__, "finetune", "tiny", *LONG, "--out", "cut"]
    child = subprocess.Popen(words, env=environment)
    deadline = time.monotonic() + 100
    while not Path("cut/checkpoints/step-000020").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 0 < load_checkpoint("cut").step < 400
    assert fmft("finetune", "tiny", "--out", "cut", "--resume", "--quiet", "--measure", "1") == 0
    whole, resumed = (loaded(tiny, run).state_dict() for run in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_settings_of_a_branch_stand_in_files_and_are_explained(tiny, capsys):
    Path("c.toml").write_text(
        '[finetune]\nmode = "residual"\nsteps = 5\n[finetune.residual_options]\nbranches = 1\n'
    )
    run = ["finetune", "tiny", "--config", "c.toml", *TINY]
    assert fmft(*run, "--out", "a") == 0
    saved = read_toml("a/config.toml")["finetune"]
    assert saved["mode"] == "residual" and saved["residual_options"] == {"branches": 1}
    assert len(loaded(tiny, "a").branch.branches) == 1
    assert fmft(*run, "--mode", "residual-mlp", "--out", "b") == 0, "options go with their mode"
    assert fmft(*run, "--mode", "direct", "--out", "c") == 0
    for words, message in (
        (["--residual_options.width", "0"], "width"),
        (["--residual_options.widht", "4"], "got 'widht'; did you mean 'width'"),
        (["--residual_options.width", "wide"], "width must be a whole number"),
        (["--mode", "direct", "--joint", "true"], "joint: expected nothing in mode direct"),
    ):
        capsys.readouterr()
        assert fmft(*run, *words, "--out", "d") == 2
        assert message in capsys.readouterr().err
        assert not Path("d").exists(), "a mistake leaves no folder behind"
