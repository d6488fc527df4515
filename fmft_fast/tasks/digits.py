"""digits: scikit-learn's real 8x8 handwritten digits, 64 numbers each, shipped with its wheel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.analysis import metrics, plots
from fmft_fast.errors import MissingDependencyError
from fmft_fast.fields import MLP
from fmft_fast.flow import integrate, sample
from fmft_fast.tasks.base import STEPS, Records, Results, Task, TaskData, register

HELDOUT, CLASSES, PROJECTIONS = 500, 10, 256
TITLES = {
    "kernel_distance": "kernel distance of features",
    "frechet_distance": "Fréchet distance of features",
    "energy_distance": "energy distance of pixels",
    "sliced_w2": "sliced W2 of pixels",
    "classifier_doubt": "classifier's doubt",
    "class_balance": "imbalance of classes",
    "nearest_neighbour_ratio": "nearest-neighbour ratio (1 is fresh data)",
    "reconstruction_error": "held-out reconstruction error",
}


class Digits(Task):
    """1,797 images, scaled to [-1, 1]: 1,297 for training and always the same 500 held out.

    A small classifier, fitted to the training images and their labels, gives the features of
    `kernel_distance` and `frechet_distance` and the `classifier_doubt` (1 - its mean confidence).
    A `nearest_neighbour_ratio` far below 1 would mean copies of training images.
    """

    name = "digits"
    summary = "scikit-learn's 8x8 handwritten digits, 64-D"
    pretrain: Mapping[str, Any] = {"steps": 6000, "batch_size": 128, "lr": 2e-3, "ema_decay": 0.995}
    finetune: Mapping[str, Any] = {
        "steps": 800,
        "batch_size": 128,
        "lr": 5e-4,
        "ema_decay": 0.995,
        "coupling": "inversion",
        "coupling_options": {"steps": 30},
        "solver_steps": (1, 2, 5, 10),
        "fm_weight": 0.1,
    }

    def make_data(self, seed: int, field: nn.Module | None = None) -> TaskData:
        """Give the images [n, 64]; the split does not depend on the seed."""
        images, _ = _load()
        return TaskData(images[:-HELDOUT], images[-HELDOUT:])

    def make_field(self) -> nn.Module:
        """Make the MLP with 3 hidden layers of 256 and SiLU."""
        return MLP(64, hidden=(256, 256, 256), activation="silu")

    def evaluate(self, field: nn.Module, steps: Sequence[int] = STEPS, *, seed: int = 0) -> Results:
        """Measure 500 samples against the 500 held-out images for each number of steps.

        For the reconstruction error the field carries each held-out image back to noise with an
        accurate solve, and forward again with the n steps.
        """
        data = self.make_data(seed)
        x0 = torch.randn(HELDOUT, 64, generator=torch.Generator().manual_seed(1_000_000 + seed))
        back = integrate(field, data.heldout, t0=1.0, t1=0.0, steps=100, method="rk4")
        results = {}
        for n in steps:
            phi, again = sample(field, x0, steps=n), sample(field, back, steps=n)
            results[n] = {
                **_measure(phi, data.heldout),
                "nearest_neighbour_ratio": metrics.nearest_neighbour_ratio(
                    phi, data.train, data.heldout
                ),
                "reconstruction_error": metrics.reconstruction_rms(again, data.heldout),
            }
        return results

    def noise_floor(self, *, seed: int = 0) -> dict[str, float]:
        """Give the mean size of each measure for 500 training images against the held-out ones."""
        data = self.make_data(seed)
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for _ in range(4):
            chosen = torch.randperm(len(data.train), generator=generator)[:HELDOUT]
            rows.append(_measure(data.train[chosen], data.heldout))
        floor = {key: sum(abs(row[key]) for row in rows) / len(rows) for key in rows[0]}
        return {**floor, "nearest_neighbour_ratio": 1.0, "reconstruction_error": 0.0}

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
        """Draw a grid of digits, quality against N and training curves."""
        out = Path(out_dir)
        if results is None:
            fields = {"before": before, "after": after}
            results = {name: self.evaluate(f, seed=seed) for name, f in fields.items()}
        files = [
            self._draw_grid(before, after, out / "digits.png", seed=seed),
            plots.quality(results, self.noise_floor(seed=seed), out / "quality.png", titles=TITLES),
        ]
        if history:
            files.append(plots.training_curves(history, out / "training.png"))
        return files

    def _draw_grid(
        self, before: nn.Module, after: nn.Module, file: Path, *, seed: int, n: int = 16
    ) -> Path:
        """Show the same noise in every row, and under the last its nearest training images."""
        train = self.make_data(seed).train
        x0 = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
        rows = {
            f"{name}, N = {steps}": sample(field, x0, steps=steps)
            for steps in (1, 2, 10)
            for name, field in (("before", before), ("after", after))
        }
        nearest = torch.cdist(rows["after, N = 10"], train).argmin(1)
        rows["nearest training image"] = train[nearest]
        return plots.image_grid({k: v.reshape(-1, 8, 8) for k, v in rows.items()}, file)


TASK = register(Digits())


def _measure(x: Tensor, real: Tensor) -> dict[str, float]:
    """Compare as many images with as many real ones."""
    features, probability = _classifier()(x)
    real_features, real_probability = _classifier()(real)
    shares, real_shares = (
        torch.bincount(p.argmax(1), minlength=CLASSES).double() / len(p)
        for p in (probability, real_probability)
    )
    return {
        "kernel_distance": metrics.kernel_distance(features, real_features),
        "frechet_distance": metrics.frechet_distance(features, real_features),
        "energy_distance": metrics.energy_distance(x, real),
        "sliced_w2": metrics.sliced_wasserstein(x, real, projections=PROJECTIONS),
        "classifier_doubt": 1 - float(probability.amax(1).mean()),
        "class_balance": metrics.total_variation(shares, real_shares),
    }


@lru_cache(maxsize=1)
def _load() -> tuple[Tensor, Tensor]:
    """Give images [1797, 64] in [-1, 1] and labels, shuffled once and for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the task 'digits' needs scikit-learn: pip install 'fmft-fast[tasks]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = torch.as_tensor(images, dtype=torch.float32) / 8 - 1
    return pixels[order], torch.as_tensor(labels)[order]


@lru_cache(maxsize=1)
def _classifier() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Fit a classifier to the training images; it gives features [n, 64] and probabilities."""
    from sklearn.neural_network import MLPClassifier

    images, labels = _load()
    model = MLPClassifier((64,), solver="lbfgs", alpha=1.0, max_iter=1000, random_state=0)
    model.fit(images[:-HELDOUT].numpy(), labels[:-HELDOUT].numpy())
    (w1, w2), (b1, b2) = (
        [torch.as_tensor(a, dtype=torch.float32) for a in part]
        for part in (model.coefs_, model.intercepts_)
    )

    def classify(x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(x @ w1 + b1)
        return features, (features @ w2 + b2).softmax(1)

    return classify
