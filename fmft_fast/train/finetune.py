"""The two trainers: flow-matching pre-training and maximum-likelihood fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from fmft_fast.errors import InputError, InputTypeError
from fmft_fast.flow.couplings import Coupling, Pairs, make_coupling
from fmft_fast.flow.losses import flow_matching_loss, reconstruction_loss
from fmft_fast.flow.paths import LinearPath, noise_like
from fmft_fast.solvers import Solution, solve
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
from fmft_fast.train.monitors import (
    CurvatureGrowth,
    Monitor,
    OverfittingSpike,
    VarianceCollapse,
    path_ratio,
    spread,
)
from fmft_fast.train.optim import pick_device

ConfigT = TypeVar("ConfigT", PretrainConfig, FinetuneConfig)
Data = Tensor | tuple[Tensor, ...] | Iterable[Any]
Evaluate = Callable[[nn.Module], Mapping[str, float]]
WATCHED_ROWS = 1024
# Two samples of fewer rows differ in spread by chance alone.
SPREAD_ROWS = 32


class _Trainer(ABC, Generic[ConfigT]):
    """What both trainers share: data, their split, the coupling, and the held-out pairs."""

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
        self._heldout = None if kept is None else self._pair_heldout(self._choose_rows(kept))
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

    def _pair_heldout(self, kept: Batch) -> Batch:
        """Pair held-out rows with noise never trained on, by the rule that training follows.

        Every optimal-transport coupling is represented by exact transport over these rows: the
        pairing that each of them approximates, at once and for any number of rows.
        """
        name, options = self.config.coupling, self.config.coupling_options
        if name.startswith("ot-"):
            name, options = "ot-minibatch", {k: options[k] for k in options if k == "cond_weight"}
        rule = make_coupling(name, **options)
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


class FlowMatchingTrainer(_Trainer[PretrainConfig]):
    """Pre-train a velocity field by flow matching: no ODE is solved.

    Args:
        field: module `v(t, x)` or `v(t, x, cond)` with t [batch], x [batch, *state]; trained in
            place.
        data: x1 [n, *state], or (x1, cond), or a DataLoader of such batches. Loaders are gathered
            into memory for couplings that pair a whole data set.
        config: settings.
        heldout: like data, never trained on; by default a share `config.holdout` of the data
            (of streamed loaders: nothing). 1024 rows of it at most are measured, paired with
            noise of their own as the coupling does it (OT: by exact transport among them).
        evaluate: `evaluate(model)` gives more named numbers, lower being better.
        out: folder of the run; None writes nothing.
        progress: show the bar and the table.

    Raises:
        InputError: the data do not fit together, or the field does not return x's shape.

    Source: Lipman et al. 2022 (arXiv 2210.02747); with OT couplings, Tong et al. 2023
    (arXiv 2302.00482).

    Example:
        >>> from fmft_fast.fields import MLP
        >>> config = PretrainConfig(steps=20, batch_size=32)
        >>> x1 = torch.randn(500, 2)
        >>> FlowMatchingTrainer(MLP(2), x1, config=config, progress=False).run().step
        20
    """

    title, settings = "pre-train", PretrainConfig

    def _loss(
        self, model: nn.Module, batch: Batch, random: torch.Generator, *choice: Any
    ) -> Tensor:
        pairs = Pairs(*batch)
        return flow_matching_loss(
            model, pairs.x0, pairs.x1, cond=pairs.cond, path=self._path, generator=random
        )

    def _measure(self, model: nn.Module) -> dict[str, float]:
        """Give the held-out loss, at the same times and noise whenever it is asked."""
        measured = {}
        if self._heldout is not None:
            pairs = Pairs(*self._heldout)
            t = torch.linspace(0, 1, len(pairs.x1), dtype=self._dtype, device=self._device)
            random = torch.Generator(self._device).manual_seed(0)
            loss = flow_matching_loss(
                model,
                pairs.x0,
                pairs.x1,
                cond=pairs.cond,
                path=self._path,
                t=t,
                generator=random,
            )
            measured["heldout"] = float(loss)
        return {**measured, **self._extra(model)}

    def _monitors(self) -> Sequence[Monitor]:
        return [OverfittingSpike()]


class MLEFineTuner(_Trainer[FinetuneConfig]):
    """Fine-tune a pre-trained field through its ODE solve, so that few steps suffice.

    The loss is -log N(x1 | phi(x0), I) per dimension for pairs (x0, x1) of the coupling, where phi
    is the solve with `config.solver_steps` steps. Besides the held-out reconstruction error it
    watches curvature and spread of the samples, and names failures as they happen.

    Args:
        field: pre-trained module `v(t, x)` or `v(t, x, cond)`, t 0-d or [batch]; trained in place.
        data: x1 [n, *state], or (x1, cond), or a DataLoader of such batches. Loaders are gathered
            into memory for couplings that pair a whole data set.
        config: settings.
        heldout: like data, never trained on; by default a share `config.holdout` of the data
            (of streamed loaders: nothing). 1024 rows of it at most are measured, paired with
            noise of their own as the coupling does it (OT: by exact transport among them).
        evaluate: `evaluate(model)` gives more named numbers, lower being better; any of them may
            be `config.metric`.
        out: folder of the run; None writes nothing.
        progress: show the bar and the table.

    Raises:
        InputError: the data do not fit together, or the field does not return x's shape.

    Warns:
        CouplingWarning: the coupling would make the field average over modes.

    Source: "Fine-Tuning Flow Matching via Maximum Likelihood Estimation of Reconstructions"
    (arXiv 2510.02081), section 4.

    Example:
        >>> from fmft_fast.fields import MLP
        >>> config = FinetuneConfig(solver_steps=(2, 10), steps=20, coupling="ot-fixed")
        >>> x1 = torch.randn(500, 2)
        >>> MLEFineTuner(MLP(2), x1, config=config, progress=False).run().reason
        'finished'
    """

    title, settings = "fine-tune", FinetuneConfig

    def _prepare(self) -> None:
        self._coupling.check_reconstruction(*self._sight)
        random = torch.Generator().manual_seed(stream_seed(self.config.seed, "watch"))
        self._watch_x0 = noise_like(self._sight[0], random)

    def _choose(self) -> int:
        choices = self.config.solver_steps
        # The number of steps comes from the CPU's stream: drawing it on a GPU would wait for it.
        return choices[int(torch.randint(len(choices), ()))]

    def _loss(
        self, model: nn.Module, batch: Batch, random: torch.Generator, *choice: Any
    ) -> Tensor:
        pairs = Pairs(*batch)
        (steps,) = choice
        phi = self._solve(model, pairs, steps, gradient=self.config.gradient).y
        sigma = None if self.config.posterior == "fitted" else 1.0
        loss = reconstruction_loss(phi, pairs.x1, sigma=sigma)
        if self.config.fm_weight > 0:
            regression = flow_matching_loss(
                model, pairs.x0, pairs.x1, cond=pairs.cond, path=self._path, generator=random
            )
            loss = loss + self.config.fm_weight * regression
        return loss

    def _solve(
        self,
        model: nn.Module,
        pairs: Pairs,
        steps: int,
        *,
        gradient: Any = "none",
        save: Literal["final", "all"] = "final",
    ) -> Solution:
        config = self.config
        return solve(
            model,
            pairs.x0,
            method=config.method,
            steps=None if config.adaptive else steps,
            rtol=config.rtol,
            atol=config.atol,
            gradient=gradient,
            save=save,
            cond=pairs.cond,
        )

    def _measure(self, model: nn.Module) -> dict[str, float]:
        """Give the held-out reconstruction error, and curvature and spread of samples.

        The error is the mean distance |phi(x0) - x1| / sqrt(dim), over the trained step counts, not
        its square: the best guess under the square is the mean of the possible partners, so that
        near a boundary between modes it would prefer the model that averages over them.
        """
        measured = {}
        choices = self.config.solver_steps
        if self._heldout is not None:
            pairs = Pairs(*self._heldout)
            errors = [
                _mean_distance(self._solve(model, pairs, steps).y, pairs.x1)
                for steps in choices[: 1 if self.config.adaptive else None]
            ]
            measured["heldout"] = sum(errors) / len(errors)
        seen = Pairs(self._watch_x0, *self._sight)
        path = self._solve(model, seen, max(choices), save="all").y
        measured["curvature"] = path_ratio(path)
        if len(seen.x1) >= SPREAD_ROWS:
            measured["spread"] = spread(path[-1], seen.x1)
        return {**measured, **self._extra(model)}

    def _monitors(self) -> Sequence[Monitor]:
        return [
            OverfittingSpike(),
            CurvatureGrowth(limit=self.config.curvature_limit),
            VarianceCollapse(limit=self.config.collapse_limit),
        ]


def _mean_distance(phi: Tensor, x1: Tensor) -> float:
    gap = (phi - x1).flatten(1)
    return float(gap.norm(dim=1).double().mean()) / gap.shape[1] ** 0.5


def _probe(field: nn.Module, rows: Batch) -> None:
    """Ask the field once, so that a wrong signature is named before training begins."""
    x, *cond = (column[:2] for column in rows)
    if not x.is_floating_point():
        raise InputTypeError(
            f"expected floating-point data x1, got {x.dtype}; scale them to about unit variance"
        )
    t = torch.full((len(x),), 0.5, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        velocity = field(t, x, *cond)
    if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
        got = list(velocity.shape) if isinstance(velocity, Tensor) else type(velocity).__name__
        raise InputError(
            f"expected field(t, x{', cond' if cond else ''}) to return x's shape "
            f"{list(x.shape)}, got {got}; a model v(x, t) needs its arguments exchanged"
        )
