"""`python -m benchmarks.latency`: how long a robot waits for its next actions.

One decision of a policy at batch 1, from observations to actions in the units of the data, given
its noise: `FlowPolicy.predict_action` and the same decision around other solvers, which do not
check their input. Peers take turns in one process with the same weights; one whose actions are not
those of a loop in float64 reports no time. A turn is ten calls after one that is not counted; each
call is timed by itself and, on a GPU, ends when the device is done. Garbage is collected between
turns only, so that it is charged to nobody. On a machine that is busy with other work the table has
the CPU time of a call instead, which leaves out the waiting but not what the others do to caches.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmft_fast.data import Normalizer
from fmft_fast.policies import FlowPolicy, PolicyConfig

from . import check, machine, results, table
from .peers import BASELINE, NotApplicable
from .run import use_threads

Decision = Callable[[Tensor, Tensor], Tensor]  # of observations and noise
SIZES: dict[str, Any] = {"obs_dim": 20, "action_dim": 2}  # of Push-T; 16 actions, 8 executed
POLICIES = {
    "mlp": PolicyConfig(**SIZES),
    "unet": PolicyConfig(**SIZES, network="unet", network_options={"channels": (64, 128)}),
}
STEPS = (1, 4, 16)
CALLS, SECONDS = 3000, 20.0
TURN = 10  # counted calls
LEAST_CALLS = 100
START, END = "<!-- latency table: python -m benchmarks.latency -->", "<!-- end of the latencies -->"


@dataclass(frozen=True)
class Latency:
    """A peer's decisions with one policy and number of steps.

    Attributes:
        policy, steps, peer: what was timed.
        reason: why there is no time; None if there is one.
        error: of the actions, relative to float64.
        least_us, median_us, p99_us: least, median and 99th percentile in microseconds.
        cpu_us: median of the CPU time in microseconds.
        calls: timed calls.
        cores: CPU time over wall time.
    """

    policy: str
    steps: int
    peer: str
    reason: str | None = None
    error: float | None = None
    least_us: float | None = None
    median_us: float | None = None
    p99_us: float | None = None
    cpu_us: float | None = None
    calls: int | None = None
    cores: float | None = None


def make_policy(config: PolicyConfig, device: str) -> FlowPolicy:
    """A policy with random weights and normalisers, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        obs, action = (
            Normalizer(1 + torch.rand(n), torch.randn(n))
            for n in (config.obs_dim, config.action_dim)
        )
        policy = FlowPolicy(config, obs, action).eval()
        for weight in policy.network.parameters():
            if weight.ndim > 1 and not weight.any():  # a block that begins as nothing
                torch.nn.init.xavier_normal_(weight)
    return policy.to(device)


def make_data(policy: FlowPolicy) -> tuple[Tensor, Tensor]:
    """Observations [1, n_obs, obs_dim] and noise [1, horizon, action_dim]."""
    config, random = policy.config, torch.Generator().manual_seed(1)
    obs = torch.randn(1, config.n_obs, config.obs_dim, generator=random)
    noise = torch.randn(1, config.horizon, config.action_dim, generator=random)
    like = next(policy.parameters())
    return obs.to(like), noise.to(like)


def ours(policy: FlowPolicy, steps: int) -> Decision:
    def decide(obs: Tensor, noise: Tensor) -> Tensor:
        return policy.predict_action({"obs": obs}, steps=steps, noise=noise)["action"]

    return decide


def around(policy: FlowPolicy, solver: Callable[[Tensor, Tensor], Tensor]) -> Decision:
    """A decision, with the solver of (x0, cond) in its middle."""
    config = policy.config
    shape, now = (1, config.horizon, config.action_dim), config.n_obs - 1

    def decide(obs: Tensor, noise: Tensor) -> Tensor:
        cond = policy.obs_normalizer.normalise(obs).flatten(1)
        x1 = solver(noise.reshape(1, *config.state), cond)
        sequence = policy.action_normalizer.restore(x1.reshape(shape))
        return sequence[:, now : now + config.n_action]

    return decide


def drop_in(policy: FlowPolicy, steps: int) -> Decision:
    odeint = importlib.import_module("torchdiffeq").odeint
    network, like = policy.network, next(policy.parameters())
    times = torch.linspace(0, 1, steps + 1, dtype=like.dtype, device=like.device)

    def solver(x0: Tensor, cond: Tensor) -> Tensor:
        return odeint(lambda t, x: network(t, x, cond), x0, times, method="euler")[-1]

    return torch.no_grad()(around(policy, solver))


