"""What every test starts from: fixed seeds, poisoned memory, and a reason for every GPU skip."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fmft_fast import fused


def pytest_configure(config: pytest.Config) -> None:
    """Fill the memory of torch.empty with NaN, so that a result which was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # Whoever starts the tests in the background of a shell has interrupts ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"needs a CUDA device; torch {torch.__version__} sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed all generators before every test."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def step_by_step() -> Iterator[None]:
    """Keep whole-trajectory kernels out of a test of the single steps."""
    with fused("off"):
        yield
