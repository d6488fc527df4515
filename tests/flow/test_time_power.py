"""Times of the flow-matching loss: uniform as ever by default, early ones favoured on request."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fmft_fast.errors import CouplingWarning
from fmft_fast.flow import flow_matching_loss
from fmft_fast.train import FinetuneConfig, FlowMatchingTrainer, MLEFineTuner, PretrainConfig


class Recorder(nn.Module):
    """Keeps the times at which it is asked while training."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.times = []

    def forward(self, t, x):
        if t.ndim and self.training:
            self.times.append(t.detach().clone())
        return self.scale * x


def times(power, n=20_000):
    field, x = Recorder(), torch.zeros(n, 1)
    random = torch.Generator().manual_seed(5)
    flow_matching_loss(field, x, x, generator=random, **({} if power is None else power))
    return field.times[0]


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 4.0])
def test_times_follow_the_density_that_the_power_names(p):
    t = times({"time_power": p}).double().sort().values
    assert 0 <= t[0] and t[-1] <= 1
    # Kolmogorov and Smirnov: beyond 1.95 / sqrt(n) lies one sample in a thousand.
    exact = 1 - (1 - t) ** p
    gap = (exact - torch.arange(1, len(t) + 1) / len(t)).abs().max()
    assert gap < 1.95 / len(t) ** 0.5


def test_the_default_draws_the_same_times_as_before():
    drawn = torch.rand(20_000, generator=torch.Generator().manual_seed(5))
    assert torch.equal(times(None), drawn) and torch.equal(times({"time_power": 1.0}), drawn)
    assert PretrainConfig().time_power == FinetuneConfig().time_power == 1.0


@pytest.mark.parametrize("make", ["pretrain", "finetune"])
def test_trainers_use_the_power(make):
    common = {"steps": 4, "batch_size": 512, "device": "cpu", "time_power": 6.0}
    field, x1 = Recorder(), torch.randn(600, 1)
    if make == "pretrain":
        config = PretrainConfig(coupling="independent", **common)
        FlowMatchingTrainer(field, x1, config=config, progress=False).run()
    else:
        config = FinetuneConfig(coupling="independent", fm_weight=1.0, **common)
        with pytest.warns(CouplingWarning, match="independent pairs"):
            MLEFineTuner(field, x1, config=config, progress=False).run()
    early = torch.cat(field.times)
    assert float(early.mean()) == pytest.approx(1 / 7, abs=0.02)
