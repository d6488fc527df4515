"""Whole-trajectory kernels of the compiled module `fmft_fast._cpu`, on torch tensors.

A tile of the batch's rows goes through all steps, stages and layers while it is in the cache. The
gradients of the parameters are sums over the threads' shares of the batch, in a fixed order: their
bits are the same from run to run, and may differ between numbers of threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmft_fast import _cpu
from fmft_fast.ops.chain import Chain
from fmft_fast.ops.network import ACTIVATIONS, Inputs, Network
from fmft_fast.ops.trajectory import AdaptiveSolve, Control, Keep, PerSampleSolve, Program, Row

KEEP_CODES = {"nothing": 0, "inputs": 1, "activations": 2}
TYPE_CODES = {torch.float32: 0, torch.float64: 1}
MAX_STAGES = 16
MAX_LAYERS = 1024
OUTCOMES = ("done", "too many steps", "underflow", "not finite")


class Kept(NamedTuple):
    """The prepared solve, the tensors that it points to, and the memory of its forward pass."""

    solve: _cpu.Solve
    tensors: tuple[Any, ...]
    memory: _cpu.Kept


class KeptRows(NamedTuple):
    """Like `Kept`, of a solve whose rows have their own steps."""

    solve: _cpu.Solve
    tensors: tuple[Any, ...]
    rows: _cpu.PerSample

    def steps(self, row: int) -> tuple[list[float], list[float]]:
        """The ends [N + 1] of the accepted steps of a row, and their signed sizes [N]."""
        return self.rows.steps(row)

    def ended(self, row: int) -> tuple[str, float]:
        """How a row ended (see `AdaptiveSolve`), and the error ratio of its last attempt."""
        outcome, ratio = self.rows.ended(row)
        return OUTCOMES[outcome], ratio


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
        tensors = _laid_out(inputs)
        y0 = tensors.y0
        assert y0 is not None
        out = torch.empty((len(program.outputs), *y0.shape), dtype=y0.dtype)
        solve, alive = _solve(program, tensors)
        memory = _cpu.trajectory_forward(solve, KEEP_CODES[keep], out.data_ptr())
        return out, None if keep == "nothing" else Kept(solve, alive, memory)

    def repeated(
        self,
        program: Program,
        inputs: Inputs,
        keep: Keep,
        final: bool,
        chain: Chain | None = None,
    ) -> RepeatedSolve:
        """A solve for tensors that come again and again, alike in all but their numbers."""
        return RepeatedSolve(program, inputs, keep, final, chain)

    def adaptive(
        self,
        network: Network,
        tableau: Any,
        control: Control,
        inputs: Inputs,
        t: list[float],
        keep: Keep,
    ) -> AdaptiveSolve:
        """See `AdaptiveKernels`."""
        tensors = _laid_out(inputs)
        y0 = tensors.y0
        assert y0 is not None
        out = torch.empty((len(t), *y0.shape), dtype=y0.dtype)
        none = torch.empty(0, dtype=torch.float64)
        before = Program(network, tableau.a, tableau.b, none, none, ())
        solve, _ = _solve(before, tensors, shared=True)
        outcome, times, h, outputs, weights, rejected, evaluations, memory = (
            _cpu.trajectory_adaptive(
                solve,
                tableau.c,
                tableau.b_err,
                [x for row in tableau.dense for x in row],
                tableau.order,
                _numbers(control),
                control.max_num_steps,
                t,
                KEEP_CODES[keep],
                out.data_ptr(),
            )
        )
        stages = len(tableau.b)
        program = Program(
            network,
            tableau.a,
            tableau.b,
            torch.tensor(times, dtype=torch.float64).view(-1, stages),
            torch.tensor(h, dtype=torch.float64),
            tuple(outputs),
            torch.tensor(weights, dtype=torch.float64).view(-1, stages),
        )
        kept = None
        if keep != "nothing" and OUTCOMES[outcome] == "done":
            kept = Kept(*_solve(program, tensors, shared=True), memory)
        return AdaptiveSolve(OUTCOMES[outcome], out, program, kept, rejected, evaluations)

    def backward(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """See `TrajectoryKernels`."""
        found, addresses = _gradients(kept.tensors[0], wanted)
        grad = grad.contiguous()
        _cpu.trajectory_backward(kept.solve, kept.memory, grad.data_ptr(), *addresses)
        return found

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
        """Solve to t1, every row of the batch with step control of its own.

        The error of a row is the root mean square over its state. Its last step ends at t1.

        Args:
            network: the field, without tables.
            tableau: see `adaptive`.
            control: tolerances and bounds of the step control, for every row alike.
            inputs: the tensors.
            t0: first time.
            t1: last time.
            keep: "nothing", or the inputs of all stages of the accepted steps.
        """
        tensors = _laid_out(inputs)
        assert tensors.y0 is not None
        y = torch.empty_like(tensors.y0)
        none = torch.empty(0, dtype=torch.float64)
        before = Program(network, tableau.a, tableau.b, none, none, ())
        solve, alive = _solve(before, tensors, shared=True)
        rows = _cpu.per_sample_forward(
            solve,
            tableau.c,
            tableau.b_err,
            tableau.order,
            _numbers(control),
            control.max_num_steps,
            t0,
            t1,
            KEEP_CODES[keep],
            y.data_ptr(),
        )
        counts = torch.empty((2, len(y)), dtype=torch.int64)
        failed = rows.counts(counts.data_ptr())
        accepted, rejected = counts.unbind()
        first = 2 if control.first_step is None else 1
        return PerSampleSolve(
            None if failed < 0 else failed,
            y,
            accepted,
            rejected,
            first + (len(tableau.b) - 1) * (accepted + rejected),
            KeptRows(solve, alive, rows),
        )

    def backward_per_sample(self, kept: KeptRows, grad: Tensor, wanted: Inputs) -> Inputs:
        """Gradients of the inputs from that of the final states, with the steps held constant."""
        found, addresses = _gradients(kept.tensors[0], wanted)
        grad = grad.contiguous()
        _cpu.per_sample_backward(kept.solve, kept.rows, grad.data_ptr(), *addresses)
        return found


class RepeatedSolve:
    """A program on tensors of the same shapes every time, all of them contiguous.

    Args:
        program: the steps.
        inputs: tensors like those that will come.
        keep: see `TrajectoryKernels.forward`.
        final: whether there is one output, wanted as [batch, state].
        chain: gives the conditions, of a condition and its own tensors, which come in their place.
    """

    def __init__(
        self, program: Program, inputs: Inputs, keep: Keep, final: bool, chain: Chain | None
    ):
        y0 = inputs.y0
        assert y0 is not None
        solve, (_, self._steps) = _solve(program, inputs)
        links = (None, [], []) if chain is None else (chain.compiled, chain.leading, chain.wanted)
        self._compiled = _cpu.Repeated(solve, [x.numel() for x in inputs.parameters], *links)
        self._keep, self._dtype = KEEP_CODES[keep], y0.dtype
        self._shape = tuple(y0.shape) if final else (len(program.outputs), *y0.shape)

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, _cpu.Run]:
        """The outputs [K, batch, state], and what was kept, with whether the last is finite.

        tensors: as `flatten` gives them.
        """
        out = torch.empty(self._shape, dtype=self._dtype)
        addresses = [x.data_ptr() for x in tensors]
        threads = torch.get_num_threads()
        return out, self._compiled.forward(self._keep, threads, out.data_ptr(), addresses)

    def backward(
        self, run: _cpu.Run, grad: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of the tensors that `forward` had from that of the outputs."""
        found = [torch.empty_like(x) if w else None for x, w in zip(tensors, wanted, strict=True)]
        grad = grad.contiguous()
        self._compiled.backward(run, grad.data_ptr(), [_address(x) for x in found])
        return found


