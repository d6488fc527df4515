"""Whole trajectories in Triton, forward and backward in one launch each.

For GPUs where no compiled module exists. A kernel is written for every network (see
`trajectory_source`): a program owns a block of samples, whose state stays in registers through all
steps; weights come from the cache. The backward kernel computes the activations again from the
inputs of the stages, and every program adds up its own part of the gradients, which are summed in a
fixed order afterwards: results are the same from run to run.

Precision follows `torch.get_float32_matmul_precision()`: "highest" multiplies in float32, "high" on
tensor cores with three products in TF32 (forward up to width 64, backward up to 32, in float32
beyond), "medium" with one. State and sums are in float32. Step control is in `adaptive`
and, for every sample by itself, in `per_sample`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from fmft_fast.kernels import adaptive, per_sample
from fmft_fast.kernels.gradients import Gradients
from fmft_fast.kernels.launch import Config, arguments, choose_config, options, precision
from fmft_fast.kernels.trajectory_source import (
    backward_kernel,
    forward_kernel,
    reads,
)
from fmft_fast.kernels.writer import padded, pieces
from torch import Tensor

from fmft_fast.ops.network import Inputs, Network
from fmft_fast.ops.trajectory import AdaptiveSolve, Control, Keep, PerSampleSolve, Program, Row

MAX_WIDTH = 128
# Products of tiles in the field: every one is written out, and takes its time to compile.
MAX_PRODUCTS = 32
# Of a program's registers, what the stages of a step may take: stages x padded state.
MAX_STAGE_WIDTH = 448
# The numbers of solves that CUDA graphs have captured.
CAPTURED: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}


class TritonTrajectory:
    """See `fmft_fast.ops.trajectory.TrajectoryKernels`."""

    name = "triton"

    def refuses(self, network: Network, stages: int, batch: int, dtype: torch.dtype) -> str | None:
        """Why a solve cannot run here, as the end of a sentence; None if it can."""
        widest = max(network.width(i) for i in range(len(network.layers) + 1))
        if dtype != torch.float32:
            return f"Triton runs whole trajectories in float32, got {dtype}"
        if batch == 0:
            return "the batch is empty"
        if widest > MAX_WIDTH:
            return f"Triton takes layers of width {MAX_WIDTH} at most, got {widest}"
        if (products := _products(network)) > MAX_PRODUCTS:
            return f"Triton takes at most {MAX_PRODUCTS} products of 64 x 64, got {products}"
        if stages * padded(network.state) > MAX_STAGE_WIDTH:
            most = MAX_STAGE_WIDTH // padded(network.state)
            return (
                f"Triton takes at most {most} stages for a state of {network.state}, got {stages}"
            )
        if _overlap(network):
            return "layers read different ranges of the same columns of a parameter"
        return None

    def forward(self, program: Program, inputs: Inputs, keep: Keep) -> tuple[Tensor, Any]:
        """Outputs [K, batch, state], and the inputs of all stages."""
        y0, tensors = arguments(program.network, inputs)
        batch, state = y0.shape
        if program.steps == 0:
            return y0.expand(len(program.outputs), batch, state).clone(), None
        out = y0.new_empty((len(program.outputs), batch, state))
        keeps = keep != "nothing"
        kept = y0.new_empty((program.steps * program.stages if keeps else 1, batch, state))
        shapes = tuple(tuple(p.shape) for p in inputs.parameters)
        numbers = _numbers(program, y0.device)

        def launch(config: Config) -> None:
            grid = (triton.cdiv(batch, config.block),)
            kernel = forward_kernel(program.network, shapes, program.stages, config.tile)
            first = (out, kept, y0, *numbers, batch, program.steps, int(keeps))
            how = precision("forward", program.network)
            kernel[grid](*first, *tensors, **options(config, how))

        with torch.cuda.device_of(y0):
            launch(choose_config("forward", program, y0, launch))
        return out, kept

    def adaptive(
        self,
        network: Network,
        tableau: Any,
        control: Control,
        inputs: Inputs,
        t: list[float],
        keep: Keep,
    ) -> AdaptiveSolve:
        """See `AdaptiveKernels`; the inputs of all stages are kept."""
        return adaptive.solve(network, tableau, control, inputs, t, keep)

    def adaptive_per_sample(
        self,
        network: Network,
        tableau: Any,
        control: Control,
        inputs: Inputs,
        t0: float,
        t1: float,
        keep: Keep,
    ) -> PerSampleSolve:
        """Solve to t1, every row with step control of its own: see `CpuTrajectoryKernels`."""
        return per_sample.solve(network, tableau, control, inputs, t0, t1, keep)

    def backward_per_sample(
        self, kept: per_sample.KeptRows, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """Gradients of the inputs from that of the final states, with the steps held constant."""
        return per_sample.backward(kept, grad, wanted)

    def backward(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """Gradients of the inputs by the exact adjoint of the solve."""
        y0, tensors = arguments(program.network, inputs)
        found = Gradients(program.network, inputs, wanted, program.steps * program.stages)
        if program.steps == 0:
            found.y0 = grad.sum(0)
            return found.collect(y0.new_zeros((1, found.size)))
        grad, numbers = grad.contiguous(), _numbers(program, y0.device)
        partials = y0

        def launch(config: Config) -> None:
            nonlocal partials
            partials = y0.new_zeros((found.programs(config.block), found.size))
            kernel = backward_kernel(
                program.network, found.shapes, program.stages, config.tile, found.wanted
            )
            first = (found.y0, partials, grad, kept, *numbers, y0.shape[0], program.steps)
            how = precision("backward", program.network)
            kernel[len(partials),](*first, *found.written, *tensors, **options(config, how))

        with torch.cuda.device_of(y0):
            launch(choose_config("backward", program, y0, launch))
        return found.collect(partials)


def _overlap(network: Network) -> bool:
    """Whether two different blocks of columns of one parameter share a column."""
    blocks = reads(network)
    return any(
        p == r and i < j + n and j < i + m
        for k, (p, i, m, _) in enumerate(blocks)
        for r, j, n, _ in blocks[:k]
    )


def _products(network: Network) -> int:
    """How many products of tiles the layers take."""
    tiles = [len(pieces(network.width(i), 64)) for i in range(len(network.layers) + 1)]
    return sum(
        tiles[i + 1] * tiles[term.source]
        for i, layer in enumerate(network.layers)
        for term in layer.terms
        if term.weight is not None
    )


def _numbers(program: Program, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of a solve on the device; a captured graph goes on reading them."""
    weights = program.weights
    key = (
        program.a,
        program.b,
        program.outputs,
        program.times.numpy().tobytes(),
        program.h.numpy().tobytes(),
        None if weights is None else weights.numpy().tobytes(),
        device,
    )
    found = _copied(*key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        CAPTURED[key] = found
    return found


@lru_cache(128)
def _copied(
    a: tuple[Row, ...],
    b: Row,
    outputs: tuple[int, ...],
    times: bytes,
    h: bytes,
    weights: bytes | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per step the times, the tableau and the weights times h; of every output weights; the steps.

    Every output becomes one inside a step: state n + 1 has the weights of step n, y0 has zeros.
    """
    s, hs = len(b), np.frombuffer(h)
    rows = np.zeros((s, s))
    for i, row in enumerate(a):
        rows[i, : len(row)] = row
    tableau = hs[:, None] * np.concatenate([rows.ravel(), np.array(b)])
    numbers = np.concatenate([np.frombuffer(times).reshape(-1, s), tableau], 1)
    steps = np.array(outputs)
    if weights is None:
        factors = np.where(steps[:, None] > 0, np.array(b), 0.0)
        steps = np.maximum(steps - 1, 0)
    else:
        factors = np.frombuffer(weights).reshape(-1, s)
    factors = hs[steps][:, None] * factors
    first = np.searchsorted(steps, np.arange(len(hs) + 1))
    return (
        torch.from_numpy(numbers.astype(np.float32)).to(device),
        torch.from_numpy(factors.astype(np.float32)).to(device),
        torch.from_numpy(first.astype(np.int32)).to(device),
    )


KERNELS = TritonTrajectory()
