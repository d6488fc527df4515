"""Figures from tensors, written as PNG files; matplotlib is needed only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmft_fast.errors import InputError, MissingDependencyError

BEFORE, AFTER, FLOOR, INK = "#c44e52", "#2a6f97", "#8a8a8a", "#333333"
COLOURS = {"before": BEFORE, "after": AFTER}
# Okabe and Ito's colours, which colour-blind readers can tell apart, and markers that differ too.
SERIES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#000000", "X"),
)
HELDOUT = {
    "pre-training": "held-out loss",
    "fine-tuning": "held-out mean distance\n$|\\phi(x_0) - x_1|\\,/\\sqrt{dim}$",
}


def trajectories(
    paths: Mapping[str, Mapping[int, Tensor]], centres: Tensor, radius: float, file: str | Path
) -> Path:
    """Draw solves in the plane: a row for each field, a column for each number of steps.

    Args:
        paths: {field: {steps: states [steps + 1, n, 2]}}.
        centres: of the modes, [modes, 2].
        radius: beyond it from every centre an end point counts as off the modes (in red); drawn
            as a circle around each centre.
        file: PNG to write; its folder is made.

    Returns:
        The file.
    """
    columns = list(next(iter(paths.values())))
    figure = _figure(3.4 * len(columns), 3.4 * len(paths) + 0.5)
    axes = figure.subplots(len(paths), len(columns), sharex=True, sharey=True, squeeze=False)
    for row, (name, by_steps) in zip(axes, paths.items(), strict=True):
        for axis, steps in zip(row, columns, strict=True):
            _draw_paths(axis, by_steps[steps], centres, radius)
            _title(axis, f"{name}, N = {steps}")
        row[0].set_ylabel("$x_2$")
    for axis in axes[-1]:
        axis.set_xlabel("$x_1$")
    _legend_below(figure, axes[0][0], columns=3)
    return _save(figure, file)


def error_map(
    errors: Mapping[str, Mapping[int, Tensor]],
    modes: Mapping[str, Mapping[int, Tensor]],
    extent: float,
    file: str | Path,
    *,
    limit: float = 3.0,
    unit: str = "sigma",
) -> Path:
    """Draw, over the noise plane, how far each end point is from its mode.

    Args:
        errors: {field: {steps: distance to the nearest centre [g, g]}}; entry [i, j] belongs to
            x0 = (grid_j, grid_i) with grid = linspace(-extent, extent, g).
        modes: the same for the index of the nearest centre; its jumps are the mode boundaries.
        extent: half width of the plane.
        file: PNG to write; its folder is made.
        limit: distance from which a point counts as off the modes.
        unit: unit of the distances.

    Returns:
        The file.
    """
    columns = list(next(iter(errors.values())))
    figure = _figure(3.5 * len(columns) + 1.0, 3.5 * len(errors) + 0.4)
    axes = figure.subplots(len(errors), len(columns), sharex=True, sharey=True, squeeze=False)
    for row, name in zip(axes, errors, strict=True):
        for axis, steps in zip(row, columns, strict=True):
            error = errors[name][steps]
            axis.imshow(
                error.cpu().numpy(),
                origin="lower",
                extent=(-extent, extent, -extent, extent),
                cmap="magma",
                vmin=0,
                vmax=4 * limit,
                interpolation="nearest",
            )
            _draw_boundaries(axis, modes[name][steps], extent)
            share = _gaussian_share(error > limit, extent)
            _title(axis, f"{name}, N = {steps}: {share:.1%} of the noise off")
        row[0].set_ylabel("$x_2$ of the noise $x_0$")
    for axis in axes[-1]:
        axis.set_xlabel("$x_1$ of the noise $x_0$")
    bar = figure.colorbar(axes[0][0].images[0], ax=axes, shrink=0.8, extend="max")
    bar.set_label(f"distance of the end point from the nearest centre [{unit}]")
    bar.ax.axhline(limit, color="white", linewidth=1.5)
    _legend_below(figure, axes[0][0], columns=1)
    return _save(figure, file)


def quality(
    results: Mapping[str, Mapping[int, Mapping[str, float]]],
    floor: Mapping[str, float],
    file: str | Path,
    *,
    titles: Mapping[str, str],
) -> Path:
    """Draw each measure against the number of Euler steps, with what real data would score.

    Args:
        results: {field: {steps: {measure: value}}}.
        floor: {measure: its value for data against data}.
        file: PNG to write; its folder is made.
        titles: measures to draw, in order, with their names.

    Returns:
        The file.
    """
    width = min(3, len(titles))
    height = -(-len(titles) // width)
    figure = _figure(3.5 * width, 2.9 * height + 0.5)
    axes = figure.subplots(height, width, squeeze=False).flatten()
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        lowest = floor.get(key)
        for name, by_steps in results.items():
            axis.plot(
                list(by_steps),
                [row[key] for row in by_steps.values()],
                "o-",
                color=COLOURS.get(name, INK),
                label=f"{name} fine-tuning",
                markersize=5,
            )
        if lowest is not None:
            axis.axhline(lowest, color=FLOOR, linestyle="--", label="data against data")
        steps = list(next(iter(results.values())))
        axis.set_xscale("log")
        axis.set_xticks(steps, [str(n) for n in steps])
        axis.minorticks_off()
        _set_value_scale(axis, [row[key] for by in results.values() for row in by.values()], lowest)
        axis.set_xlabel("Euler steps N")
        axis.grid(alpha=0.25)
        _title(axis, title)
    for axis in axes[len(titles) :]:
        axis.remove()
    _legend_below(figure, axes[0], columns=3)
    return _save(figure, file)


def training_curves(history: Mapping[str, Sequence[Mapping[str, Any]]], file: str | Path) -> Path:
    """Draw training loss and held-out measure of each run from the lines of its metrics.jsonl.

    The two have panels of their own: fine-tuning measures its held-out rows by another number
    than its loss.

    Args:
        history: {run: records with "kind" ("train" | "eval" | "event"), "step" and numbers}.
        file: PNG to write; its folder is made.

    Returns:
        The file.
    """
    figure = _figure(4.6 * len(history), 5.0)
    axes = figure.subplots(2, len(history), squeeze=False, sharex="col")
    for (above, below), (run, records) in zip(axes.T, history.items(), strict=True):
        _draw_curve(above, records, "train", "loss", color=FLOOR, linewidth=1.2)
        above.set_ylabel("training loss")
        _draw_curve(below, records, "eval", "heldout", color=AFTER, marker="o", markersize=4)
        below.set_ylabel(HELDOUT.get(run, "held-out measure"))
        below.set_xlabel("step")
        _title(above, run)
    return _save(figure, file)


def medians(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    file: str | Path,
    *,
    xlabel: str,
    levels: Mapping[str, Mapping[str, float]] | None = None,
    log_x: bool = True,
    log_y: bool = True,
    columns: int = 3,
) -> Path:
    """Draw medians with their intervals against a setting: a panel per measure, a line per label.

    Args:
        panels: {title: {label: [(x, low, median, high), ...]}}; a label keeps its colour and
            marker in all panels.
        file: PNG to write; its folder is made.
        xlabel: name of x.
        levels: {title: {label: value}} of dashed lines to compare with, such as real data; their
            labels stand at the lines.
        log_x: whether x has a logarithmic scale (x > 0).
        log_y: whether positive values over a wide range have one; False for scores, shares and
            counts, whose differences matter.
        columns: panels side by side.

    Returns:
        The file.
    """
    width = min(columns, len(panels))
    height = -(-len(panels) // width)
    figure = _figure(3.8 * width, 3.0 * height)
    axes = figure.subplots(height, width, squeeze=False).flatten()
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    # A second round of the colours is dashed, its markers hollow.
    rounds = [(*series, dashed) for dashed in (False, True) for series in SERIES]
    styles = dict(zip(labels, rounds, strict=False))
    if len(styles) < len(labels):
        raise InputError(f"expected at most {len(rounds)} lines, got {len(labels)}; draw fewer")
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for label, points in lines.items():
            _draw_medians(axis, points, label, *styles[label])
        level = (levels or {}).get(title, {})
        for label, value in level.items():
            axis.axhline(value, color=FLOOR, linestyle="--", linewidth=1.2)
            axis.annotate(
                label,
                (0, value),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(3, -2),
                va="top",
                fontsize=8,
                color=INK,
            )
        if log_x:
            axis.set_xscale("log")
        _tick_at(axis, sorted({point[0] for points in lines.values() for point in points}))
        seen = [value for points in lines.values() for point in points for value in point[1:]]
        _set_value_scale(axis, [*seen, *level.values()], None, log=log_y)
        _label_logarithms(axis.yaxis)
        axis.set_xlabel(xlabel)
        axis.grid(alpha=0.25)
        _title(axis, title)
    for axis in axes[len(panels) :]:
        axis.remove()
    fullest = max(axes[: len(panels)], key=lambda axis: len(axis.get_lines()))
    # Of the font's size a letter is about 0.08 inches wide, a line and its gaps 0.7.
    entry = 0.7 + 0.08 * max(map(len, labels))
    beside = max(1, int(figure.get_figwidth() / entry))
    figure.set_figheight(3.0 * height + 0.3 + 0.22 * -(-len(labels) // beside))
    _legend_below(figure, fullest, columns=beside)
    return _save(figure, file)


def image_grid(
    rows: Mapping[str, Tensor], file: str | Path, *, low: float = -1.0, high: float = 1.0
) -> Path:
    """Draw small grey images, one labelled row of them for each entry.

    Args:
        rows: {label: images [n, height, width]}, ink bright.
        file: PNG to write; its folder is made.
        low: value drawn white.
        high: value drawn black.

    Returns:
        The file.
    """
    count = max(len(images) for images in rows.values())
    figure = _figure(0.55 * count + 2.2, 0.6 * len(rows) + 0.1)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.cpu().numpy(), cmap="gray_r", vmin=low, vmax=high)
        line[0].text(
            -0.25, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=10
        )
    return _save(figure, file)


def _draw_curve(
    axis, records: Sequence[Mapping[str, Any]], kind: str, key: str, **style: Any
) -> None:
    """Draw one number of the records of one kind over their steps."""
    rows = [r for r in records if r.get("kind") == kind and r.get(key) is not None]
    axis.plot([r["step"] for r in rows], [r[key] for r in rows], **style)
    axis.set_yscale("log")
    axis.grid(alpha=0.25, which="both")


def _draw_medians(
    axis,
    points: Sequence[tuple[float, ...]],
    label: str,
    colour: str,
    marker: str,
    dashed: bool,
) -> None:
    x, low, middle, high = zip(*points, strict=True)
    style = {"linestyle": "--", "markerfacecolor": "white"} if dashed else {}
    axis.plot(
        x, middle, color=colour, marker=marker, markersize=5, linewidth=1.4, label=label, **style
    )
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _tick_at(axis, places: Sequence[float], *, most: int = 7) -> None:
    """Put ticks at the places themselves where there are few of them."""
    if len(places) <= most:
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.xaxis.minorticks_off()
    else:
        _label_logarithms(axis.xaxis)


def _label_logarithms(side) -> None:
    """Write 0.2 for 2 x 10^-1, and label 1, 2 and 5 where a logarithmic axis spans few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if side.get_scale() == "log":
        low, high = side.get_view_interval()
        side.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        side.set_major_formatter(lambda value, _: f"{value:g}")
        side.set_minor_formatter(NullFormatter())


