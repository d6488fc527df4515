"""Results as they are written to JSON and read again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .peers import BASELINE

SCHEMA = 2
FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One peer doing one operation of one case.

    Attributes:
        case, operation, peer, threads: what was timed.
        reason: why there is no time; None if there is one.
        value_error, gradient_error, update_error: relative, against float64.
        ms, ms_20, ms_80, runs: median and quantiles in ms, and number of samples.
        cores: CPU time over wall time.
        peak_bytes: memory above what was there before; None for JAX.
        evaluations: of the field in the operation, as counted or as the solve reports them.
        gflops: useful GFLOP/s.
        gemm_share: useful FLOP/s over the machine's best rate of torch.mm.
        roofline_share: the time that the machine's GEMM and copy rates allow, over the time.
    """

    case: str
    operation: str
    peer: str
    threads: int
    reason: str | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    update_error: float | None = None
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    runs: int | None = None
    cores: float | None = None
    peak_bytes: int | None = None
    evaluations: int | None = None
    gflops: float | None = None
    gemm_share: float | None = None
    roofline_share: float | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells rows apart."""
        return self.case, self.operation, self.peer, self.threads


@dataclass(frozen=True)
class Report:
    """A run of the suite.

    Attributes:
        machine: see `benchmarks.machine.describe`.
        settings: how it was run.
        rates: threads to the machine's best rates {"gemm": FLOP/s, "copy": bytes/s}.
        rows: the results.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    rates: dict[str, dict[str, float]]
    rows: list[Row]

    def find(self, case: str, operation: str, peer: str, threads: int = 1) -> Row | None:
        """The row with this key."""
        key = (case, operation, peer, threads)
        return next((row for row in self.rows if row.key == key), None)

    def speedup(
        self, case: str, operation: str, peer: str, threads: int = 1, over: str = BASELINE
    ) -> float | None:
        """How many times faster than another peer."""
        ours, theirs = (self.find(case, operation, name, threads) for name in (peer, over))
        if ours is None or theirs is None or ours.ms is None or theirs.ms is None:
            return None
        return theirs.ms / ours.ms

    @property
    def busy(self) -> bool:
        """Whether other work took more than a tenth of the time of a thread: only a trial, then."""
        shares = [row.cores for row in self.rows if row.cores is not None and row.threads == 1]
        return self.machine["device"] == "cpu" and bool(shares) and median(shares) < 0.9

    def write(self, path: Path) -> None:
        """Write as JSON."""
        table = {"schema": SCHEMA, **dataclasses.asdict(self)}
        # What is not there takes no room.
        table["rows"] = [{k: v for k, v in row.items() if v is not None} for row in table["rows"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1) + "\n")


def read(path: Path) -> Report:
    """Read a report.

    Raises:
        ValueError: the file is no report of this version of the suite.
    """
    table = json.loads(path.read_text())
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        found = table.get("schema") if isinstance(table, dict) else type(table).__name__
        raise ValueError(
            f"{path}: expected results with schema {SCHEMA}, got {found}; "
            "measure again with python -m benchmarks.run"
        )
    rows = [Row(**row) for row in table["rows"]]
    return Report(table["machine"], table["settings"], table["rates"], rows)


def merge(reports: Iterable[Report]) -> Report:
    """One report of runs on one machine, for instance with several numbers of threads."""
    first, *rest = reports
    rates, rows = dict(first.rates), list(first.rows)
    for report in rest:
        rates |= report.rates
        rows += report.rows
    return Report(first.machine, first.settings, rates, rows)
