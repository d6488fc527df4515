"""one-step: how much of a hundred Euler steps one step can do, by mode of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmft_fast.analysis import plots
from fmft_fast.studies.base import Rows, Settings, Study, register
from fmft_fast.studies.estimates import estimates, table
from fmft_fast.studies.models import Models, Pretrained, finetune, in_ninths
from fmft_fast.tasks import find_task

MODES = {"direct": "direct", "residual": "GAV branch", "residual-mlp": "MLP branch"}
COUPLINGS: dict[str, dict[str, Any]] = {"ot-semidiscrete": {}, "inversion": {"steps": 30}}
NONE = "pre-trained"
STEPS = (1, 10, 100)
TASKS: dict[str, dict[str, Any]] = {
    "toy-gmm": {"pretrain_steps": 2997, "finetune_steps": 500},
    "digits": {"pretrain_steps": 5994, "finetune_steps": 400},
}
MEASURES = {
    "toy-gmm": {"off_mode_share": "off-mode share", "energy_distance": "energy distance"},
    "digits": {"frechet_distance": "Fréchet distance", "energy_distance": "energy distance"},
}


def cells(seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Give each task, mode, coupling and seed; and what the pre-trained models are worth."""
    small = {"pretrain_steps": 9, "finetune_steps": 2, "measured": [1, 2]} if quick else {}
    pairs = [(mode, coupling) for coupling in COUPLINGS for mode in MODES]
    if quick:
        pairs = [("residual", "inversion")]
    return [
        {
            "task": task,
            "mode": mode,
            "coupling": coupling,
            "seed": seed,
            "measured": list(STEPS),
            **TASKS[task],
            **small,
        }
        for task in (("digits",) if quick else TASKS)
        for mode, coupling in [(NONE, "-"), *pairs]
        for seed in seeds
    ]


def models(settings: Settings) -> list[Pretrained]:
    """Give the model at the end of pre-training."""
    return [in_ninths(settings["task"], settings["seed"], settings["pretrain_steps"])]


def measure(settings: Settings, models_: Models) -> dict[str, Any]:
    """Fine-tune for one Euler step, and measure samples of one to a hundred."""
    (base,) = models(settings)
    name, seed, mode = settings["task"], settings["seed"], settings["mode"]
    field, size, findings = models_.load(base), 0, []
    if mode != NONE:
        choice = {
            "seed": seed,
            "mode": mode,
            "solver_steps": (1,),
            "steps": settings["finetune_steps"],
            "coupling": settings["coupling"],
            "coupling_options": COUPLINGS[settings["coupling"]],
        }
        result = finetune(name, field, choice)
        field, findings = result.model, [finding.name for finding in result.findings]
        size = sum(p.numel() for p in field.parameters() if p.requires_grad)
    found = find_task(name).evaluate(field, settings["measured"], seed=seed)
    kept = {key: {str(n): row[key] for n, row in found.items()} for key in MEASURES[name]}
    return {"quality": kept, "trained_parameters": size, "findings": findings}


def show(rows: Rows) -> str:
    """Give, for each task, its measures at N = 1 and 100 and the share of the gap closed."""
    texts, down = [], {"model": "model", "coupling": "coupling"}
    for task, measures in MEASURES.items():
        flat = [_flat(row, _before(rows, row)) for row in rows if row["task"] == task]
        if not flat:
            continue
        across = {"trained_parameters": "trained parameters"}
        for key, title in measures.items():
            across |= {f"{key} 1": f"{title}, N = 1", f"{key} 100": "N = 100"}
            across[f"{key} gap"] = "gap closed, %"
        texts.append(f"{task}:\n\n{table(flat, down, across)}")
    gap = "The gap is that of the pre-trained model, between its N = 1 and its N = 100."
    return "\n\n".join([*texts, gap])


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw the first measure of each task against the number of steps, a panel per coupling."""
    panels, levels = {}, {}
    for task in dict.fromkeys(row["task"] for row in rows):
        key, title = next(iter(MEASURES[task].items()))
        flat = [_flat(row, _before(rows, row)) for row in rows if row["task"] == task]
        for coupling in dict.fromkeys(r["coupling"] for r in flat if r["coupling"] != "-"):
            name = f"{task}, {coupling}\n{title}"
            shown = [row for row in flat if row["coupling"] in ("-", coupling)]
            panels[name] = _lines(shown, key)
            most = max(shown[0]["measured"])
            best = estimates(shown, ("mode",), f"{key} {most}")[(NONE,)]
            levels[name] = {f"pre-trained, N = {most}": best.median}
    file = folder / "one-step.png"
    return [plots.medians(panels, file, xlabel="Euler steps N", levels=levels, columns=2)]


def _lines(rows: Rows, key: str) -> dict[str, list[tuple[float, float, float, float]]]:
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for n in rows[0]["measured"]:
        for (model,), found in estimates(rows, ("model",), f"{key} {n}").items():
            lines.setdefault(model, []).append((n, found.low, found.median, found.high))
    return lines


def _before(rows: Rows, row: Settings) -> Settings:
    """Find the row of the pre-trained model that another one started from."""
    same = ("task", "seed", "pretrain_steps")
    return next(r for r in rows if r["mode"] == NONE and all(r[name] == row[name] for name in same))


def _flat(row: Settings, before: Settings) -> dict[str, Any]:
    """Spread a row's measures into columns, with the share of the gap that was closed."""
    name = MODES.get(row["mode"], row["mode"])
    flat = {**row, "model": name if row["mode"] == NONE else f"fine-tuned, {name}"}
    for key, by_steps in row["quality"].items():
        flat |= {f"{key} {n}": value for n, value in by_steps.items()}
        first, *_, last = before["quality"][key].values()
        if row["mode"] != NONE:
            flat[f"{key} gap"] = 100 * (first - by_steps["1"]) / (first - last)
    return flat


STUDY = register(
    Study(
        name="one-step",
        question=(
            "How near does one Euler step come to a hundred, with each mode of fine-tuning and "
            "each coupling?"
        ),
        cells=cells,
        measure=measure,
        table=show,
        figures=draw,
        models=models,
    )
)
