"""The velocity fields that are timed: plain torch modules, as users write them, and v + GAV."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmft_fast.fields import GAV, Residual


class MLP(nn.Module):
    """Layers over [x, cond, t] with an activation between them."""

    def __init__(self, dim: int, hidden: tuple[int, ...], act: type[nn.Module], cond: int = 0):
        super().__init__()
        widths = (dim + cond + 1, *hidden)
        layers: list[nn.Module] = []
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(n_in, n_out), act()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], dim))

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity [batch, dim] at time t (0-d or [batch]) and state x [batch, dim]."""
        time = t.to(x).reshape(-1, 1).expand(x.shape[0], 1)
        parts = (x, time) if cond is None else (x, cond, time)
        return self.net(torch.cat(parts, 1))


class ResidualGAV(nn.Module):
    """An MLP and the branch A0 x + sum_j A_j f_j(D_j x)."""

    def __init__(self, dim: int, hidden: tuple[int, ...], branches: int = 3):
        super().__init__()
        self.mlp = MLP(dim, hidden, nn.SELU)
        self.a0 = nn.Linear(dim, dim, bias=False)
        width = 2 * dim
        self.d = nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(branches))
        self.a = nn.ModuleList(nn.Linear(width, dim, bias=False) for _ in range(branches))
        self.f = nn.ModuleList([nn.Tanh(), nn.LeakyReLU(0.1), nn.ELU()][:branches])

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocity [batch, dim]."""
        v = self.mlp(t, x) + self.a0(x)
        for a, f, d in zip(self.a, self.f, self.d, strict=True):
            v = v + a(f(d(x)))
        return v


def residual_gav(dim: int, hidden: tuple[int, ...]) -> Residual:
    """An MLP and the package's own GAV of three branches, trained together."""
    names = ("tanh", "leaky_relu", "asinh")
    branch = GAV(dim, branches=len(names), width=2 * dim, activation=names)
    return Residual(MLP(dim, hidden, nn.SELU), branch, joint=True)


class UNet(nn.Module):
    """A convolutional UNet of one level, the time as a further channel."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.enter = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(4, 2 * width)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.norm3 = nn.GroupNorm(4, 2 * width)
        self.up = nn.Conv2d(3 * width, width, 3, padding=1)
        self.norm4 = nn.GroupNorm(4, width)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocity [batch, channels, height, width]."""
        time = t.to(x).reshape(-1, 1, 1, 1).expand(x.shape[0], 1, *x.shape[2:])
        high = F.silu(self.norm1(self.enter(torch.cat((x, time), 1))))
        low = F.silu(self.norm2(self.down(high)))
        low = low + F.silu(self.norm3(self.middle(low)))
        low = low.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.leave(F.silu(self.norm4(self.up(torch.cat((high, low), 1)))))


class Bound(nn.Module):
    """A conditional field at one condition: field(t, x) for solvers that know no condition."""

    def __init__(self, field: nn.Module, cond: Tensor):
        super().__init__()
        self.field = field
        self.cond = cond

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocity of the bound field."""
        return self.field(t, x, self.cond)
