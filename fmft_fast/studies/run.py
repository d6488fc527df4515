"""`fmft study`: measure what has not been measured yet, then write numbers, table and figures."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmft_fast.commands import Place
from fmft_fast.envs import make_environment
from fmft_fast.errors import ConfigError, FmftError, InputError, MissingDependencyError
from fmft_fast.info import cpu, machine_class
from fmft_fast.report import settings_key, write_json
from fmft_fast.studies.base import Settings, Study
from fmft_fast.studies.models import Models, Pretrained
from fmft_fast.tasks import find_task
from fmft_fast.tasks.robot import RobotTask, data_variable
from fmft_fast.train.checkpoint import versions
from fmft_fast.train.logging import progress_bar
from fmft_fast.workers import Job, run_jobs


@dataclass(frozen=True)
class Cell:
    """One set of settings of a study, and the file that keeps what was measured for it."""

    settings: Settings
    file: Path

    def read(self) -> dict[str, Any] | None:
        """Give the file's content, or None where nothing has been measured yet."""
        if not self.file.exists():
            return None
        content = json.loads(self.file.read_text(encoding="utf-8"))
        if content["settings"] != dict(self.settings):
            raise ConfigError(
                f"{self.file} holds other settings than its name says; delete it, then --resume"
            )
        return content

    def __str__(self) -> str:
        """Name the cell by its settings."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


def run(
    study: Study, place: Place, *, seeds: Sequence[int], workers: int = 2, quick: bool = False
) -> dict[str, Any]:
    """Measure every cell of a study that is not kept yet; then write what was found.

    Writes results.json, table.md and the figures into the folder, beside cells/ (one file each)
    and models/ (checkpoints), from which an interrupted study goes on.

    Args:
        study: what to measure.
        place: folder, whether to go on with what it holds, and whether to speak.
        seeds: different numbers; medians and intervals are taken over them.
        workers: processes, one thread each; 0 measures in this one.
        quick: smallest sizes; for tests.

    Raises:
        ConfigError: the folder holds a study and is not to be resumed, or demonstrations are needed
            and nobody said where they are.
        InputError: they cannot be read.
        MissingDependencyError: a simulator is needed and not installed.
        FmftError: cells failed; they are named with their settings, the others are kept.
        KeyboardInterrupt: stopped on request; says how to resume.
    """
    started = time.perf_counter()
    kept = place.out / "cells"
    if kept.exists() and not place.resume:
        raise ConfigError(f"{place.out} already holds a study; add --resume or name another --out")
    cells = make_cells(study, kept, seeds, quick=quick)
    left = [cell for cell in cells if cell.read() is None]
    check_needs(study, left)
    kept.mkdir(parents=True, exist_ok=True)
    models = Models(place.out / "models")
    place.say(f"{study.name}: {study.question}\n{len(cells)} cells in {place.out}")
    failed = _measure_all(study, left, models, len(cells), workers, place)
    if failed:
        count = sum(str(cell) in failed for cell in cells)
        raise FmftError(
            f"{count} of {len(cells)} cells failed:\n"
            + "\n".join(f"  {name}: {error}" for name, error in failed.items())
            + f"\nthe others are kept in {kept}; mend the cause, then go on with --resume"
        )
    measured = [cell.read() or {} for cell in cells]
    content = {
        "command": "study",
        "study": study.name,
        "question": study.question,
        "seeds": list(seeds),
        "quick": quick,
        "cells": measured,
        "versions": versions(),
        "machine": {"class": machine_class("cpu"), "model": cpu()["model"], "workers": workers},
        "seconds": round(time.perf_counter() - started, 1),
        "cell_seconds": round(sum(cell["seconds"] for cell in measured), 1),
        "cells_measured_now": len(left),
    }
    write_up(study, place, content)
    return content


def make_cells(study: Study, folder: Path, seeds: Sequence[int], *, quick: bool) -> list[Cell]:
    """Give the cells of a study, each with its file under `folder`.

    Raises:
        InputError: two cells have the same settings, or some are not plain values.
    """
    cells = []
    for settings in study.cells(seeds, quick=quick):
        if json.loads(json.dumps(settings)) != settings:
            raise InputError(
                f"expected settings that JSON keeps (numbers, texts, lists), got {settings}"
            )
        cells.append(Cell(settings, folder / f"{settings_key(settings)}.json"))
    if len({cell.file for cell in cells}) < len(cells):
        raise InputError(f"two cells of {study.name} have the same settings; drop one")
    return cells


def check_needs(study: Study, cells: Sequence[Cell]) -> None:
    """Look for demonstrations and simulator of robot tasks, before hours of training.

    Raises:
        ConfigError: nobody said where the demonstrations are.
        InputError: they cannot be read.
        MissingDependencyError: the simulator is not installed.
    """
    names = {model.task for cell in cells for model in study.models(cell.settings)}
    for task in map(find_task, sorted(names)):
        if isinstance(task, RobotTask):
            if task.data() is None:
                raise ConfigError(
                    f"data: expected the demonstrations of {task.name}, got none; write "
                    f"--data {task.name}=PATH, or set {data_variable(task.name)}"
                )
            task.demonstrations()
            make_environment(task.simulator()).close()


def rows_of(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give settings and measures of each cell of a results.json in one table row."""
    return [{**cell["settings"], **cell["measured"]} for cell in content["cells"]]


