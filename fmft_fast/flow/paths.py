"""Probability paths from noise x0 (t = 0) to data x1 (t = 1) and their velocity targets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fmft_fast.errors import InputError


@dataclass(frozen=True)
class PathSample:
    """Points on a path: `x_t` and its velocity `u_t`, both [batch, *state], at `t` [batch]."""

    x_t: Tensor
    u_t: Tensor
    t: Tensor

    @property
    def dx_t(self) -> Tensor:
        """`u_t` under the name that flow_matching uses."""
        return self.u_t


class Path(Protocol):
    """What a loss asks of a path."""

    def sample(
        self, t: Tensor, x0: Tensor, x1: Tensor, *, generator: torch.Generator | None = None
    ) -> PathSample:
        """Give the path's points at the times t."""
        ...


@dataclass(frozen=True)
class LinearPath:
    """x_t = (1 - t) x0 + t x1 + sigma * noise, with velocity u_t = x1 - x0.

    Source: Tong et al. 2023 (arXiv 2302.00482), equations 14-15; sigma = 0 is rectified flow.

    Example:
        >>> point = LinearPath().sample(torch.tensor([0.25]), torch.zeros(1, 2), torch.ones(1, 2))
        >>> point.x_t
        tensor([[0.2500, 0.2500]])
    """

    sigma: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a negative width."""
        if not self.sigma >= 0:
            raise InputError(f"sigma must be at least 0, got {self.sigma}")

    def sample(
        self, t: Tensor, x0: Tensor, x1: Tensor, *, generator: torch.Generator | None = None
    ) -> PathSample:
        """Give x_t and u_t for times t (0-d or [batch]) and ends x0, x1 ([batch, *state])."""
        t, s = _times(t, x0, x1)
        x_t = (1 - s) * x0 + s * x1
        if self.sigma > 0:
            x_t = x_t + self.sigma * noise_like(x_t, generator)
        return PathSample(x_t, x1 - x0, t)


@dataclass(frozen=True)
class CondOTPath:
    """x_t = (1 - (1 - sigma_min) t) x0 + t x1, with velocity u_t = x1 - (1 - sigma_min) x0.

    It ends in N(x1, sigma_min^2) instead of the point x1.
    Source: Lipman et al. 2022 (arXiv 2210.02747), equations 20-23.
    """

    sigma_min: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse a width outside [0, 1)."""
        if not 0 <= self.sigma_min < 1:
            raise InputError(f"sigma_min must lie in [0, 1), got {self.sigma_min}")

    def sample(
        self, t: Tensor, x0: Tensor, x1: Tensor, *, generator: torch.Generator | None = None
    ) -> PathSample:
        """Give x_t and u_t for times t (0-d or [batch]) and ends x0, x1 ([batch, *state])."""
        del generator
        t, s = _times(t, x0, x1)
        shrink = 1 - self.sigma_min
        return PathSample((1 - shrink * s) * x0 + s * x1, x1 - shrink * x0, t)


def noise_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal noise of x's shape; a CPU generator serves data on any device."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def refreshed(x0: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """sqrt(1 - s^2) x0 + s eps with fresh noise eps: still N(0, I) if x0 is.

    A loss on refreshed pairs asks for one x1 around each x0, not at it, which smooths what is
    learnt.
    """
    if share == 0:
        return x0
    return math.sqrt(1 - share**2) * x0 + share * noise_like(x0, generator)


def check_share(option: str, value: float) -> None:
    """Refuse a share outside [0, 1]."""
    if not 0 <= value <= 1:
        raise InputError(f"{option} must lie in [0, 1], got {value}")


def _times(t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Give t as [batch] and as [batch, 1, ..., 1]."""
    if x0.shape != x1.shape or x1.ndim < 1:
        raise InputError(
            f"x0 and x1 must share one shape [batch, *state], "
            f"got {list(x0.shape)} and {list(x1.shape)}"
        )
    batch = x1.shape[0]
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] != batch):
        raise InputError(f"t must be 0-d or [{batch}], got {list(t.shape)}")
    t = t.to(x1).expand(batch)
    return t, t.reshape(batch, *[1] * (x1.ndim - 1))
