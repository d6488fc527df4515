"""The results as pictures (PNG)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cases import CASES, OPERATIONS
from .peers import BASELINE, PEERS
from .results import Report

TICKS = (0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
OURS, JAX, OTHERS = "#c44e52", "#dd8d29", "#2a6f97"
COLOURS = ("#2a6f97", "#8a8a8a", "#5b9a68", "#8c6bb1", "#dd8d29", "#c44e52", "#7b241c")


def speedups(report: Report, file: Path, threads: int = 1) -> None:
    """Bars: how many times faster than torchdiffeq.odeint, a panel per case and operation."""
    panels = [
        (case, operation)
        for case in CASES
        for operation in OPERATIONS
        if any(_gain(report, case, operation, peer, threads) for peer in PEERS)
    ]
    if not panels:
        return
    figure, axes = _grid(len(panels), columns=4)
    for axis, (case, operation) in zip(axes, panels, strict=False):
        gains = {
            peer: gain
            for peer in reversed(PEERS)
            if peer != BASELINE and (gain := _gain(report, case, operation, peer, threads))
        }
        for peer, gain in gains.items():
            # From 1 to the gain: to the left is slower, to the right is faster.
            axis.barh(peer, gain - 1, left=1, color=_colour(peer))
            axis.annotate(
                f"{gain:.2g}",
                (gain, peer),
                (3 if gain >= 1 else -3, 0),
                textcoords="offset points",
                ha="left" if gain >= 1 else "right",
                va="center",
                fontsize=7,
            )
        axis.axvline(1, color="#333333", linewidth=0.8)
        axis.set_xscale("log")
        low, high = min(gains.values(), default=1), max(gains.values(), default=1)
        axis.set_xlim(min(0.25, low / 3), max(4.0, high * 2))
        axis.set_title(f"{case}, {operation}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.minorticks_off()
        axis.set_xticks(ticks := [t for t in TICKS if _within(axis, t)])
        axis.set_xticklabels([f"{t:g}" for t in ticks])
    figure.suptitle(
        f"Times faster than {BASELINE} ({report.machine['class']}, {threads} thread)", fontsize=11
    )
    _save(figure, file)


def scaling(report: dict[str, Any], file: Path) -> None:
    """Time of a gradient against batch, width, depth and steps, with the roofline."""
    import matplotlib.ticker as ticker

    figure, axes = _grid(len(report["axes"]), columns=2, width=4.6, height=3.6)
    for axis, (name, points) in zip(axes, report["axes"].items(), strict=False):
        values = [point["value"] for point in points]
        for colour, peer in zip(COLOURS, report["peers"], strict=False):
            known = [(p["value"], p["ms"][peer]) for p in points if peer in p["ms"]]
            if known:
                axis.plot(*zip(*known, strict=True), "o-", color=colour, label=peer, markersize=3)
        roof = [point["roofline_ms"] for point in points]
        axis.plot(values, roof, "k--", linewidth=1, label="roofline (torch.mm, copy)")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(ticker.FixedLocator(values))
        axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlabel(name, fontsize=9)
        axis.set_ylabel("forward + backward, ms", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"{report['base']}\n{report['machine']['class']}, 1 thread", fontsize=10)
    _save(figure, file)


def _gain(report: Report, case: str, operation: str, peer: str, threads: int) -> float | None:
    return report.speedup(case, operation, peer, threads)


def _colour(peer: str) -> str:
    if peer.startswith("fmft_fast"):
        return OURS
    return JAX if PEERS[peer].kind == "jax" else OTHERS


def _within(axis: Any, value: float) -> bool:
    low, high = axis.get_xlim()
    return low <= value <= high


def _grid(count: int, columns: int, width: float = 3.9, height: float = 2.6) -> tuple[Any, list]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
