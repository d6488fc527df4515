"""How far a run has come: what resuming needs besides weights, and what remains at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fmft_fast.errors import CheckpointError
from fmft_fast.train.monitors import Finding


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        model: the model given to `fit`, now with the selected weights, in eval mode.
        step: optimiser steps done.
        reason: "finished" or "early stop".
        selected_step: step of the weights in `model`.
        metrics: evaluation of these weights (empty without `evaluate`).
        history: every evaluation, each with its "step".
        findings: what the monitors named.
    """

    model: nn.Module
    step: int
    reason: str
    selected_step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Sequence[Mapping[str, float]] = ()
    findings: Sequence[Finding] = ()


@dataclass
class Progress:
    """What a run remembers from step to step.

    Attributes:
        step: optimiser steps done.
        best_step: step of the best evaluation, -1 before the first one.
        best_value: its metric.
        stale: evaluations since then.
        metrics: the newest evaluation.
        history: every evaluation, each with its "step".
        findings: what the monitors named.
        window: losses of the newest `log_every` steps.
    """

    step: int = 0
    best_step: int = -1
    best_value: float = math.inf
    stale: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    window: list[float] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Describe everything in plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Take over what `state` described."""
        findings = [Finding(**values) for values in state["findings"]]
        return cls(**{**state, "findings": findings})


def random_state(noise: torch.Generator) -> dict[str, Any]:
    """Describe the run's own stream and the global ones (dropout draws from them)."""
    cuda = noise.device.type == "cuda"
    return {
        "device": noise.device.type,
        "noise": noise.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(noise.device) if cuda else None,
    }


def load_random_state(noise: torch.Generator, state: Mapping[str, Any]) -> None:
    """Bring all streams back to `state`.

    Raises:
        CheckpointError: the run was on another kind of device, whose random numbers differ.
    """
    if state["device"] != noise.device.type:
        raise CheckpointError(
            f"the run was on {state['device']}, here it is on {noise.device.type}, whose random "
            f"numbers differ; resume with device = {state['device']}"
        )
    noise.set_state(state["noise"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], noise.device)
