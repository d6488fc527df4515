"""A two-mode toy on a line: small enough to train inside a test, multimodal enough to collapse."""

from __future__ import annotations

import torch

from fmft_fast.fields import MLP
from fmft_fast.train import FlowMatchingTrainer, PretrainConfig


def two_modes(n=2000, seed=0):
    """Draw n points of two narrow Gaussians at -2 and +2, [n, 1]."""
    random = torch.Generator().manual_seed(seed)
    side = 4.0 * torch.randint(2, (n, 1), generator=random) - 2
    return side + 0.1 * torch.randn(n, 1, generator=random)


def pretrained(steps=300):
    """Give a field trained a little, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        field = MLP(1, hidden=(32, 32), activation="silu")
    config = PretrainConfig(
        steps=steps, lr=5e-3, batch_size=128, device="cpu", coupling="ot-minibatch"
    )
    return FlowMatchingTrainer(field, two_modes(), config=config, progress=False).run().model
