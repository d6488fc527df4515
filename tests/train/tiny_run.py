"""A tiny regression problem for the training loop; run as a script, it trains in a folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from fmft_fast.train import FitConfig, LoaderBatches, fit
from fmft_fast.train.monitors import OverfittingSpike

CONFIG = FitConfig(
    steps=60,
    lr=0.01,
    warmup=5,
    ema_decay=0.9,
    eval_every=10,
    checkpoint_every=7,
    log_every=5,
    device="cpu",
)


def make_model() -> nn.Module:
    """Give a net with dropout, so that the global random stream matters, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.1), nn.SELU(), nn.Linear(16, 1))


def make_loader():
    """Give a shuffled DataLoader of 50 rows in batches of 8."""
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)


def loss(model, batch, random):
    """Fit the sum of the inputs, with noise from the run's own stream."""
    x = batch[0]
    x = x + 0.1 * torch.randn(x.shape, generator=random, device=x.device)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def evaluate(model):
    """Give the error on fixed rows."""
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(2))
    x = x.to(next(model.parameters()).device)
    return {"heldout": float((model(x) - x.sum(1, keepdim=True)).square().mean())}


def train(out=None, *, resume=False, config=CONFIG, pause_s=0.0, **options):
    """Run `fit` on the problem, slowed down by `pause_s` per step."""

    def slow(model, batch, random):
        time.sleep(pause_s)
        return loss(model, batch, random)

    arguments = {"evaluate": evaluate, "monitors": [OverfittingSpike()], "progress": False}
    return fit(
        options.pop("model", None) or make_model(),
        LoaderBatches(make_loader(), seed=config.seed),
        options.pop("loss", slow),
        config=config,
        out=out,
        resume=resume,
        **{**arguments, **options},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), pause_s=float(sys.argv[2]))
