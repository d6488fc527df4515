"""The ten lines of the README: a user's own field and DataLoader, fine-tuned for few steps."""

from __future__ import annotations

from pathlib import Path

import torch
import toys
from torch import nn

from fmft_fast.train import FlowMatchingTrainer, PretrainConfig


class Velocity(nn.Module):
    """A field that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, t, x):
        return self.net(torch.cat([x, t.expand(len(x)).unsqueeze(1)], dim=1))


EXAMPLE = """
from torch.utils.data import DataLoader
from fmft_fast import solve
from fmft_fast.train import FinetuneConfig, MLEFineTuner, load_weights

loader = DataLoader(x1, batch_size=256, shuffle=True)      # your data, [n, *state]
config = FinetuneConfig(solver_steps=(2, 10), coupling="ot-semidiscrete", steps=300)
tuner = MLEFineTuner(field, loader, config=config, out="runs/mine")   # v(t, x), t: [] or [batch]
result = tuner.run()                                       # Ctrl-C saves, run(resume=True) goes on
print(result.metrics, result.findings)                     # held-out error; failures by name
samples = solve(result.model, torch.randn(1000, *x1.shape[1:]), steps=2, gradient="none").y
load_weights(field, "runs/mine")                           # later: the best model again
"""


def test_the_readme_shows_this_example():
    readme = Path(__file__).parents[2] / "README.md"
    assert EXAMPLE in readme.read_text(encoding="utf-8")


def test_ten_lines_finetune_a_users_own_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x1, field = toys.two_modes(), Velocity()
    pretrain = PretrainConfig(steps=300, lr=5e-3, device="cpu")
    FlowMatchingTrainer(field, x1, config=pretrain, progress=False).run()
    names = {"x1": x1, "field": field, "torch": torch}
    lines = [line for line in EXAMPLE.splitlines() if line]
    assert len(lines) <= 10
    exec(EXAMPLE, names)
    history = names["result"].history
    assert names["result"].metrics["heldout"] < 0.8 * history[0]["heldout"]
    assert names["result"].findings == ()
    assert names["samples"].shape == (1000, 1)
    assert 1.5 < float(names["samples"].std()) < 2.5
