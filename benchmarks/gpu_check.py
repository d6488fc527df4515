"""One command for a machine with a GPU: build from source, test, look for races, time everything.

    python -m benchmarks.gpu_check

It needs no network, installs the checkout in place into the running Python, and takes less than
eight minutes. It writes benchmarks/results/gpu_check.json and next to it cuda-suite.json, for
`benchmarks.table` and `benchmarks.gate`. Where a test fails it reports no times, unless asked for
by `--times-anyway`. `--device cpu` tries out the timing of the suite where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import machine, measure, results
from .cases import CASES
from .machine import ROOT
from .peers import PEERS
from .results import Report, Row
from .run import selection

RESULTS = results.FOLDER / "gpu_check.json"
BUDGET = 460.0  # seconds in all
TEST_LIMIT, PEER_LIMIT = 180.0, 60.0
LATENCY_LIMIT = 45.0
HANGING = 90.0  # seconds after which a test must be waiting for a kernel that does not end
LAST_WORDS = 10.0  # seconds to stop by oneself
SANITIZED = ROOT / "tests/ops/test_trajectory_gpu.py"
TIMED = ("p1", "small", "wide", "policy", "dopri5")
WIDE = ("wide", "policy")
MARKED = ("p1", "wide")
OURS = ('fmft_fast.solve(gradient="backprop")', "fmft_fast.solve", "fmft_fast.odeint")
RIVALS = ("CUDA-graphed loop", "torch.compile reduce-overhead")
# What matters most comes first: the rest goes without if time runs out.
ORDER = (
    *OURS,
    *("torchdiffeq.odeint", *RIVALS, "plain loop", "torchdiffeq.odeint_adjoint"),
)
SIZES = (256 * 2, 4096 * 32, 1 << 20, 1 << 24)
TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer
SHOWN, KEPT = 2500, 100_000  # characters of a command's output
STAGES = 7
ROWS = 8  # of the dense output


class Clock:
    """The seconds that are left."""

    def __init__(self, budget: float):
        self.end = time.monotonic() + budget

    def limit(self, most: float) -> float:
        """At most so many seconds, and not more than are left."""
        return max(0.0, min(most, self.end - time.monotonic()))


def main() -> int:
    """Run the whole check; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build, test and time on a GPU.")
    parser.add_argument("--require-gpu", action="store_true", help="fail where there is no GPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--seconds", type=float, default=0.3, help="per row of the suite")
    parser.add_argument("--case", action="append", choices=list(CASES), help="of the suite")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="of the suite")
    parser.add_argument("--times-anyway", action="store_true", help="also if a test fails")
    parser.add_argument("--only-step-ops", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    clock = Clock(options.budget)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"No GPU: torch {torch.__version__} sees no CUDA device; nothing was checked.")
        return int(options.require_gpu)
    if options.only_step_ops:
        print(json.dumps(time_ops()))
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what ran is seen also if it is stopped
    report: dict[str, Any] = {}
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def stage(name: str, found: Any) -> bool:
        """Write down what was found, at once; whether all is well."""
        report[name] = found
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        return not isinstance(found, dict) or found.get("status") in (0, None)

    on_gpu = options.device == "cuda"
    if on_gpu and not stage("build", build(clock)):
        return 1
    stage("machine", describe(options.device))
    good = True
    with ThreadPoolExecutor(1 + len(TOOLS)) as pool:  # there is nothing to time yet
        checks = {"tests": pool.submit(run_tests, clock)} if on_gpu else {}
        checks |= {tool: pool.submit(sanitize, tool, clock) for tool in TOOLS if on_gpu}
        for name, check in checks.items():
            good = stage(name, check.result()) and good
    if good or options.times_anyway:
        if on_gpu:
            stage("step_ops", step_ops(clock))
        suite_clock = Clock(clock.limit(options.budget) - LATENCY_LIMIT)
        rounded = by_precision(options.seconds, suite_clock) if on_gpu else {}
        if on_gpu:
            stage("suite_by_precision", {k: [*map(asdict, rows)] for k, rows in rounded.items()})
            stage("suite_by_steps", by_steps(options.seconds, suite_clock))
        suite = time_suite(
            options.case or TIMED, options.peer, options.seconds, options.device, suite_clock
        )
        stage("suite", asdict(suite))
        if on_gpu:
            suite.write(options.output.with_name("cuda-suite.json"))
            stage("marks", marks(suite, rounded))
        stage("clocks_after", machine.clocks())
        stage("latency", time_decisions(options.device, clock))
    for name, found in report.items():
        if isinstance(found, dict) and "summary" in found:
            print(f"{name:12}status {found['status']}: {found['summary'][:200]}")
    print(f"wrote {options.output}")
    return int(not good)


