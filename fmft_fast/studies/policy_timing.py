"""policy-timing: when to leave pre-training for fine-tuning, and for how long, on Push-T."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fmft_fast.analysis import plots
from fmft_fast.studies.base import Rows, Settings, Study, register
from fmft_fast.studies.checkpoint_timing import STARTS
from fmft_fast.studies.estimates import estimate, table
from fmft_fast.studies.models import Models, Pretrained, finetune
from fmft_fast.studies.policies import PRETRAIN_STEPS, base_of, robot

POINTS = 4  # measured along a run
EPISODES, FINETUNE_STEPS = 50, 2000


def cells(seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Give each start of fine-tuning, in per cent of pre-training, and seed."""
    sizes = {
        "pretrain_steps": 9 if quick else PRETRAIN_STEPS["pusht"],
        "finetune_steps": 2 if quick else FINETUNE_STEPS,
        "points": 1 if quick else POINTS,
        "starts": 2 if quick else EPISODES,
    }
    return [
        {"task": "pusht", "begin": begin, "seed": seed, **sizes}
        for begin in ((11, 100) if quick else STARTS)
        for seed in seeds
    ]


def models(settings: Settings) -> list[Pretrained]:
    """Give the policy pre-trained to the end, with a checkpoint after each ninth."""
    return [base_of(settings)]


def measure(settings: Settings, models_: Models) -> dict[str, Any]:
    """Fine-tune from the start, rolling out with one Euler step along the way."""
    task, seed = robot(settings["task"]), settings["seed"]

    def score(field: nn.Module) -> Mapping[str, float]:
        rows = task.roll_out(field, (1,), starts=settings["starts"])
        return {"failure": 1 - sum(row["score"] for row in rows) / len(rows)}

    step = STARTS[settings["begin"]] * (settings["pretrain_steps"] // 9)
    keys = {
        "seed": seed,
        "steps": settings["finetune_steps"],
        # At a constant rate one run shows all durations.
        "schedule": "constant",
        "eval_every": settings["finetune_steps"] // settings["points"],
    }
    field = models_.load(base_of(settings), step=step)
    result = finetune(settings["task"], field, keys, evaluate=score)
    curve = [(int(row["step"]), 1 - row["failure"]) for row in result.history]
    best_step, best = max(curve[1:], key=lambda point: point[1])
    return {
        "before": curve[0][1],
        "best": best,
        "best_step": best_step,
        "end": curve[-1][1],
        "heldout": [row["heldout"] for row in result.history],
        "curve": [list(point) for point in curve],
        "findings": [finding.name for finding in result.findings],
    }


def show(rows: Rows) -> str:
    """Give a line per start: score with one step before, at its best, when, and at the end."""
    across = {
        "before": "before, N = 1",
        "best": "best while fine-tuning",
        "best_step": "at step",
        "end": "at the end",
    }
    return table(rows, {"begin": "start, %"}, across)


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw the score against fine-tuning steps, a line per start."""
    lines = {}
    for begin in dict.fromkeys(row["begin"] for row in rows):
        runs = [row["curve"] for row in rows if row["begin"] == begin]
        found = [
            (points[0][0], estimate([value for _, value in points]))
            for points in zip(*runs, strict=True)
        ]
        lines[f"start at {begin} %"] = [(step, e.low, e.median, e.high) for step, e in found]
    panels = {"Push-T: score at N = 1": lines}
    file = folder / "policy-timing.png"
    return [plots.medians(panels, file, xlabel="fine-tuning steps", log_x=False, log_y=False)]


STUDY = register(
    Study(
        name="policy-timing",
        question=(
            "From which point of a policy's pre-training on does fine-tuning pay, how long should "
            "it last, and does an early start over-fit?"
        ),
        cells=cells,
        measure=measure,
        table=show,
        figures=draw,
        models=models,
    )
)
