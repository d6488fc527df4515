"""What the tests of the kernels for the CPU share."""

from __future__ import annotations

import pytest
import torch
from ops.kernel_sets import instruction_set


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    with instruction_set(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
