"""One command for a machine with a GPU: build from source, run the GPU tests, time the step ops.

    python -m benchmarks.gpu_check

It needs no network, installs the checkout in place into the running Python, and writes
benchmarks/results/gpu_check.json. Where a test fails it reports no times.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/gpu_check.json"
SIZES = (256 * 2, 4096 * 32, 1 << 20, 1 << 24)
STAGES = 7
ROWS = 8  # of the dense output
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,driver_version"


def main() -> int:
    """Run the whole check; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build, test and time on a GPU.")
    parser.add_argument("--require-gpu", action="store_true", help="fail where there is no GPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--only-times", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"No GPU: torch {torch.__version__} sees no CUDA device; nothing was checked.")
        return int(options.require_gpu)
    if options.only_times:
        print(json.dumps(time_ops()))
        return 0
    report: dict[str, Any] = {"machine": machine(), "commit": commit()}
    report["build"] = build()
    report["tests"] = run_tests()
    passed = report["build"]["status"] == 0 and report["tests"]["status"] == 0
    # A fresh process, which sees the package as it was just installed.
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--only-times"]
    if passed:
        times = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if times.returncode:
            print(times.stderr)
            return 1
        report["step_ops"] = json.loads(times.stdout.splitlines()[-1])
        show(report["step_ops"])
    report["clocks_after"] = clocks()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {options.output}")
    return int(not passed)


def machine() -> dict[str, Any]:
    """Return the device, its clocks and the versions in use."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "clocks": clocks(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def clocks() -> str:
    """Return what nvidia-smi says of the clocks, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def commit() -> str:
    """Return the commit of the checkout, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def build() -> dict[str, Any]:
    """Install the checkout in place, its CUDA module compiled for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    start = time.perf_counter()
    status = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"),
            *("--quiet", "-e", str(ROOT)),
        ],
        env={**os.environ, "FMFT_CUDA": "1", "FMFT_CUDA_ARCHS": f"{major}{minor}"},
    ).returncode
    return {"status": status, "seconds": time.perf_counter() - start}


def run_tests() -> dict[str, Any]:
    """Run the tests marked gpu and keep pytest's closing line."""
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(result.stdout[-6000:])
    lines = result.stdout.strip().splitlines()
    return {
        "status": result.returncode,
        "summary": lines[-1] if lines else "pytest printed nothing",
        "seconds": time.perf_counter() - start,
    }


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
    samples = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(batch):
            call()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / batch)
    low, *_, high = statistics.quantiles(samples, n=5)
    return {"median": statistics.median(samples), "low": low, "high": high}


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
