"""Memory of the discrete adjoint: O(steps x state), not O(steps x activations)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import peak_bytes
from fmft_fast import solve

pytestmark = pytest.mark.usefixtures("step_by_step")

BATCH, DIM, WIDTH = 256, 2, 1024


def wide_field() -> nn.Module:
    net = nn.Sequential(nn.Linear(DIM, WIDTH), nn.Tanh(), nn.Linear(WIDTH, DIM))

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.net(x)

    return Field()


def training_step(steps: int, **kwargs) -> int:
    field, x0 = wide_field(), torch.randn(BATCH, DIM)

    def run() -> None:
        solve(field, x0, steps=steps, **kwargs).y.square().mean().backward()

    run()  # gradient buffers exist from here on
    return peak_bytes(run)


ACTIVATION = BATCH * WIDTH * 4
STATE = BATCH * DIM * 4


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_peak_grows_with_the_state_only(method: str) -> None:
    stages = {"euler": 1, "rk4": 4}[method]
    short, long = (training_step(n, method=method) for n in (8, 64))
    assert long - short <= 2 * (64 - 8) * stages * STATE + STATE
    assert long < 8 * ACTIVATION


def test_backpropagation_grows_with_the_activations() -> None:
    short, long = (training_step(n, gradient="backprop") for n in (8, 64))
    assert long - short > 0.9 * (64 - 8) * ACTIVATION


def test_checkpoints_keep_a_fraction_of_the_states() -> None:
    all_kept = training_step(100, method="rk4")
    few_kept = training_step(100, method="rk4", checkpoint_every=10)
    assert few_kept < all_kept - 0.7 * 100 * 4 * STATE


FRESH = """
import torch
from fmft_fast import fused
from solvers.test_memory import training_step
torch.set_num_threads(1)
with fused("require"):
    print(*(training_step(n, gradient=g) for g in ("discrete", "backprop") for n in (16, 64)))
"""


def test_whole_solves_keep_the_states_and_not_the_activations() -> None:
    # A process of its own: scratch memory and freed blocks stay with a process.
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", FRESH],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert not found.returncode, found.stderr
    short, long, short_graph, long_graph = map(int, found.stdout.split())
    steps = 64 - 16
    assert 0.9 * steps * STATE < long - short < 2 * steps * STATE
    assert long_graph - short_graph > steps * ACTIVATION
