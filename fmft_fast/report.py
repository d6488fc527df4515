"""Results for people: tables of measures against the number of steps, and files with all of it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmft_fast.tasks.base import HIGH, LOW

Results = Mapping[int, Mapping[str, float]]


def results_table(runs: Mapping[str, Results], floor: Mapping[str, float] | None = None) -> str:
    """Give a Markdown table: one row per measure and run, one column per number of steps.

    Where a measure comes with the ends of an interval, they stand behind it in brackets.

    Args:
        runs: {"before": {steps: {measure: value}}, ...}, all with the same steps and measures.
        floor: what real data score against real data.

    Example:
        >>> print(results_table({"before": {1: {"error": 0.5}, 2: {"error": 0.25}}}))
        | measure | model  | N = 1 | N = 2 |
        |---------|--------|-------|-------|
        | error   | before | 0.5   | 0.25  |
    """
    first = next(iter(runs.values()))
    steps = list(first)
    header = ["measure", "model", *(f"N = {n}" for n in steps)]
    if floor:
        header.append("real data")
    rows = []
    for measure in (name for name in first[steps[0]] if not name.endswith((LOW, HIGH))):
        for i, (name, results) in enumerate(runs.items()):
            row = [measure if i == 0 else "", name]
            row += [_with_interval(results[n], measure) for n in steps]
            if floor:
                row.append(number(floor[measure]) if i == 0 and measure in floor else "")
            rows.append(row)
    return markdown([header, *rows])


def _with_interval(row: Mapping[str, float], measure: str) -> str:
    shown = number(row[measure])
    if measure + LOW not in row:
        return shown
    return f"{shown} [{number(row[measure + LOW])}, {number(row[measure + HIGH])}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows (the first is the header) as an aligned Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def number(value: float) -> str:
    """Show a number with three figures, or more where it is larger than they can tell."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def median_results(runs: Sequence[Results]) -> dict[int, dict[str, float]]:
    """Give the median over runs of every number."""
    return {
        n: {
            measure: statistics.median(float(run[n][measure]) for run in runs)
            for measure in runs[0][n]
        }
        for n in runs[0]
    }


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write JSON in one move, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def read_results(table: Mapping[str, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Undo what JSON does to the numbers of steps: keys are numbers again."""
    return {int(n): dict(measures) for n, measures in table.items()}


def settings_key(settings: Mapping[str, Any]) -> str:
    """Give a file's name for settings: the values to read, a digest to tell all apart.

    Example:
        >>> settings_key({"task": "toy-gmm", "seed": 0})
        'toy-gmm-0-eff2fbf1967e'
    """
    text = json.dumps(settings, sort_keys=True)
    words = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(str(value) for value in settings.values()))
    return f"{words[:60].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
