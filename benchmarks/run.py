"""`python -m benchmarks.run`: correctness first, then times and memory of every peer.

Peers take turns, so that noise of the machine hits all alike. A peer whose errors against float64
are out of bounds (benchmarks/check.py) reports no time; the gradient of an adjoint ODE is
approximate by design, and its error is reported only. Writes JSON, a Markdown table and plots.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fmft_fast import record_stats

from . import check, machine, measure, results
from .cases import CASES, OPERATIONS, Case, Operation, Problem
from .peers import PEERS, Call, NotApplicable, Peer
from .results import Report, Row

SECONDS = 0.25


reference_of = functools.cache(check.Reference)


def use_threads(count: int) -> None:
    """Let torch, and JAX if it is not imported yet, use so many threads."""
    torch.set_num_threads(count)
    os.environ["NPROC"] = os.environ["OMP_NUM_THREADS"] = str(count)
    if count == 1:
        os.environ["XLA_FLAGS"] = (
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )


def selection(
    cases: Sequence[str] | None, operations: Sequence[Operation] | None, device: str
) -> list[tuple[Case, Operation]]:
    """What to time: what is asked for by name, else what the cases say themselves."""
    chosen = [CASES[name] for name in cases] if cases else list(CASES.values())
    return [
        (case, operation)
        for case in chosen
        if cases or device in case.devices
        for operation in OPERATIONS
        if operation in (operations or case.operations)
    ]


def prepare(
    case: Case, operation: Operation, peer: str, reference: check.Reference, device: str
) -> tuple[Call | None, dict[str, Any]]:
    """A call that is right, or None, and what the row says so far: errors and the reason."""
    try:
        problem = Problem(case, device=device)
        call = PEERS[peer].prepare(problem, operation)
        result, evaluations = call_counted(PEERS[peer], problem, call)
        errors = reference.errors(operation, result)
    except NotApplicable as reason:
        return None, {"reason": f"not applicable: {reason}"}
    except ImportError as error:
        return None, {"reason": f"not installed: {error}"}
    except Exception as error:  # a rival that fails is a result
        return None, {"reason": f"failed: {type(error).__name__}: {str(error)[:200]}"}
    found: dict[str, Any] = {f"{name}_error": error for name, error in asdict(errors).items()}
    found["evaluations"] = evaluations
    fault = errors.fault(case, PEERS[peer])
    return (None, {**found, "reason": fault}) if fault else (call, found)


def call_counted(peer: Peer, problem: Problem, call: Call) -> tuple[Sequence[Any], int | None]:
    """The result of a call, and its evaluations of the field as far as they can be seen."""
    if peer.kind != "eager":
        return call(), problem.evaluations if problem.case.steps else None
    if peer.name.startswith("fmft_fast"):
        # It says itself what it does; a hook would keep it from fusing.
        with record_stats() as log:
            result = call()
        return result, sum(stats.evaluations for stats in log)
    seen: list[None] = []
    hook = problem.field.register_forward_hook(lambda *_: seen.append(None))
    result = call()
    hook.remove()
    return result, len(seen)


def time_peers(
    case: Case,
    operation: Operation,
    peers: Sequence[str],
    seconds: float,
    rates: dict[str, float],
    device: str = "cpu",
) -> list[Row]:
    """The rows of one operation of one case."""
    torch._dynamo.reset()  # compiled functions of earlier cases count against its limits
    reference, problem = reference_of(case, device), Problem(case)
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for peer in peers:
        call, rows[peer] = prepare(case, operation, peer, reference, device)
        if call is not None:
            calls[peer] = call
    times = measure.interleave(calls, seconds, device)
    flops, size = problem.useful_flops(operation), problem.useful_bytes(operation)
    bound = max(flops / rates["gemm"], size / rates["copy"])
    for peer, found in times.items():
        rate = flops / (found.ms / 1e3)
        # What JAX and replayed graphs hold, torch's allocator does not see come and go.
        seen = ("eager",) if device == "cuda" else ("eager", "traced")
        visible = PEERS[peer].kind in seen
        rows[peer] |= {
            **asdict(found),
            "peak_bytes": measure.peak_memory(calls[peer], device) if visible else None,
            "gflops": rate / 1e9,
            "gemm_share": rate / rates["gemm"],
            "roofline_share": bound / (found.ms / 1e3),
        }
    threads = torch.get_num_threads()
    return [Row(case.name, operation, peer, threads, **row) for peer, row in rows.items()]


def run(
    chosen: Sequence[tuple[Case, Operation]],
    peers: Sequence[str],
    seconds: float,
    device: str = "cpu",
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Time peers in this process, with as many threads as torch has.

    What is found so far goes to `keep` after every operation.
    """
    rates = {"gemm": measure.gemm_rate(device), "copy": measure.copy_rate(device)}
    report = Report(
        machine.describe(device),
        {"seconds": seconds},
        {str(torch.get_num_threads()): rates},
        [],
    )
    for case, operation in chosen:
        begin = time.perf_counter()
        found = time_peers(case, operation, peers, seconds, rates, device)
        report.rows.extend(found)
        keep(report)
        print(f"\n{case.name} {operation} ({time.perf_counter() - begin:.0f} s)", flush=True)
        for row in found:
            time_ms = "" if row.ms is None else f"{row.ms:10.3f} ms"
            print(f"  {row.peer:38}{time_ms}{row.reason or ''}", flush=True)
    return report


def run_apart(arguments: Sequence[str], threads: int) -> Report:
    """The same command with another number of threads, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.run", *arguments),
                *("--threads", str(threads), "--output", str(path), "--no-pictures"),
            ],
            cwd=machine.ROOT,
            check=True,
        )
        return results.read(path)


def main() -> None:
    """Parse the command line, measure, and write JSON, table and plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument(
        "--operation", action="append", choices=OPERATIONS, help="default: per case"
    )
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="default: 1")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="per row")
    parser.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="of products of float32, see torch.set_float32_matmul_precision",
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.json")
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON only")
    args = parser.parse_args()
    output = args.output or results.FOLDER / f"{args.device}.json"
    start = time.perf_counter()
    torch.set_float32_matmul_precision(args.precision)
    if len(args.threads) == 1:
        use_threads(args.threads[0])
        chosen = selection(args.case, args.operation, args.device)
        peers = args.peer or list(PEERS)
        report = run(chosen, peers, args.seconds, args.device, lambda part: part.write(output))
    else:
        common = ["--device", args.device, "--seconds", str(args.seconds)]
        common += ["--precision", args.precision]
        for flag in ("case", "operation", "peer"):
            for name in getattr(args, flag) or ():
                common += [f"--{flag}", name]
        report = results.merge(run_apart(common, threads) for threads in args.threads)
    report.settings["command"] = " ".join(["python -m benchmarks.run", *sys.argv[1:]])
    report.settings["total_seconds"] = round(time.perf_counter() - start)
    report.write(output)
    if report.busy:
        print("\nOther work took time from this process: measure again on an idle machine.")
    print(f"\nwritten to {output} after {report.settings['total_seconds']} s")
    if not args.no_pictures:
        from . import plots, table

        output.with_suffix(".md").write_text(table.full(report))
        plots.speedups(report, output.with_suffix(".png"))
        print(f"and {output.with_suffix('.md').name}, {output.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