def in_order(peers: Sequence[str]) -> list[str]:
    """The peers, what matters most first."""
    return sorted(peers, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def time_suite(
    cases: Sequence[str],
    peers: Sequence[str] | None,
    seconds: float,
    device: str,
    clock: Clock,
    peer_limit: float = PEER_LIMIT,
) -> Report:
    """Time each peer in a process of its own, which is stopped at the limit."""
    parts: list[Report] = []
    missing: list[Row] = []
    keys = [(case.name, operation) for case, operation in selection(cases, None, device)]
    for peer in in_order(peers or list(PEERS)):
        limit = clock.limit(peer_limit)
        part = time_peer(peer, cases, seconds, device, limit) if limit > 5 else None
        if part is not None:
            parts.append(part)
        done = {(row.case, row.operation): row for row in (part.rows if part else ())}
        reason = f"no result within {limit:.0f} s"
        missing += [Row(*key, peer, 1, reason) for key in keys if key not in done]
        for key in keys:
            row = done.get(key)
            shown = reason if row is None else row.reason or f"{1e3 * (row.ms or 0):.1f} us"
            if limit > 5:
                print(f"{key[0]:8}{key[1]:10}{peer:38}{shown}", flush=True)
    if not parts:
        return Report(machine.describe(device), {}, {}, missing)
    merged = results.merge(parts)
    settings = {"seconds": seconds, "command": "python -m benchmarks.gpu_check"}
    return Report(merged.machine, settings, merged.rates, [*merged.rows, *missing])


def by_steps(seconds: float, clock: Clock) -> list[Any]:
    """Times of wide fields by recorded steps, which compete with solves layer by layer."""
    limit = clock.limit(PEER_LIMIT)
    off = {"FMFT_FUSED": "0"}
    part = limit > 5 and time_peer("fmft_fast.solve", WIDE, seconds, "cuda", limit, env=off)
    return [asdict(row) for row in shown(part.rows if part else [], "not fused")]


def by_precision(seconds: float, clock: Clock) -> dict[str, list[Row]]:
    """Gradients of the marked cases with products of rounded float32."""
    found: dict[str, list[Row]] = {"medium": [], "high": []}
    for (precision, rows), peer in itertools.product(found.items(), (OURS[0], RIVALS[0])):
        limit = clock.limit(PEER_LIMIT)
        words = ("--operation", "gradient", "--precision", precision)
        part = limit > 5 and time_peer(peer, MARKED, seconds, "cuda", limit, *words)
        rows += shown(part.rows if part else [], precision)
    return found


def shown(rows: Sequence[Row], how: str) -> Sequence[Row]:
    """Print the rows of a peer and return them."""
    for row in rows:
        result = row.reason or f"{1e3 * (row.ms or 0):.1f} us"
        print(f"{row.case:8}{row.operation:10}{f'{row.peer}, {how}':46}{result}", flush=True)
    return rows


def marks(suite: Report, rounded: dict[str, list[Row]]) -> dict[str, Any]:
    """What was to be reached on an H200, and what was: times in us, and ratios."""

    def us(case: str, peers: Sequence[str], precision: str = "highest") -> float | None:
        rows = suite.rows if precision == "highest" else rounded[precision]
        times = [
            1e3 * row.ms
            for row in rows
            if row.ms and (row.case, row.operation) == (case, "gradient") and row.peer in peers
        ]
        return min(times, default=None)

    def ratio(case: str, rivals: Sequence[str], precision: str = "highest") -> float | None:
        theirs, ours = us(case, rivals, precision), us(case, OURS, precision)
        return theirs / ours if theirs and ours else None

    found = {
        "p1, bf16: at most 60 us": us("p1", OURS, "medium"),
        "p1, as float32: at most 110 us": us("p1", OURS),
        "p1, torchdiffeq over ours: at least 60": ratio("p1", ("torchdiffeq.odeint",)),
        "p1, best rival over ours: at least 8": ratio("p1", RIVALS),
        "wide: at most 850 us": us("wide", OURS),
        "wide, best rival over ours: at least 1.3": ratio("wide", RIVALS),
        "wide, rounded to TF32: at most 850 us": us("wide", OURS, "high"),
        "wide, rounded to TF32, best rival over ours: at least 1.3": ratio("wide", RIVALS, "high"),
    }
    for name, number in found.items():
        print(f"{name:60}{'not measured' if number is None else f'{number:.3g}'}")
    return found


def time_decisions(device: str, clock: Clock) -> dict[str, Any]:
    """What `benchmarks.latency` has found of policies when it ended or was stopped."""
    limit = clock.limit(LATENCY_LIMIT)
    if limit < 5:
        return {"status": None, "summary": "no time is left"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latency.json"
        command = [
            *(sys.executable, "-m", "benchmarks.latency", "--device", device),
            *("--calls", "1000", "--seconds", "2", "--output", str(path)),
        ]
        found = run_limited(command, limit)
        print(found["output"][-SHOWN:])
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):  # there is none, or it was stopped while writing
            pass
    last = (found["output"].strip().splitlines() or ["it printed nothing"])[-1]
    return {"status": None, "summary": f"no latencies: {last}"}


def time_peer(
    peer: str,
    cases: Sequence[str],
    seconds: float,
    device: str,
    limit: float,
    *words: str,
    env: dict[str, str] | None = None,
) -> Report | None:
    """What a peer's process has written when it ended or was stopped; `words` are more options."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [
            *(sys.executable, "-m", "benchmarks.run", "--device", device, "--peer", peer),
            *("--seconds", str(seconds), "--output", str(path), "--no-pictures"),
            *(word for case in cases for word in ("--case", case)),
            *words,
        ]
        found = run_limited(command, limit, env)
        if found["status"] not in (0, 124):
            print(found["output"][-2000:])
        return results.read(path) if path.exists() else None


def run_limited(
    command: Sequence[str], limit: float, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Exit status (124 at the limit), output and seconds of a command."""
    start = time.perf_counter()
    environment = {**os.environ, **(env or {})}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = 124
            os.killpg(process.pid, signal.SIGINT)  # pytest says what it has found by now
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the compilers that it has started
            process.wait()
        log.seek(0)
        output = log.read()
    return {"status": status, "output": output, "seconds": time.perf_counter() - start}


def build(clock: Clock) -> dict[str, Any]:
    """Install the checkout in place, its CUDA module compiled for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    command = [
        *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"),
        *("--disable-pip-version-check", "--no-index", "--quiet", "-e", str(ROOT)),
    ]
    arch = {"FMFT_CUDA": "1", "FMFT_CUDA_ARCHS": f"{major}{minor}"}
    found = run_limited(command, clock.limit(BUDGET), arch)
    return closing_line(found)


def describe(device: str) -> dict[str, Any]:
    """The machine, as a process sees it that started after the build."""
    code = "import json, sys; from benchmarks import machine as m; "
    code += "print(json.dumps(m.describe(sys.argv[1])))"
    found = run_limited([sys.executable, "-c", code, device], PEER_LIMIT)
    if found["status"]:
        print(found["output"][-2000:])
        return {}
    return json.loads(found["output"].splitlines()[-1])


def run_tests(clock: Clock) -> dict[str, Any]:
    """Run the tests marked gpu, side by side if pytest-xdist is there; keep the closing line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "not sanitizer"]
    command += ["-p", "no:cacheprovider", "--tb=short"]
    if importlib.util.find_spec("xdist"):  # Triton's compilers take most of the time
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={HANGING:.0f}", "--timeout-method=thread"]
    # Without the first torch warns that cuBLAS is not deterministic.
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    found = run_limited(command, clock.limit(TEST_LIMIT), env)
    return closing_line(found)


