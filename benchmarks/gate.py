"""`python -m benchmarks.gate`: fails when fmft_fast has lost speed against torchdiffeq or the loop.

Ratios of times are compared, not times, with those in the committed results of the same class of
machines (CPU vendor and instruction set, or GPU): a loss of more than 30 % fails, after a second
measurement, because machines that run checks are noisy. On a class without results it says so, and
only being slower than torchdiffeq fails.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import machine, results
from .cases import CASES, Operation
from .peers import BASELINE
from .results import Report, Row
from .run import time_peers, use_threads

LOSS = 0.3
NOISE = 0.1  # how much slower than torchdiffeq may look without being so
OURS = ("fmft_fast.odeint", "fmft_fast.solve")
OTHERS = (BASELINE, "plain loop")
TIMED: tuple[tuple[str, Operation], ...] = (
    ("small", "forward"),
    ("small", "gradient"),
    ("policy", "gradient"),
    ("dopri5", "gradient"),
    ("small", "training"),
)
Ratios = Mapping[tuple[str, str, str, str], float]
"""(case, operation, ours, other) to the other's time over ours."""


@dataclass(frozen=True)
class Loss:
    """A ratio that fell too far."""

    case: str
    operation: str
    ours: str
    other: str
    expected: float
    got: float
    least: float

    def __str__(self) -> str:
        return (
            f"{self.case} {self.operation}: {self.ours} against {self.other}: expected "
            f"{self.expected:.2f} times as fast (at least {self.least:.2f}), got {self.got:.2f}"
        )


def ratios(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], float]:
    """What the rows say of fmft_fast against the others."""
    times = {(r.case, r.operation, r.peer): r.ms for r in rows if r.threads == 1}
    found = {}
    for (case, operation, peer), ms in times.items():
        for other in OTHERS:
            theirs = times.get((case, operation, other))
            if peer in OURS and ms and theirs:
                found[case, operation, peer, other] = theirs / ms
    return found


def losses(got: Ratios, expected: Ratios | None) -> list[Loss]:
    """What is too slow, against the committed ratios or, without any, against torchdiffeq."""
    found = []
    for key, ratio in got.items():
        *_, other = key
        if expected is None:
            if other != BASELINE:
                continue
            wanted, least = 1.0, 1 - NOISE
        elif key in expected:
            wanted = expected[key]
            least = (1 - LOSS) * wanted
        else:
            continue
        if ratio < least:
            found.append(Loss(*key, wanted, ratio, least))
    return found


def committed(machine_class: str, folder: Path = results.FOLDER) -> Report | None:
    """The newest results of this class of machines that are no trial on a busy one."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = results.read(path)
        except (ValueError, KeyError, TypeError):
            continue  # other results lie there, too
        if report.machine["class"] == machine_class and not report.busy:
            found.append(report)
    return max(found, key=lambda report: report.machine["date"], default=None)


def wrong(rows: Iterable[Row]) -> list[str]:
    """Our own peers that gave no time although they apply."""
    return [
        f"{row.case} {row.operation}: {row.peer}: {row.reason}"
        for row in rows
        if row.peer in OURS and row.reason and not row.reason.startswith("not applicable")
    ]


def time_rows(
    timed: Sequence[tuple[str, Operation]], seconds: float, device: str = "cpu"
) -> list[Row]:
    """Fresh rows; only their ratios count, so the machine's own rates are not measured."""
    rates = {"gemm": 1.0, "copy": 1.0}
    return [
        row
        for case, operation in timed
        for row in time_peers(CASES[case], operation, (*OTHERS, *OURS), seconds, rates, device)
    ]


def judge(device: str, seconds: float, folder: Path = results.FOLDER) -> int:
    """Measure, compare, measure what is too slow again; returns the exit status."""
    name = machine.machine_class(device)
    report = committed(name, folder)
    expected = None if report is None else ratios(report.rows)
    if report is None:
        print(f"No committed results for {name!r}: checking only that torchdiffeq is not faster.")
        print("Add some: python -m benchmarks.run --output benchmarks/results/<name>.json")
    else:
        print(f"Compared with {report.machine['cpu']['model']} ({name}), {report.machine['date']}.")
    rows = time_rows(TIMED, seconds, device)
    if faults := wrong(rows):
        print("\n".join(faults))
        return 1
    got = ratios(rows)
    for key, ratio in got.items():
        case, operation, ours, other = key
        before = expected.get(key) if expected else None
        known = f" (committed: {before:.2f})" if before else ""
        print(f"{case:8}{operation:10}{ours:18} against {other:20}{ratio:6.2f}x{known}")
    found = losses(got, expected)
    if found:
        print(f"{len(found)} too slow; measuring those again")
        again = tuple(pair for pair in TIMED if pair in {(f.case, f.operation) for f in found})
        second = ratios(time_rows(again, 2 * seconds, device))
        # The better of two measurements: noise only ever takes speed away from both alike.
        better = {key: max(got[key], second.get(key, 0.0)) for key in got}
        found = losses(better, expected)
    for loss in found:
        print(f"FAILED {loss}")
    return int(bool(found))


def main() -> int:
    """Parse the command line and judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=0.8, help="per row")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="committed results")
    args = parser.parse_args()
    use_threads(1)
    start = time.perf_counter()
    status = judge(args.device, args.seconds, args.results)
    print(f"{'failed' if status else 'passed'} after {time.perf_counter() - start:.0f} s")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
