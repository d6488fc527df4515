"""The multilayer perceptron, kept as plain `nn.Linear` layers that kernels can read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmft_fast.errors import InputError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
    """Velocity field v(t, x, cond) of flat states.

    The layers see `[x, cond, t]` along the last axis: `linears[0]` is
    [hidden[0], dim + cond_dim + 1] and `linears[-1]` is [dim, hidden[-1]].

    Args:
        dim: size of a state.
        hidden: widths of the hidden layers; `()` gives an affine field.
        activation: a name in `ACTIVATIONS`.
        cond_dim: size of a condition, 0 for none.

    Raises:
        InputError: for a size below its minimum or an unknown activation.

    Example:
        >>> field = MLP(2, hidden=(32, 32), activation="silu")
        >>> field(torch.tensor(0.5), torch.zeros(7, 2)).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64, 64),
        activation: str = "selu",
        cond_dim: int = 0,
    ) -> None:
        super().__init__()
        if dim < 1 or cond_dim < 0 or any(width < 1 for width in hidden):
            raise InputError(
                "expected dim >= 1, cond_dim >= 0 and hidden widths >= 1, "
                f"got dim = {dim}, cond_dim = {cond_dim}, hidden = {tuple(hidden)}"
            )
        if activation not in ACTIVATIONS:
            raise InputError(
                f"unknown activation {activation!r}; choose one of {', '.join(sorted(ACTIVATIONS))}"
            )
        self.dim, self.cond_dim, self.activation = dim, cond_dim, activation
        widths = (dim + cond_dim + 1, *hidden, dim)
        self.linears = nn.ModuleList(
            nn.Linear(n_in, n_out) for n_in, n_out in zip(widths, widths[1:], strict=False)
        )
        self.act = ACTIVATIONS[activation]()

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return dx/dt, [batch, dim].

        Args:
            t: flow time in [0, 1], 0-d or [batch].
            x: states, [batch, dim].
            cond: conditions, [batch, cond_dim]; required exactly when `cond_dim > 0`.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise InputError(f"x must be [batch, {self.dim}], got {list(x.shape)}")
        wanted = [len(x), self.cond_dim] if self.cond_dim else "none"
        got = "none" if cond is None else list(cond.shape)
        if got != wanted:
            raise InputError(f"cond must be {wanted} (cond_dim = {self.cond_dim}), got {got}")
        time = t.to(x).expand(x.shape[0]).unsqueeze(1)
        z = torch.cat([x, time] if cond is None else [x, cond, time], dim=1)
        *hidden, last = self.linears
        for linear in hidden:
            z = self.act(linear(z))
        return last(z)

    def extra_repr(self) -> str:
        """Show what cannot be seen from the layers."""
        return f"dim={self.dim}, cond_dim={self.cond_dim}, activation={self.activation!r}"
