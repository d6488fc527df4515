"""Work on a GPU that is recorded once and replayed: a CUDA graph, or why there is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

_enabled: ContextVar[bool | None] = ContextVar("cuda_graphs", default=None)


class CaptureError(Exception):
    """Work cannot be recorded; says why. It never leaves the package."""


class Recorded(Protocol):
    """Recorded work: `replay` repeats it on the same memory and refills `outputs`."""

    outputs: Sequence[Tensor]

    def replay(self) -> None:
        """Do the work once more."""
        ...


class Recorder(Protocol):
    """What records: CUDA graphs, or in tests a double that runs the function again."""

    def record(
        self, work: Callable[[], Sequence[Tensor]], generators: Sequence[torch.Generator] = ()
    ) -> Recorded:
        """Record `work`, which reads and writes memory that stays where it is.

        It runs a few times before; what it returns is read after every replay.

        Args:
            work: takes no arguments, never waits for the device.
            generators: sources of random numbers, besides torch's own, that advance with replays.

        Raises:
            CaptureError: it cannot be recorded.
        """
        ...


@contextmanager
def cuda_graphs(enabled: bool) -> Iterator[None]:
    """Allow or forbid recording and replaying of CUDA graphs in this context.

    The default is to allow it, and to forbid it where FMFT_CUDA_GRAPHS=0 is set.

    Example:
        >>> import torch, fmft_fast
        >>> with fmft_fast.cuda_graphs(False):
        ...     fmft_fast.solve(lambda t, x: -x, torch.ones(1), steps=1).y
        tensor([0.])
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def graphs_allowed() -> bool:
    """Whether graphs may be recorded and replayed here."""
    chosen = _enabled.get()
    return os.environ.get("FMFT_CUDA_GRAPHS", "1") != "0" if chosen is None else chosen


def is_capturing() -> bool:
    """Whether somebody is recording the present stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def find_recorder(device: torch.device) -> Recorder | None:
    """The recorder of a device, if it has one and may be used."""
    if device.type != "cuda" or not graphs_allowed() or is_capturing():
        return None
    return CudaRecorder(device)


class CudaRecorder:
    """Records CUDA graphs on a stream of its own."""

    WARM_UP = 2

    def __init__(self, device: torch.device):
        self.device = device

    def record(
        self, work: Callable[[], Sequence[Tensor]], generators: Sequence[torch.Generator] = ()
    ) -> Recorded:
        """See `Recorder`."""
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            stream = torch.cuda.Stream()
            stream.wait_stream(before)
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            try:
                self._warm_up(work, stream)
                # Other threads, such as a loader that pins memory, may go on meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    outputs = work()
            except Exception as error:
                self._clean_up(graph, before)
                raise CaptureError(_reason(error)) from error
            before.wait_stream(stream)
        return _CudaGraph(graph, outputs)

    def _warm_up(self, work: Callable[[], Sequence[Tensor]], stream: torch.cuda.Stream) -> None:
        """Run what libraries do only once, then refuse what waits for the device."""
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                work()
            try:
                # So that a wait is found here: inside a capture it would spoil that first.
                torch.cuda.set_sync_debug_mode("error")
                work()
            finally:
                torch.cuda.set_sync_debug_mode(mode)

    def _clean_up(self, graph: torch.cuda.CUDAGraph, before: torch.cuda.Stream) -> None:
        """Leave stream and allocator as if nothing had been recorded.

        After a spoiled capture torch stays on the stream of the capture, and its allocator goes on
        as if the capture did, too.
        """
        torch.cuda.set_stream(before)
        with suppress(RuntimeError):
            end: Any = torch._C._cuda_endAllocateToPool  # pyright: ignore
            end(torch.cuda.current_device(), graph.pool())
        with suppress(RuntimeError):
            torch.cuda.synchronize()


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Tensor]):
        self.graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self.graph.replay()


def _reason(error: BaseException) -> str:
    """The first line of an error or, where a capture hid it, of the one that came before."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    lines = str(first).strip().splitlines()
    return f"{type(first).__name__}: {lines[0] if lines else 'no message'}"
