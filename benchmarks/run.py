"""`python -m benchmarks.run`: gradients first, then times and memory, of every peer on every case.

A peer's gradient error is relative to backpropagation through the same steps in float64, and for
adaptive steps to a solve with tolerances of 1e-11.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fmft_fast

from .cases import CASES, Case
from .measure import peak_bytes, timed
from .peers import PEERS, NotApplicable, Peer

RESULTS = Path(__file__).parent / "results"


def gradient_of(peer: Peer, case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of the mean square of the final state in all parameters, flat."""
    field, x0 = case.make(dtype)
    loss = peer(case, field, x0).square().mean()
    grads = torch.autograd.grad(loss, list(field.parameters()))
    return torch.cat([g.reshape(-1) for g in grads])


def measure(name: str, case: Case, seconds: float) -> dict[str, Any] | None:
    """One row, or None if the peer does not apply."""
    peer = PEERS[name]
    try:
        gradient = gradient_of(peer, case, torch.float64)
    except NotApplicable:
        return None
    except ImportError as error:
        return {"case": case.name, "peer": name, "skipped": str(error)}
    reference = case if case.steps else replace(case, tol=1e-11)
    exact = gradient_of(PEERS['fmft_fast.solve(gradient="backprop")'], reference, torch.float64)
    error = float((gradient - exact).norm() / exact.norm())
    field, x0 = case.make()

    def training() -> None:
        field.zero_grad()
        peer(case, field, x0).square().mean().backward()

    row = {"case": case.name, "peer": name, "gradient_error": error}
    return row | timed(training, seconds) | {"peak_bytes": peak_bytes(training)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table; `x` is the time of torchdiffeq.odeint on the case over the peer's."""
    base = {r["case"]: r.get("ms") for r in rows if r["peer"] == "torchdiffeq.odeint"}
    lines = [
        "| case | peer | forward + backward, ms (20/80 %) | x | gradient error | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "skipped" in r:
            lines.append(f"| {r['case']} | {r['peer']} | skipped: {r['skipped']} | | | |")
            continue
        ratio = f"{base[r['case']] / r['ms']:.2f}" if base.get(r["case"]) else ""
        lines.append(
            f"| {r['case']} | {r['peer']} | {r['ms']:.2f} ({r['ms_20']:.2f} / {r['ms_80']:.2f}) "
            f"| {ratio} | {r['gradient_error']:.1e} | {r['peak_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in args.case or CASES:
        for peer in args.peer or PEERS:
            row = measure(peer, CASES[case], args.seconds)
            if row is not None:
                rows.append(row)
                print(f"{case:8} {peer:40} {row.get('ms', float('nan')):9.2f} ms", flush=True)
    report = {
        "fmft_fast": fmft_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(rows)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
