"""Times as medians over interleaved runs, and memory as the peak of what torch allocates."""

from __future__ import annotations

import functools
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fmft_fast import _cpu

ROUNDS = 10
LEAST_ROUNDS = 4
BATCH_MS = 1.0  # a CUDA sample covers at least so much work


@dataclass(frozen=True)
class Times:
    """Median and 20/80 % quantiles in ms, the number of samples, and the CPU cores in use."""

    ms: float
    ms_20: float
    ms_80: float
    runs: int
    cores: float


def interleave(
    calls: Mapping[str, Callable[[], Any]], seconds: float, device: str = "cpu"
) -> dict[str, Times]:
    """Time all calls in turns, about `seconds` each, so that noise of the machine hits all alike.

    The calls have run once before. Each has a slot in each of 10 rounds (4 where calls take longer
    than their slots). The first run in a slot finds cold caches and is not counted unless it fills
    the slot.
    """
    clock = cuda_sample if device == "cuda" else _cpu_sample
    samples: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, float] = dict.fromkeys(calls, 0.0)
    wall: dict[str, float] = dict.fromkeys(calls, 0.0)
    slot = seconds / ROUNDS
    batch = {}
    for name, call in calls.items():
        batch[name] = 1
        if device == "cuda":
            call()
            batch[name] += int(BATCH_MS / clock(call, 1))
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(ROUNDS):
            if turn >= LEAST_ROUNDS and time.perf_counter() - start > seconds * len(calls):
                break
            for name, call in calls.items():
                begin, cpu_begin = time.perf_counter(), time.process_time()
                found = [clock(call, batch[name])]
                while time.perf_counter() - begin < slot:
                    found.append(clock(call, batch[name]))
                wall[name] += time.perf_counter() - begin
                cpu[name] += time.process_time() - cpu_begin
                samples[name] += found[1:] or found
    finally:
        gc.enable()
    return {name: summarise(samples[name], cpu[name] / wall[name]) for name in calls}


def summarise(samples: list[float], cores: float) -> Times:
    """Median and quantiles of times in ms."""
    low, *_, high = statistics.quantiles(samples, n=5)
    return Times(statistics.median(samples), low, high, len(samples), cores)


def _cpu_sample(call: Callable[[], Any], batch: int) -> float:
    start = time.perf_counter()
    for _ in range(batch):
        call()
    return 1e3 * (time.perf_counter() - start) / batch


def cuda_sample(call: Callable[[], Any], batch: int) -> float:
    """Time of a call on the device in ms, over a batch of calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(batch):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / batch


def peak_memory(run: Callable[[], Any], device: str) -> int:
    """Most bytes alive at once in `run` above those alive before it.

    On the CPU that is the sum of two peaks: of what torch allocates and of what the compiled
    kernels do, with the scratch memory that they hold on to.
    """
    if device != "cuda":
        return peak_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(run: Callable[[], Any]) -> int:
    """`peak_memory` on the CPU."""
    _cpu.reset_memory_peak()
    live, scratch, _ = _cpu.memory_use()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        run()
    # The sequence of allocations has no public name.
    profiler: Any = profile.profiler
    alive = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    ours = _cpu.memory_use()[2] - live
    return peak + (ours + scratch if ours else 0)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep the profiler's own log, which has no switch, from the terminal."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


GEMM_SIZES = ((256, 64, 64), (1024, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048))


def gemm_rate(device: str = "cpu", seconds: float = 0.3) -> float:
    """Best float32 rate of torch.mm here, in FLOP/s."""
    best = 0.0
    for m, k, n in GEMM_SIZES:
        a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        out = torch.empty(m, n, device=device)
        multiply = functools.partial(torch.mm, a, b, out=out)
        best = max(best, 2 * m * k * n / _best_seconds(multiply, seconds, device))
    return best


def copy_rate(device: str = "cpu", seconds: float = 0.3) -> float:
    """Best rate of a copy between arrays far larger than the caches, in bytes/s, both ways."""
    a = torch.ones(1 << 25 if device == "cpu" else 1 << 28, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / _best_seconds(lambda: b.copy_(a), seconds, device)


def _best_seconds(call: Callable[[], Any], seconds: float, device: str) -> float:
    clock = cuda_sample if device == "cuda" else _cpu_sample
    call()
    found = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < end:
        found.append(clock(call, 1))
    return min(found) / 1e3