def sanitize(tool: str, clock: Clock) -> dict[str, Any]:
    """Run small solves under a tool of compute-sanitizer; status None if it cannot or is slow."""
    name = "compute-sanitizer"
    path = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    limit = clock.limit(TEST_LIMIT)
    if path is None or limit < 5:
        reason = "compute-sanitizer is not installed" if path is None else "no time is left"
        return {"status": None, "summary": reason}
    command = [
        *(path, "--tool", tool, "--error-exitcode", "99"),
        # The name of torch's kernels as it is mangled; some of torch's calls fail by design.
        *("--kernel-name-exclude", "kernel_substring=2at6native"),
        *(("--report-api-errors", "no") if tool == "memcheck" else ()),
        *(sys.executable, str(SANITIZED)),
    ]
    found = run_limited(command, limit)
    refused = ("Failed to initialize", "not supported", "Unable to find")
    if found["status"] == 124 or any(words in found["output"] for words in refused):
        found["status"] = None
    return closing_line(found)


def closing_line(found: dict[str, Any]) -> dict[str, Any]:
    """Show the end of a command's output and keep its last line, and more of it if it failed."""
    print(found["output"][-SHOWN:])
    lines = found["output"].strip().splitlines()
    kept = {
        "status": found["status"],
        "summary": lines[-1] if lines else "it printed nothing",
        "seconds": found["seconds"],
    }
    return kept | ({"output": found["output"][-KEPT:]} if found["status"] else {})


