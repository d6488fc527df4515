"""What both trainers share: data, their split, the coupling, and the held-out pairs."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fmft_fast.errors import InputError, InputTypeError
from fmft_fast.flow.couplings import Coupling, Pairs, make_coupling
from fmft_fast.flow.losses import flow_matching_loss
from fmft_fast.flow.paths import LinearPath
from fmft_fast.train.batches import (
    Batch,
    BatchSource,
    LoaderBatches,
    LoaderPairs,
    PairBatches,
    as_batch,
    as_columns,
    cast_floats,
    gather,
    stream_seed,
)
from fmft_fast.train.config import FinetuneConfig, PretrainConfig
from fmft_fast.train.loop import FitResult, fit
from fmft_fast.train.monitors import Monitor
from fmft_fast.train.optim import pick_device

ConfigT = TypeVar("ConfigT", PretrainConfig, FinetuneConfig)
Data = Tensor | tuple[Tensor, ...] | Iterable[Any]
Evaluate = Callable[[nn.Module], Mapping[str, float]]
WATCHED_ROWS = 1024


class Trainer(ABC, Generic[ConfigT]):
    """Holds data, settings and field; a trainer adds the loss and what is measured."""

    title: str
    settings: type[ConfigT]

    def __init__(
        self,
        field: nn.Module,
        data: Data,
        *,
        config: ConfigT | None = None,
        heldout: Data | None = None,
        evaluate: Evaluate | None = None,
        out: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(field, nn.Module):
            raise InputTypeError(
                f"expected an nn.Module v(t, x), got {type(field).__name__}; wrap it in one"
            )
        config = self.settings() if config is None else config
        if not isinstance(config, self.settings):
            raise InputTypeError(
                f"expected config = {self.settings.__name__}(...), got {type(config).__name__}"
            )
        self.config: ConfigT = config
        self._evaluate, self._out, self._progress = evaluate, out, progress
        self._device = pick_device(config.device)
        self._dtype = getattr(torch, config.dtype)
        # Probing and inversion want the field without dropout; `fit` turns that on again.
        self._field = field.to(self._device, self._dtype).eval()
        self._path = LinearPath(config.sigma)
        self._coupling = make_coupling(config.coupling, **config.coupling_options)
        self._random = torch.Generator().manual_seed(stream_seed(config.seed, "setup"))
        streams = self._coupling.per_batch and not isinstance(data, (Tensor, tuple))
        if streams:
            rows, kept = None, None if heldout is None else self._columns(heldout)
        else:
            rows, kept = self._split(self._columns(data), heldout)
        sight = rows if rows is not None else kept
        if sight is None:
            sight = cast_floats(LoaderBatches(data, seed=config.seed).next(), self._dtype)
        self._sight = self._choose_rows(sight)
        _probe(self._field, self._sight)
        self._mean = sight[0].mean(0)
        self._heldout = None if kept is None else self._pair_heldout(self._choose_rows(kept))
        if kept is None and evaluate is None:
            self._select_without_heldout()
        self._batches = self._source(data if rows is None else rows)
        self._prepare()

    def run(self, *, resume: bool = False) -> FitResult:
        """Train, and give the field with the selected weights.

        Args:
            resume: continue from the last checkpoint in `out`, if there is one. Construct the
                trainer as before: with the same data and the same initial field.
        """
        return fit(
            self._field,
            self._batches,
            self._loss,
            config=self.config,
            evaluate=self._measure,
            monitors=self._monitors(),
            out=self._out,
            resume=resume,
            progress=self._progress,
            title=self.title,
            choose=self._choose,
        )

    def _flow_matching(self, model: nn.Module, pairs: Pairs, random: torch.Generator) -> Tensor:
        """Give the flow-matching loss of a batch at random times."""
        return flow_matching_loss(
            model,
            pairs.x0,
            pairs.x1,
            cond=pairs.cond,
            path=self._path,
            time_power=self.config.time_power,
            generator=random,
        )

    # What the host decides before a step; nothing, unless a trainer says otherwise.
    _choose: Callable[[], Any] | None = None

    def _prepare(self) -> None:
        """Do what is left to do before a run."""

    @abstractmethod
    def _loss(
        self, model: nn.Module, batch: Batch, random: torch.Generator, *choice: Any
    ) -> Tensor:
        """Give the loss of a batch."""

    @abstractmethod
    def _measure(self, model: nn.Module) -> dict[str, float]:
        """Give the held-out measures."""

    @abstractmethod
    def _monitors(self) -> Sequence[Monitor]:
        """Give the monitors of a run."""

    def _columns(self, data: Data) -> Batch:
        whole = isinstance(data, (Tensor, tuple))
        columns = as_batch(data) if whole else gather(data, seed=self.config.seed)
        counts = [len(column) for column in columns]
        if min(counts) == 0 or len(set(counts)) > 1:
            raise InputError(
                f"expected as many conditions as data and at least one row, got {counts} rows; "
                f"check that both come from the same rows"
            )
        return cast_floats(columns, self._dtype)

    def _split(self, rows: Batch, heldout: Data | None) -> tuple[Batch, Batch | None]:
        """Set rows aside for the held-out error, unless some were given."""
        if heldout is not None:
            return rows, self._columns(heldout)
        count = len(rows[0])
        aside = round(count * self.config.holdout)
        if aside == 0:
            return rows, None
        order = torch.randperm(count, generator=self._random)
        kept = tuple(column[order[:aside].to(column.device)] for column in rows)
        return tuple(column[order[aside:].to(column.device)] for column in rows), kept

    def _choose_rows(self, rows: Batch) -> Batch:
        """Choose as many rows as are watched, anywhere: data are often sorted by class."""
        chosen = torch.randperm(len(rows[0]), generator=self._random)[:WATCHED_ROWS]
        return tuple(column[chosen.to(column.device)].to(self._device) for column in rows)

    def _select_without_heldout(self) -> None:
        """Let the last model be the result where nothing tells which one is the best.

        With `patience`, which is never a default, the run refuses to go on without the metric.
        """
        config = self.config
        if config.metric != "heldout" or config.select == "last" or config.patience is not None:
            return
        warnings.warn(
            "the last model is kept, not the best one, as nothing is held out: the rows are too "
            f"few, or come from a loader batch by batch (coupling {config.coupling}). Pass "
            "heldout=, or evaluate= with metric=",
            stacklevel=4,
        )
        self.config = dataclasses.replace(config, select="last")

    def _pair_heldout(self, kept: Batch) -> Batch:
        """Pair held-out rows with noise never trained on, by the rule that training follows.

        Every optimal-transport coupling is represented by exact transport over these rows: the
        pairing that each of them approximates, at once and for any number of rows.
        """
        name, options = self.config.coupling, self.config.coupling_options
        if name.startswith("ot-"):
            name, options = "ot-minibatch", {k: options[k] for k in options if k == "cond_weight"}
        # A pair to be measured by keeps its noise.
        rule = make_coupling(name, **{k: v for k, v in options.items() if k != "refresh"})
        if rule.per_batch:
            return as_columns(rule.pair(*kept, generator=self._random))
        rule.fit(*kept, field=self._field, generator=self._random)
        return as_columns(rule.sample(len(kept[0]), generator=self._random))

    def _source(self, data: Any) -> BatchSource:
        """Make the endless stream of pairs (x0, x1[, cond])."""
        config = self.config
        if not isinstance(data, tuple):
            return LoaderPairs(data, self._coupling, dtype=self._dtype, seed=config.seed)
        rows = tuple(column.to(self._device) for column in data)
        fitted = self._fit_coupling(rows)
        return PairBatches(
            fitted, batch_size=config.batch_size, device=self._device, seed=config.seed
        )

    def _fit_coupling(self, rows: Batch) -> Coupling:
        random = torch.Generator(self._device)
        random.manual_seed(stream_seed(self.config.seed, "coupling"))
        return self._coupling.fit(*rows, field=self._field, generator=random)

    def _extra(self, model: nn.Module) -> Mapping[str, float]:
        return self._evaluate(model) if self._evaluate is not None else {}


def _probe(field: nn.Module, rows: Batch) -> None:
    """Ask the field once, so that a wrong signature is named before training begins."""
    x, *cond = (column[:2] for column in rows)
    if not x.is_floating_point():
        raise InputTypeError(
            f"expected floating-point data x1, got {x.dtype}; scale them to about unit variance"
        )
    t = torch.full((len(x),), 0.5, dtype=x.dtype, device=x.device)
    try:
        with torch.no_grad():
            velocity = field(t, x, *cond)
    except (RuntimeError, IndexError, TypeError) as error:
        raise InputError(
            f"field(t, x{', cond' if cond else ''}) failed for x of shape {list(x.shape)} and t of "
            f"shape {list(t.shape)}: {error}. Training has a time for every sample, a solve one "
            "for all: t.reshape(-1, 1).expand(len(x), 1), say, serves both"
        ) from error
    if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
        got = list(velocity.shape) if isinstance(velocity, Tensor) else type(velocity).__name__
        raise InputError(
            f"expected field(t, x{', cond' if cond else ''}) to return x's shape "
            f"{list(x.shape)}, got {got}; a model v(x, t) needs its arguments exchanged"
        )
