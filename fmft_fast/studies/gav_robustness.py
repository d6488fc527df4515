"""gav-robustness: what noise does to samples, by fine-tuning and construction of the GAV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.analysis import metrics, plots
from fmft_fast.errors import CertificateError
from fmft_fast.fields import GAV, Residual
from fmft_fast.studies.base import Rows, Settings, Study, register
from fmft_fast.studies.estimates import estimates, table
from fmft_fast.studies.models import Models, Pretrained, finetune, in_ninths
from fmft_fast.tasks import find_task, toy_gmm

RATE = 0.5
CONSTRUCTIONS = ("collocated", "lmi", "schur-cayley", "schur-cayley-free")
# The branch of a frozen field keeps its own small rate: with a large one it would pull all samples
# together, and nothing could make up for it.
MODELS: dict[str, dict[str, Any] | None] = {
    "FM": None,
    "FT-FM": {"mode": "direct"},
    "FT-FM(GAV), frozen": {"mode": "residual"},
} | {
    f"FT-FM({kind})": {
        "mode": "residual",
        "joint": True,
        "residual_options": {"construction": kind, "rate": RATE},
    }
    for kind in CONSTRUCTIONS
}
TASKS: dict[str, dict[str, Any]] = {
    "toy-gmm": {"pretrain_steps": 2997, "finetune_steps": 300, "samples": 4000},
    "digits": {"pretrain_steps": 5994, "finetune_steps": 300, "samples": 500},
}
QUALITY = {"toy-gmm": "off-mode share", "digits": "energy distance"}
STEPS = 5
# gaussian: added to the start; salt-and-pepper: share of its entries set to -3 or 3; input: added
# to what the field is given, anew at every step.
LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian": (0.1, 0.3, 0.6),
    "salt-and-pepper": (0.03, 0.1, 0.3),
    "input": (0.03, 0.1, 0.3),
}
SHOWN = {"gaussian": 0.3, "salt-and-pepper": 0.1, "input": 0.1}


def cells(seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Give each task, model and seed."""
    small = {"pretrain_steps": 9, "finetune_steps": 2, "samples": 50} if quick else {}
    return [
        {"task": task, "model": model, "seed": seed, **TASKS[task], **small}
        for task in (("digits",) if quick else TASKS)
        for model in (("FM", "FT-FM(lmi)") if quick else MODELS)
        for seed in seeds
    ]


def models(settings: Settings) -> list[Pretrained]:
    """Give the pre-trained model."""
    return [in_ninths(settings["task"], settings["seed"], settings["pretrain_steps"])]


def measure(settings: Settings, models_: Models) -> dict[str, Any]:
    """Fine-tune, then measure samples under every kind and level of noise."""
    (base,) = models(settings)
    field, chosen = models_.load(base), MODELS[settings["model"]]
    findings = []
    if chosen is not None:
        choice = {
            "seed": settings["seed"],
            "steps": settings["finetune_steps"],
            "solver_steps": (STEPS,),
            **chosen,
        }
        result = finetune(settings["task"], field, choice)
        field, findings = result.model, [finding.name for finding in result.findings]
    with torch.no_grad():
        found = noisy_quality(field, settings)
    return {"certified_rate": certified_rate(field), "findings": findings, **found}


def noisy_quality(field: nn.Module, settings: Settings) -> dict[str, Any]:
    """Give the quality of samples under noise, and how far noise moves a sample (RMS per entry)."""
    task = settings["task"]
    data = find_task(task).make_data(settings["seed"]).heldout[: settings["samples"]]
    random = torch.Generator().manual_seed(2_000_000 + settings["seed"])
    x0 = torch.randn(data.shape, generator=random)
    clean = end(field, x0)
    quality, moved = {"none": {"0": quality_of(task, clean, data)}}, {}
    for kind, levels in LEVELS.items():
        quality[kind], moved[kind] = {}, {}
        for level in levels:
            start = corrupted(x0, kind, level, random)
            x = end(field, start, level if kind == "input" else 0.0, random)
            quality[kind][str(level)] = quality_of(task, x, data)
            moved[kind][str(level)] = float((x - clean).square().mean().sqrt())
    return {"quality": quality, "moved": moved}


def quality_of(task: str, x: Tensor, data: Tensor) -> float:
    """Give the measure of `QUALITY`, lower being better."""
    if task == toy_gmm.TASK.name:
        return metrics.off_mode_share(x, toy_gmm.TASK.centres, toy_gmm.SIGMA)
    return metrics.energy_distance(x, data)


def corrupted(x0: Tensor, kind: str, level: float, random: torch.Generator) -> Tensor:
    """Give the start of a solve under noise of a kind."""
    if kind == "gaussian":
        return x0 + level * torch.randn(x0.shape, generator=random)
    if kind == "salt-and-pepper":
        hit = torch.rand(x0.shape, generator=random) < level
        return torch.where(hit, 3.0 * torch.randn(x0.shape, generator=random).sign(), x0)
    return x0


def end(
    field: nn.Module, x: Tensor, level: float = 0.0, random: torch.Generator | None = None
) -> Tensor:
    """Take the Euler steps, with noise of that level on what the field is given."""
    for k in range(STEPS):
        given = x
        if level:
            given = x + level * torch.randn(x.shape, generator=random)
        x = x + field(torch.tensor(k / STEPS), given) / STEPS
    return x


def certified_rate(field: nn.Module) -> float | None:
    """The contraction rate of the branch, or None where there is no branch or no guarantee."""
    if not isinstance(field, Residual) or not isinstance(field.branch, GAV):
        return None
    try:
        return field.branch.certificate().rate
    except CertificateError:
        return None


def show(rows: Rows) -> str:
    """Give, for each task, the quality without and with noise, and how far noise moves samples."""
    texts = []
    for task, title in QUALITY.items():
        flat = [_flat(row) for row in rows if row["task"] == task]
        across = {"certified_rate": "certified rate", "clean": f"{title}, no noise"}
        across |= {f"quality {kind}": f"{kind} {level:g}" for kind, level in SHOWN.items()}
        across |= {f"moved {kind}": f"moved by {kind} {level:g}" for kind, level in SHOWN.items()}
        if flat:
            texts.append(f"{task}:\n\n{table(flat, {'model': 'model'}, across)}")
    return "\n\n".join(texts)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {**row, "clean": row["quality"]["none"]["0"]}
    for kind, level in SHOWN.items():
        flat[f"quality {kind}"] = row["quality"][kind][str(level)]
        flat[f"moved {kind}"] = row["moved"][kind][str(level)]
    return flat


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw the quality of samples against the level of noise, a panel per task and noise."""
    panels = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        for kind, levels in LEVELS.items():
            lines = panels.setdefault(f"{task}, {kind} noise\n{QUALITY[task]}", {})
            for level in levels:
                flat = [
                    {"model": row["model"], "value": row["quality"][kind][str(level)]}
                    for row in rows
                    if row["task"] == task
                ]
                for (model,), found in estimates(flat, ("model",), "value").items():
                    point = (level, found.low, found.median, found.high)
                    lines.setdefault(model, []).append(point)
    file = folder / "gav-robustness.png"
    return [plots.medians(panels, file, xlabel="level of noise")]


STUDY = register(
    Study(
        name="gav-robustness",
        question=(
            "Does a contracting branch make samples more robust to noise, and does it matter how "
            "contraction is built in?"
        ),
        cells=cells,
        measure=measure,
        table=show,
        figures=draw,
        models=models,
    )
)
