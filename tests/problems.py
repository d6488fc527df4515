"""Initial value problems with known solutions, and small neural fields, for every test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """dy/dt = field(t, y) between t0 and t1, its solution and what its tests need.

    Attributes:
        make_field: a fresh field module in float64 (complex128 for complex problems).
        y_exact: maps times [T] in float64 to states [T, *state].
        t0, t1: the interval.
        steps: a number of equal steps with which fixed-grid methods are in their asymptotic range.
    """

    name: str
    make_field: Callable[[], nn.Module]
    y_exact: Callable[[Tensor], Tensor]
    t0: float
    t1: float
    steps: int

    def times(self, count: int, *, reverse: bool = False) -> Tensor:
        """`count` equally spaced times in float64, from t1 to t0 with `reverse`."""
        t = torch.linspace(self.t0, self.t1, count, dtype=torch.float64)
        return t.flip(0) if reverse else t

    def start(self, t: Tensor) -> Tensor:
        """The exact state at t[0]."""
        return self.y_exact(t[:1])[0]


class Linear(nn.Module):
    """y' = A y, a damped rotation coupled to a decay."""

    A = [[-0.3, 1.2, 0.0], [-1.2, -0.3, 0.5], [0.0, 0.0, -0.8]]

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(self.A, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.weight @ y

    @classmethod
    def exact(cls, t: Tensor) -> Tensor:
        a = torch.tensor(cls.A, dtype=torch.float64)
        return torch.linalg.matrix_exp(a * t[:, None, None]) @ torch.tensor([1.0, -0.5, 2.0]).to(t)


class Logistic(nn.Module):
    """y' = r y (1 - y / K) for a batch of two."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.capacity = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y * (1 - y / self.capacity)

    @staticmethod
    def exact(t: Tensor) -> Tensor:
        start = torch.tensor([[0.2], [3.0]], dtype=torch.float64)
        return 2 / (1 + (2 / start - 1) * torch.exp(-1.3 * t[:, None, None]))


class Forced(nn.Module):
    """y' = y / t + a t cos t for a state of one entry: y = t (sin t + 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.amplitude = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y / t + self.amplitude * t * torch.cos(t)

    @staticmethod
    def exact(t: Tensor) -> Tensor:
        return (t * (torch.sin(t) + 2))[:, None]


class Stiff(nn.Module):
    """y' = -k (y - cos t) - sin t: a fast decay onto a slow curve, y = cos t + 2 exp(-k t)."""

    RATE = 12.0

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(self.RATE, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * (y - torch.cos(t)) - torch.sin(t)

    @classmethod
    def exact(cls, t: Tensor) -> Tensor:
        return (torch.cos(t) + 2 * torch.exp(-cls.RATE * t))[:, None]


class Rotation(nn.Module):
    """y' = (i w - d) y with complex y."""

    RATE = complex(-0.2, 1.7)

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(self.RATE, dtype=torch.complex128))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y

    @classmethod
    def exact(cls, t: Tensor) -> Tensor:
        start = torch.tensor([1.0 + 0.5j, -2.0j], dtype=torch.complex128)
        return torch.exp(cls.RATE * t[:, None]) * start


class Oscillator(nn.Module):
    """x' = v, v' = -w^2 x for a batch [4, 2] of (x, v) with different phases."""

    OMEGA = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.tensor(self.OMEGA, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack((v, -(self.omega**2) * x), dim=-1)

    @classmethod
    def exact(cls, t: Tensor) -> Tensor:
        phase = cls.OMEGA * t[:, None] + torch.arange(4, dtype=torch.float64) * (math.pi / 3)
        return torch.stack((torch.sin(phase), cls.OMEGA * torch.cos(phase)), dim=-1)


REAL_PROBLEMS = (
    Problem("linear", Linear, Linear.exact, 0.0, 2.0, 40),
    Problem("logistic", Logistic, Logistic.exact, 0.0, 2.0, 40),
    Problem("forced", Forced, Forced.exact, 1.0, 3.0, 40),
    Problem("stiff", Stiff, Stiff.exact, 0.0, 0.8, 80),
    Problem("oscillator", Oscillator, Oscillator.exact, 0.0, 1.5, 40),
)
COMPLEX_PROBLEMS = (Problem("rotation", Rotation, Rotation.exact, 0.0, 2.0, 40),)
PROBLEMS = {problem.name: problem for problem in REAL_PROBLEMS + COMPLEX_PROBLEMS}


class NeuralField(nn.Module):
    """A small time-dependent network [batch, dim] -> [batch, dim] that records its evaluations.

    Attributes:
        times: every time at which it was evaluated, as a float.
    """

    def __init__(self, dim: int = 3, width: int = 8, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def matrix(*shape: int) -> nn.Parameter:
            values = torch.randn(*shape, dtype=torch.float64, generator=generator)
            return nn.Parameter(values / math.sqrt(shape[0]))

        self.inner = matrix(dim + 1, width)
        self.outer = matrix(width, dim)
        self.times: list[float] = []

    @property
    def evaluations(self) -> int:
        """Number of evaluations so far."""
        return len(self.times)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(t.detach().item())
        time_column = torch.sin(3 * t).expand(*y.shape[:-1], 1)
        return torch.tanh(torch.cat((y, time_column), dim=-1) @ self.inner) @ self.outer


def random_state(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """A standard normal tensor from its own generator."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
