"""What a training step costs the host besides the loss and its gradient."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from fmft_fast.train.batches import Batch
from fmft_fast.train.step import TrainStep


@dataclass(frozen=True)
class HostCost:
    """Microseconds of the process's time per step: in loss and gradient, and outside of them."""

    inside: float
    outside: float


def host_cost(trainer: Any, steps: int = 200, warm_up: int = 20) -> HostCost:
    """Measure some training steps of a trainer that has not run; they change its field.

    Process time, so that other processes do not count. A replayed step is outside altogether.

    Args:
        trainer: a `FlowMatchingTrainer` or `MLEFineTuner`.
        steps: steps measured.
        warm_up: steps before.

    Example:
        >>> from fmft_fast.fields import MLP
        >>> from fmft_fast.train import FlowMatchingTrainer
        >>> trainer = FlowMatchingTrainer(MLP(2), torch.randn(64, 2), progress=False)
        >>> host_cost(trainer, steps=2, warm_up=1).outside > 0
        True
    """
    device = trainer._device
    random = torch.Generator(device).manual_seed(0)
    step = TrainStep(
        trainer._field,
        trainer._batches,
        trainer._loss,
        trainer.config,
        device,
        random,
        trainer._choose,
    )
    gradients, inside = step.gradients, 0.0

    def timed(batch: Batch, choice: Hashable) -> torch.Tensor:
        nonlocal inside
        start = time.process_time()
        loss = gradients(batch, choice)
        inside += time.process_time() - start
        return loss

    step.gradients = timed
    trainer._field.train()
    for number in range(warm_up):
        step(number)
    inside, start = 0.0, time.process_time()
    for number in range(warm_up, warm_up + steps):
        step(number)
    total = time.process_time() - start
    return HostCost(inside / steps * 1e6, (total - inside) / steps * 1e6)
