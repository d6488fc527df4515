"""decomposition: the error on the toy, term by term, against Theorem 3.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.analysis import ErrorBound, error_bound, exact_path, metrics, plots, stiffness
from fmft_fast.flow import sample
from fmft_fast.studies.base import Rows, Settings, Study, register
from fmft_fast.studies.estimates import estimate, table
from fmft_fast.studies.models import Models, Pretrained, finetune
from fmft_fast.tasks.toy_gmm import SIGMA, TASK

# Model: coupling of its pre-training, and of its fine-tuning if it has one.
MODELS: dict[str, tuple[str, str | None]] = {
    "pre-trained": ("independent", None),
    "pre-trained OT": ("ot-minibatch", None),
    "tuned OT": ("independent", "ot-semidiscrete"),
    "tuned inversion": ("independent", "inversion"),
}
STEPS = (1, 2, 5, 10, 20, 50, 100)
IN_BETWEEN = (20, 50)  # drawn, but left out of the table
SIZES = {"pretrain_steps": 3000, "finetune_steps": 3000, "samples": 512, "path_steps": 1000}
QUICK = {
    **{"pretrain_steps": 20, "finetune_steps": 4, "samples": 16, "path_steps": 50},
    "coupling_options": {"steps": 1},
}
MEASURES: dict[str, str] = {
    "error": "error",
    "error_mean": "its mean",
    "field_error": "of v for u",
    "step_error": "of the steps",
    "delta": "delta",
    "bound_one_sided": "one-sided bound",
    "field_term": "its delta part",
    "step_term": "its M part",
    "bound_lipschitz": "bound by steps",
    "bound_theorem": "Theorem 3.1",
    "uniform_log10": "log10, one L for all",
    "off": "off the modes",
}


def cells(seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Give each model and seed; one cell measures all numbers of steps."""
    sizes = QUICK if quick else SIZES
    steps = [2, 5] if quick else list(STEPS)
    names = ("pre-trained", "tuned inversion") if quick else MODELS
    return [
        {"model": name, "seed": seed, "steps": steps, **sizes} for name in names for seed in seeds
    ]


def models(settings: Settings) -> list[Pretrained]:
    """Give the model that the cell begins with."""
    coupling = MODELS[settings["model"]][0]
    layer = {"coupling": coupling, "steps": settings["pretrain_steps"]}
    return [Pretrained("toy-gmm", settings["seed"], layer)]


def measure(settings: Settings, models_: Models) -> dict[str, Any]:
    """Take the error apart for each number of steps, with the exact velocity as the reference."""
    (base,) = models(settings)
    field = models_.load(base)
    coupling = MODELS[settings["model"]][1]
    if coupling is not None:
        options = {"coupling_options": settings.get("coupling_options", {})}
        layer = {"coupling": coupling, "steps": settings["finetune_steps"], **options}
        field = finetune("toy-gmm", field, {"seed": settings["seed"], **layer}).model
    law = TASK.mixture
    random = torch.Generator().manual_seed(1000 + settings["seed"])
    x0 = torch.randn(settings["samples"], 2, generator=random)
    path = exact_path(law, x0, settings["path_steps"])
    by_steps = []
    for n in settings["steps"]:
        bound = error_bound(field, law, x0, n, path=path)
        by_steps.append({"N": n, **numbers(bound), "off": _off(field, law.means, x0, n)})
    slopes = stiffness(field, x0).to_dict()
    return {
        "by_steps": by_steps,
        "peak": slopes["peak"]["median"],
        "peak_q95": slopes["peak"]["q95"],
        "growth": slopes["growth"]["median"],
        "growth_q95": slopes["growth"]["q95"],
        "path_ratio": slopes["path_ratio"]["median"],
    }


def numbers(b: ErrorBound) -> dict[str, float | None]:
    """Give medians over samples; 95 % quantiles and the mean where the tail matters."""
    median = {
        "error": b.error,
        "field_error": b.field_error,
        "step_error": b.step_error,
        "delta": b.delta.amax(0),
        "lipschitz": b.lipschitz.amax(0),
        "curvature": b.curvature.amax(0),
        "field_term": b.field_term("one_sided"),
        "step_term": b.step_term("one_sided"),
        "bound_one_sided": b.bound("one_sided"),
        "bound_lipschitz": b.bound("lipschitz"),
        "bound_theorem": b.bound("theorem"),
    }
    found: dict[str, float | None] = {key: float(x.median()) for key, x in median.items()}
    found["error_mean"] = float(b.error.mean())
    for key in ("error", "bound_one_sided", "bound_theorem", "delta"):
        found[f"{key}_q95"] = float(median[key].clamp_max(1e300).quantile(0.95))
    found["holds"] = float(
        torch.stack([b.holds(k) for k in ("theorem", "one_sided")]).all(0).double().mean()
    )
    found["uniform_log10"] = b.uniform_log10
    return found


def _off(field: nn.Module, centres: Tensor, x0: Tensor, steps: int) -> float:
    """Give the share of samples off the modes, for these rows of noise."""
    return metrics.off_mode_share(sample(field, x0, steps=steps), centres.to(x0), SIGMA)


def unfold(rows: Rows) -> list[dict[str, Any]]:
    """Give a row for each number of steps of each cell."""
    return [
        {"model": row["model"], "seed": row["seed"], **measured}
        for row in rows
        for measured in row["by_steps"]
    ]


def show(rows: Rows) -> str:
    """Give errors and bounds for each model and number of steps; then slopes for each model."""
    along = {
        "peak": "largest L on a path",
        "peak_q95": "its 95 %",
        "growth": "integral of mu",
        "growth_q95": "its 95 %",
        "path_ratio": "length / displacement",
    }
    chosen = [row for row in unfold(rows) if row["N"] not in IN_BETWEEN]
    errors = table(chosen, {"model": "model", "N": "N"}, MEASURES)
    return f"{errors}\n\nAlong the model's own trajectories:\n\n" + table(
        rows, {"model": "model"}, along
    )


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw errors and bounds, and the parts of both, against N: a panel for each model."""
    bounds = {
        "error": "measured",
        "bound_one_sided": "one-sided bound",
        "bound_lipschitz": "bound by steps",
        "bound_theorem": "Theorem 3.1",
    }
    parts = {
        "field_error": "v for u, measured",
        "field_term": "bound: delta",
        "step_error": "steps, measured",
        "step_term": "bound: M",
    }
    files = []
    for name, lines in (("bounds", bounds), ("parts", parts)):
        file = folder / f"decomposition-{name}.png"
        files.append(
            plots.medians(_panels(unfold(rows), lines), file, xlabel="Euler steps N", columns=2)
        )
    return files


def _panels(rows: Rows, lines: Mapping[str, str]) -> dict[str, Any]:
    panels: dict[str, Any] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        panels[model] = {label: [] for label in lines.values()}
        for n in dict.fromkeys(row["N"] for row in rows):
            chosen = [row for row in rows if row["model"] == model and row["N"] == n]
            for key, label in lines.items():
                found = estimate([row[key] for row in chosen])
                panels[model][label].append((n, found.low, found.median, found.high))
    return panels


STUDY = register(
    Study(
        name="decomposition",
        question=(
            "Which term of Theorem 3.1 is the error of few Euler steps made of, how far is the "
            "bound from it, and which of them does fine-tuning change?"
        ),
        cells=cells,
        measure=measure,
        table=show,
        figures=draw,
        models=models,
    )
)
