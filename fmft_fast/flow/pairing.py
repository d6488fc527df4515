"""What the couplings share: pairs, the class they derive from, and how they check and draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fmft_fast.errors import InputError
from fmft_fast.flow.paths import refreshed


@dataclass(frozen=True)
class Pairs:
    """Rows that belong together: noise x0, data x1 (both [batch, *state]) and x1's condition."""

    x0: Tensor
    x1: Tensor
    cond: Tensor | None = None

    def take(self, rows: Tensor) -> Pairs:
        """Give some of the pairs, by row number."""
        return Pairs(self.x0[rows], self.x1[rows], None if self.cond is None else self.cond[rows])


class Coupling:
    """A rule that pairs noise with data; see `fmft_fast.flow.couplings` for its use."""

    name: ClassVar[str]
    per_batch: ClassVar[bool] = False
    _data: tuple[Tensor, Tensor | None] | None = None

    def fit(
        self,
        x1: Tensor,
        cond: Tensor | None = None,
        *,
        field: Any = None,
        generator: torch.Generator | None = None,
    ) -> Coupling:
        """Learn what the coupling needs from the data set and keep it; returns itself.

        Args:
            x1: the data set, [n, *state].
            cond: its conditions, [n, ...].
            field: the pre-trained field; only `inversion` and `reflow` read it.
            generator: source of every random choice.

        Raises:
            InputError: the data are empty, not finite, or do not match their conditions.
        """
        check_data(x1, cond)
        self._data = (x1, cond)
        self._learn(x1, cond, field, generator)
        return self

    def sample(self, batch: int, *, generator: torch.Generator | None = None) -> Pairs:
        """Draw `batch` pairs; a function of the fit and the generator's state alone."""
        x1, cond = self._fitted()
        rows = draw_rows(len(x1), batch, x1.device, generator)
        return self.pair(x1[rows], None if cond is None else cond[rows], generator=generator)

    def pair(
        self, x1: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Pairs:
        """Pair a batch x1 [batch, *state] with fresh noise; couplings with `per_batch` only."""
        raise InputError(
            f"{self.name!r} pairs a whole data set: call fit(x1) once, then sample(batch)"
        )

    def _learn(
        self, x1: Tensor, cond: Tensor | None, field: Any, generator: torch.Generator | None
    ) -> None:
        """Do what `fit` needs besides keeping the data."""

    def check_reconstruction(self, x1: Tensor, cond: Tensor | None = None) -> None:
        """Warn (CouplingWarning) if reconstruction training with this coupling loses variance."""

    def _fitted(self) -> tuple[Tensor, Tensor | None]:
        if self._data is None:
            raise InputError(f"{self.name!r} has no data yet: call fit(x1) before sample(batch)")
        return self._data


class KeptPairs(Coupling):
    """A coupling that makes its pairs once, in `_learn`, and draws from them."""

    refresh: float = 0.0
    _pairs: Pairs

    def sample(self, batch: int, *, generator: torch.Generator | None = None) -> Pairs:
        """Draw `batch` of the pairs, with a share `refresh` of new noise."""
        self._fitted()
        kept = self._pairs
        pairs = kept.take(draw_rows(len(kept.x0), batch, kept.x0.device, generator))
        return replace(pairs, x0=refreshed(pairs.x0, self.refresh, generator))


def check_data(x1: Tensor, cond: Tensor | None) -> None:
    """Refuse data that no coupling can serve."""
    if x1.ndim < 2 or len(x1) == 0 or not x1.is_floating_point():
        raise InputError(
            f"data must be floating point [n, *state] with n >= 1, got {x1.dtype} {list(x1.shape)}"
        )
    # sync: once per pairing; a NaN would otherwise surface as a meaningless permutation.
    if not bool(torch.isfinite(x1).all()):
        raise InputError("data hold NaN or infinite values; clean them first")
    if cond is not None and (cond.ndim < 1 or len(cond) != len(x1)):
        raise InputError(f"expected {len(x1)} conditions, one per row, got {list(cond.shape)}")


def check_at_least(option: str, value: float, low: float) -> None:
    """Refuse an option below its minimum."""
    if not value >= low:
        raise InputError(f"{option} must be at least {low}, got {value}")


def draw_rows(
    n: int, batch: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Draw `batch` row numbers below n, with replacement."""
    check_at_least("batch", batch, 1)
    place = device if generator is None else generator.device
    return torch.randint(n, (batch,), generator=generator, device=place).to(device)


def choose_rows(n: int, k: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Choose min(n, k) different row numbers."""
    place = device if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=place)[:k].to(device)