def write_up(study: Study, place: Place, content: Mapping[str, Any]) -> None:
    """Write results.json and table.md, and draw the figures."""
    rows = rows_of(content)
    shown = study.table(rows)
    seeds = ", ".join(map(str, content["seeds"]))
    text = (
        f"# {study.name}\n\n{study.question}\n\n    fmft study {study.name}\n\n"
        f"{study.summary} over seeds {seeds} with 95 % bootstrap intervals, by {len(rows)} "
        f"cells.\n\n"
        f"{shown}\n"
    )
    write_json(place.out / "results.json", content)
    (place.out / "table.md").write_text(text, encoding="utf-8")
    place.say(f"\n{shown}\n\nnumbers: {place.out / 'results.json'}, {place.out / 'table.md'}")
    try:
        files = study.figures(rows, place.out)
    except MissingDependencyError as error:
        place.say(f"no figures: {error}")
        return
    place.say(f"figures: {', '.join(str(file) for file in files)}")


def _measure_all(
    study: Study, cells: Sequence[Cell], models: Models, total: int, workers: int, place: Place
) -> dict[str, str]:
    """Make the models that are missing and measure the cells; gives {cell: what went wrong}."""
    jobs, failed = _make_jobs(study, cells, models), {}
    measured = {str(cell) for cell in cells}
    with progress_bar(total, study.name, show=not place.quiet, unit="cell") as bar:
        bar.update(total - len(cells))
        try:
            with closing(run_jobs(jobs, workers, tick=lambda: bar.update(0))) as ends:
                for ended in ends:
                    if ended.error is not None:
                        failed[ended.job.name] = ended.error
                    elif ended.job.name in measured:
                        bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; go on with: fmft study {study.name} --resume --out {place.out}"
            ) from None
    return failed


def _make_jobs(study: Study, cells: Sequence[Cell], models: Models) -> list[Job]:
    """Put models before the cells that load them, and each cell as early as it can be."""
    jobs: dict[str, Job] = {}
    for cell in cells:
        wanted = [model for model in study.models(cell.settings) if not models.made(model)]
        for model in wanted:
            jobs.setdefault(model.name, Job(model.name, _make_model, (models, model)))
        needs = tuple(model.name for model in wanted)
        jobs[str(cell)] = Job(str(cell), _measure, (study, cell, models), needs)
    return list(jobs.values())


def _make_model(models: Models, model: Pretrained) -> None:
    models.make(model)


def _measure(study: Study, cell: Cell, models: Models) -> None:
    """Measure one cell and keep it, in a worker process."""
    started = time.perf_counter()
    measured = dict(study.measure(cell.settings, models))
    clash = measured.keys() & cell.settings.keys()
    if clash:
        raise InputError(f"{', '.join(sorted(clash))} is a setting and a measure; rename one")
    try:
        json.dumps(measured, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"expected plain finite values and None for what could not be measured, got "
            f"{measured} ({error})"
        ) from error
    seconds = round(time.perf_counter() - started, 2)
    content = {"settings": dict(cell.settings), "measured": measured, "seconds": seconds}
    write_json(cell.file, content)
