"""A convolutional U-Net over a sequence of actions, steered by time and condition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmft_fast.errors import InputError

from .sequence import TimeEmbedding, check_call, check_sizes, check_state


class ConditionalUnet1d(nn.Module):
    """Velocity field v(t, x, cond) of sequences of actions, by convolutions along the sequence.

    Each of the `channels` is a level of two residual blocks; a level sees half as many places of
    the sequence as the one before. Time and condition scale and shift the channels of every block
    (FiLM). Any horizon will do: a level of odd length hands on the larger half, and what comes back
    one place too long is cut.

    The defaults are the reference size of Diffusion Policy, 65 million parameters; on a CPU take
    `channels=(64, 128)` or so.

    Args:
        state: (horizon, action_dim).
        cond_dim: size of a condition, 0 for none.
        channels: widths of the levels.
        kernel: places that a convolution sees, an odd number.
        groups: groups of channels that are normalised together, at least two channels each.
        embedding: size of the time's embedding, an even number.

    Attributes:
        state: (horizon, action_dim).
        cond_dim: size of a condition.

    Raises:
        InputError: a size does not make sense, or the groups do not divide the channels.

    Source: Chi et al. 2023, Diffusion Policy (arXiv 2303.04137), for the architecture; Perez et
        al. 2018, FiLM (arXiv 1709.07871).

    Example:
        >>> field = ConditionalUnet1d((16, 2), cond_dim=40, channels=(16, 32))
        >>> field(torch.tensor(0.5), torch.zeros(7, 16, 2), torch.zeros(7, 40)).shape
        torch.Size([7, 16, 2])
    """

    def __init__(
        self,
        state: Sequence[int],
        cond_dim: int = 0,
        channels: Sequence[int] = (256, 512, 1024),
        kernel: int = 5,
        groups: int = 8,
        embedding: int = 256,
    ) -> None:
        super().__init__()
        self.state, self.channels = check_state(state), tuple(channels)
        least = {"cond_dim": 0, "kernel": 1, "groups": 1, "embedding": 2}
        check_sizes(least, cond_dim=cond_dim, kernel=kernel, groups=groups, embedding=embedding)
        _check_channels(self.channels, kernel, groups)
        self.cond_dim, self.kernel, self.groups = cond_dim, kernel, groups

        def pair(n_in: int, n_out: int) -> nn.ModuleList:
            return nn.ModuleList(FilmBlock(n, n_out, kernel, groups) for n in (n_in, n_out))

        levels = list(pairwise(self.channels))
        first, last = self.channels[0], self.channels[-1]
        self.time = TimeEmbedding(embedding)
        self.down = nn.ModuleList(pair(a, b) for a, b in pairwise((self.state[1], *self.channels)))
        self.shorten = nn.ModuleList(nn.Conv1d(a, a, 3, stride=2, padding=1) for a, _ in levels)
        self.middle = pair(last, last)
        self.up = nn.ModuleList(pair(2 * b, a) for a, b in reversed(levels))
        self.lengthen = nn.ModuleList(
            nn.ConvTranspose1d(a, a, 4, stride=2, padding=1) for a, _ in reversed(levels)
        )
        self.leave = nn.Sequential(
            ConvBlock(first, first, kernel, groups), nn.Conv1d(first, self.state[1], 1)
        )
        # One product gives all scales and shifts: at small batches the calls are what costs.
        self.sizes = [2 * block.width for block in self.modules() if isinstance(block, FilmBlock)]
        self.film = nn.Linear(embedding + cond_dim, sum(self.sizes))

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return dx/dt, [batch, horizon, action_dim].

        Args:
            t: flow time in [0, 1], 0-d or [batch].
            x: sequences, [batch, horizon, action_dim].
            cond: conditions, [batch, cond_dim]; required exactly when `cond_dim > 0`.

        Raises:
            InputError: an argument has another shape.
        """
        check_call(t, x, cond, self.state, self.cond_dim)
        known = self.time(t, x)
        if cond is not None:
            known = torch.cat([known.expand(len(x), -1), cond], 1)
        films = iter(self.film(F.mish(known)).unsqueeze(2).split(self.sizes, 1))
        z, skips = x.transpose(1, 2), []
        for level, pair in enumerate(self.down):
            z = _run(pair, z, films)
            skips.append(z)
            if level < len(self.shorten):
                z = self.shorten[level](z)
        z = _run(self.middle, z, films)
        for pair, lengthen in zip(self.up, self.lengthen, strict=True):
            z = _run(pair, torch.cat([z, skips.pop()], 1), films)
            z = lengthen(z)[..., : skips[-1].shape[2]]
        return self.leave(z).transpose(1, 2)

    def extra_repr(self) -> str:
        """Show what cannot be seen from the layers."""
        return f"state={self.state}, cond_dim={self.cond_dim}, channels={self.channels}"


class ConvBlock(nn.Sequential):
    """A convolution that keeps the length, normalised by groups of channels, then Mish."""

    def __init__(self, n_in: int, n_out: int, kernel: int, groups: int) -> None:
        convolution = nn.Conv1d(n_in, n_out, kernel, padding=kernel // 2)
        super().__init__(convolution, nn.GroupNorm(groups, n_out), nn.Mish())


class FilmBlock(nn.Module):
    """Two convolutions beside a skip connection; between them channels are scaled and shifted."""

    def __init__(self, n_in: int, n_out: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.width = n_out
        self.enter = ConvBlock(n_in, n_out, kernel, groups)
        self.leave = ConvBlock(n_out, n_out, kernel, groups)
        self.skip = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, z: Tensor, film: Tensor) -> Tensor:
        """Return [batch, n_out, length] of z [batch, n_in, length] and film [batch, 2 n_out, 1]."""
        scale, shift = film.chunk(2, 1)
        return self.leave(torch.addcmul(shift, self.enter(z), 1 + scale)) + self.skip(z)


def _run(blocks: nn.Module, z: Tensor, films) -> Tensor:
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        z = block(z, next(films))
    return z


def _check_channels(channels: tuple[int, ...], kernel: int, groups: int) -> None:
    """Refuse what convolutions and normalisation cannot take."""
    if not channels:
        raise InputError("channels: expected the widths of one or more levels, got none")
    for width in channels:
        check_sizes({"channels": 1}, channels=width)
        if width % groups or width < 2 * groups:
            raise InputError(
                f"channels: expected multiples of groups = {groups} with at least two channels per "
                f"group, got {channels}; change {width} or take fewer groups"
            )
    if kernel % 2 == 0:
        raise InputError(f"kernel: expected an odd number, got {kernel}; take {kernel + 1}")
