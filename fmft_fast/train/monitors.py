"""Monitors that name the known failures of fine-tuning while they happen, each with its remedy.

`fit` feeds every evaluation to each monitor: named numbers such as "loss" (mean training loss since
the last one), "heldout", "curvature" and "spread". A monitor whose numbers are absent is silent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """A failure that was seen: its name, the step, what was measured, and what to do."""

    name: str
    step: int
    seen: str
    remedy: str

    def __str__(self) -> str:
        """Give one line for the screen."""
        return f"{self.name}: {self.seen}; {self.remedy}"


class Monitor(ABC):
    """Watches numbers; reports when a failure begins, and again only after it has passed."""

    name: str
    remedy: str

    def __init__(self) -> None:
        self._inside = False

    def update(self, step: int, metrics: Mapping[str, float]) -> Finding | None:
        """Take one evaluation; give a finding if the failure begins with it."""
        seen = self.look(metrics)
        begins = seen is not None and not self._inside
        self._inside = seen is not None
        return Finding(self.name, step, seen, self.remedy) if begins and seen else None

    @abstractmethod
    def look(self, metrics: Mapping[str, float]) -> str | None:
        """Say what is wrong with this evaluation, or give None."""

    def state(self) -> dict[str, Any]:
        """Describe what the monitor remembers, for checkpoints."""
        return dict(vars(self))

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Remember what a saved monitor did."""
        vars(self).update(state)


class OverfittingSpike(Monitor):
    """The training loss has levelled off, and then it or the held-out error jumps.

    The held-out error must stay risen for two evaluations: the first steps of a run at full
    learning rate may raise it in passing.

    Args:
        rise: growth of the held-out error over its best value that counts as a spike.
        jump: growth of the training loss over its plateau that counts as one.
        flat: relative change of the training loss between two evaluations that counts as level.
    """

    name = "over-fitting spike"
    remedy = "stop here and keep the best model: train fewer steps, or add weight_decay or patience"

    def __init__(self, *, rise: float = 1.2, jump: float = 2.0, flat: float = 0.1) -> None:
        super().__init__()
        self.rise, self.jump, self.flat = rise, jump, flat
        self._best = float("inf")
        self._best_loss = float("inf")
        self._risen = 0
        self._last_loss: float | None = None
        self._plateau: float | None = None

    def look(self, metrics: Mapping[str, float]) -> str | None:
        """Compare with the best held-out error and with the plateau of the loss."""
        loss, heldout = metrics.get("loss"), metrics.get("heldout")
        seen = None
        if loss is not None:
            if self._plateau is not None and loss > self.jump * self._plateau:
                seen = f"the training loss levelled off at {self._plateau:.4g}, now {loss:.4g}"
            elif self._last_loss is not None:
                level = abs(loss - self._last_loss) <= self.flat * self._last_loss
                self._plateau = min(loss, self._plateau or loss) if level else self._plateau
            self._last_loss = loss
        if heldout is not None and loss is not None:
            # A rise shared by the training loss is divergence, which the plateau rule names.
            learning = loss <= self._best_loss * (1 + self.flat)
            risen = heldout > self.rise * self._best and learning
            self._risen = self._risen + 1 if risen else 0
            if self._risen >= 2:
                seen = (
                    f"the held-out error rose from {self._best:.4g} to {heldout:.4g} while the "
                    f"training loss stays at {loss:.4g}"
                )
        if heldout is not None and heldout < self._best:
            self._best = heldout
            self._best_loss = loss if loss is not None else self._best_loss
        return seen


class CurvatureGrowth(Monitor):
    """Trajectories have become much more curved than those of the pre-trained model.

    Args:
        limit: growth of "curvature" (path length / displacement) over its first value.
    """

    name = "curvature growth"
    remedy = (
        "start from a better checkpoint, lower lr, or mix in the flow-matching loss (fm_weight)"
    )

    def __init__(self, *, limit: float = 2.0) -> None:
        super().__init__()
        self.limit = limit
        self._first: float | None = None

    def look(self, metrics: Mapping[str, float]) -> str | None:
        """Compare with the first value, that of the model as it came."""
        value = metrics.get("curvature")
        if value is None:
            return None
        if self._first is None:
            self._first = value
        if value <= self.limit * self._first:
            return None
        return f"path length / displacement grew from {self._first:.3g} to {value:.3g}"


class VarianceCollapse(Monitor):
    """Samples have lost much of the data's spread: the model averages instead of generating.

    Args:
        limit: "spread" (standard deviation of samples / that of data) below which it speaks.
    """

    name = "variance collapse"
    remedy = (
        "pair noise and data (coupling ot-semidiscrete, ot-fixed or inversion instead of "
        "independent), and start again from the pre-trained model"
    )

    def __init__(self, *, limit: float = 0.5) -> None:
        super().__init__()
        self.limit = limit

    def look(self, metrics: Mapping[str, float]) -> str | None:
        """Compare the samples' spread with the limit."""
        value = metrics.get("spread")
        if value is None or value >= self.limit:
            return None
        return f"samples have {value:.0%} of the data's standard deviation"


class Cancellation(Monitor):
    """A field and the branch beside it work against each other instead of together.

    Args:
        limit: "cancelled" (see `interplay`) above which it speaks.
    """

    name = "cancellation"
    remedy = (
        "lower the rate of the branch (residual_options), freeze the field (joint = false) or hold "
        "it by anchor_weight, and start again from the pre-trained model"
    )

    def __init__(self, *, limit: float = 0.5) -> None:
        super().__init__()
        self.limit = limit

    def look(self, metrics: Mapping[str, float]) -> str | None:
        """Compare the cancelled share with the limit."""
        value = metrics.get("cancelled")
        if value is None or value <= self.limit:
            return None
        return (
            f"the field and its branch cancel {value:.0%} of their energy (cosine "
            f"{metrics['cosine']:.2f}, size of the branch {metrics['delta_size']:.2f})"
        )


def spread(samples: Tensor, data: Tensor) -> float:
    """Give the standard deviation of samples relative to that of data, both [n, *state].

    It is the root of the ratio of total variances (traces of the covariances).

    Example:
        >>> round(spread(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])), 3)
        0.5
    """
    ours, theirs = (x.flatten(1).double().var(dim=0, correction=0).sum() for x in (samples, data))
    return float((ours / theirs.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())


def interplay(v: Tensor, delta: Tensor) -> dict[str, float]:
    """Tell how two parts of a velocity work together, both [n, *state], taken as one vector each.

    Returns:
        "cosine" of the angle between them, from -1 (opposed) to 1; "delta_size", |delta| / |v|;
        and "cancelled", 1 - |v + delta|^2 / (|v|^2 + |delta|^2): the share of their energy that
        they take from each other. It is 0 for parts at right angles, 1 when nothing is left, and
        negative when they support each other.

    Example:
        >>> v = torch.ones(5, 2)
        >>> interplay(v, -0.5 * v)
        {'cosine': -1.0, 'delta_size': 0.5, 'cancelled': 0.8}
    """
    v, delta = v.double(), delta.double()
    least = torch.finfo(torch.float64).tiny
    vv, dd, vd = ((a * b).sum() for a, b in ((v, v), (delta, delta), (v, delta)))
    return {
        "cosine": float(vd / (vv * dd).sqrt().clamp_min(least)),
        "delta_size": float((dd / vv.clamp_min(least)).sqrt()),
        "cancelled": float((0 - 2 * vd) / (vv + dd).clamp_min(least)),
    }
