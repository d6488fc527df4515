"""Adaptive solves in Triton: the device controls the steps, the host looks now and then.

An attempt is a launch over the tiles of the batch, and one of a single program that accepts or
rejects it and plans the next one (see `control`). What they hand on lies in memory of the device,
so that the host launches a number of attempts without waiting; those after the end do nothing. A
batch of one tile takes a single launch for as many attempts.

The stages of an attempt are evaluated where those of its step are kept, which a later attempt
overwrites if this one is rejected. The backward pass is that of fixed steps.

Products are in float32 whatever torch allows, unless rtol is 1e-2 or more: rounding to TF32 would
pass for an error of the steps.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
from fmft_fast.kernels import control as device
from fmft_fast.kernels.adaptive_source import attempt_kernel, places
from fmft_fast.kernels.launch import arguments, configs, options, precision
from torch import Tensor

from fmft_fast.ops.accepted import OUTCOMES, accepted_program
from fmft_fast.ops.network import Inputs, Network
from fmft_fast.ops.trajectory import AdaptiveSolve, Control, Keep

COARSE = 1e-2
# Attempts between two looks of the host, at first and at most; they are in one launch if alone.
FIRST_ATTEMPTS, MOST_ATTEMPTS = 8, 64
LOOKED_AT = ("OUTCOME", "ACCEPTED", "REJECTED", "NEXT")
LENGTH = max(device.METHOD.value, device.SLOPE.value + 1)


def solve(
    network: Network,
    tableau: Any,
    control: Control,
    inputs: Inputs,
    t: list[float],
    keep: Keep,
) -> AdaptiveSolve:
    """See `fmft_fast.ops.trajectory.AdaptiveKernels`."""
    y0, tensors = arguments(network, inputs)
    (batch, width), stages = y0.shape, len(tableau.b)
    how = precision_of(network, control.rtol)
    config = configs("forward", network, how)[0]
    shapes = tuple(tuple(p.shape) for p in inputs.parameters)
    kernel = attempt_kernel(network, shapes, stages, config.tile)
    tiles = triton.cdiv(batch, config.block)
    is_alone = tiles == 1
    attempts = MOST_ATTEMPTS if is_alone else FIRST_ATTEMPTS
    # Where all outputs are ends of steps, the last stage serves the error alone.
    each = stages - control.meet if keep != "nothing" else 0

    given, start, numbers = given_numbers(control, tableau, tuple(t), y0.numel(), y0.device)
    out = y0.new_empty((len(t), batch, width))
    out[0] = y0
    carried = y0.new_zeros((2, 2, batch, width))  # in two places, the state and its slope
    carried[0, 0] = y0
    sums = given.new_empty((3, tiles))
    memory = (start.clone(), given, numbers.clone(), y0.new_empty((len(t), stages)))
    log, kept = given.new_empty((0, 2)), y0.new_empty((0, batch, width))
    found = {"OUTCOME": device.RUNNING.value, "ACCEPTED": 0}
    with torch.cuda.device_of(y0):
        while found["OUTCOME"] == device.RUNNING.value:
            steps = found["ACCEPTED"] + attempts
            log, kept = with_room(log, steps), with_room(kept, steps * each + 1)
            first = (out, kept, carried, log, sums, *memory, batch)
            for _ in range(1 if is_alone else attempts):
                counts = (attempts if is_alone else 1, each, len(t))
                kernel[tiles,](*first, *counts, is_alone, *tensors, **options(config, how))
                if not is_alone:
                    last = (sums, log, tiles, len(t))
                    device.control_kernel[1,](*memory, *last, **places(stages))
            now = memory[0].tolist()  # waits for the device
            found = {name: int(now[getattr(device, name).value]) for name in LOOKED_AT}
            attempts = min(2 * attempts, MOST_ATTEMPTS)
    return _solved(network, tableau, control, t, out, kept if each else None, log, found)


def _solved(
    network: Network,
    tableau: Any,
    control: Control,
    t: list[float],
    out: Tensor,
    kept: Tensor | None,
    log: Tensor,
    found: dict[str, int],
) -> AdaptiveSolve:
    """The solve as the host wants it."""
    accepted, rejected = found["ACCEPTED"], found["REJECTED"]
    ends, sizes = log[:accepted].T.tolist()
    reached = t[: found["NEXT"]]
    program = accepted_program(network, tableau, [t[0], *ends], sizes, reached, control.meet)
    outcome = OUTCOMES[found["OUTCOME"]]
    first = 2 if control.first_step is None else 1
    evaluations = first + (len(tableau.b) - 1) * (accepted + rejected)
    kept = kept if outcome == "done" else None
    return AdaptiveSolve(outcome, out, program, kept, rejected, evaluations)


def precision_of(network: Network, rtol: float) -> str:
    """What `tl.dot` does with float32 in attempts."""
    return precision("forward", network) if rtol >= COARSE else "ieee"


def with_room(x: Tensor, rows: int) -> Tensor:
    """The tensor, or one that begins with it and has room for so many rows or twice its own."""
    if len(x) >= rows:
        return x
    grown = x.new_empty((max(rows, 2 * len(x)), *x.shape[1:]))
    grown[: len(x)] = x
    return grown


@lru_cache(128)
def given_numbers(
    control: Control, tableau: Any, t: tuple[float, ...], entries: int, where: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What the step control is given, its state at first, and the numbers of the first slope."""
    stages, direction = len(tableau.b), 1.0 if t[-1] >= t[0] else -1.0
    first_step = math.nan if control.first_step is None else abs(control.first_step)
    settings = {
        "RTOL": control.rtol,
        "ATOL": control.atol,
        "SAFETY": control.safety,
        "IFACTOR": control.ifactor,
        "DFACTOR": control.dfactor,
        "MIN_STEP": control.min_step,
        "MAX_STEP": control.max_step,
        "MOST": control.max_num_steps,
        "FIRST_STEP": first_step,
        "MEET": control.meet,
        "DIRECTION": direction,
        "ORDER": tableau.order,
        "ENTRIES": entries,
    }
    running = device.RUNNING.value
    start = {"S": direction * t[0], "OUTCOME": running, "NEXT": 1, "BEYOND": 1, "GUESS": 1}
    rows = [[*row, *[0.0] * (stages - len(row))] for row in tableau.a]
    method = [tableau.c, *rows, tableau.b, tableau.b_err, *zip(*tableau.dense, strict=True)]
    given = [*_in_order(settings), *(x for row in method for x in row), *(direction * x for x in t)]
    numbers = [0.0] * (stages * (stages + 3))
    numbers[0], numbers[stages * (stages + 2)] = t[0], 1.0
    double = {"dtype": torch.float64, "device": where}
    return (
        torch.tensor(given, **double),
        torch.tensor(_in_order(start), **double),
        torch.tensor(numbers, dtype=torch.float32, device=where),
    )


def _in_order(numbers: dict[str, float]) -> list[float]:
    """The numbers where `control` looks for them, the others being 0."""
    found = [0.0] * LENGTH
    for name, x in numbers.items():
        found[getattr(device, name).value] = float(x)
    return found