def step_ops(clock: Clock) -> list[dict[str, Any]]:
    """The times of the step ops, from a process that sees the package as it was installed."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--only-step-ops"]
    found = run_limited(command, clock.limit(PEER_LIMIT))
    if found["status"]:
        print(found["output"][-2000:])
        return []
    rows = json.loads(found["output"].splitlines()[-1])
    show(rows)
    return rows


def time_ops() -> list[dict[str, Any]]:
    """Time every op on every backend: 7 stages, float32, the step on the device."""
    from fmft_fast.ops import backend_report, choose_kernels

    h = torch.tensor(0.1, device="cuda")
    w = tuple(0.1 * (i + 1) for i in range(STAGES))
    p = [[0.1, 0.2, 0.3, 0.4]] * STAGES
    theta = torch.linspace(0, 1, ROWS, device="cuda")
    # Name, arguments after y and k, and how many states the op reads and writes.
    calls = (
        ("rk_combine", (h, w), STAGES + 2),
        ("rk_finish", (h, w, w, 1e-3, 1e-3), STAGES + 2),
        ("dense_eval", (h, p, theta), STAGES + 1 + ROWS),
    )
    names = [s.name for s in backend_report() if s.available and s.name != "cpu"]
    rows = []
    for size, name in itertools.product(SIZES, names):
        y, *k = torch.randn(STAGES + 1, size, device="cuda").unbind()
        for op, arguments, states in calls:
            us = call_us(functools.partial(getattr(choose_kernels(y, name), op), y, k, *arguments))
            gb_per_s = states * size * y.itemsize / us["median"] / 1e3
            rows.append({"op": op, "backend": name, "size": size, **us, "GB/s": gb_per_s})
    return rows


def call_us(call: Callable[[], Any], batch: int = 20, repeats: int = 30) -> dict[str, float]:
    """Time a call on the device, in us: median and 20/80 % quantiles over batches of calls."""
    for _ in range(batch):
        call()
    found = measure.summarise([measure.cuda_sample(call, batch) for _ in range(repeats)], 0.0)
    return {"median": 1e3 * found.ms, "low": 1e3 * found.ms_20, "high": 1e3 * found.ms_80}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the times as a table."""
    print(f"{'op':<12}{'size':>10}  {'backend':<11}{'us':>9}{'20 %':>9}{'80 %':>9}{'GB/s':>9}")
    for row in rows:
        print(
            f"{row['op']:<12}{row['size']:>10}  {row['backend']:<11}{row['median']:>9.1f}"
            f"{row['low']:>9.1f}{row['high']:>9.1f}{row['GB/s']:>9.0f}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
