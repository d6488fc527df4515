"""What a study is, and the registry of studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fmft_fast.errors import InputError
from fmft_fast.studies.models import Models, Pretrained

Settings = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


class Cells(Protocol):
    """Gives the settings of every cell."""

    def __call__(self, seeds: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
        """Give them for these seeds, at the smallest sizes if quick."""
        ...


def _no_models(settings: Settings) -> Sequence[Pretrained]:
    return ()


@dataclass(frozen=True)
class Study:
    """A question, the cells that are measured for it, and what is shown of them.

    A cell is a set of plain settings, every size and the seed among them, and `measure` is a
    function of nothing else: what was measured is kept under the settings and not measured again.
    The functions stand at the top of a module, since worker processes import them.

    Attributes:
        name: as typed after `fmft study`.
        question: one sentence.
        cells: `cells(seeds, quick=...)` gives the settings of every cell, no two the same; quick
            means the smallest sizes that still run every line.
        measure: `measure(settings, models)` gives plain values under names that no setting has;
            None stands for what could not be measured, such as the error of a solve that blew up.
        table: `table(rows)` gives Markdown; a row is the settings and measures of one cell.
        figures: `figures(rows, folder)` draws PNG files into the folder and gives them.
        models: `models(settings)` gives the pre-trained models that a cell loads.
        summary: what the table shows of several seeds.

    Example:
        >>> find_study("checkpoint-timing").question[:8]
        'At which'
    """

    name: str
    question: str
    cells: Cells
    measure: Callable[[Settings, Models], Mapping[str, Any]]
    table: Callable[[Rows], str]
    figures: Callable[[Rows, Path], list[Path]]
    models: Callable[[Settings], Sequence[Pretrained]] = _no_models
    summary: str = "Medians"


STUDIES: dict[str, Study] = {}


def register(study: Study) -> Study:
    """Make a study known under its name.

    Raises:
        InputError: another study has that name.
    """
    if study.name in STUDIES:
        raise InputError(
            f"a study called {study.name!r} is registered already; choose another name"
        )
    STUDIES[study.name] = study
    return study


def find_study(name: str) -> Study:
    """Give the study of that name.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    if name not in STUDIES:
        raise InputError(f"unknown study {name!r}; choose one of {', '.join(sorted(STUDIES))}")
    return STUDIES[name]