def _draw_paths(axis, states: Tensor, centres: Tensor, radius: float) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    end = states[-1]
    off = (torch.cdist(end, centres).amin(1) > radius).cpu().numpy()
    lines = states.transpose(0, 1).cpu().numpy()
    for chosen, colour, alpha in ((~off, AFTER, 0.28), (off, BEFORE, 0.55)):
        axis.add_collection(LineCollection(list(lines[chosen]), colors=colour, alpha=alpha, lw=0.6))
    start, end = states[0].cpu().numpy(), end.cpu().numpy()
    axis.scatter(*start.T, s=2.5, color=FLOOR, label="noise $x_0$", zorder=2, linewidths=0)
    axis.scatter(*end[~off].T, s=6, color=AFTER, label="end on a mode", zorder=3, linewidths=0)
    axis.scatter(*end[off].T, s=9, color=BEFORE, label="end off the modes", zorder=4, linewidths=0)
    for centre in centres.tolist():
        axis.add_patch(Circle(centre, radius, fill=False, color=INK, lw=0.9, zorder=5))
    axis.set_aspect("equal")
    axis.set_xlim(-3.2, 3.2)
    axis.set_ylim(-3.2, 3.2)


def _draw_boundaries(axis, mode: Tensor, extent: float, *, gap: float = 0.25) -> None:
    """Put a dot, every `gap` along the axes, where the nearest centre changes."""
    across, along = (mode[:, 1:] != mode[:, :-1]), (mode[1:] != mode[:-1])
    grid = torch.linspace(-extent, extent, len(mode))
    every = max(1, round(gap / float(grid[1] - grid[0])))
    i, j = across[::every].cpu().nonzero(as_tuple=True)
    k, m = along[:, ::every].cpu().nonzero(as_tuple=True)
    x = torch.cat([(grid[j] + grid[j + 1]) / 2, grid[m * every]])
    y = torch.cat([grid[i * every], (grid[k] + grid[k + 1]) / 2])
    axis.scatter(x, y, s=3, color="#5fe0ff", linewidths=0, label="mode boundary")


