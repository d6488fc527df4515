"""The two trainers: flow-matching pre-training and maximum-likelihood fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmft_fast.flow.couplings import Pairs
from fmft_fast.flow.losses import flow_matching_loss, reconstruction_loss
from fmft_fast.flow.paths import noise_like
from fmft_fast.solvers import Solution, solve
from fmft_fast.train.batches import Batch, stream_seed
from fmft_fast.train.config import FinetuneConfig, PretrainConfig
from fmft_fast.train.monitors import (
    CurvatureGrowth,
    Monitor,
    OverfittingSpike,
    VarianceCollapse,
    path_ratio,
    spread,
)
from fmft_fast.train.trainer import Trainer

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
