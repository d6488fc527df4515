"""policy-finetuning: which fine-tuning makes a one-step policy as good as a many-step one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmft_fast.analysis import plots
from fmft_fast.envs import summarise
from fmft_fast.studies.base import Rows, Settings, Study, register
from fmft_fast.studies.models import Models, Pretrained
from fmft_fast.studies.policies import (
    BEFORE,
    EARLY,
    NOT_TUNED,
    PRETRAIN_STEPS,
    VARIANTS,
    base_of,
    roll_outs,
    score_table,
    tuned,
    unpacked,
)

STEPS = (1, 4, 16)
STARTS, FINETUNE_STEPS = 100, 3000
# The others take the first seed only, which shows their direction.
ON_ALL_SEEDS = (
    BEFORE,
    EARLY,
    "independent, FM at .05",
    "independent, FM at .05, twice as long",
    "independent, FM at .05, four times as long",
    "independent",
    "inversion",
    "reflow",
    "independent, FM at .1",
)


def cells(seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Give each variant and training seed, those of less interest for the first seed only."""
    sizes = {
        "pretrain_steps": 9 if quick else PRETRAIN_STEPS["pusht"],
        "finetune_steps": 2 if quick else FINETUNE_STEPS,
        "starts": 2 if quick else STARTS,
    }
    variants = (BEFORE, "reflow") if quick else (*NOT_TUNED, *VARIANTS)
    return [
        {"task": "pusht", "variant": variant, "seed": seed, **sizes}
        for variant in variants
        for seed in (seeds if quick or variant in ON_ALL_SEEDS else seeds[:1])
    ]


def models(settings: Settings) -> list[Pretrained]:
    """Give the pre-trained policy."""
    return [base_of(settings)]


def measure(settings: Settings, models_: Models) -> dict[str, Any]:
    """Fine-tune, then roll out from every start at each number of steps."""
    model = tuned(settings, models_, settings["variant"])
    return {"roll_outs": roll_outs(settings, model, steps=STEPS)}


def show(rows: Rows) -> str:
    """Give a line per variant, and how its one step compares with one and many before."""
    few, many = STEPS[0], STEPS[-1]
    return score_table(
        unpacked(rows, "variant", "seed"),
        "score",
        "variant",
        "Push-T score",
        against={
            f"N = {few} minus {BEFORE} N = {few}": (BEFORE, few),
            f"N = {few} minus {BEFORE} N = {many}": (BEFORE, many),
        },
    )


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw score and success against N, a line per variant of which all seeds were measured."""
    drawn = [row for row in rows if row["variant"] in ON_ALL_SEEDS]
    found = summarise(unpacked(drawn, "variant"), by=("variant", "steps"))
    panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for (variant, n), measures in found.items():
        for name, one in measures.items():
            line = panels.setdefault(name, {}).setdefault(variant, [])
            line.append((n, one.low, one.mean, one.high))
    file = folder / "policy-finetuning.png"
    return [plots.medians(panels, file, xlabel="Euler steps N", log_y=False, columns=2)]


STUDY = register(
    Study(
        name="policy-finetuning",
        question=(
            "Which way of fine-tuning lets a policy act in one step as well as it did in many, and "
            "does the loss tell which?"
        ),
        cells=cells,
        measure=measure,
        table=show,
        summary="Means of roll-outs",
        figures=draw,
        models=models,
    )
)
