"""`python -m benchmarks.scaling`: the cost as batch, width, depth and steps grow 64 times.

From one small solve, each size is multiplied by 1, 4, 16 and 64 while the others stay; a gradient
is timed, checked against float64 before. Writes JSON and a log-log picture with the roofline.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import machine, measure, plots, results
from .cases import Case
from .peers import PEERS
from .run import time_peers, use_threads

BASE = Case("scaling", 64, (2,), hidden=(16, 16), steps=4)
FACTORS = (1, 4, 16, 64)
AXES: dict[str, Callable[[int], Case]] = {
    "batch": lambda k: replace(BASE, batch=BASE.batch * k),
    "width": lambda k: replace(BASE, hidden=tuple(n * k for n in BASE.hidden)),
    "depth": lambda k: replace(BASE, hidden=BASE.hidden * k),
    "steps": lambda k: replace(BASE, steps=(BASE.steps or 1) * k),
}
VALUES: dict[str, Callable[[Case], int]] = {
    "batch": lambda case: case.batch,
    "width": lambda case: case.hidden[0],
    "depth": lambda case: len(case.hidden),
    "steps": lambda case: case.steps or 0,
}
DEFAULT_PEERS = (
    *("torchdiffeq.odeint", "torchdiffeq.odeint_adjoint", "plain loop", "diffrax", "jax"),
    *("fmft_fast.odeint", "fmft_fast.solve"),
)


def run(
    peers: Sequence[str],
    seconds: float,
    device: str = "cpu",
    axes: Sequence[str] = tuple(AXES),
    factors: Sequence[int] = FACTORS,
) -> dict[str, Any]:
    """Time every point; peers without a right result are left out there, with the reason."""
    rates = {"gemm": measure.gemm_rate(device), "copy": measure.copy_rate(device)}
    report: dict[str, Any] = {
        "machine": machine.describe(device),
        "base": BASE.title,
        "rates": rates,
        "peers": list(peers),
        "axes": {},
    }
    for axis in axes:
        points = report["axes"][axis] = []
        for factor in factors:
            case = AXES[axis](factor)
            rows = time_peers(case, "gradient", peers, seconds, rates, device)
            timed = [row for row in rows if row.ms and row.roofline_share]
            points.append(
                {
                    "value": VALUES[axis](case),
                    "ms": {row.peer: row.ms for row in timed},
                    "us_per_step": {
                        row.peer: 1e3 * (row.ms or 0) / (case.steps or 1) for row in timed
                    },
                    "roofline_ms": max(
                        ((row.ms or 0) * (row.roofline_share or 0) for row in timed), default=0.0
                    ),
                    "reasons": {row.peer: row.reason for row in rows if row.reason},
                }
            )
            found = ", ".join(f"{row.peer} {row.ms:.2f} ms" for row in timed)
            print(f"{axis} {points[-1]['value']}: {found}", flush=True)
    return report


def main() -> None:
    """Parse the command line, measure, write JSON and picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--peer", action="append", choices=list(PEERS))
    parser.add_argument("--axis", action="append", choices=list(AXES), help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="per peer and point")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/scaling-<device>")
    args = parser.parse_args()
    use_threads(args.threads)
    start = time.perf_counter()
    report = run(args.peer or DEFAULT_PEERS, args.seconds, args.device, args.axis or tuple(AXES))
    report["threads"] = torch.get_num_threads()
    output = args.output or results.FOLDER / f"scaling-{args.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    plots.scaling(report, output.with_suffix(".png"))
    seconds = time.perf_counter() - start
    print(f"written to {output} and {output.with_suffix('.png').name} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
