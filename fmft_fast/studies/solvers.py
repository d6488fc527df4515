"""solvers: which method makes the best of a number of field evaluations, and to train through."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.analysis import metrics, plots
from fmft_fast.solvers import record_stats, solve
from fmft_fast.studies.base import Rows, Settings, Study, register
from fmft_fast.studies.estimates import estimates, table
from fmft_fast.studies.models import Models, Pretrained, finetune, in_ninths
from fmft_fast.tasks.toy_gmm import SIGMA, TASK

# What one solve is given: numbers of steps, or tolerances where these steer the steps.
SAMPLERS: dict[str, Sequence[float]] = {
    "euler": (3, 6, 12, 24, 50, 100),
    "midpoint": (3, 6, 12, 25, 50),
    "rk4": (1, 3, 6, 12, 25),
    "dopri5": (1, 2, 4, 8, 16),
    "dopri5, adaptive": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    "implicit_midpoint": (1, 2, 4, 8, 16),
    "bdf2": (1, 4, 8, 16, 24),
}
# 24 evaluations each; an implicit method takes what its iteration needs. With fewer steps than 4
# that is many iterations, and the gradient through them overflows.
TRAINED = {"euler": 24, "midpoint": 12, "rk4": 6, "dopri5": 4, "implicit_midpoint": 4, "bdf2": 4}
NONE = "pre-trained"
BUDGETS = (12, 25, 50, 100)
SHOWN = {
    "off": "off-mode share",
    "width": "width of the modes",
    "energy": "energy distance",
    "error": "distance from an accurate solve",
}


def cells(seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Give the pre-trained model, and the one fine-tuned through each method, for each seed."""
    sizes = {"pretrain_steps": 2997, "finetune_steps": 200, "samples": 2000, "reference": 256}
    if quick:
        sizes = {"pretrain_steps": 9, "finetune_steps": 2, "samples": 32, "reference": 8}
    return [
        {"trained": trained, "steps": steps, "seed": seed, **sizes}
        for trained, steps in {NONE: 0, **TRAINED}.items()
        if not quick or trained in (NONE, "euler")
        for seed in seeds
    ]


def models(settings: Settings) -> list[Pretrained]:
    """Give the model at the end of pre-training."""
    return [in_ninths(TASK.name, settings["seed"], settings["pretrain_steps"])]


def measure(settings: Settings, models_: Models) -> dict[str, Any]:
    """Fine-tune through the method, then sample with each solver at several costs."""
    (base,) = models(settings)
    field, trained, seed = models_.load(base), settings["trained"], settings["seed"]
    x0 = torch.randn(settings["samples"], 2, generator=torch.Generator().manual_seed(seed))
    used = None
    if trained != NONE:
        choice = {
            "seed": seed,
            "method": trained,
            "solver_steps": (settings["steps"],),
            "steps": settings["finetune_steps"],
            "lr": 4e-3,
        }
        field = finetune(TASK.name, field, choice).model
        used = _solve(field, x0[:256], trained, settings["steps"])[1]
    # The others are compared with Euler and with the method that they were trained through.
    every = trained in (NONE, "euler")
    solvers = [name for name in SAMPLERS if every or name in ("euler", trained)]
    reference = solve(field, x0, method="rk4", steps=settings["reference"], gradient="none").y
    curves = {
        name: [_sample(field, x0, reference, name, n) for n in SAMPLERS[name]] for name in solvers
    }
    return {"training_evaluations": used, "curves": curves}


def _sample(
    field: nn.Module, x0: Tensor, reference: Tensor, solver: str, n: float
) -> dict[str, Any]:
    """Solve once; give cost, quality, and the distance from an accurate solve.

    The width is the median distance from the nearest centre in units of the data's: a mode that
    has shrunk to its centre has no samples off it, and width 0.
    """
    phi, evaluations, converged = _solve(field, x0, solver, n)
    radius = torch.cdist(phi, TASK.centres).amin(1)
    return {
        "given": n,
        "evaluations": evaluations,
        "converged": converged,
        "off": metrics.off_mode_share(phi, TASK.centres, SIGMA),
        "energy": metrics.energy_distance(phi, TASK.draw(2 * len(phi), 1, balanced=True)),
        "width": float(radius.median()) / (SIGMA * math.sqrt(2 * math.log(2))),
        "error": metrics.reconstruction_rms(phi, reference),
    }


def _solve(field: nn.Module, x0: Tensor, solver: str, n: float) -> tuple[Tensor, int, bool]:
    """Give end points, evaluations, and whether every implicit equation was solved."""
    method, adaptive = solver.removesuffix(", adaptive"), solver.endswith("adaptive")
    how: dict[str, Any] = {"rtol": n, "atol": n} if adaptive else {"steps": int(n)}
    with warnings.catch_warnings(record=True) as caught, record_stats() as log:
        warnings.simplefilter("always")
        phi = solve(field, x0, method=method, gradient="none", **how).y
    converged = not any("did not converge" in str(warning.message) for warning in caught)
    return phi, log[-1].evaluations, converged


