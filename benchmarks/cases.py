"""The problems that are timed: one literal each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Field(nn.Module):
    """MLP velocity field with the time appended to the state, SELU between the layers."""

    def __init__(self, dim: int, hidden: tuple[int, ...]):
        super().__init__()
        widths = (dim + 1, *hidden)
        layers: list[nn.Module] = []
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(n_in, n_out), nn.SELU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], dim))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocity [batch, dim] at time t (0-d) and state x [batch, dim]."""
        return self.net(torch.cat((x, t.expand(x.shape[0], 1)), 1))


@dataclass(frozen=True)
class Case:
    """A solve from t = 0 to 1 and the gradient of its mean square in the parameters.

    Attributes:
        name: key on the command line.
        batch, dim, hidden: sizes of the state and the field.
        method: name of the method.
        steps: number of equal steps, or None for adaptive steps.
        tol: rtol and atol of the adaptive steps.
    """

    name: str
    batch: int
    dim: int
    hidden: tuple[int, ...]
    method: str
    steps: int | None = None
    tol: float = 1e-5

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[Field, Tensor]:
        """The field and the initial state, the same on every call."""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            field = Field(self.dim, self.hidden)
        x0 = torch.randn(self.batch, self.dim, generator=generator)
        return field.to(dtype), x0.to(dtype)


CASES = {
    case.name: case
    for case in (
        Case("small", 256, 2, (64, 64, 64), "euler", steps=16),
        Case("narrow", 16, 2, (64, 64, 64), "euler", steps=16),
        Case("rk4", 256, 2, (64, 64, 64), "rk4", steps=16),
        Case("wide", 1024, 32, (512, 512, 512), "euler", steps=16),
        Case("dopri5", 256, 2, (64, 64, 64), "dopri5"),
    )
}
