"""regularisation: what keeps fine-tuning in 64 dimensions from learning its pairs by heart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmft_fast.analysis import plots
from fmft_fast.flow import make_coupling, sample
from fmft_fast.studies.base import Rows, Settings, Study, register
from fmft_fast.studies.estimates import estimates, table
from fmft_fast.studies.models import Models, Pretrained, finetune, in_ninths
from fmft_fast.tasks import find_task
from fmft_fast.train.batches import stream_seed

TASK = "digits"
STEPS = 2
NONE, PLAIN = "pre-trained", "none"
COUPLINGS: dict[str, dict[str, Any]] = {"inversion": {"steps": 20}, "ot-fixed": {"size": 1297}}
# Kind of regularisation: {strength: settings}; without any, weights are neither averaged nor held.
KINDS: dict[str, dict[float, dict[str, Any]]] = {
    "weight decay": {w: {"weight_decay": w} for w in (0.1, 1.0)},
    "EMA": {d: {"ema_decay": d} for d in (0.98, 0.995)},
    "anchor": {w: {"anchor_weight": w} for w in (1e-4, 1e-3, 1e-2)},
    "FM loss": {w: {"fm_weight": w} for w in (0.1, 1.0)},
    "new noise": {s: {"coupling_options": {"refresh": s}} for s in (0.1, 0.3, 0.6)},
}
SIZES = {"pretrain_steps": 5994, "finetune_steps": 400}
MEASURES = {
    "frechet_distance": "Fréchet distance",
    "energy_distance": "energy distance",
    "nearest_neighbour_ratio": "nearest-neighbour ratio",
    "heldout_error": "held-out pairs",
    "train_error": "trained pairs",
}


def cells(seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Give each coupling, regularisation, strength and seed; and the pre-trained model."""
    small = {"pretrain_steps": 9, "finetune_steps": 2} if quick else {}
    choices = [(NONE, "-", 0.0)]
    for coupling in COUPLINGS:
        choices.append((coupling, PLAIN, 0.0))
        choices += [(coupling, kind, s) for kind, strengths in KINDS.items() for s in strengths]
    if quick:
        choices = [choices[0], ("inversion", "new noise", 0.3)]
    return [
        {"coupling": coupling, "kind": kind, "strength": strength, "seed": seed, **SIZES, **small}
        for coupling, kind, strength in choices
        for seed in seeds
    ]


def models(settings: Settings) -> list[Pretrained]:
    """Give the pre-trained model."""
    return [in_ninths(TASK, settings["seed"], settings["pretrain_steps"])]


def measure(settings: Settings, models_: Models) -> dict[str, Any]:
    """Fine-tune for two Euler steps; measure samples, and errors on pairs seen and unseen."""
    (base,) = models(settings)
    field, task, seed = models_.load(base), find_task(TASK), settings["seed"]
    told: dict[str, Any] = {"heldout_error": None, "train_error": None, "findings": []}
    if settings["coupling"] != NONE:
        coupling = settings["coupling"]
        chosen = dict(KINDS.get(settings["kind"], {}).get(settings["strength"], {}))
        options = {**COUPLINGS[coupling], **chosen.pop("coupling_options", {})}
        plain = {"ema_decay": None, "fm_weight": 0.0, "select": "last", "solver_steps": (STEPS,)}
        layer = {"seed": seed, "steps": settings["finetune_steps"], "coupling": coupling}
        result = finetune(TASK, field, {**plain, **layer, "coupling_options": options, **chosen})
        field = result.model
        told = {
            "heldout_error": result.history[-1]["heldout"],
            "train_error": train_error(settings, models_, field),
            "findings": [finding.name for finding in result.findings],
        }
    found = task.evaluate(field, (STEPS,), seed=seed)[STEPS]
    return {**{key: found[key] for key in MEASURES if key in found}, **told}


def train_error(settings: Settings, models_: Models, field: nn.Module) -> float:
    """Give the mean distance |phi(x0) - x1| / sqrt(dim) on pairs that training has seen."""
    (base,) = models(settings)
    seed, coupling = settings["seed"], settings["coupling"]
    random = torch.Generator().manual_seed(stream_seed(seed, "coupling"))
    rule = make_coupling(coupling, **COUPLINGS[coupling])
    rule.fit(find_task(TASK).make_data(seed).train, field=models_.load(base), generator=random)
    pairs = rule.sample(1000, generator=random)
    gap = sample(field, pairs.x0, steps=STEPS) - pairs.x1
    return float(gap.norm(dim=1).mean()) / gap.shape[1] ** 0.5


def show(rows: Rows) -> str:
    """Give a line per coupling, regularisation and strength."""
    down = {"coupling": "coupling", "kind": "regularisation", "strength": "strength"}
    return table(rows, down, MEASURES)


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw the distance of samples and the errors on pairs, from none to the strengths given."""
    panels, levels = {}, {}
    before = estimates(rows, ("coupling",), "frechet_distance").get((NONE,))
    for coupling in COUPLINGS:
        for key in ("frechet_distance", "heldout_error", "train_error"):
            own = [row for row in rows if row["coupling"] == coupling]
            found = estimates(own, ("kind", "strength"), key)
            title = f"{coupling}\n{MEASURES[key]}"
            lines: dict[str, list[tuple[float, float, float, float]]] = {}
            for kind, strengths in KINDS.items():
                places = [(PLAIN, 0.0), *((kind, strength) for strength in strengths)]
                lines[kind] = [
                    (x, found[place].low, found[place].median, found[place].high)
                    for x, place in enumerate(places)
                    if place in found
                ]
            panels[title] = {kind: points for kind, points in lines.items() if points}
            if before is not None and key == "frechet_distance":
                levels[title] = {"pre-trained": before.median}
    panels = {title: lines for title, lines in panels.items() if lines}
    file = folder / "regularisation.png"
    label = "strength: 0 none, then as in the table"
    return [plots.medians(panels, file, xlabel=label, levels=levels, log_x=False)]


STUDY = register(
    Study(
        name="regularisation",
        question=(
            "In 64 dimensions, which regularisation keeps fine-tuning from learning its pairs by "
            "heart, and at what price?"
        ),
        cells=cells,
        measure=measure,
        table=show,
        figures=draw,
        models=models,
    )
)
