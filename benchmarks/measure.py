"""Times as medians and memory as the peak of what torch allocates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def timed(run: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Median and 20/80 % quantiles in ms over at least 5 runs and about so many seconds."""
    run()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - start))
    low, *_, high = statistics.quantiles(samples, n=5)
    return {"ms": statistics.median(samples), "ms_20": low, "ms_80": high, "runs": len(samples)}


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes alive at once in `run` above those alive before it, as torch allocates them."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    # The sequence of allocations has no public name.
    profiler: Any = profile.profiler
    alive = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak
