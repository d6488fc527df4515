"""Work on a GPU that is recorded once and replayed: a CUDA graph, or why there is none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.capture import is_capturing

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
        self,
        work: Callable[[], Sequence[Tensor]],
        generators: Sequence[torch.Generator] = (),
        *,
        rehearse: bool = True,
    ) -> Recorded:
        """Record `work`, which reads and writes memory that stays where it is.

        What it returns is read after every replay.

        Args:
            work: takes no arguments, never waits for the device.
            generators: sources of random numbers, besides torch's own, that advance with replays.
            rehearse: run the work a few times before; else that has been done, on this stream.

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
        self,
        work: Callable[[], Sequence[Tensor]],
        generators: Sequence[torch.Generator] = (),
        *,
        rehearse: bool = True,
    ) -> Recorded:
        """See `Recorder`."""
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            # What was rehearsed on a stream is recorded there; the default one cannot be.
            own = rehearse or before == torch.cuda.default_stream()
            stream = torch.cuda.Stream() if own else before
            stream.wait_stream(before)
            pool = torch.cuda.graph_pool_handle()
            try:
                if rehearse:
                    self._warm_up(work, stream)
                graph, outputs = self._capture(work, stream, pool, generators)
            except Exception as error:
                self._clean_up(before, stream, pool, generators)
                raise CaptureError(_reason(error)) from error
            before.wait_stream(stream)
        return _CudaGraph(graph, outputs)

    def _capture(
        self,
        work: Callable[[], Sequence[Tensor]],
        stream: torch.cuda.Stream,
        pool: Any,
        generators: Sequence[torch.Generator],
    ) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # Other threads, such as a loader that pins memory, may go on meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            outputs = work()
        return graph, outputs

    def _warm_up(self, work: Callable[[], Sequence[Tensor]], stream: torch.cuda.Stream) -> None:
        """Run what libraries do only once, then refuse what waits for the device."""
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                work()
            try:
                # So that a wait is found here: inside a capture it would spoil that first.
                _react_to_waits("error")
                work()
            finally:
                _react_to_waits(mode)

    def _clean_up(
        self,
        before: torch.cuda.Stream,
        stream: torch.cuda.Stream,
        pool: Any,
        generators: Sequence[torch.Generator],
    ) -> None:
        """Leave stream, allocator and generators as if nothing had been recorded.

        After a spoiled capture torch stays on the stream of the capture, and its allocator and its
        generators go on as if the capture did, too; a capture that ends well ends theirs.
        """
        torch.cuda.set_stream(before)
        inside: Any = torch._C
        before_2_8 = "_cuda_endAllocateCurrentStreamToPool"
        with suppress(RuntimeError, AttributeError):
            end = getattr(inside, "_cuda_endAllocateToPool", None) or getattr(inside, before_2_8)
            end(torch.cuda.current_device(), pool)
        with suppress(RuntimeError):
            torch.cuda.synchronize()
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty graph
            self._capture(lambda: [], stream, torch.cuda.graph_pool_handle(), generators)
        torch.cuda.set_stream(before)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Tensor]):
        self.graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self.graph.replay()


def _react_to_waits(how: int | str) -> None:
    """Choose what torch does at a wait for the device; it warns once that this is a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(how)


@contextmanager
def watch_waits(device: torch.device) -> Iterator[list[str]]:
    """Collect what torch says about waits for a device inside; elsewhere there are none."""
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    mode = torch.cuda.get_sync_debug_mode()
    _react_to_waits("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield waits
        finally:
            _react_to_waits(mode)
    for warning in caught:
        text = str(warning.message)
        if "called a synchronizing" in text:
            waits.append(text.splitlines()[0])
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _reason(error: BaseException) -> str:
    """The first line of an error or, where a capture hid it, of the one that came before."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    lines = str(first).strip().splitlines()
    return f"{type(first).__name__}: {lines[0] if lines else 'no message'}"
