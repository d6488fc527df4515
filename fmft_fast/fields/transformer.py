"""A transformer over a sequence of actions, which looks at time and condition as tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmft_fast.errors import InputError

from .sequence import TimeEmbedding, check_call, check_dropout, check_sizes, check_state

SPREAD = 0.5  # of what tells places at the start, about that of the tokens otherwise


class ActionTransformer(nn.Module):
    """Velocity field v(t, x, cond) of sequences of actions, by attention.

    An encoder takes one token for the time and one for each observation in the condition; a decoder
    of `layers` layers takes a token for each action, which attends to itself and the earlier
    actions and to all tokens of the encoder. The defaults are the reference size of Diffusion
    Policy (dropout there is .01).

    Attention is written out in matrix products: sequences are short, and derivatives of any order
    and kind go through.

    Args:
        state: (horizon, action_dim).
        cond_dim: size of a condition, 0 for none.
        n_obs: tokens that the condition is cut into, each of cond_dim / n_obs numbers.
        width: size of a token.
        layers: layers of the decoder.
        heads: heads of attention, each of width / heads numbers.
        encoder_layers: layers of self-attention over the condition's tokens; with 0 a perceptron
            takes each token by itself.
        dropout: probability of dropping an entry of attention weights and of what layers add.
        causal: whether an action sees only itself and earlier ones.

    Attributes:
        state: (horizon, action_dim).
        cond_dim: size of a condition.

    Raises:
        InputError: a size does not make sense, n_obs does not divide cond_dim, or heads does not
            divide width.

    Source: Chi et al. 2023, Diffusion Policy (arXiv 2303.04137), for the architecture.

    Example:
        >>> field = ActionTransformer((16, 2), cond_dim=40, n_obs=2, width=32, layers=2)
        >>> field(torch.tensor(0.5), torch.zeros(7, 16, 2), torch.zeros(7, 40)).shape
        torch.Size([7, 16, 2])
    """

    later: Tensor | None

    def __init__(
        self,
        state: Sequence[int],
        cond_dim: int = 0,
        n_obs: int = 1,
        width: int = 256,
        layers: int = 8,
        heads: int = 4,
        *,
        encoder_layers: int = 0,
        dropout: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.state = check_state(state)
        sizes = {"n_obs": n_obs, "width": width, "layers": layers, "heads": heads}
        check_sizes(dict.fromkeys(sizes, 1), **sizes)
        least = {"cond_dim": 0, "encoder_layers": 0}
        check_sizes(least, cond_dim=cond_dim, encoder_layers=encoder_layers)
        check_dropout(dropout)
        if cond_dim % n_obs or width % heads:
            raise InputError(
                "expected n_obs to divide cond_dim and heads to divide width, "
                f"got n_obs = {n_obs}, cond_dim = {cond_dim}, heads = {heads}, width = {width}"
            )
        horizon, action_dim = self.state
        self.cond_dim, self.n_obs = cond_dim, n_obs if cond_dim else 0
        self.time = TimeEmbedding(width)
        self.take_action = nn.Linear(action_dim, width)
        self.take_obs = nn.Linear(cond_dim // n_obs, width) if cond_dim else None
        self.action_place = nn.Parameter(torch.empty(horizon, width))
        self.known_place = nn.Parameter(torch.empty(1 + self.n_obs, width))
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(
            Layer(width, heads, dropout, looks=False) for _ in range(encoder_layers)
        )
        if not encoder_layers:
            self.encoder.append(Perceptron(width, nn.Mish()))
        self.decoder = nn.ModuleList(
            Layer(width, heads, dropout, looks=True) for _ in range(layers)
        )
        self.known_norm = nn.LayerNorm(width)
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, action_dim)
        later = torch.ones(horizon, horizon).triu(1).bool() if causal else None
        self.register_buffer("later", later, persistent=False)
        for place in (self.action_place, self.known_place):
            nn.init.normal_(place, std=SPREAD)

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return dx/dt, [batch, horizon, action_dim].

        Args:
            t: flow time in [0, 1], 0-d or [batch].
            x: sequences, [batch, horizon, action_dim].
            cond: conditions, [batch, cond_dim], the oldest observation first; required exactly when
                `cond_dim > 0`.

        Raises:
            InputError: an argument has another shape.
        """
        check_call(t, x, cond, self.state, self.cond_dim)
        known = self.time(t, x).unsqueeze(1).expand(len(x), -1, -1)
        if cond is not None and self.take_obs is not None:
            seen = self.take_obs(cond.unflatten(1, (self.n_obs, -1)))
            known = torch.cat([known, seen], 1)
        known = self.drop(known + self.known_place)
        for layer in self.encoder:
            known = layer(known)
        known = self.known_norm(known)
        z = self.drop(self.take_action(x) + self.action_place)
        for layer in self.decoder:
            z = layer(z, known, self.later)
        return self.leave(self.norm(z))

    def extra_repr(self) -> str:
        """Show what cannot be seen from the layers."""
        causal = self.later is not None
        return f"state={self.state}, cond_dim={self.cond_dim}, n_obs={self.n_obs}, causal={causal}"


class Layer(nn.Module):
    """Attention among tokens, if it `looks` attention to known ones, and a perceptron.

    Each takes the normalised tokens and adds to them.
    """

    def __init__(self, width: int, heads: int, dropout: float, looks: bool) -> None:
        super().__init__()
        self.own_norm, self.own = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.look_norm = nn.LayerNorm(width) if looks else None
        self.look = Attention(width, heads, dropout) if looks else None
        self.norm, self.perceptron = nn.LayerNorm(width), Perceptron(width, nn.GELU(), dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, z: Tensor, known: Tensor | None = None, hidden: Tensor | None = None):
        """Return tokens of z's shape, [batch, places, width].

        Args:
            z: tokens, [batch, places, width].
            known: tokens to look at, [batch, any, width].
            hidden: true where a token [places, 1] does not see another [1, places].
        """
        y = self.own_norm(z)
        z = z + self.drop(self.own(y, y, hidden))
        if known is not None and self.look_norm is not None and self.look is not None:
            z = z + self.drop(self.look(self.look_norm(z), known))
        return z + self.drop(self.perceptron(self.norm(z)))


class Attention(nn.Module):
    """What tokens take over from others, by the likeness of their queries and the others' keys."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.leave, self.drop = nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, z: Tensor, others: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return [batch, places, width] of z, of that shape, and the others."""
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [batch, heads, places, ...]
            for part in (self.query(z), *self.key_value(others).chunk(2, 2))
        )
        scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(2, 3)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        taken = self.drop(F.softmax(scores, -1)) @ value
        return self.leave(taken.transpose(1, 2).flatten(2))


class Perceptron(nn.Sequential):
    """A hidden layer four times as wide as the tokens."""

    def __init__(self, width: int, activation: nn.Module, dropout: float = 0.0) -> None:
        enter, leave = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        super().__init__(enter, activation, nn.Dropout(dropout), leave)
