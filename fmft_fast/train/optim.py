"""Device, optimiser and learning rate, as a configuration names them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

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


class FusedAdamW(AdamW):
    """torch's AdamW; where all parameters are alike a step is one call of its fused kernel."""

    _state_lists: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def advance(self) -> None:
        """Do what `step` does, but for its hooks."""
        (group,) = self.param_groups
        grads = [p.grad for p in group["params"] if p.grad is not None]
        if self._state_lists is None or len(grads) < len(group["params"]):
            self.step()
            self._collect()
            return
        averages, squares, steps = self._state_lists
        torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            group["params"],
            grads,
            averages,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _collect(self) -> None:
        """Find the state of all parameters, if one call can take them."""
        (group,) = self.param_groups
        params = group["params"]
        alike = len({(p.device, p.dtype) for p in params}) == 1
        if group["fused"] and alike and all(p in self.state for p in params):
            states = [self.state[p] for p in params]
            self._state_lists = (
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
            )

    def set_rate(self, lr: float) -> None:
        """Set the learning rate, in place where it lies on the device."""
        (group,) = self.param_groups
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def describe(self, lr: float) -> dict[str, Any]:
        """`state_dict` for a checkpoint, which does not tell where a run keeps its rate."""
        state = self.state_dict()
        groups = [{**g, "lr": lr, "capturable": False} for g in state["param_groups"]]
        return {**state, "param_groups": groups}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `describe` gave, on any device."""
        own = {name: self.param_groups[0][name] for name in ("lr", "capturable", "fused")}
        self.load_state_dict(dict(state))
        self.param_groups[0].update(own)
        self._state_lists = None


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: FitConfig, *, rate_on_device: bool = False
) -> FusedAdamW:
    """Give AdamW (one fused kernel where the device has it).

    Args:
        parameters: to train.
        config: settings.
        rate_on_device: keep the learning rate in memory that a CUDA graph can read.

    Raises:
        ConfigError: there is nothing to train.
    """
    if not parameters:
        raise ConfigError("expected parameters to train, got none; set requires_grad on some")
    fused = all(p.device.type in ("cpu", "cuda") and not p.is_complex() for p in parameters)
    lr = torch.tensor(config.lr, device=parameters[0].device) if rate_on_device else config.lr
    return FusedAdamW(
        parameters,
        lr=lr,
        weight_decay=config.weight_decay,
        fused=fused,
        capturable=rate_on_device and parameters[0].is_cuda,
    )


def gradient_norm(grads: list[Tensor], clip: float | None) -> Tensor:
    """Give the norm of all gradients, and scale them down to `clip`; the host waits for nothing."""
    if len({(g.device, g.dtype) for g in grads}) != 1:
        norm = torch.nn.utils.get_total_norm(grads)
    else:
        parts = torch._foreach_norm(grads)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.linalg.vector_norm(torch.stack(parts))
    # On a CPU the host may look: nearly all steps of a run need no scaling.
    if clip is not None and not (norm.device.type == "cpu" and float(norm) < 0.999 * clip):
        scale = torch.clamp(clip / (norm + 1e-6), max=1.0)
        for device in {g.device for g in grads}:
            mine = [g for g in grads if g.device == device]
            torch._foreach_mul_(mine, scale.to(device))  # pyright: ignore[reportPrivateImportUsage]
    return norm


class Average:
    """The averaged weights of a model: `module`, moved towards the model after every step.

    The first update copies. Buffers are copied always; frozen weights are the same from the start.

    Args:
        model: what is averaged.
        decay: the final decay, see `average_decay`.
        rate_on_device: keep the decay in memory that a CUDA graph can read.
    """

    def __init__(self, model: nn.Module, decay: float, *, rate_on_device: bool = False) -> None:
        self.module = copy.deepcopy(model)
        self.decay, self.count = decay, 0
        both = zip(self.module.parameters(), model.parameters(), strict=True)
        moving = [(mine, theirs) for mine, theirs in both if theirs.requires_grad]
        self._averaged, self._current = [a for a, _ in moving], [b for _, b in moving]
        self._buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))
        first = self._current[0]
        self._kept: Any = torch.zeros((), device=first.device) if rate_on_device else 0.0

    def set_rate(self, step: int) -> None:
        """Set the decay for the update after `step` steps."""
        kept = average_decay(step, self.decay) if self.count else 0.0
        if isinstance(self._kept, Tensor):
            self._kept.fill_(kept)
        else:
            self._kept = kept

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model, without a wait."""
        averaged, current = self._averaged, self._current
        if isinstance(self._kept, Tensor):
            gap = torch._foreach_sub(averaged, current)  # pyright: ignore
            torch._foreach_mul_(gap, self._kept)  # pyright: ignore
            torch._foreach_add_(gap, current)  # pyright: ignore
            torch._foreach_copy_(averaged, gap)  # pyright: ignore
        elif self._kept == 0.0:
            torch._foreach_copy_(averaged, current)  # pyright: ignore
        else:
            torch._foreach_lerp_(averaged, current, 1 - self._kept)  # pyright: ignore
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
