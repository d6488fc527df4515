"""Device, optimiser and learning rate, as a configuration names them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fmft_fast.errors import ConfigError
from fmft_fast.train.config import FitConfig


def pick_device(name: str) -> torch.device:
    """Give the device that a configuration names; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device: expected auto, cpu, cuda or cuda:N, got {name!r}; use auto"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name} was asked for, but torch sees no GPU; use cpu or auto")
    return device


def lr_factor(step: int, config: FitConfig) -> float:
    """Give the share of the peak learning rate at a step: linear warm-up, then flat or cosine.

    Example:
        >>> config = FitConfig(steps=100, warmup=10)
        >>> [round(lr_factor(s, config), 2) for s in (0, 9, 55, 100)]
        [0.1, 1.0, 0.5, 0.0]
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def average_decay(step: int, decay: float) -> float:
    """Give the decay of the averaged weights after `step` steps: it grows to `decay`.

    A decay that is constant from the first step would keep a share of the starting weights for
    long (5 % after 3000 steps at .999).

    Example:
        >>> [round(average_decay(k, 0.99), 3) for k in (0, 8, 80, 3000)]
        [0.1, 0.5, 0.9, 0.99]
    """
    return min(decay, (1 + step) / (10 + step))


def make_optimizer(parameters: Sequence[nn.Parameter], config: FitConfig) -> tuple[AdamW, LambdaLR]:
    """Give AdamW (one fused kernel where the device has it) and its schedule.

    Raises:
        ConfigError: there is nothing to train.
    """
    if not parameters:
        raise ConfigError("expected parameters to train, got none; set requires_grad on some")
    fused = all(p.device.type in ("cpu", "cuda") and not p.is_complex() for p in parameters)
    optimizer = AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    return optimizer, LambdaLR(optimizer, lambda step: lr_factor(step, config))
