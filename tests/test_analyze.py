"""`fmft analyze` measures two checkpoints against the exact field, or against the first of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_task import TinyTask

from fmft_fast import analyze, cli
from fmft_fast.fields import MLP
from fmft_fast.flow import GaussianMixture
from fmft_fast.tasks import TASKS, TaskData, register

TRAIN = ["--steps", "10", "--batch_size", "16", "--device", "cpu", "--quiet", "--measure", "1"]


class PlaneTask(TinyTask):
    """Two modes in the plane, whose exact velocity is known."""

    name = "plane"
    mixture = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.3)

    def make_data(self, seed, field=None):
        random = torch.Generator().manual_seed(seed)
        return TaskData(self.mixture.sample(200, random), self.mixture.sample(50, random))

    def make_field(self):
        return MLP(2, hidden=(8,))


@pytest.fixture(params=[TinyTask, PlaneTask])
def task(request, monkeypatch, tmp_path):
    """Give a task with two checkpoints, in a folder of their own."""
    made = register(request.param())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "MAP_POINTS", 9)
    monkeypatch.setattr(analyze, "PATH_STEPS", 40)
    assert cli.main(["pretrain", made.name, *TRAIN]) == 0
    assert cli.main(["finetune", made.name, *TRAIN]) == 0
    yield made
    del TASKS[made.name]


def test_analyze_writes_numbers_and_figures_for_both(task, capsys):
    runs = [f"runs/{task.name}/{kind}" for kind in ("pretrain", "finetune")]
    words = ["analyze", task.name, "--before", runs[0], "--after", runs[1]]
    assert cli.main([*words, "--steps", "2,3", "--samples", "12"]) == 0
    out = capsys.readouterr().out
    folder = Path("runs") / task.name / "analysis"
    content = json.loads((folder / "analysis.json").read_text())
    assert set(content["bounds"]) == {"before", "after"}
    for by_steps in content["bounds"].values():
        assert set(by_steps) == {"2", "3"}
        for found in by_steps.values():
            assert found["samples"] == 12
            assert all(kind["holds"] == 1.0 for kind in found["bounds"].values())
    drawn = {"bounds.png", "decomposition.png", "slopes.png"}
    if task.name == "plane":
        drawn.add("maps.png")
        assert "exact velocity" in content["reference"] and "'ot-minibatch'" in out
        assert content["bounds"]["before"]["2"]["delta"]["max"] > 0
        assert set(content["stiffness"]) == {"before", "after", "exact"}
    else:
        assert "model before fine-tuning, solved accurately" in content["reference"]
        assert content["bounds"]["before"]["2"]["delta"]["max"] == 0
        assert content["bounds"]["after"]["2"]["delta"]["max"] > 0
        assert set(content["stiffness"]) == {"before", "after"}
    assert drawn == {file.name for file in folder.glob("*.png")}
    assert all((folder / name).stat().st_size > 5000 for name in drawn)


def test_mistakes_are_explained(capsys):
    words = ["analyze", "toy-gmm", "--before", "gone", "--after", "gone"]
    assert cli.main(words) == 2
    assert "gone does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, "--samples", "1,2"])
    assert "expected one number" in capsys.readouterr().err
