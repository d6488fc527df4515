"""Adaptive solves in Triton in which every sample has steps of its own.

A program makes the attempts of its samples in a loop, until all of them have come to their end or
the room for accepted steps is used up; then the host gives more. A sample that has come to its end
goes on being computed for as long as others of its program do, but is not changed any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton
from fmft_fast.kernels import control as device
from fmft_fast.kernels.adaptive import given_numbers, precision_of, with_room
from fmft_fast.kernels.gradients import Gradients
from fmft_fast.kernels.launch import arguments, configs, options, precision
from fmft_fast.kernels.per_sample_source import ROW, rows_backward_kernel, rows_kernel
from torch import Tensor

from fmft_fast.ops.accepted import OUTCOMES
from fmft_fast.ops.network import Inputs, Network
from fmft_fast.ops.trajectory import Control, Keep, PerSampleSolve

# Bytes for which a launch gets room, and bounds of the number of attempts that they hold.
ROOM, FEWEST, MOST = 1 << 25, 16, 1024


@dataclass(frozen=True)
class KeptRows:
    """The steps of all samples, and what the backward pass wants of them.

    Attributes:
        network: the field.
        tableau: the method.
        tensors: what went in.
        rows: [numbers of `ROW`, batch] float64 on the host, at the end.
        log: [steps, 3, batch] float64: where a step starts and ends, and its signed size.
        inputs: [steps stages, batch, state] of the stages; a single one if nothing is kept.
        t0: first time.
    """

    network: Network
    tableau: Any
    tensors: Inputs
    rows: Tensor
    log: Tensor
    inputs: Tensor
    t0: float

    @cached_property
    def accepted(self) -> Tensor:
        """[batch] numbers of accepted steps."""
        return self.rows[ROW.index("accepted")].long()

    @cached_property
    def _on_host(self) -> list[list[list[float]]]:
        return self.log[: int(self.accepted.max())].permute(2, 1, 0).tolist()

    def steps(self, row: int) -> tuple[list[float], list[float]]:
        """The ends [N + 1] of the accepted steps of a row, and their signed sizes [N]."""
        count, (_, ends, sizes) = int(self.accepted[row]), self._on_host[row]
        return [self.t0, *ends[:count]], sizes[:count]

    def ended(self, row: int) -> tuple[str, float]:
        """How a row ended (see `AdaptiveSolve`), and the error ratio of its last attempt."""
        outcome, ratio = (self.rows[ROW.index(name), row].item() for name in ("outcome", "last"))
        return OUTCOMES[int(outcome)], ratio


def solve(
    network: Network,
    tableau: Any,
    control: Control,
    inputs: Inputs,
    t0: float,
    t1: float,
    keep: Keep,
) -> PerSampleSolve:
    """See `CpuTrajectoryKernels.adaptive_per_sample`."""
    y0, tensors = arguments(network, inputs)
    (batch, width), stages = y0.shape, len(tableau.b)
    how = precision_of(network, control.rtol)
    config = configs("forward", network, how)[0]
    shapes = tuple(tuple(p.shape) for p in inputs.parameters)
    kernel = rows_kernel(network, shapes, stages, config.tile)
    each = stages - 1 if keep != "nothing" else 0
    attempts = min(max(ROOM // (batch * (4 * each * width + 24)), FEWEST), MOST)

    given = given_numbers(replace(control, meet=True), tableau, (t0, t1), width, y0.device)[0]
    y, slopes = y0.clone(), torch.zeros_like(y0)
    rows = given.new_zeros((len(ROW), batch))
    rows[ROW.index("s")] = t0 if t1 >= t0 else -t0
    rows[ROW.index("guess")] = 1.0
    rows[ROW.index("outcome")] = device.RUNNING.value
    log, kept = given.new_empty((0, 3, batch)), y0.new_empty((0, batch, width))
    accepted, phase = 0, device.START.value
    with torch.cuda.device_of(y0):
        while True:
            log = with_room(log, accepted + attempts)
            kept = with_room(kept, (accepted + attempts) * each + 1)
            first = (y, slopes, kept, log, rows, given, batch, attempts, phase, each)
            grid = (triton.cdiv(batch, config.block),)
            kernel[grid](*first, *tensors, **options(config, how))
            found = rows.cpu()  # waits for the device
            outcome = found[ROW.index("outcome")]
            if not bool((outcome == device.RUNNING.value).any()):
                break
            accepted, phase = int(found[ROW.index("accepted")].max()), device.STEP.value
    counts = [found[ROW.index(name)].long() for name in ("accepted", "rejected")]
    failed = (outcome != device.DONE.value).nonzero()
    first = 2 if control.first_step is None else 1
    return PerSampleSolve(
        int(failed[0]) if len(failed) else None,
        y,
        *counts,
        first + (stages - 1) * (counts[0] + counts[1]),
        KeptRows(network, tableau, inputs, found, log, kept, t0),
    )


def backward(kept: KeptRows, grad: Tensor, wanted: Inputs) -> Inputs:
    """See `CpuTrajectoryKernels.backward_per_sample`."""
    network, method = kept.network, kept.tableau.advancing
    y0, tensors = arguments(network, kept.tensors)
    found = Gradients(network, kept.tensors, wanted, 0)
    how = precision("backward", network)
    config = configs("backward", network, how)[0]
    kernel = rows_backward_kernel(network, found.shapes, method.stages, config.tile, found.wanted)
    partials = y0.new_zeros((found.programs(config.block), found.size))
    rows = [[*row, *[0.0] * (method.stages - len(row))] for row in method.a]
    numbers = [*method.c, *(x for row in rows for x in row), *method.b]
    coefficients = torch.tensor(numbers, dtype=torch.float64).to(y0.device)
    counts = kept.accepted.int().to(y0.device)
    first = (found.y0, partials, grad.contiguous(), kept.inputs, coefficients, kept.log, counts)
    steps = int(kept.accepted.max())
    with torch.cuda.device_of(y0):
        kernel[len(partials),](
            *first, y0.shape[0], steps, *found.written, *tensors, **options(config, how)
        )
    return found.collect(partials)