def within(curve: Sequence[Settings], budget: int, key: str) -> float | None:
    """Give a number of the dearest solve that the budget of evaluations affords, if any does.

    Example:
        >>> curve = [{"evaluations": e, "off": 1 / e} for e in (10, 20, 50)]
        >>> within(curve, 25, "off"), within(curve, 5, "off")
        (0.05, None)
    """
    # Of two tolerances that lead to the same number the later, tighter one counts.
    afforded = [point for point in reversed(curve) if point["evaluations"] <= budget]
    return max(afforded, key=lambda point: point["evaluations"])[key] if afforded else None


def show(rows: Rows) -> str:
    """Give samples at equal cost; then what training through each method leads to."""
    sampled, trained = [], []
    for row in rows:
        common = {"model": _model(row["trained"]), "seed": row["seed"]}
        if row["trained"] in (NONE, "euler"):
            for solver, curve in row["curves"].items():
                found = {f"{key}{b}": within(curve, b, key) for key in SHOWN for b in BUDGETS}
                sampled.append({**common, "solver": _spell(solver), **found})
        if row["trained"] != NONE:
            own = next(p for p in _own(row) if p["given"] == row["steps"])
            euler = row["curves"]["euler"]
            found = {"euler12": within(euler, 12, "off"), "euler100": within(euler, 100, "off")}
            own = {"own": own["off"], "own width": own["width"]}
            trained.append({**common, **row, **own, **found})
    down = {"model": "model", "solver": "solver"}
    across = {f"off{b}": f"off, {b}" for b in BUDGETS}
    across |= {f"{key}25": f"{key}, 25" for key in ("width", "energy", "error")}
    through = {
        "training_evaluations": "evaluations",
        "own": "off, same solve",
        "own width": "width, same solve",
        "euler12": "off, Euler 12",
        "euler100": "off, Euler 100",
    }
    return (
        "Sampling: the dearest solve with at most so many field evaluations as the head says (-: "
        "none). Off is the share of samples off the modes; width that of the modes (1 is the "
        "data's); energy the energy distance; error the root mean square distance from "
        f"{rows[0]['reference']} steps of RK4.\n\n"
        + table(sampled, down, across)
        + "\n\nFine-tuning through each method, with so many steps and evaluations of a solve; "
        "samples by the same solve and by Euler's:\n\n"
        + table(trained, {"model": "model", "steps": "steps"}, through)
    )


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw quality and error against cost: pre-trained, trained through Euler, or by itself."""
    files = []
    for name, keys in {"quality": ("off", "width"), "error": ("error",)}.items():
        panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
        for key in keys:
            for chosen in (NONE, "euler"):
                curves = [r["curves"] for r in rows if r["trained"] == chosen]
                panels[f"{SHOWN[key]}\n{_model(chosen)}"] = _lines(curves, key)
            curves = [{r["trained"]: _own(r)} for r in rows if r["trained"] != NONE]
            panels[f"{SHOWN[key]}\nfine-tuned through the solver itself"] = _lines(curves, key)
        file = folder / f"solvers-{name}.png"
        files.append(plots.medians(panels, file, xlabel="field evaluations of a solve"))
    return files


def _own(row: Settings) -> list[dict[str, Any]]:
    """Give the curve of the solver that a model was trained through."""
    return row["curves"][row["trained"]]


def _lines(curves: Sequence[Settings], key: str) -> dict[str, list[Any]]:
    """Give medians over seeds at the median cost: it differs between seeds if steps adapt."""
    flat = [
        {"solver": _spell(solver), **point}
        for by_solver in curves
        for solver, points in by_solver.items()
        for point in points
    ]
    cost = estimates(flat, ("solver", "given"), "evaluations")
    lines: dict[str, list[Any]] = {}
    for (solver, given), found in estimates(flat, ("solver", "given"), key).items():
        point = (cost[solver, given].median, found.low, found.median, found.high)
        lines.setdefault(solver, []).append(point)
    return lines


def _model(trained: str) -> str:
    return NONE if trained == NONE else f"fine-tuned through {_spell(trained)}"


def _spell(solver: str) -> str:
    special = {"euler": "Euler", "rk4": "RK4", "bdf2": "BDF2"}
    return special.get(solver, solver.replace("_", " "))


STUDY = register(
    Study(
        name="solvers",
        question=(
            "At equal numbers of field evaluations, which solver gives the best samples of a "
            "pre-trained and of a fine-tuned model, and which is best to fine-tune through?"
        ),
        cells=cells,
        measure=measure,
        table=show,
        figures=draw,
        models=models,
    )
)
