"""Whole-trajectory kernels of the compiled module `fmft_fast._cpu`, on torch tensors.

A tile of the batch's rows goes through all steps, stages and layers while it is in the cache. The
gradients of the parameters are sums over the threads' shares of the batch, in a fixed order: their
bits are the same from run to run, and may differ between numbers of threads.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmft_fast import _cpu
from fmft_fast.ops.network import ACTIVATIONS, Inputs, Network
from fmft_fast.ops.trajectory import Keep, Program, Row

KEEP_CODES = {"nothing": 0, "inputs": 1, "activations": 2}
TYPE_CODES = {torch.float32: 0, torch.float64: 1}
MAX_STAGES = 16
MAX_LAYERS = 63


class Kept(NamedTuple):
    """The prepared solve, the memory of its forward pass, and the tensors that it points to."""

    solve: _cpu.Solve
    memory: _cpu.Kept
    tensors: tuple[Any, ...]


class CpuTrajectoryKernels:
    """See `fmft_fast.ops.trajectory.TrajectoryKernels`."""

    name = "cpu"

    def refuses(self, network: Network, stages: int, batch: int, dtype: torch.dtype) -> str | None:
        """See `TrajectoryKernels`."""
        if dtype not in TYPE_CODES:
            return f"the compiled CPU kernels take float32 and float64, not {dtype}"
        if stages > MAX_STAGES:
            return f"the compiled CPU kernels take at most {MAX_STAGES} stages, not {stages}"
        if len(network.layers) > MAX_LAYERS:
            return f"the compiled CPU kernels take at most {MAX_LAYERS} layers"
        return None

    def forward(self, program: Program, inputs: Inputs, keep: Keep) -> tuple[Tensor, Kept | None]:
        """See `TrajectoryKernels`."""
        y0 = inputs.y0
        assert y0 is not None
        batch, state = y0.shape
        out = torch.empty((len(program.outputs), batch, state), dtype=y0.dtype, device=y0.device)
        y0 = y0.contiguous()
        parameters = [_rows_together(x) for x in inputs.parameters]
        tables = [x.contiguous() for x in inputs.tables]
        conds = [x.contiguous() for x in inputs.conds]
        times, h = program.times.contiguous(), program.h.contiguous()
        weights = None if program.weights is None else program.weights.contiguous()
        solve = _cpu.Solve(
            field_of(program.network),
            method_of(program.a, program.b),
            TYPE_CODES[y0.dtype],
            torch.get_num_threads(),
            batch,
            h.shape[0],
            times.data_ptr(),
            h.data_ptr(),
            program.outputs,
            0 if weights is None else weights.data_ptr(),
            y0.data_ptr(),
            [x.data_ptr() for x in parameters],
            [x.stride(0) for x in parameters],
            [x.data_ptr() for x in tables],
            [x.data_ptr() for x in conds],
        )
        memory = _cpu.trajectory_forward(solve, KEEP_CODES[keep], out.data_ptr())
        if keep == "nothing":
            return out, None
        return out, Kept(solve, memory, (y0, parameters, tables, conds, times, h, weights))

    def backward(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """See `TrajectoryKernels`."""
        grad = grad.contiguous()
        found = Inputs(
            _like([inputs.y0], [wanted.y0])[0],
            _like(inputs.parameters, wanted.parameters),
            _like(inputs.tables, wanted.tables),
            _like(inputs.conds, wanted.conds),
        )
        _cpu.trajectory_backward(
            kept.solve,
            kept.memory,
            grad.data_ptr(),
            _address(found.y0),
            [_address(x) for x in found.parameters],
            [x.shape[0] for x in inputs.parameters],
            [x.shape[1] if x.dim() == 2 else 1 for x in inputs.parameters],
            [_address(x) for x in found.tables],
            [_address(x) for x in found.conds],
        )
        return found


def field_of(network: Network) -> _cpu.Field:
    """The network in the compiled module's form, made once."""
    made = network.__dict__.get("_cpu_field")
    if made is None:
        layers = [
            (
                x.width,
                [(t.source, -1 if t.weight is None else t.weight, t.column) for t in x.terms],
                _or_absent(x.bias),
                x.time[0] if x.time else -1,
                x.time[1] if x.time else 0,
                _or_absent(x.table),
                _or_absent(x.cond),
                ACTIVATIONS.index(x.activation),
                x.slope,
                x.skips,
            )
            for x in network.layers
        ]
        made = _cpu.Field(network.state, layers)
        object.__setattr__(network, "_cpu_field", made)  # the dataclass is frozen
    return made


@functools.lru_cache(maxsize=64)
def method_of(a: tuple[Row, ...], b: Row) -> _cpu.Method:
    """The coefficients in the compiled module's form, made once."""
    return _cpu.Method(a, b)


def _or_absent(number: int | None) -> int:
    return -1 if number is None else number


def _rows_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 and x.dim() == 2 else x.contiguous()


def _like(tensors: list[Any], wanted: list[Any]) -> list[Any]:
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if w else None
        for x, w in zip(tensors, wanted, strict=True)
    ]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


KERNELS = CpuTrajectoryKernels()
