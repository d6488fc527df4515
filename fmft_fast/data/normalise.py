"""Linear maps of each dimension to a common range, kept in the checkpoint with the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fmft_fast.errors import InputError

KINDS = ("min-max", "mean-std")


class Normalizer(nn.Module):
    """Maps x to (x - offset) / scale and back, dimension by dimension.

    Buffers, and so part of the state_dict:
        scale: [dim] float32, above 0.
        offset: [dim] float32.

    Raises:
        InputError: they are not two finite vectors of one length, or a scale is not above 0.

    Example:
        >>> normalizer = Normalizer.fit(torch.tensor([[0.0, 5.0], [4.0, 5.0]]))
        >>> normalizer.normalise(torch.tensor([3.0, 5.0]))
        tensor([0.5000, 0.0000])
        >>> normalizer.restore(torch.tensor([0.5, 0.0]))
        tensor([3., 5.])
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        scale, offset = (torch.as_tensor(v, dtype=torch.float32).clone() for v in (scale, offset))
        if scale.ndim != 1 or not scale.numel() or scale.shape != offset.shape:
            raise InputError(
                f"scale, offset: expected two vectors [dim], got shapes {list(scale.shape)} and "
                f"{list(offset.shape)}; give one number of each for every dimension"
            )
        if not bool((scale > 0).all() & scale.isfinite().all() & offset.isfinite().all()):
            raise InputError(
                f"scale, offset: expected finite numbers and scale above 0, got {scale.tolist()} "
                f"and {offset.tolist()}; use scale 1 for constant dimensions"
            )
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    @classmethod
    def identity(cls, dim: int) -> Normalizer:
        """Make the one that changes nothing, also as the shell that load_state_dict fills."""
        return cls(torch.ones(dim), torch.zeros(dim))

    @classmethod
    def fit(cls, x: Tensor, kind: str = "min-max", *, least_scale: float = 0.0) -> Normalizer:
        """Measure data.

        Args:
            x: [n, dim], anything that torch.as_tensor takes.
            kind: "min-max" maps each dimension to [-1, 1], "mean-std" to mean 0 and standard
                deviation 1 (that of the sample, divided by n).
            least_scale: dimensions whose half range or standard deviation is smaller, in raw units,
                count as constant; those that vary by rounding alone always do. A constant dimension
                maps to 0 and keeps scale 1, so that noise in it is not blown up.

        Raises:
            InputError: x is not [n, dim] of finite numbers with n >= 1, or the kind is unknown.

        Example:
            >>> x = torch.tensor([[1.0], [3.0]])
            >>> Normalizer.fit(x, "mean-std").normalise(x).ravel().tolist()
            [-1.0, 1.0]
        """
        if kind not in KINDS:
            raise InputError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}; use one")
        if not (math.isfinite(least_scale) and least_scale >= 0):
            raise InputError(f"least_scale: expected a number from 0 on, got {least_scale!r}")
        x = torch.as_tensor(x).detach().to(torch.float64)
        if x.ndim != 2 or not x.numel() or not bool(x.isfinite().all()):
            raise InputError(
                f"x: expected finite numbers of shape [n, dim], got shape {list(x.shape)}; flatten "
                f"leading dimensions and drop NaN"
            )
        low, high = x.amin(0), x.amax(0)
        if kind == "min-max":
            offset, scale = (low + high) / 2, (high - low) / 2
        else:
            offset, scale = x.mean(0), x.std(0, correction=0)
        # float32 cannot tell values apart that differ by less than this.
        rounding = torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())
        smallest = rounding.clamp(min=max(least_scale, torch.finfo(torch.float32).tiny))
        constant = (high == low) | (scale < smallest)
        return cls(torch.where(constant, 1.0, scale), offset)

    def normalise(self, x: Tensor) -> Tensor:
        """Map raw numbers [..., dim] to the common range."""
        scale, offset = self._check(x)
        return (x - offset) / scale

    def restore(self, x: Tensor) -> Tensor:
        """Map numbers [..., dim] of the common range back to raw ones."""
        scale, offset = self._check(x)
        return x * scale + offset

    def forward(self, x: Tensor) -> Tensor:
        """Do the same as `normalise`."""
        return self.normalise(x)

    def extra_repr(self) -> str:
        """Tell the number of dimensions."""
        return f"dim={len(self.scale)}"

    def _check(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give scale and offset, of x's width."""
        scale = self.scale
        if x.shape[-1:] != scale.shape:
            raise InputError(
                f"x: expected shape [..., {len(scale)}], got {list(x.shape)}; "
                f"use the normaliser that was fitted to this quantity"
            )
        return scale, self.offset
