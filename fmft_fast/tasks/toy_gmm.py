"""toy-gmm: five narrow Gaussians on a circle in the plane, the toy of the method's paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.analysis import metrics, plots
from fmft_fast.fields import MLP
from fmft_fast.flow import GaussianMixture, Pairs, make_coupling, sample
from fmft_fast.solvers import solve
from fmft_fast.tasks.base import STEPS, Records, Results, Task, TaskData, register

RADIUS, SIGMA, MODES = 2.0, 0.1, 5
TRAIN_ROWS = 100_000
ROWS, ENERGY_ROWS, PROJECTIONS = 20_000, 10_000, 128
PAIRS, TRANSPORT_STEPS = 4096, 1000
MAP_EXTENT, MAP_POINTS = 3.0, 301
TITLES = {
    "off_mode_share": "off-mode share",
    "mode_balance": "imbalance of modes",
    "energy_distance": "energy distance",
    "sliced_w2": "sliced W2",
    "reconstruction_error": "held-out reconstruction error",
}


class ToyGMM(Task):
    """Five Gaussians of standard deviation 0.1 on a circle of radius 2 (std 1.42 per axis).

    A sample is off the modes when it lies beyond 3 sigma of every centre: true share .011.
    """

    name = "toy-gmm"
    summary = "5 Gaussians in 2-D; a sample beyond 3 sigma of every centre is off the modes"
    pretrain: Mapping[str, Any] = {"steps": 3000, "batch_size": 256, "lr": 2e-3, "ema_decay": 0.995}
    finetune: Mapping[str, Any] = {
        "steps": 3000,
        "batch_size": 256,
        "lr": 8e-3,
        "ema_decay": 0.99,
        "coupling": "ot-semidiscrete",
        "solver_steps": (1, 2, 5, 10),
        "posterior": "fitted",
        "select": "last",
    }

    @property
    def centres(self) -> Tensor:
        """Give the centres of the modes, [5, 2]."""
        angle = math.pi / 2 + torch.arange(MODES) * (2 * math.pi / MODES)
        return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)

    @property
    def mixture(self) -> GaussianMixture:
        """Give the law of the data, which knows its exact velocity field."""
        return GaussianMixture(self.centres, SIGMA)

    def draw(self, n: int, seed: int, *, balanced: bool = False) -> Tensor:
        """Draw n points of the mixture, [n, 2]; balanced: with equal numbers from every mode."""
        generator = torch.Generator().manual_seed(seed)
        mode = torch.randint(MODES, (n,), generator=generator)
        if balanced:
            mode = torch.randperm(n, generator=generator) % MODES
        return self.mixture.sample(n, generator, component=mode)

    def make_data(self, seed: int, field: nn.Module | None = None) -> TaskData:
        """Draw 100,000 training and 20,000 held-out points."""
        return TaskData(self.draw(TRAIN_ROWS, 10 * seed), self.draw(ROWS, 10 * seed + 1))

    def make_field(self) -> nn.Module:
        """Make the MLP with 3 hidden layers of 128 and SELU."""
        return MLP(2, hidden=(128, 128, 128), activation="selu")

    def evaluate(self, field: nn.Module, steps: Sequence[int] = STEPS, *, seed: int = 0) -> Results:
        """Measure 20,000 samples of fresh noise against fresh data for each number of steps."""
        x0, x1, pairs = _fresh(seed)
        results = {}
        for n in steps:
            x = sample(field, x0, steps=n)
            phi = sample(field, pairs.x0, steps=n)
            results[n] = {
                **measure(x, x1),
                "reconstruction_error": metrics.reconstruction_rms(phi, pairs.x1),
            }
        return results

    def noise_floor(self, *, seed: int = 0) -> dict[str, float]:
        """Give the mean size of each measure for data against data.

        The reconstruction error's floor is the distance of the partners that the same noise gets
        from transport to two samples of the data.
        """
        return dict(_floor(seed))

    def figures(
        self,
        before: nn.Module,
        after: nn.Module,
        out_dir: str | Path,
        *,
        seed: int = 0,
        results: Mapping[str, Results] | None = None,
        history: Mapping[str, Records] | None = None,
    ) -> list[Path]:
        """Draw trajectories, the error map over x0, quality against N and training curves."""
        out = Path(out_dir)
        fields = {"before": before, "after": after}
        if results is None:
            results = {name: self.evaluate(f, seed=seed) for name, f in fields.items()}
        files = [
            self._draw_trajectories(fields, out / "trajectories.png", seed=seed),
            self._draw_error_map(fields, out / "error_map.png"),
            plots.quality(results, self.noise_floor(seed=seed), out / "quality.png", titles=TITLES),
        ]
        if history:
            files.append(plots.training_curves(history, out / "training.png"))
        return files

    def _draw_trajectories(
        self, fields: Mapping[str, nn.Module], file: Path, *, seed: int, n: int = 400
    ) -> Path:
        x0 = _fresh(seed)[0][:n]
        paths = {
            name: {
                steps: solve(f, x0, steps=steps, gradient="none", save="all").y
                for steps in (2, 10, 100)
            }
            for name, f in fields.items()
        }
        return plots.trajectories(paths, self.centres, 3 * SIGMA, file)

    def _draw_error_map(self, fields: Mapping[str, nn.Module], file: Path) -> Path:
        """Show the distance from the nearest centre over a grid of noise, in units of sigma."""
        line = torch.linspace(-MAP_EXTENT, MAP_EXTENT, MAP_POINTS)
        x0 = torch.cartesian_prod(line, line).flip(1)
        errors: dict[str, dict[int, Tensor]] = {}
        modes: dict[str, dict[int, Tensor]] = {}
        for name, f in fields.items():
            errors[name], modes[name] = {}, {}
            for steps in (2, 10):
                distance = torch.cdist(sample(f, x0, steps=steps), self.centres)
                nearest, index = distance.reshape(MAP_POINTS, MAP_POINTS, MODES).min(2)
                errors[name][steps], modes[name][steps] = nearest / SIGMA, index
        return plots.error_map(errors, modes, MAP_EXTENT, file)


TASK = register(ToyGMM())


def measure(x: Tensor, x1: Tensor) -> dict[str, float]:
    """Compare samples with as many points of fresh data."""
    return {
        "off_mode_share": metrics.off_mode_share(x, TASK.centres, SIGMA),
        "mode_balance": metrics.total_variation(metrics.mode_shares(x, TASK.centres)),
        "energy_distance": metrics.energy_distance(x[:ENERGY_ROWS], x1[:ENERGY_ROWS]),
        "sliced_w2": metrics.sliced_wasserstein(x, x1, projections=PROJECTIONS),
    }


def _stream(seed: int, use: int) -> int:
    """Keep the seeds of evaluation apart from those of training data."""
    return 1_000_000 + 1000 * seed + use


@lru_cache(maxsize=4)
def _fresh(seed: int) -> tuple[Tensor, Tensor, Pairs]:
    """Give noise, fresh data, and held-out pairs of noise and data for one evaluation seed."""
    generator = torch.Generator().manual_seed(_stream(seed, 0))
    x0 = torch.randn(ROWS, 2, generator=generator)
    # Equal modes take the largest part of the sampling noise out of the distances.
    x1 = TASK.draw(ROWS, _stream(seed, 1), balanced=True)
    return x0, x1, _transport(TASK.make_data(seed).heldout, seed)


@lru_cache(maxsize=4)
def _floor(seed: int, repeats: int = 4) -> tuple[tuple[str, float], ...]:
    rows = []
    for i in range(repeats):
        fresh = TASK.draw(ROWS, _stream(seed, 2 * i + 10))
        rows.append(measure(fresh, TASK.draw(ROWS, _stream(seed, 2 * i + 11), balanced=True)))
    mean = {key: sum(abs(row[key]) for row in rows) / repeats for key in rows[0]}
    partners = [_transport(TASK.draw(ROWS, _stream(seed, use)), seed).x1 for use in (2, 3)]
    return (*mean.items(), ("reconstruction_error", metrics.reconstruction_rms(*partners)))


def _transport(x1: Tensor, seed: int) -> Pairs:
    """Send the noise of `seed`, the same for all data, to x1 by semi-discrete transport."""
    coupling = make_coupling("ot-semidiscrete", fit_steps=TRANSPORT_STEPS)
    coupling.fit(x1, generator=torch.Generator().manual_seed(_stream(seed, 4)))
    return coupling.sample(PAIRS, generator=torch.Generator().manual_seed(_stream(seed, 5)))
