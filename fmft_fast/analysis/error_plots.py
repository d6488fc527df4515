"""Figures of errors, of the bounds on them, and of slopes, from what `bounds` and `curvature` give.

Lines are medians over samples, bands the middle half of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmft_fast.analysis.bounds import ErrorBound, Kind
from fmft_fast.analysis.curvature import Stiffness
from fmft_fast.analysis.plots import _figure, _save, _title, medians

Bounds = Mapping[str, Mapping[int, ErrorBound]]
Number = Callable[[ErrorBound], Tensor]
SHORT: dict[Kind, str] = {
    "one_sided": "one-sided bound",
    "lipschitz": "bound by steps",
    "theorem": "Theorem 3.1",
}


def bounds_against_steps(found: Bounds, file: str | Path) -> Path:
    """Draw the measured error and the three bounds against the number of Euler steps.

    Args:
        found: {field: {steps: bound}}; a panel for each field.
        file: PNG to write; its folder is made.
    """
    lines: dict[str, Number] = {"measured": lambda b: b.error}
    for kind, label in SHORT.items():
        lines[label] = lambda b, kind=kind: b.bound(kind)
    return medians(_panels(found, lines), file, xlabel="Euler steps N")


def decomposition(found: Bounds, file: str | Path) -> Path:
    """Draw the two parts of the measured error, and of its sharpest bound, against steps.

    Args:
        found: {field: {steps: bound}}; two panels for each field.
        file: PNG to write; its folder is made.
    """
    measured: dict[str, Number] = {
        "of the field": lambda b: b.field_error,
        "of the steps": lambda b: b.step_error,
        "both": lambda b: b.error,
    }
    bounded: dict[str, Number] = {
        "of the field": lambda b: b.field_term("one_sided"),
        "of the steps": lambda b: b.step_term("one_sided"),
        "both": lambda b: b.bound("one_sided"),
    }
    panels = {}
    for name, by_steps in found.items():
        for what, lines in (("measured", measured), ("one-sided bound", bounded)):
            panels |= _panels({f"{name}: {what}": by_steps}, lines)
    return medians(panels, file, xlabel="Euler steps N", columns=2)


def slopes_against_time(found: Mapping[str, Stiffness], file: str | Path) -> Path:
    """Draw the Lipschitz and the one-sided constant along the fields' own trajectories.

    Args:
        found: {field: stiffness}; a line for each field.
        file: PNG to write; its folder is made.
    """
    panels = {
        title: {
            name: [
                (t, *_quartiles(row)) for t, row in zip(s.t.tolist(), getattr(s, key), strict=True)
            ][:: max(1, len(s.t) // 25)]
            for name, s in found.items()
        }
        for title, key in (
            ("Lipschitz constant on the way", "lipschitz"),
            ("one-sided Lipschitz constant on the way", "one_sided"),
        )
    }
    return medians(panels, file, xlabel="flow time t", log_x=False)


def noise_maps(
    maps: Mapping[str, Mapping[str, Tensor]],
    extent: float,
    file: str | Path,
    *,
    signed: tuple[str, ...] = (),
) -> Path:
    """Draw numbers over the noise plane: a row for each field, a column for each number.

    Args:
        maps: {field: {title: values [g, g]}}; entry [i, j] belongs to x0 = (grid_j, grid_i) with
            grid = linspace(-extent, extent, g). A column has one scale of colours.
        extent: half width of the plane.
        file: PNG to write; its folder is made.
        signed: titles of numbers of both signs; the others are positive and get logarithms.
    """
    from matplotlib.colors import LogNorm, TwoSlopeNorm

    titles = list(next(iter(maps.values())))
    figure = _figure(3.9 * len(titles), 3.3 * len(maps) + 0.3)
    axes = figure.subplots(len(maps), len(titles), sharex=True, sharey=True, squeeze=False)
    for j, title in enumerate(titles):
        values = torch.stack([row[title] for row in maps.values()]).double()
        low, high = (
            float(q) for q in values.flatten().quantile(torch.tensor([0.01, 0.995]).double())
        )
        if title in signed:
            size = max(abs(low), abs(high), 1e-12)
            norm, colours = TwoSlopeNorm(0, -size, size), "RdBu_r"
        else:
            tiny = 1e-12
            norm, colours = LogNorm(max(low, tiny), max(high, 2 * tiny)), "magma"
        for i, name in enumerate(maps):
            image = axes[i][j].imshow(
                maps[name][title].cpu().numpy(),
                origin="lower",
                extent=(-extent, extent, -extent, extent),
                cmap=colours,
                norm=norm,
                interpolation="nearest",
            )
            _title(axes[i][j], f"{name}: {title}")
        figure.colorbar(image, ax=list(axes[:, j]), shrink=0.8, extend="both")
    for axis in axes[-1]:
        axis.set_xlabel("$x_1$ of the noise $x_0$")
    for row in axes:
        row[0].set_ylabel("$x_2$ of the noise $x_0$")
    return _save(figure, file)


def _panels(found: Bounds, lines: Mapping[str, Number]) -> dict[str, Any]:
    """Give {field: {label: quartiles against steps}}."""
    return {
        name: {
            label: [(n, *_quartiles(number(b))) for n, b in by_steps.items()]
            for label, number in lines.items()
        }
        for name, by_steps in found.items()
    }


def _quartiles(values: Tensor) -> tuple[float, float, float]:
    """Give the quartiles of numbers [batch]."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=values.device)
    low, middle, high = values.double().quantile(at).tolist()
    return low, middle, high
