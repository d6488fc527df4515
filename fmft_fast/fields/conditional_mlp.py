"""A residual multilayer perceptron in which condition and time bias every block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fmft_fast.errors import InputError
from fmft_fast.fields.mlp import ACTIVATIONS


class ConditionalMLP(nn.Module):
    """Velocity field v(t, x, cond) of flat states, for conditions that decide much.

    An encoder of its own makes features of the condition; they and features of the time bias every
    block, z <- z + W act(V z + C encoder(cond) + T features(t)). What depends on condition or time
    alone does not depend on the state: a solve through the fused kernels computes it once, however
    many steps it takes, and the state passes matrices and activations only.

    Args:
        dim: size of a state.
        cond_dim: size of a condition, at least 1.
        width: of the blocks and of the encoder.
        blocks: number of blocks.
        frequencies: number of frequencies k pi / 2, k = 1, 2, 4, ..., of the time's features.
        activation: a name in `fmft_fast.fields.mlp.ACTIVATIONS`.

    Raises:
        InputError: for a size below its minimum or an unknown activation.

    Source: He et al. 2016 (arXiv 1603.05027) for residual blocks whose activations come first.

    Example:
        >>> field = ConditionalMLP(2, 3, width=32)
        >>> field(torch.tensor(0.5), torch.zeros(7, 2), torch.zeros(7, 3)).shape
        torch.Size([7, 2])
    """

    angles: Tensor

    def __init__(
        self,
        dim: int,
        cond_dim: int,
        width: int = 512,
        blocks: int = 2,
        frequencies: int = 4,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if min(dim, cond_dim, width, blocks, frequencies) < 1:
            raise InputError(
                f"expected sizes from 1 on, got dim = {dim}, cond_dim = {cond_dim}, "
                f"width = {width}, blocks = {blocks}, frequencies = {frequencies}"
            )
        if activation not in ACTIVATIONS:
            raise InputError(
                f"unknown activation {activation!r}; choose one of {', '.join(sorted(ACTIVATIONS))}"
            )
        self.dim, self.cond_dim = dim, cond_dim
        self.act = ACTIVATIONS[activation]()
        self.encoder = nn.Sequential(
            nn.Linear(cond_dim, width), self.act, nn.Linear(width, width), self.act
        )
        self.register_buffer("angles", 2.0 ** torch.arange(frequencies) * math.pi / 2)
        self.enter = nn.Linear(dim, width)
        self.told = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.timed = nn.ModuleList(
            nn.Linear(2 * frequencies + 1, width, bias=False) for _ in range(blocks)
        )
        self.inner = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.leave = nn.Linear(width, dim)
        for linear in self.outer:
            # A block begins as the identity, so that depth costs nothing at the start.
            nn.init.zeros_(linear.get_parameter("weight"))

    def forward(self, t: Tensor, x: Tensor, cond: Tensor) -> Tensor:
        """Return dx/dt, [batch, dim].

        Args:
            t: flow time in [0, 1], 0-d or [batch].
            x: states, [batch, dim].
            cond: conditions, [batch, cond_dim].
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise InputError(f"x must be [batch, {self.dim}], got {list(x.shape)}")
        if cond is None or list(cond.shape) != [len(x), self.cond_dim]:
            got = "none" if cond is None else list(cond.shape)
            raise InputError(f"cond must be [{len(x)}, {self.cond_dim}], got {got}")
        time = t.to(x).expand(x.shape[0]).unsqueeze(1)
        angle = time * self.angles
        features = torch.cat([time, angle.sin(), angle.cos()], dim=1)
        code = self.encoder(cond)
        z = self.enter(x)
        blocks = zip(self.inner, self.told, self.timed, self.outer, strict=True)
        for inner, told, timed, outer in blocks:
            z = z + outer(self.act(inner(z) + told(code) + timed(features)))
        return self.leave(self.act(z))

    def extra_repr(self) -> str:
        """Show what cannot be seen from the layers."""
        return f"dim={self.dim}, cond_dim={self.cond_dim}"
