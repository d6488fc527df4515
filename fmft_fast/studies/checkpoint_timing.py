"""checkpoint-timing: when to leave pre-training for fine-tuning, and for how long to fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fmft_fast.analysis import plots
from fmft_fast.studies.base import Rows, Settings, Study, register
from fmft_fast.studies.estimates import estimate, table
from fmft_fast.studies.models import Models, Pretrained, finetune, in_ninths
from fmft_fast.tasks import find_task

# Per cent of pre-training after which fine-tuning starts, and the ninths that they mean.
STARTS = {11: 1, 33: 3, 55: 5, 78: 7, 100: 9}
STEPS = 2
MEASURES = {"toy-gmm": "off_mode_share", "digits": "frechet_distance"}
TITLES = {
    "toy-gmm": "toy-gmm: off-mode share",
    "digits": "digits: Fréchet distance of features",
}
# At a constant rate one run shows all durations; with the tasks' cosine each would need its own.
SIZES: dict[str, dict[str, Any]] = {
    "toy-gmm": {"pretrain_steps": 2997, "finetune_steps": 1200, "lr": 4e-3},
    "digits": {"pretrain_steps": 5994, "finetune_steps": 900, "lr": 5e-4},
}
POINTS = 6  # measured along a run


def cells(seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Give each task, start and seed."""
    small = {"pretrain_steps": 18, "finetune_steps": 4, "points": 1} if quick else {}
    return [
        {"task": task, "start": start, "seed": seed, **SIZES[task], "points": POINTS, **small}
        for task in (("digits",) if quick else SIZES)
        for start in ((11, 100) if quick else STARTS)
        for seed in seeds
    ]


def models(settings: Settings) -> list[Pretrained]:
    """Give the model pre-trained to the end, with a checkpoint after each ninth."""
    return [in_ninths(settings["task"], settings["seed"], settings["pretrain_steps"])]


def measure(settings: Settings, models_: Models) -> dict[str, Any]:
    """Fine-tune from the start, measuring samples of two Euler steps along the way."""
    name, seed = settings["task"], settings["seed"]
    task, key = find_task(name), MEASURES[name]

    def quality(field: nn.Module) -> Mapping[str, float]:
        return {"quality": task.evaluate(field, (STEPS,), seed=seed)[STEPS][key]}

    (base,) = models(settings)
    field = models_.load(base, step=STARTS[settings["start"]] * (settings["pretrain_steps"] // 9))
    result = finetune(
        name,
        field,
        {
            "seed": seed,
            "steps": settings["finetune_steps"],
            "lr": settings["lr"],
            "schedule": "constant",
            "eval_every": settings["finetune_steps"] // settings["points"],
        },
        evaluate=quality,
    )
    curve = [(int(row["step"]), row["quality"]) for row in result.history]
    best_step, best = min(curve[1:], key=lambda point: point[1])
    return {
        "before": curve[0][1],
        "best": best,
        "best_step": best_step,
        "end": curve[-1][1],
        "curve": [list(point) for point in curve],
        "findings": [finding.name for finding in result.findings],
    }


def show(rows: Rows) -> str:
    """Give a line per task and start: quality before, at its best, when that was, at the end."""
    across = {
        "before": f"before, N = {STEPS}",
        "best": "best while fine-tuning",
        "best_step": "at step",
        "end": "at the end",
    }
    return table(rows, {"task": "task", "start": "start, %"}, across)


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw quality against fine-tuning steps, a line per start."""
    panels = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        lines = panels.setdefault(TITLES[task], {})
        for start in dict.fromkeys(row["start"] for row in rows):
            runs = [r["curve"] for r in rows if r["task"] == task and r["start"] == start]
            found = [
                (points[0][0], estimate([value for _, value in points]))
                for points in zip(*runs, strict=True)
            ]
            label = f"start at {start} %"
            lines[label] = [(step, e.low, e.median, e.high) for step, e in found]
    file = folder / "checkpoint-timing.png"
    return [plots.medians(panels, file, xlabel="fine-tuning steps", log_x=False)]


STUDY = register(
    Study(
        name="checkpoint-timing",
        question=(
            "At which point of pre-training should fine-tuning start, how long should it last, and "
            "does an early start over-fit?"
        ),
        cells=cells,
        measure=measure,
        table=show,
        figures=draw,
        models=models,
    )
)
