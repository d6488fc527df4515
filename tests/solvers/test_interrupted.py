"""Ctrl-C ends a solve in one call, however long it would take."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

from fmft_fast import fused, solve
from fmft_fast.ops.backend import backend_report

pytestmark = pytest.mark.skipif(
    not any(s.name == "cpu" and s.available for s in backend_report()),
    reason="the kernels for the CPU are not compiled",
)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("gradient", ["discrete", "none"])
def test_an_adaptive_solve_can_be_interrupted(per_sample, gradient):
    stiff = nn.Linear(2, 2, bias=False)
    stiff.weight.data = -1e5 * torch.eye(2)
    x = torch.ones(64, 2)

    def field(t, x):
        return stiff(x)

    options = {"per_sample": True} if per_sample else {}

    def run(t1):
        tolerances = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}
        with fused("require"):
            found = solve(field, x, 0.0, t1, **tolerances, gradient=gradient, options=options)
        return found.y.detach()

    want = run(1e-3)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    begin = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(1e4)  # takes minutes
    assert time.perf_counter() - begin < 10
    assert run(1e-3).equal(want)
