"""Solves layer by layer on a GPU: each way recorded once as a CUDA graph, and replayed.

Layer by layer a solve is hundreds of launches, which cost a host more than all but very wide
fields cost the device. The first solve of a kind runs as usual; the second one is recorded, forward
as a whole and backward as a whole, and from then on each is one launch. Of a kind are solves that
share everything that a recording holds fixed: the steps, shapes, dtypes, strides, which gradients
are wanted, the memory of parameters, precision settings, stream and thread.

A recording reads parameters where they lie, so that it sees what an optimiser does to them, and
holds on to none of them; all else that goes into a solve is copied into memory of its own, and what
comes out is copied from there. What the backward pass needs stays in the recording, too, until the
next replay: as long as a solve waits for its backward pass, others of its kind run as usual. A
second backward pass (retain_graph=True) that comes after the next replay solves again.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..fusion import Plan
from ..ops.backend import LAYERED
from ..ops.network import Inputs, Network
from ..ops.trajectory import (
    Keep,
    Program,
    RecordableKernels,
    TrajectoryKernels,
    flatten,
    rebuild,
)
from .recorder import CaptureError, Recorder, find_recorder
from .recordings import Recordings, autocast, layout, settings, stream_of

# Most recorded solves, and most bytes that they may hold all together. A solve that would hold more
# by itself runs as usual: its layers are so large that launches matter little.
LIMIT = 16
MOST_HELD = 1 << 30
PATIENCE = 64
# Backward passes recorded for one forward pass; they differ in the thread, or in autocast.
BACKWARDS = 2

_cache = Recordings(LIMIT, MOST_HELD, PATIENCE)


def clear() -> None:
    """Drop all recorded solves and their memory."""
    _cache.clear()


def with_recordings(
    kernels: TrajectoryKernels, plan: Plan, device: torch.device
) -> TrajectoryKernels:
    """The kernels of a solve; those that go layer by layer are replayed where that is possible."""
    if kernels.name != LAYERED:
        return kernels
    recorder = find_recorder(device)
    if recorder is None:
        return kernels
    return RecordedKernels(cast(RecordableKernels, kernels), recorder, plan)


class RecordedKernels:
    """Kernels whose solves are recorded; see the module and `TrajectoryKernels`.

    Args:
        kernels: what is recorded.
        recorder: of the device.
        plan: the field; what is recorded of it goes when it goes.
    """

    def __init__(self, kernels: RecordableKernels, recorder: Recorder, plan: Plan):
        self.kernels, self.recorder, self.plan = kernels, recorder, plan
        self.name = kernels.name

    def refuses(self, network: Network, stages: int, batch: int, dtype: torch.dtype) -> str | None:
        """See `TrajectoryKernels`."""
        return self.kernels.refuses(network, stages, batch, dtype)

    def forward(self, program: Program, inputs: Inputs, keep: Keep) -> tuple[Tensor, Any]:
        """See `TrajectoryKernels`."""
        kind = self._kind(program, inputs, keep)
        size = None if kind is None else _cache.seen.get(kind)
        if size is not None:
            solve = self._recorded(kind, size, program, inputs, keep)
            replayed = None if solve is None else solve.forward(inputs)
            if replayed is not None:
                return replayed
        out, kept = self.kernels.forward(program, inputs, keep)
        if kind is not None and size is None:
            assert inputs.y0 is not None
            _cache.note(kind, self.kernels.working_bytes(program, inputs.y0, keep))
        return out, kept

    def backward(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """See `TrajectoryKernels`."""
        if isinstance(kept, Ticket):
            solve = kept.solve
            with solve.lock:
                kept.waits = False
                if solve.holds(kept):
                    part = self._recorded_backward(solve, inputs, grad, wanted)
                    if part is not None:
                        return part.replay(grad)
                    return self.kernels.backward(program, inputs, solve.kept, grad, wanted)
            _, kept = self.kernels.forward(program, inputs, solve.keep)
        return self.kernels.backward(program, inputs, kept, grad, wanted)

    def _kind(self, program: Program, inputs: Inputs, keep: Keep) -> tuple | None:
        """What solves have in common that may share a recording; None if this one has none."""
        flat = flatten(inputs)
        if self.plan in _cache.failed or any(type(x) not in (Tensor, nn.Parameter) for x in flat):
            return None
        wants = None if keep == "nothing" else tuple(x.requires_grad for x in flat)
        layouts = tuple(map(layout, flat))
        number = _cache.know(self.plan)
        return number, program.digest, keep, layouts, tuple(_addresses(inputs)), wants

    def _recorded(
        self, kind: Any, size: int, program: Program, inputs: Inputs, keep: Keep
    ) -> RecordedSolve | None:
        """The recording of a kind; None without room for it, and after a failure."""
        assert inputs.y0 is not None
        device = inputs.y0.device
        key = (*kind, settings(device), autocast(device))

        def make() -> RecordedSolve:
            return RecordedSolve(self.kernels, self.recorder, program, inputs, keep)

        try:
            return _cache.get(key, make, size)
        except CaptureError as error:
            self._give_up(error)
            return None

    def _recorded_backward(
        self, solve: RecordedSolve, inputs: Inputs, grad: Tensor, wanted: Inputs
    ) -> RecordedBackward | None:
        """The recording of a backward pass; None if this one has none."""
        recorder = find_recorder(grad.device)
        if recorder is None or self.plan in _cache.failed or not solve.reads(inputs):
            return None
        key = (tuple(flatten(wanted)), settings(grad.device), autocast(grad.device))
        if key not in solve.backwards:
            if len(solve.backwards) >= BACKWARDS:
                return None
            try:
                part = RecordedBackward(self.kernels, recorder, solve, inputs, grad, wanted)
            except CaptureError as error:
                self._give_up(error)
                return None
            solve.backwards[key] = part
        return solve.backwards[key]

    def _give_up(self, error: CaptureError) -> None:
        _cache.give_up(self.plan, "a field that is solved layer by layer", error)


class Ticket:
    """A replayed solve's right to what the recording keeps for its backward pass.

    Attributes:
        solve: the recording.
        number: of the replay.
        waits: whether there was no backward pass yet.
    """

    def __init__(self, solve: RecordedSolve, number: int):
        self.solve, self.number = solve, number
        self.waits = True


class RecordedSolve:
    """A recorded forward pass, the memory that it reads, and the backward passes that follow it.

    Attributes:
        keep: see `TrajectoryKernels`.
        kept: what the kernels keep, refilled by every replay.
        own: for every tensor of the solve the memory that it is copied to, None for parameters
            that are read where they lie.
        backwards: the recorded backward passes.
        lock: for whoever replays.
    """

    keep: Keep

    def __init__(
        self,
        kernels: TrajectoryKernels,
        recorder: Recorder,
        program: Program,
        inputs: Inputs,
        keep: Keep,
    ):
        y0 = inputs.y0
        assert y0 is not None
        self.device, self.keep = y0.device, keep
        self.program = program.with_times_on(y0.device, y0.dtype)
        self.addresses = _addresses(inputs)
        self.own = [
            x.detach().clone() if address is None else None
            for x, address in zip(flatten(inputs), self.addresses, strict=True)
        ]
        self.lock = threading.RLock()
        self.stream = stream_of(self.device)
        self.replays = 0
        self.latest: Any = lambda: None
        self.backwards: dict[Any, RecordedBackward] = {}
        program, fixed, found = self.program, self.bind(inputs), []

        def work() -> list[Tensor]:
            found.clear()  # the memory of a rehearsal
            out, kept = kernels.forward(program, fixed, keep)
            found.append(kept)
            return [out, *_tensors_of(kept)]

        self.recorded = recorder.record(work)
        self.kept = found[0]  # of the run that was recorded, the last one

    def bind(self, inputs: Inputs) -> Inputs:
        """The tensors as a recording reads them."""
        pairs = zip(flatten(inputs), self.own, strict=True)
        return rebuild(inputs, [x.detach() if own is None else own for x, own in pairs])

    def reads(self, inputs: Inputs) -> bool:
        """Whether the parameters still lie where the recording reads them."""
        pairs = zip(flatten(inputs), self.addresses, strict=True)
        return all(address is None or x.data_ptr() == address for x, address in pairs)

    def holds(self, ticket: Ticket) -> bool:
        """Whether what was kept for a solve is there still, and safe from replays meanwhile."""
        return ticket.number == self.replays and stream_of(self.device) == self.stream

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> tuple[Tensor, Ticket | None] | None:
        """The outputs, and a ticket if something is kept; None while a solve waits for that."""
        with self.lock:
            latest: Ticket | None = self.latest()
            if latest is not None and latest.waits:
                return None
            self.replays += 1
            pairs = zip(self.own, flatten(inputs), strict=True)
            given = [x for own, x in pairs if own is not None]
            _copy([own for own in self.own if own is not None], given)
            self.recorded.replay()
            out = self.recorded.outputs[0].clone()
            if self.keep == "nothing":
                return out, None
            ticket = Ticket(self, self.replays)
            self.latest = weakref.ref(ticket)
            return out, ticket


class RecordedBackward:
    """A recorded backward pass; it reads what a `RecordedSolve` has kept."""

    def __init__(
        self,
        kernels: TrajectoryKernels,
        recorder: Recorder,
        solve: RecordedSolve,
        inputs: Inputs,
        grad: Tensor,
        wanted: Inputs,
    ):
        own = self.grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
        own.copy_(grad)
        self.wanted = wanted
        fixed, program, kept = solve.bind(inputs), solve.program, solve.kept

        def work() -> list[Tensor]:
            grads = flatten(kernels.backward(program, fixed, kept, own, wanted))
            return [g for g in grads if g is not None]

        self.recorded = recorder.record(work)

    @torch.no_grad()
    def replay(self, grad: Tensor) -> Inputs:
        """The gradients of what is wanted from that of the outputs."""
        self.grad.copy_(grad)
        self.recorded.replay()
        found = list(map(torch.empty_like, self.recorded.outputs))
        _copy(found, list(self.recorded.outputs))
        each = iter(found)
        return rebuild(self.wanted, [next(each) if w else None for w in flatten(self.wanted)])


def _addresses(inputs: Inputs) -> list[int | None]:
    """Where the parameters lie that are read in place; None for all other tensors.

    What is computed anew for every solve is no `Parameter`, and lies elsewhere each time.
    """
    last = len(inputs.parameters)
    return [
        x.data_ptr() if 0 < i <= last and type(x) is nn.Parameter else None
        for i, x in enumerate(flatten(inputs))
    ]


def _tensors_of(kept: Any) -> list[Tensor]:
    """The tensors that the kernels keep for a backward pass."""
    if kept is None:
        return []
    return [kept] if isinstance(kept, Tensor) else kept.tensors()


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """Copy tensors in as few launches as possible."""
    torch._foreach_copy_(to, source)  # pyright: ignore[reportPrivateImportUsage]
