"""policy-noise: how policies bear noisy observations, before and after fine-tuning, with a GAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmft_fast.analysis import plots
from fmft_fast.envs import ObservationNoise, summarise
from fmft_fast.report import markdown
from fmft_fast.studies.base import Rows, Settings, Study, register
from fmft_fast.studies.models import Models, Pretrained
from fmft_fast.studies.policies import (
    BEFORE,
    PRETRAIN_STEPS,
    base_of,
    robot,
    roll_outs,
    tuned,
    unpacked,
)

# Pre-trained, fine-tuned, and fine-tuned together with a GAV branch.
MODELS = {
    "FM": BEFORE,
    "FT-FM": "independent, FM at .05",
    "FT-FM (GAV)": "joint with GAV",
}
LEVELS = {"gaussian": (0.0, 0.02, 0.05, 0.1), "salt-pepper": (0.01, 0.05)}
STARTS = {"pusht": 50, "kitchen": 25}
SEEDS = {"pusht": None, "kitchen": 2}  # of those given, at most; a kitchen policy takes long
FINETUNE_STEPS = 3000
STEPS = (1,)


def cells(seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Give each task, model and training seed."""
    return [
        {
            "task": task,
            "model": model,
            "seed": seed,
            "pretrain_steps": 9 if quick else PRETRAIN_STEPS[task],
            "finetune_steps": 2 if quick else FINETUNE_STEPS,
            "starts": 1 if quick else STARTS[task],
            "levels": {"gaussian": [0.0]} if quick else {k: list(v) for k, v in LEVELS.items()},
        }
        for task in (("pusht",) if quick else STARTS)
        for model in (("FM", "FT-FM") if quick else MODELS)
        for seed in seeds[: SEEDS[task]]
    ]


def models(settings: Settings) -> list[Pretrained]:
    """Give the pre-trained policy."""
    return [base_of(settings)]


def measure(settings: Settings, models_: Models) -> dict[str, Any]:
    """Fine-tune, then roll out with one step under each kind and level of noise."""
    model = tuned(settings, models_, MODELS[settings["model"]])
    noises = [
        ObservationNoise(kind, level)
        for kind, levels in settings["levels"].items()
        for level in levels
    ]
    return {"roll_outs": roll_outs(settings, model, steps=STEPS, observation_noise=noises)}


def show(rows: Rows) -> str:
    """Give a line per task and noise, a column per model."""
    header = ["task", "noise", *dict.fromkeys(row["model"] for row in rows)]
    lines = [header]
    for task in dict.fromkeys(row["task"] for row in rows):
        measure_ = robot(task).measure
        own = unpacked([row for row in rows if row["task"] == task], "model")
        found = summarise(own, by=("model", "noise"), measures=(measure_,))
        for noise in dict.fromkeys(noise for _, noise in found):
            values = (found[model, noise][measure_] for model in header[2:])
            kind, _, level = noise.partition(":")
            shown = f"{kind} {level}" if float(level or 0) else "none"
            lines.append([f"{task}, {measure_}", shown, *map(str, values)])
    return markdown(lines)


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw degradation curves: a panel per task and kind of noise, a line per model."""
    panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        measure_ = robot(task).measure
        own = unpacked([row for row in rows if row["task"] == task], "model")
        found = summarise(own, by=("model", "noise"), measures=(measure_,))
        for kind in LEVELS:
            lines = panels.setdefault(f"{task}: {measure_}, {kind}", {})
            for (model, noise), measures in found.items():
                name, _, level = noise.partition(":")
                # No noise is the first point of every curve.
                if name in (kind, "none") or float(level or 0) == 0:
                    one = measures[measure_]
                    point = (float(level or 0), one.low, one.mean, one.high)
                    lines.setdefault(model, []).append(point)
    file = folder / "policy-noise.png"
    return [plots.medians(panels, file, xlabel="noise level", log_x=False, log_y=False, columns=2)]


STUDY = register(
    Study(
        name="policy-noise",
        question=(
            "Does fine-tuning, alone or with a contracting branch, make a policy bear noisy "
            "observations better or worse?"
        ),
        cells=cells,
        measure=measure,
        table=show,
        summary="Means of roll-outs",
        figures=draw,
        models=models,
    )
)
