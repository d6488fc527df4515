"""`python -m benchmarks.table RESULTS [--update README.md]`: results as Markdown.

The README's table is this table: --update rewrites what stands between its two markers.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from . import results
from .cases import CASES
from .peers import BASELINE, PEERS
from .results import Report, Row

START, END = "<!-- benchmark table: python -m benchmarks.table -->", "<!-- end of the table -->"


def summary(report: Report, operation: str = "gradient", threads: int = 1) -> str:
    """Times of one operation: a row for each peer, a column for each case, the best in bold.

    Peers with an approximate gradient are not compared.
    Two more columns give the error and the peak memory in the first case.
    """
    rows = [r for r in report.rows if r.operation == operation and r.threads == threads]
    cases = [name for name in CASES if any(r.case == name and r.ms for r in rows)]
    peers = [name for name in PEERS if any(r.peer == name and r.ms for r in rows)]
    exact = [name for name in peers if not PEERS[name].approximate]
    best = {
        case: min((r.ms for r in rows if r.case == case and r.ms and r.peer in exact), default=None)
        for case in cases
    }
    first = cases[0] if cases else ""
    columns = [*cases, f"error, {first}", f"peak MB, {first}"]
    lines = [
        f"| {OPERATIONS[operation]}, ms | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for peer in peers:
        cells = []
        for case in cases:
            row = report.find(case, operation, peer, threads)
            if row is None or row.ms is None:
                cells.append("wrong" if row and (row.reason or "").startswith("wrong") else "-")
            else:
                text = short(row.ms)
                cells.append(f"**{text}**" if row.ms == best[case] else text)
        cells += _error_and_memory(report.find(first, operation, peer, threads))
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    ours = [name for name in exact if name.startswith("fmft_fast")]
    if ours and BASELINE in peers:
        cells = []
        for case in cases:
            gains = (report.speedup(case, operation, name, threads) for name in ours)
            best_gain = max((gain for gain in gains if gain), default=None)
            cells.append("-" if best_gain is None else f"{short(best_gain)}x")
        lines.append(f"| best of fmft_fast against {BASELINE} | {' | '.join([*cells, '', ''])} |")
    return "\n".join(lines)


def _error_and_memory(row: Row | None) -> list[str]:
    if row is None or row.ms is None:
        return ["", ""]
    memory = "" if row.peak_bytes is None else short(row.peak_bytes / 1e6)
    return [f"{_error(row):.0e}", memory]


def _error(row: Row) -> float:
    """The error that says most: of the gradient, of the optimiser's step, or of the value."""
    errors = (row.gradient_error, row.update_error, row.value_error)
    return next((error for error in errors if error is not None), 0.0)


BUSY = " **A trial: the machine was busy with other work.**"
OPERATIONS = {
    "forward": "forward",
    "gradient": "forward + backward",
    "training": "forward + backward + AdamW",
}


def readme(report: Report) -> str:
    """What stands in the README: the summary of gradients and where it comes from."""
    processor = report.machine["cpu"]
    device = report.machine["gpu"]["name"] if report.machine["gpu"] else processor["model"]
    cases = [name for name in CASES if any(r.case == name for r in report.rows)]
    titles = "; ".join(f"*{name}*: {CASES[name].title}" for name in cases)
    versions = report.machine["packages"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "jax") if versions[name])
    source = (
        f"{device} ({report.machine['class']}), one thread, float32, {shown}, "
        f"{report.machine['date'][:10]}; errors are relative to float64, memory is the peak above "
        f"what was there before. {titles}."
    )
    source = textwrap.fill(f"{source}{BUSY if report.busy else ''}", 105)
    return f"{summary(report)}\n\n{source}"


def full(report: Report) -> str:
    """Everything: the machine, a summary for each operation, and every row."""
    machine = report.machine
    lines = [f"# Benchmark on {machine['cpu']['model']} ({machine['class']})", ""]
    if machine["gpu"]:
        lines += [f"GPU: {machine['gpu']['name']}, {machine['gpu']['clocks']}", ""]
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    command = report.settings.get("command", "")
    lines += [f"`{command}`, commit {machine['commit']}, {machine['date']}. {versions}.", ""]
    for threads, rates in report.rates.items():
        lines.append(
            f"With {threads} thread(s): best torch.mm {rates['gemm'] / 1e9:.0f} GFLOP/s, "
            f"copy {rates['copy'] / 1e9:.1f} GB/s."
        )
    lines += [BUSY] * report.busy
    lines += ["", "Cases:", ""]
    lines += [f"- {n}: {CASES[n].title}" for n in CASES if any(r.case == n for r in report.rows)]
    lines += [
        "",
        "Useful FLOPs are those of products and convolutions, the backward pass twice the forward "
        "one, nothing computed again, the product with a condition once in a solve; activations "
        "are not counted. GEMM share: useful FLOP/s over the best torch.mm. Roofline share: the "
        "time that both rates allow over the time taken.",
    ]
    for threads in sorted({r.threads for r in report.rows}):
        for operation in OPERATIONS:
            if any(r.operation == operation and r.threads == threads for r in report.rows):
                lines += ["", f"## {OPERATIONS[operation]}, {threads} thread(s)", ""]
                lines.append(summary(report, operation, threads))
    lines += [
        "",
        "## All rows",
        "",
        "| case | operation | peer | threads | ms (20/80 %) | runs | cores | x torchdiffeq | error "
        "| evaluations | peak MB | GFLOP/s | GEMM share | roofline share |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(report, row) for row in report.rows]
    return "\n".join(lines) + "\n"


def _line(report: Report, row: Row) -> str:
    start = f"| {row.case} | {row.operation} | {row.peer} | {row.threads} "
    if row.ms is None:
        return f"{start}| {row.reason} | | | | | | | | | |"
    gain = report.speedup(row.case, row.operation, row.peer, row.threads)
    memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.2f}"
    cells = (
        f"{row.ms:.3f} ({row.ms_20:.3f} / {row.ms_80:.3f})",
        row.runs,
        f"{row.cores:.1f}",
        "" if gain is None else f"{gain:.2f}",
        f"{_error(row):.0e}",
        row.evaluations or "",
        memory,
        f"{row.gflops:.1f}",
        f"{row.gemm_share:.1%}",
        f"{row.roofline_share:.1%}",
    )
    return f"{start}| {' | '.join(map(str, cells))} |"


def short(number: float) -> str:
    """Three digits."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def update(text: str, table: str, first: str = START, last: str = END) -> str:
    """The text with the table between the two markers.

    Raises:
        ValueError: the markers are missing.
    """
    before, start, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (start and end):
        raise ValueError(f"expected the markers {first!r} and {last!r}, each on a line of its own")
    return f"{before}{first}\n\n{table}\n\n{last}{after}"


def main() -> None:
    """Print the README's table, or write it there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON written by python -m benchmarks.run")
    parser.add_argument("--update", type=Path, metavar="README", help="rewrite its table")
    parser.add_argument("--full", action="store_true", help="all operations and rows")
    args = parser.parse_args()
    report = results.read(args.results)
    text = full(report) if args.full else readme(report)
    if args.update is None:
        print(text)
    else:
        old = args.update.read_text(encoding="utf-8")
        args.update.write_text(update(old, text), encoding="utf-8")


if __name__ == "__main__":
    main()
