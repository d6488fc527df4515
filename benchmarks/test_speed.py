"""`pytest benchmarks --benchmark-only` times, `--benchmark-disable` checks correctness only.

The quick selection is below; --all-cases takes everything that `python -m benchmarks.run` does.
"""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, OPERATIONS, Case, Operation
from .peers import PEERS
from .run import prepare, reference_of, selection

pytest.importorskip("pytest_benchmark")

QUICK_CASES = ("small", "policy", "dopri5")
QUICK_PEERS = (
    *("torchdiffeq.odeint", "torchdiffeq.odeint_adjoint", "plain loop"),
    *("fmft_fast.odeint", "fmft_fast.odeint_adjoint", "fmft_fast.solve"),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-cases")
    chosen = selection(None if everything else QUICK_CASES, None, DEVICE)
    rows = [
        pytest.param(case, operation, peer, id=f"{case.name}-{operation}-{peer}")
        for case, operation in chosen
        for peer in (PEERS if everything else QUICK_PEERS)
        if everything or operation != "training"
    ]
    metafunc.parametrize(("case", "operation", "peer"), rows)


def test_speed(benchmark, case: Case, operation: Operation, peer: str) -> None:
    assert case.name in CASES and operation in OPERATIONS
    torch.set_num_threads(1)
    torch._dynamo.reset()
    benchmark.group = f"{case.name} {operation}"
    call, found = prepare(case, operation, peer, reference_of(case, DEVICE), DEVICE)
    if call is None:
        reason = found["reason"]
        (pytest.fail if reason.startswith(("wrong", "failed")) else pytest.skip)(reason)
    benchmark.extra_info.update(found)

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
