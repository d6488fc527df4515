"""Solves with step control by the CUDA kernels: the room they need, and what they have accepted."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmft_fast.ops.accepted import OUTCOMES
from fmft_fast.ops.network import Inputs, Network
from fmft_fast.ops.trajectory import Control, Program

# `Progress` of csrc/cuda/trajectory.h, and what it begins with.
PROGRESS = struct.Struct("dddqqiiixxxx")
BEGUN, ON_ITS_WAY = len(OUTCOMES), len(OUTCOMES) + 1
# Bytes for which a launch gets room, and bounds of the number of steps that they hold.
ROOM, FEWEST, MOST = 1 << 26, 4, 1024


class Progress:
    """How far solves have come, in tensors [R] on the host, one number for each of them.

    Args:
        table: [R, 56] bytes of `PROGRESS`.
    """

    def __init__(self, table: Tensor):
        reals, longs, shorts = (table.view(x) for x in (torch.float64, torch.int64, torch.int32))
        self.ratio, self.rejected = reals[:, 2], longs[:, 4]
        self.accepted, self.outcome = shorts[:, 10], shorts[:, 12]


class Steps(NamedTuple):
    """The steps of a solve, all rows alike (R = 1), or of every row (R = batch).

    Attributes:
        progress: of R solves, at the end.
        nodes: [N + 1, R] float64 on the device: where steps begin, and the end of the last one.
        sizes: [N, R] float64 on the device, signed; 0 where a row has no step.
        inputs: [N stages, batch, state] of the stages, or None.
    """

    progress: Progress
    nodes: Tensor
    sizes: Tensor
    inputs: Tensor | None


class Kept(NamedTuple):
    """What a backward pass wants besides its program.

    Attributes:
        inputs: [steps stages, batch, state] of the stages.
        split: bf16 terms of a number in the products.
        row_times: [steps stages, batch] float32 where samples have steps of their own, else None.
        row_h: [steps, batch] float32, likewise; 0 where a sample has no step.
    """

    inputs: Tensor
    split: int
    row_times: Tensor | None = None
    row_h: Tensor | None = None

    def rows(self, at: slice) -> Kept:
        """The part that belongs to some samples."""
        parts = (x if x is None else x[:, at].contiguous() for x in (self.row_times, self.row_h))
        return Kept(self.inputs[:, at].contiguous(), self.split, *parts)


@dataclass(frozen=True)
class KeptRows:
    """What the backward pass of a solve with steps of the samples' own wants."""

    network: Network
    tableau: Any
    tensors: Inputs
    split: int
    found: Steps

    @cached_property
    def _on_host(self) -> tuple[Tensor, Tensor]:
        return self.found.nodes.cpu(), self.found.sizes.cpu()

    def steps(self, row: int) -> tuple[list[float], list[float]]:
        """The ends [N + 1] of the accepted steps of a row, and their signed sizes [N]."""
        (nodes, sizes), count = self._on_host, int(self.found.progress.accepted[row])
        return nodes[: count + 1, row].tolist(), sizes[:count, row].tolist()

    def ended(self, row: int) -> tuple[str, float]:
        """How a row ended (see `AdaptiveSolve`), and the error ratio of its last attempt."""
        progress = self.found.progress
        return OUTCOMES[int(progress.outcome[row])], float(progress.ratio[row])

    def replay(self) -> tuple[Program, Kept]:
        """The steps as a backward pass takes them."""
        method, (_, nodes, sizes, inputs) = self.tableau.advancing, self.found
        assert inputs is not None
        none = torch.zeros(len(sizes), method.stages, dtype=torch.float64)
        program = Program(self.network, method.a, method.b, none, none[:, 0], (len(sizes),))
        times = [nodes[1:] if c == 1 else nodes[:-1] + c * sizes for c in method.c]
        row_times = torch.stack(times, 1).flatten(0, 1).float()
        return program, Kept(inputs, self.split, row_times, sizes.float())


def take_steps(
    binding: Any,
    launch: Callable[..., None],
    tableau: Any,
    control: Control,
    y0: Tensor,
    t: list[float],
    kept_stages: int,
    by_row: bool,
    blocks: int,
) -> Steps:
    """Launch until all is done; every launch is followed by one wait for the device.

    Args:
        binding: the compiled module.
        launch: takes the control, the stage inputs or None, and what `trajectory_adaptive` takes
            from `log` to `room`.
        tableau: whose last stage is the first of the next step.
        control: tolerances and bounds.
        y0: [batch, state].
        t: times of the output.
        kept_stages: how many stages of a step have their inputs kept.
        by_row: whether every row has steps of its own.
        blocks: of a launch.
    """
    direction = 1 if t[-1] >= t[0] else -1
    batch, state = y0.shape
    rows = batch if by_row else 1
    begin = bytearray(PROGRESS.pack(direction * t[0], 0.0, 0.0, 0, 0, 0, 1, BEGUN))
    progress = torch.frombuffer(begin, dtype=torch.uint8).to(y0.device).repeat(rows, 1)
    times = torch.tensor(t, dtype=torch.float64).to(y0.device)
    states = y0.new_empty(4 * y0.numel())
    partials = y0.new_empty(4 * blocks, dtype=torch.float64)
    first = math.nan if control.first_step is None else control.first_step
    bounds = [control.rtol, control.atol, control.safety, control.ifactor, control.dfactor]
    numbers = [control.max_num_steps, tableau.order, direction, control.meet, kept_stages, len(t)]
    device_control = binding.Control(
        [*bounds, control.min_step, control.max_step, first],
        [int(x) for x in numbers],
        tableau.c,
        tableau.b_err,
        tableau.dense,
        [x.data_ptr() for x in (times, progress, states, partials)],
    )
    room = ROOM // (4 * kept_stages * batch * state + 16 * rows)
    room = min(max(room, FEWEST), MOST)
    nodes: list[Tensor] = []
    sizes: list[Tensor] = []
    inputs: list[Tensor] = []
    taken = 0
    while True:
        ends = y0.new_empty(room + 1, rows, dtype=torch.float64)
        # A row that ended where a launch did has its end there.
        ends[0].copy_(nodes[-1][room]) if nodes else ends.fill_(direction * t[0])
        nodes.append(ends)
        sizes.append(y0.new_zeros(room, rows, dtype=torch.float64))
        kept = y0.new_empty(room * kept_stages, batch, state) if kept_stages else None
        log = [nodes[-1].data_ptr(), sizes[-1].data_ptr()]
        launch(device_control, kept, log, taken, room)
        found = Progress(progress.cpu())
        last = int(found.accepted.max()) - taken
        if kept is not None:
            # A copy, so that the room that was too much does not live as long as the solve.
            inputs.append(kept if last == room else kept[: last * kept_stages].clone())
        if not (found.outcome == ON_ITS_WAY).any():
            break
        taken += room
    whole = [*(x[:room] for x in nodes[:-1]), nodes[-1][: last + 1]]
    return Steps(
        found,
        direction * _joined(whole),
        direction * _joined([*sizes[:-1], sizes[-1][:last]]),
        _joined(inputs) if inputs else None,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