def loop(policy: FlowPolicy, steps: int) -> Decision:
    """Euler steps in plain Python."""
    network, like = policy.network, next(policy.parameters())
    times = (torch.arange(steps) / steps).to(like).unbind()

    def solver(x: Tensor, cond: Tensor) -> Tensor:
        for t in times:
            x = torch.add(x, network(t, x, cond), alpha=1 / steps)
        return x

    return around(policy, solver)


def plain_loop(policy: FlowPolicy, steps: int) -> Decision:
    return torch.no_grad()(loop(policy, steps))


def compiled_loop(policy: FlowPolicy, steps: int, mode: str | None = None) -> Decision:
    """The whole decision in one graph."""
    torch._dynamo.reset()  # compiled functions of earlier rows count against its limits
    decide = torch.compile(loop(policy, steps), mode=mode, fullgraph=True, dynamic=False)
    return torch.no_grad()(decide)


def compiled_loop_reduced(policy: FlowPolicy, steps: int) -> Decision:
    if next(policy.parameters()).device.type != "cuda":
        raise NotApplicable("CUDA graphs need a CUDA device")
    decide = compiled_loop(policy, steps, "reduce-overhead")

    def step(obs: Tensor, noise: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return decide(obs, noise)

    return step


OURS = "fmft_fast predict_action"
PEERS: dict[str, Callable[[FlowPolicy, int], Decision]] = {
    OURS: ours,
    BASELINE: drop_in,
    "plain loop": plain_loop,
    "torch.compile": compiled_loop,
    "torch.compile reduce-overhead": compiled_loop_reduced,
}


def prepare(
    policy: FlowPolicy, exact: Tensor, steps: int, peer: str
) -> tuple[Callable[[], Tensor] | None, dict[str, Any]]:
    """A call that is right, or None, and what its row says so far."""
    obs, noise = make_data(policy)
    try:
        decide = PEERS[peer](policy, steps)
        for _ in range(3):  # what is recorded is recorded in the second call
            found = decide(obs, noise).clone()
    except NotApplicable as reason:
        return None, {"reason": f"not applicable: {reason}"}
    except ImportError as error:
        return None, {"reason": f"not installed: {error}"}
    except Exception as error:  # a rival that fails is a result
        return None, {"reason": f"failed: {type(error).__name__}: {str(error)[:200]}"}
    error = check.relative(check.flat([found]), check.flat([exact]))
    if not error <= (bound := check.BOUNDS["fixed"]["forward"]):
        reason = f"wrong: error {error:.1e}, expected at most {bound:.0e}"
        return None, {"reason": reason, "error": error}
    return functools.partial(decide, obs, noise), {"error": error}


def take_turns(
    calls: Mapping[str, Callable[[], Any]], count: int, seconds: float, device: str
) -> dict[str, dict[str, Any]]:
    """Time each call so often, or for so many seconds but a hundred times at least."""
    finish = torch.cuda.synchronize if device == "cuda" else _nothing
    samples, shares = ({name: [] for name in calls} for _ in range(2))
    busy, wall = (dict.fromkeys(calls, 0.0) for _ in range(2))
    clock, cpu = time.perf_counter, time.process_time
    gc.collect()
    gc.disable()
    try:
        for turn in range(-(-count // TURN)):
            if TURN * turn >= LEAST_CALLS and sum(wall.values()) > seconds * len(calls):
                break
            gc.collect(0)
            for name, call in calls.items():
                begin, cpu_begin = clock(), cpu()
                call()
                for _ in range(TURN):
                    finish()
                    cpu_start, start = cpu(), clock()
                    call()
                    finish()
                    samples[name].append(clock() - start)
                    shares[name].append(cpu() - cpu_start)
                wall[name] += clock() - begin
                busy[name] += cpu() - cpu_begin
    finally:
        gc.enable()
    return {
        name: {
            "least_us": 1e6 * min(found),
            "median_us": 1e6 * statistics.median(found),
            "p99_us": 1e6 * statistics.quantiles(found, n=100)[98],
            "cpu_us": 1e6 * statistics.median(shares[name]),
            "calls": len(found),
            "cores": busy[name] / wall[name],
        }
        for name, found in samples.items()
    }


def _nothing() -> None:
    """Wait for no device."""


def time_policy(
    name: str, config: PolicyConfig, steps: int, device: str, calls: int, seconds: float
) -> list[Latency]:
    """The rows of all peers with one policy and number of steps."""
    policy = make_policy(config, device)
    obs, noise = make_data(policy)
    exact = copy.deepcopy(policy).double()
    actions = plain_loop(exact, steps)(obs.double(), noise.double())
    right: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for peer in PEERS:
        call, rows[peer] = prepare(policy, actions, steps, peer)
        if call is not None:
            right[peer] = call
    for peer, times in take_turns(right, calls, seconds, device).items():
        rows[peer] |= times
    return [Latency(name, steps, peer, **row) for peer, row in rows.items()]


def run(
    policies: Mapping[str, PolicyConfig],
    steps: Sequence[int],
    calls: int,
    seconds: float,
    device: str = "cpu",
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Time everything; what is found so far goes to `keep` after every number of steps."""
    report: dict[str, Any] = {
        "machine": machine.describe(device),
        "settings": {"threads": torch.get_num_threads(), "calls": calls, "seconds": seconds},
        "policies": {name: config.to_dict() for name, config in policies.items()},
        "rows": [],
    }
    for name, config in policies.items():
        for count in steps:
            for row in time_policy(name, config, count, device, calls, seconds):
                report["rows"].append({k: v for k, v in asdict(row).items() if v is not None})
                print(f"{name:6}{count:3} steps  {row.peer:32}{_cell(row)}", flush=True)
            keep(report)
    return report


def _cell(row: Latency, busy: bool = False) -> str:
    if row.median_us is None or row.p99_us is None or row.cpu_us is None:
        return row.reason or "-"
    if busy:
        return table.short(row.cpu_us)
    return f"{table.short(row.median_us)} / {table.short(row.p99_us)}"


def is_busy(report: dict[str, Any]) -> bool:
    """Whether other work took more than a tenth of the time of a thread: only a trial, then."""
    shares = [row["cores"] for row in report["rows"] if "cores" in row]
    one = report["settings"]["threads"] == 1 and report["machine"]["device"] == "cpu"
    return one and bool(shares) and statistics.median(shares) < 0.9


def readme(report: dict[str, Any]) -> str:
    """The table and where it comes from."""
    rows = [Latency(**row) for row in report["rows"]]
    columns = list(dict.fromkeys((row.policy, row.steps) for row in rows))
    busy = is_busy(report)
    named = [f"{name}, {steps} step{'s' * (steps > 1)}" for name, steps in columns]
    lines = [
        f"| us{' of CPU time: median' if busy else ': median / 99 %'} | {' | '.join(named)} |",
        "|---|" + "---|" * len(columns),
    ]
    for peer in PEERS:
        found = {(row.policy, row.steps): row for row in rows if row.peer == peer}
        if not any(row.median_us for row in found.values()):
            continue
        shown = [_cell(found[key], busy) if key in found else "-" for key in columns]
        cells = ["-" if text.startswith("not ") else text.split(":")[0] for text in shown]
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    source = report["machine"]
    device = source["gpu"]["name"] if source["gpu"] else source["cpu"]["model"]
    threads = report["settings"]["threads"]
    words = f"{threads} thread{'s' * (threads > 1)}, float32, torch {source['packages']['torch']}"
    lines += ["", f"{device} ({source['class']}), {words}, {source['date'][:10]}."]
    return "\n".join(lines) + table.BUSY * busy


def main() -> None:
    """Parse the command line, measure, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--policy", action="append", choices=list(POLICIES), help="default: all")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="default: 1 4 16")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"per row, default {CALLS}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="most per row, about")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/latency-<device>.json")
    parser.add_argument("--update", type=Path, metavar="README", help="rewrite its table")
    parser.add_argument("--table", type=Path, metavar="JSON", help="of these results; measure none")
    args = parser.parse_args()
    if args.table is None:
        use_threads(args.threads)
        output = args.output or results.FOLDER / f"latency-{args.device}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        chosen = {name: POLICIES[name] for name in args.policy or POLICIES}

        def keep(report: dict[str, Any]) -> None:
            report["settings"]["command"] = " ".join(
                ["python -m benchmarks.latency", *sys.argv[1:]]
            )
            output.write_text(json.dumps(report, indent=1) + "\n")

        report = run(chosen, args.steps, args.calls, args.seconds, args.device, keep)
    else:
        report = json.loads(args.table.read_text())
    if args.update is None:
        print(readme(report))
    else:
        old = args.update.read_text(encoding="utf-8")
        new = table.update(old, readme(report), START, END)
        args.update.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