def _numbers(control: Control) -> list[float]:
    """The step control in the compiled module's form."""
    return [
        control.rtol,
        control.atol,
        control.safety,
        control.ifactor,
        control.dfactor,
        control.min_step,
        control.max_step,
        math.nan if control.first_step is None else control.first_step,
        control.meet,
    ]


def _gradients(tensors: Inputs, wanted: Inputs) -> tuple[Inputs, tuple[Any, ...]]:
    """Room for the gradients, and where it lies in the compiled module's form."""
    found = Inputs(
        torch.empty_like(tensors.y0) if wanted.y0 and tensors.y0 is not None else None,
        _like(tensors.parameters, wanted.parameters),
        _like(tensors.tables, wanted.tables),
        _like(tensors.conds, wanted.conds),
    )
    return found, (
        _address(found.y0),
        [_address(x) for x in found.parameters],
        [0 if x is None else x.numel() for x in found.parameters],
        [0 if x is None else x.stride(0) for x in found.parameters],
        [_address(x) for x in found.tables],
        [_address(x) for x in found.conds],
    )


def _laid_out(inputs: Inputs) -> Inputs:
    """The tensors with rows that lie next to each other, parameters with any distance of rows.

    They hold the memory in which they are now, whatever becomes of the tensors that were given.
    """
    return Inputs(
        None if inputs.y0 is None else inputs.y0.detach().contiguous(),
        [_rows_together(x.detach()) for x in inputs.parameters],
        [x.detach().contiguous() for x in inputs.tables],
        [x.detach().contiguous() for x in inputs.conds],
    )


def _solve(
    program: Program, tensors: Inputs, shared: bool = False
) -> tuple[_cpu.Solve, tuple[Any, ...]]:
    """The solve in the compiled module's form, and what has to outlive it."""
    y0, given = tensors.y0, steps_of(program)
    assert y0 is not None
    solve = _cpu.Solve(
        given.field,
        given.method,
        TYPE_CODES[y0.dtype],
        shared,
        torch.get_num_threads(),
        y0.shape[0],
        *given.numbers,
        y0.data_ptr(),
        [x.data_ptr() for x in tensors.parameters],
        [x.stride(0) for x in tensors.parameters],
        [x.data_ptr() for x in tensors.tables],
        [x.data_ptr() for x in tensors.conds],
    )
    return solve, (tensors, given)


class Steps(NamedTuple):
    """What a program gives the compiled module, and the tensors that it points to."""

    field: _cpu.Field
    method: _cpu.Method
    numbers: tuple[int, int, int, tuple[int, ...], int]
    tensors: tuple[Tensor | None, ...]


def steps_of(program: Program) -> Steps:
    """The program in the compiled module's form, made once."""
    made = program.__dict__.get("_cpu_steps")
    if made is None:
        times, h = program.times.contiguous(), program.h.contiguous()
        weights = None if program.weights is None else program.weights.contiguous()
        made = Steps(
            field_of(program.network),
            method_of(program.a, program.b),
            (h.shape[0], times.data_ptr(), h.data_ptr(), program.outputs, _address(weights)),
            (times, h, weights),
        )
        object.__setattr__(program, "_cpu_steps", made)  # the dataclass is frozen
    return made


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
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def _like(tensors: list[Any], wanted: list[Any]) -> list[Any]:
    return [torch.empty_like(x) if w else None for x, w in zip(tensors, wanted, strict=True)]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


KERNELS = CpuTrajectoryKernels()