def _gaussian_share(region: Tensor, extent: float) -> float:
    """Give the standard normal mass of a region of the grid, relative to the grid's."""
    weight = torch.exp(-torch.linspace(-extent, extent, len(region)).square() / 2)
    mass = weight[:, None] * weight
    return float((mass * region.cpu()).sum() / mass.sum())


def _set_value_scale(
    axis, values: Sequence[float], floor: float | None, *, log: bool = True
) -> None:
    """Choose a logarithmic scale over a wide range, if allowed; below the floor it is linear."""
    smallest, largest = min(values), max(values)
    if floor is not None and floor > 0 and smallest < floor / 3:
        axis.set_yscale("symlog", linthresh=floor)
    elif log and smallest > 0 and largest / smallest > 5:
        axis.set_yscale("log")
    else:
        top = 1.08 * max(largest, floor or 0)
        axis.set_ylim((0, top or 1.0) if smallest >= 0 else None)


def _legend_below(figure, axis, *, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False
    )
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([25])


def _title(axis, text: str) -> None:
    axis.set_title(text, fontsize=10, color=INK)


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "figures need matplotlib: pip install 'fmft-fast[train]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _save(figure, file: str | Path) -> Path:
    file = Path(file)
    if file.suffix != ".png":
        raise InputError(f"expected a .png file, got {file.name!r}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return file
