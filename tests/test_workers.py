"""Jobs in worker processes hand back what they return, and fail alone."""

from __future__ import annotations

import math

from fmft_fast.workers import Job, run_jobs


def unpicklable():
    return lambda: None


def test_values_come_back_from_processes():
    jobs = [
        Job("root", math.sqrt, (9.0,)),
        Job("odd", unpicklable),
        Job("negative", math.sqrt, (-1.0,)),
        Job("after", math.sqrt, (4.0,), needs=("odd",)),
        Job("list", sorted, ([3, 1],)),
    ]
    ended = {one.job.name: one for one in run_jobs(jobs, 1)}
    assert ended["root"].value == 3.0 and ended["root"].error is None
    assert ended["list"].value == [1, 3]
    assert "cannot be pickled" in ended["odd"].error and ended["odd"].value is None
    assert ended["negative"].error.startswith("ValueError") and ended["negative"].value is None
    assert ended["after"].error == "it needs odd, which failed"
