"""The two trainers: flow-matching pre-training and maximum-likelihood fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmft_fast.analysis import path_ratio
from fmft_fast.fields import Residual
from fmft_fast.flow.couplings import Pairs
from fmft_fast.flow.losses import flow_matching_loss, reconstruction_loss
from fmft_fast.flow.paths import noise_like
from fmft_fast.solvers import Solution, solve
from fmft_fast.train.batches import Batch, stream_seed
from fmft_fast.train.branch import add_branch
from fmft_fast.train.config import FinetuneConfig, PretrainConfig
from fmft_fast.train.monitors import (
    Cancellation,
    CurvatureGrowth,
    Monitor,
    OverfittingSpike,
    VarianceCollapse,
    interplay,
    spread,
)
from fmft_fast.train.trainer import Data, Evaluate, Trainer

# Two samples of fewer rows differ in spread by chance alone.
SPREAD_ROWS = 32


class FlowMatchingTrainer(Trainer[PretrainConfig]):
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
        return self._flow_matching(model, Pairs(*batch), random)

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


class MLEFineTuner(Trainer[FinetuneConfig]):
    """Fine-tune a pre-trained field through its ODE solve, so that few steps suffice.

    The loss is -log N(x1 | phi(x0), I) per dimension for pairs (x0, x1) of the coupling, where phi
    is the solve with `config.solver_steps` steps. Besides the held-out reconstruction error it
    watches curvature and spread of the samples, and names failures as they happen.

    Args:
        field: pre-trained module `v(t, x)` or `v(t, x, cond)`, t 0-d or [batch]; trained in place.
        data: x1 [n, *state], or (x1, cond), or a DataLoader of such batches. Loaders are gathered
            into memory for couplings that pair a whole data set.
        config: settings.
        mode: "direct", "residual" or "residual-mlp", instead of `config.mode`.
        heldout: like data, never trained on; by default a share `config.holdout` of the data
            (of streamed loaders: nothing). 1024 rows of it at most are measured, paired with
            noise of their own as the coupling does it (OT: by exact transport among them).
        evaluate: `evaluate(model)` gives more named numbers, lower being better; any of them may
            be `config.metric`.
        out: folder of the run; None writes nothing.
        progress: show the bar and the table.

    Raises:
        InputError: the data do not fit together, or the field does not return x's shape.
        ConfigError: settings that do not go together, or an unknown option of the branch.

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

    def __init__(
        self,
        field: nn.Module,
        data: Data,
        *,
        config: FinetuneConfig | None = None,
        mode: str | None = None,
        heldout: Data | None = None,
        evaluate: Evaluate | None = None,
        out: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        config = FinetuneConfig() if config is None else config
        if isinstance(config, FinetuneConfig):
            config = config if mode is None else dataclasses.replace(config, mode=mode)
            config.check_mode()
        super().__init__(
            field,
            data,
            config=config,
            heldout=heldout,
            evaluate=evaluate,
            out=out,
            progress=progress,
        )

    def _prepare(self) -> None:
        config = self.config
        if config.mode != "direct":
            self._field = add_branch(self._field, self._sight, self._mean, config)
        if config.anchor_weight > 0:
            named = self._field.named_parameters()
            self._anchors = [(name, p.detach().clone()) for name, p in named if p.requires_grad]
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
            loss = loss + self.config.fm_weight * self._flow_matching(model, pairs, random)
        if self.config.anchor_weight > 0:
            loss = loss + 0.5 * self.config.anchor_weight * self._square_drift(model)
        return loss

    def _square_drift(self, model: nn.Module) -> Tensor:
        """Give the squared distance of the trained weights to where they started, 0-d."""
        weights = dict(model.named_parameters())
        squares = [(weights[name] - anchor).square().sum() for name, anchor in self._anchors]
        return torch.stack(squares).sum()

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
        solution = self._solve(model, seen, max(choices), save="all")
        path = solution.y
        measured["curvature"] = path_ratio(path)
        if len(seen.x1) >= SPREAD_ROWS:
            measured["spread"] = spread(path[-1], seen.x1)
        if isinstance(model, Residual):
            measured |= _interplay_along(model, solution, seen.cond)
        if self.config.anchor_weight > 0:
            measured["drift"] = float(self._square_drift(model).sqrt())
        return {**measured, **self._extra(model)}

    def _monitors(self) -> Sequence[Monitor]:
        return [
            OverfittingSpike(),
            CurvatureGrowth(limit=self.config.curvature_limit),
            VarianceCollapse(limit=self.config.collapse_limit),
            Cancellation(limit=self.config.cancellation_limit),
        ]


def _interplay_along(model: Residual, solution: Solution, cond: Tensor | None) -> dict[str, float]:
    """Tell how base and branch work together at the points that a solve passed."""
    told = () if cond is None else (cond,)
    states = solution.y[:-1]
    times = solution.t[:-1].to(states)
    parts = [model.parts(t, x, *told) for t, x in zip(times, states, strict=True)]
    v, delta = (torch.stack(part) for part in zip(*parts, strict=True))
    return interplay(v, delta)


def _mean_distance(phi: Tensor, x1: Tensor) -> float:
    gap = (phi - x1).flatten(1)
    return float(gap.norm(dim=1).double().mean()) / gap.shape[1] ** 0.5
