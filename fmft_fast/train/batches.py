"""Where training batches come from, in an order that a resumed run repeats exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fmft_fast.errors import InputError, InputTypeError
from fmft_fast.flow.couplings import (
    Coupling,
    Independent,
    Inversion,
    OTFixed,
    OTSemidiscrete,
    Pairs,
    Reflow,
)

Batch = tuple[Tensor, ...]
# Couplings whose draws never wait for the device; "ot-minibatch" assigns on the host.
ON_DEVICE = (Independent, Inversion, OTFixed, OTSemidiscrete, Reflow)


class BatchSource(Protocol):
    """An endless stream of batches whose position can be saved."""

    def next(self) -> Batch:
        """Give the next batch."""
        ...

    def state(self) -> dict[str, Any]:
        """Describe the position."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        ...


def stream_seed(seed: int, name: str) -> int:
    """Derive the seed of a named random stream, so that streams of one run never coincide."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class PairBatches:
    """Endless pairs (x0, x1[, cond]) from a coupling that has been fitted to data.

    Args:
        coupling: fitted; see `fmft_fast.flow.couplings`.
        batch_size: pairs per batch.
        device: where the coupling's data lie.
        seed: seed of the draws.
    """

    def __init__(
        self, coupling: Coupling, *, batch_size: int, device: torch.device, seed: int
    ) -> None:
        self.coupling, self.batch_size = coupling, batch_size
        self._random = torch.Generator(device).manual_seed(stream_seed(seed, "pairs"))

    @property
    def generators(self) -> tuple[torch.Generator, ...] | None:
        """What a draw advances, if it needs no word from the host; None if it does."""
        return (self._random,) if type(self.coupling) in ON_DEVICE else None

    def next(self) -> Batch:
        """Draw the next pairs."""
        return as_columns(self.coupling.sample(self.batch_size, generator=self._random))

    def state(self) -> dict[str, Any]:
        """Describe the position: the random state."""
        return {"random": self._random.get_state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        self._random.set_state(state["random"])


class LoaderBatches:
    """Endless epochs over a DataLoader (or any re-iterable of batches).

    The loader's own randomness is pinned at the start of each epoch, so a resumed run shuffles
    as the killed one did; it then skips the batches already used. Random transforms inside the
    dataset are repeated exactly with `num_workers=0`.

    Args:
        loader: yields a tensor x1 [batch, ...], or (x1,), or (x1, cond); a label or condition
            comes second.
        seed: seed of the epochs.

    Raises:
        InputTypeError: the loader is an iterator, which cannot start a second epoch.
    """

    def __init__(self, loader: Iterable[Any], *, seed: int) -> None:
        if isinstance(loader, Iterator):
            raise InputTypeError(
                f"expected a DataLoader or a list of batches, got the iterator "
                f"{type(loader).__name__}, which is spent after one epoch; pass the loader itself"
            )
        self.loader = loader
        self.seed = seed
        self._epoch = -1
        self._used = 0
        self._batches: Iterator[Any] = iter(())

    def _start_epoch(self) -> None:
        self._epoch += 1
        self._used = 0
        seed = stream_seed(self.seed, f"epoch {self._epoch}")
        own = getattr(self.loader, "generator", None)
        if own is not None:
            own.manual_seed(seed)
        # The sampler draws its order when first asked, so that happens inside the fork, too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batches = iter(self.loader)
            first = next(batches, None)
        if first is None:
            raise InputError("expected at least one batch, got an empty loader; give it data")
        self._batches = _chain(first, batches)

    def next(self) -> Batch:
        """Give the loader's next batch."""
        batch = next(self._batches, None)
        if batch is None:
            self._start_epoch()
            batch = next(self._batches)
        self._used += 1
        return as_batch(batch)

    def rest_of_epoch(self) -> Iterator[Any]:
        """Give what the present epoch still holds."""
        return self._batches

    def state(self) -> dict[str, Any]:
        """Describe the position: epoch, and batches used of it."""
        return {"epoch": self._epoch, "used": self._used}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position by starting that epoch anew and skipping what was used."""
        self._epoch, self._used, self._batches = -1, 0, iter(())
        if state["epoch"] < 0:
            return
        self._epoch = state["epoch"] - 1
        self._start_epoch()
        self._used = state["used"]
        for _ in range(self._used):
            next(self._batches, None)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def as_batch(batch: Any) -> Batch:
    """Bring what a loader yields to a tuple of tensors (x1,) or (x1, cond)."""
    items = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if 1 <= len(items) <= 2 and all(isinstance(item, Tensor) for item in items):
        return items
    kinds = ", ".join(type(item).__name__ for item in items)
    raise InputTypeError(
        f"expected batches x1, (x1,) or (x1, cond) of tensors, got ({kinds}); "
        f"wrap the loader, or give it a collate_fn that returns these"
    )


def gather(loader: Iterable[Any], *, seed: int) -> Batch:
    """Concatenate one epoch of a loader to whole tensors, the same ones for the same seed."""
    source = LoaderBatches(loader, seed=seed)
    parts = [source.next()]
    parts += [as_batch(batch) for batch in source.rest_of_epoch()]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


class LoaderPairs:
    """Endless pairs (x0, x1[, cond]): a loader's batches, paired one by one with fresh noise.

    Args:
        loader: see `LoaderBatches`.
        coupling: one with `per_batch = True`.
        dtype: floating dtype of x1 and of floating conditions.
        seed: seed of the epochs and of the noise.
    """

    def __init__(
        self, loader: Iterable[Any], coupling: Coupling, *, dtype: torch.dtype, seed: int
    ) -> None:
        self.coupling, self.dtype = coupling, dtype
        self._loader = LoaderBatches(loader, seed=seed)
        self._random = torch.Generator().manual_seed(stream_seed(seed, "pairs"))

    def next(self) -> Batch:
        """Pair the loader's next batch."""
        columns = cast_floats(self._loader.next(), self.dtype)
        return as_columns(self.coupling.pair(*columns, generator=self._random))

    def state(self) -> dict[str, Any]:
        """Describe the position in loader and noise."""
        return {"loader": self._loader.state(), "random": self._random.get_state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        self._loader.load_state(state["loader"])
        self._random.set_state(state["random"])


def as_columns(pairs: Pairs) -> Batch:
    """Give pairs as the tuple (x0, x1) or (x0, x1, cond)."""
    columns = (pairs.x0, pairs.x1)
    return columns if pairs.cond is None else (*columns, pairs.cond)


def cast_floats(batch: Batch, dtype: torch.dtype) -> Batch:
    """Cast data and floating conditions; labels keep their integer dtype."""
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)
