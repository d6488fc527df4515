"""Recorders that need no GPU: they run the work, or its operations, again on the same memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmft_fast.solvers import graphs, recorded_solve
from fmft_fast.solvers.recorder import CaptureError, graphs_allowed


class Rerun:
    """Recorded work of `Double`."""

    def __init__(self, double, work):
        self.double, self.work, self.outputs = double, work, work()

    def replay(self):
        self.double.replays += 1
        for out in self.outputs:
            out.fill_(torch.nan)
        for out, new in zip(self.outputs, self.work(), strict=True):
            out.copy_(new)


class Double:
    """See the module; `reason` lets every recording fail."""

    def __init__(self):
        self.records = self.replays = 0
        self.reason = None

    def record(self, work, generators=(), *, rehearse=True):
        if self.reason:
            raise CaptureError(self.reason)
        self.records += 1
        self.generators = generators
        if rehearse:
            work()
        return Rerun(self, work)


class Operations(TorchDispatchMode):
    """Repeats the operations of recorded work and nothing of its Python, as a CUDA graph does."""

    def __init__(self, double, work):
        super().__init__()
        self.double, self.calls = double, []
        with self:
            self.outputs = work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Its argument has another shape afterwards.
        again = (args[0].detach(), *args[1:]) if func.__name__.startswith("squeeze_") else args
        out = func(*args, **kwargs)
        self.calls.append((func, again, kwargs, [x.detach() for x in tree_leaves(out)]))
        return out

    def replay(self):
        self.double.replays += 1
        for out in self.outputs:
            out.fill_(torch.nan)
        for func, args, kwargs, outputs in self.calls:
            given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for out, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                if _memory(out) not in given:
                    out.copy_(new)


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def double(monkeypatch):
    """Every device records by a double, from an empty cache."""
    double = Double()
    for module in (graphs, recorded_solve):
        module.clear()
        monkeypatch.setattr(module, "find_recorder", lambda _: double if graphs_allowed() else None)
    yield double
    for module in (graphs, recorded_solve):
        module.clear()


@pytest.fixture
def operations(double, monkeypatch):
    """The double repeats operations."""

    def record(work, generators=(), *, rehearse=True):
        double.records += 1
        work()
        return Operations(double, work)

    monkeypatch.setattr(double, "record", record)
    return double
