"""Whole-trajectory kernels of the compiled module `fmft_fast._cuda`, on torch tensors of a GPU.

A block of the kernels keeps all weights and the values of all layers in shared memory; `cuda_plan`
says what lies where. Where the gradients of the weights do not fit as well, they are left to one
product per matrix at the end (`deferred`); a field that does not fit even so is refused.
Products are made of one to three bf16 terms of each number, as
`torch.get_float32_matmul_precision()` asks; all else is float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fmft_fast import _cuda
from fmft_fast.errors import InputError
from fmft_fast.ops.accepted import OUTCOMES, accepted_program
from fmft_fast.ops.cuda_adaptive import Kept, KeptRows, Steps, take_steps
from fmft_fast.ops.cuda_plan import Plan, lay_out
from fmft_fast.ops.cuda_support import Same, closed, closed_program, reads_all, unsupported
from fmft_fast.ops.cuda_uploads import upload_steps
from fmft_fast.ops.network import Inputs, Network
from fmft_fast.ops.precision import matmul_precision
from fmft_fast.ops.trajectory import (
    AdaptiveSolve,
    Control,
    Keep,
    PerSampleSolve,
    Program,
    Row,
    rebuild,
)

SPLITS = {"medium": 1, "high": 2, "highest": 3}
# Bytes for what a deferred backward pass keeps, and rows that fill a GPU, which it may take anyhow.
ROOM, MIN_ROWS = 1 << 32, 4096

plan = functools.partial(lay_out, _cuda.Field)


def _split() -> int:
    return SPLITS[matmul_precision()]


def _split_for(rtol: float) -> int:
    """Return the terms of a solve with step control, which needs less noise than its tolerance."""
    return max(_split(), 2 if rtol >= 1e-3 else 3)


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """Return the shared memory of a block and the number of multiprocessors."""
    return _cuda.trajectory_shared_memory(device), _cuda.multiprocessors(device)


@functools.lru_cache(maxsize=256)
def _fitting(
    network: Same, split: int, stages: int, narrow: bool, work: str, limit: int
) -> Plan | None:
    """Return the plan to run; more rows share the weights, fewer fill a machine sooner.

    work: a name of `_cuda.Pass`; where samples have steps of their own, blocks have 16 of them.
    """
    backward, by_row = work.endswith("backward"), work.startswith("by_row")
    for deferred in (False, True) if backward else (False,):
        for row_tiles in (1,) if narrow or by_row else (2, 1):
            found = plan(network.it, split, row_tiles, stages, backward, deferred, by_row)
            if found.bytes <= limit:
                return found
    return None


@functools.lru_cache(maxsize=256)
def _unfit(network: Same, split: int, stages: int, limit: int, by_row: bool = False) -> str | None:
    """Say why no plan fits the device."""
    for work in ("by_row", "by_row_backward") if by_row else ("forward", "backward"):
        if _fitting(network, split, stages, True, work, limit) is None:
            backward = work.endswith("backward")
            need = plan(network.it, split, 1, stages, backward, backward, by_row).bytes
            return (
                f"its weights and values take {need} bytes of shared memory and the device has "
                f"{limit} for a block"
            )
    return None


@functools.lru_cache(maxsize=256)
def _capacity(found: Plan, work: str, device: int) -> int:
    """Return how many blocks run at once; it also lets the kernel use the memory it needs."""
    of_device = _cuda.trajectory_capacity(found.field, getattr(_cuda.Pass, work), device)
    return max(1, of_device)


def _chosen(network: Network, stages: int, y0: Tensor, split: int, work: str, device: int):
    """Return the plan and the number of blocks; raise for what `refuses` keeps from here."""
    same, batch = Same(network), y0.shape[0]
    limit, processors = _limits(device)
    reason = unsupported(same, stages, batch == 0, y0.dtype)
    reason = reason or _unfit(same, split, stages, limit, work.startswith("by_row"))
    found = None
    if reason is None:
        found = _fitting(same, split, stages, batch <= 16 * processors, work, limit)
    if found is None:
        raise InputError(
            "expected a solve that the CUDA trajectory kernels take, got one that they refuse: "
            f"{reason}; use backend='auto'"
        )
    return found, min(-(-batch // found.rows), _capacity(found, work, device))


def _device() -> int:
    return torch.cuda.current_device()


def _queue(y: Tensor) -> tuple[int, int]:
    return y.device.index, torch.cuda.current_stream(y.device).cuda_stream


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(inputs: Inputs) -> Inputs:
    tensors = [inputs.y0, *inputs.parameters, *inputs.tables, *inputs.conds]
    return rebuild(inputs, [x.detach().contiguous() for x in tensors])


def _columns_of(inputs: Inputs) -> list[int]:
    return [x.shape[1] if x.dim() == 2 else 1 for x in inputs.parameters]


@dataclass(frozen=True)
class _Trajectory:
    name: str = "cuda"

    def refuses(self, network: Network, stages: int, batch: int, dtype: torch.dtype) -> str | None:
        """See `TrajectoryKernels`."""
        same = Same(closed(Same(network)))
        reason = unsupported(same, stages, batch == 0, dtype)
        return reason or _unfit(same, _split(), stages, _limits(_device())[0])

    def forward(self, program: Program, inputs: Inputs, keep: Keep) -> tuple[Tensor, Any]:
        """See `TrajectoryKernels`."""
        program, inputs, split = closed_program(Same(program)), _contiguous(inputs), _split()
        y0 = inputs.y0
        assert y0 is not None
        batch, state = y0.shape
        queue = _queue(y0)
        found, blocks = _chosen(program.network, program.stages, y0, split, "forward", queue[0])
        out = y0.new_empty(len(program.outputs), batch, state)
        kept = None
        if keep != "nothing":
            kept = y0.new_empty(program.steps * program.stages, batch, state)
        uploaded = upload_steps(program, y0, queue[0])
        solve = _forward_call(inputs, out, kept, uploaded, program.a, program.b, program.steps)
        _cuda.trajectory_forward(found.field, solve, blocks, *queue)
        return out, None if kept is None else Kept(kept, split)

    def backward(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """See `TrajectoryKernels`."""
        stage_inputs, split, row_times, row_h = kept
        program = closed_program(Same(program))
        inputs, grad = _contiguous(inputs), grad.contiguous()
        y0 = inputs.y0
        assert y0 is not None
        batch, network = y0.shape[0], program.network
        queue = _queue(y0)
        work = "backward" if row_h is None else "by_row_backward"
        found, blocks = _chosen(network, program.stages, y0, split, work, queue[0])
        if found.deferred and (rows := _rows_at_once(program)) < batch:
            return self._by_parts(program, inputs, kept, grad, wanted, rows)
        asked = [
            (x, bool(w))
            for x, w in zip(
                [*inputs.parameters, *inputs.tables],
                [*wanted.parameters, *wanted.tables],
                strict=True,
            )
        ]
        sizes = [x.numel() if w else 0 for x, w in asked]
        *starts, total = accumulate(sizes, initial=0)
        places = [at if w else -1 for at, (_, w) in zip(starts, asked, strict=True)]
        whole = not found.deferred and reads_all(Same(network), *_columns_of(inputs))
        make = y0.new_empty if whole else y0.new_zeros
        partials = make((blocks, total)) if total else None
        flat = y0.new_empty(total)
        grad_y0 = torch.empty_like(y0) if wanted.y0 else None
        conds = [
            torch.empty_like(x) if w else None
            for x, w in zip(inputs.conds, wanted.conds, strict=True)
        ]
        room = (network, stage_inputs, row_h is not None)
        values, deltas = _room(*room) if found.deferred else ([], [])
        split_at = len(inputs.parameters)
        solve = _cuda.Solve(
            [
                [y0.data_ptr(), 0, stage_inputs.data_ptr(), grad.data_ptr(), _address(grad_y0)]
                + [_address(partials)],
                [*upload_steps(program, y0, queue[0]), _address(row_times), _address(row_h)],
                [x.data_ptr() for x in inputs.parameters],
                [x.data_ptr() for x in inputs.tables],
                [x.data_ptr() for x in inputs.conds],
                [_address(x) for x in conds],
                [_address(x) for x in values[1:]],
                [_address(x) for x in deltas],
            ],
            _columns_of(inputs),
            places[:split_at],
            places[split_at:],
            total,
            _square(program.a),
            program.b,
            batch,
            program.steps,
        )
        _cuda.trajectory_backward(found.field, solve, blocks, flat.data_ptr(), *queue)
        shaped = [
            part.view(x.shape) if w else None
            for part, (x, w) in zip(flat.split(sizes), asked, strict=True)
        ]
        if found.deferred:
            _add_products(network, shaped, values, deltas)
        return rebuild(inputs, [grad_y0, *shaped, *conds])

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
        # Where every time ends a step, the last stage is only that which the next step begins with.
        stages = len(tableau.b) - control.meet
        out, split, found = self._take_steps(
            network, tableau, control, inputs, t, stages if keep != "nothing" else 0, by_row=False
        )
        end, steps = found.progress, found.nodes[:, 0].tolist()
        outcome, rejected = OUTCOMES[int(end.outcome)], int(end.rejected)
        done = outcome == "done"
        program = accepted_program(
            network, tableau, steps, found.sizes[:, 0].tolist(), t if done else t[:1], control.meet
        )
        kept = None if found.inputs is None or not done else Kept(found.inputs, split)
        evaluations = _evaluations(control, tableau, program.steps + rejected)
        return AdaptiveSolve(outcome, out, program, kept, rejected, evaluations)

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
        stages = len(tableau.b) - 1 if keep != "nothing" else 0
        control = replace(control, meet=True)
        out, split, found = self._take_steps(
            network, tableau, control, inputs, [t0, t1], stages, by_row=True
        )
        ends = found.progress
        accepted, rejected = ends.accepted.long(), ends.rejected.clone()
        failed = (ends.outcome != OUTCOMES.index("done")).nonzero()
        return PerSampleSolve(
            int(failed[0]) if len(failed) else None,
            out[0],
            accepted,
            rejected,
            _evaluations(control, tableau, accepted + rejected),
            KeptRows(network, tableau, inputs, split, found),
        )

    def backward_per_sample(self, kept: KeptRows, grad: Tensor, wanted: Inputs) -> Inputs:
        """Gradients of the inputs from that of the final states, with the steps held constant."""
        program, steps = kept.replay()
        return self.backward(program, kept.tensors, steps, grad[None], wanted)

    def _take_steps(
        self,
        network: Network,
        tableau: Any,
        control: Control,
        inputs: Inputs,
        t: list[float],
        kept_stages: int,
        by_row: bool,
    ) -> tuple[Tensor, int, Steps]:
        """Return the outputs, the terms of the products, and the steps."""
        whole, inputs = closed(Same(network)), _contiguous(inputs)
        y0, stages = inputs.y0, len(tableau.b)
        assert y0 is not None
        queue, work = _queue(y0), "by_row" if by_row else "adaptive"
        limit, _ = _limits(queue[0])
        splits, same = range(_split_for(control.rtol), _split(), -1), Same(whole)
        fits = (s for s in splits if not _unfit(same, s, stages, limit, by_row))
        split = next(fits, _split())
        found, blocks = _chosen(whole, stages, y0, split, work, queue[0])
        out = y0.new_empty(1 if by_row else len(t), *y0.shape)
        out[0].copy_(y0)

        def launch(control: Any, kept: Tensor | None, log: list[int], taken: int, room: int):
            solve = _forward_call(inputs, out, kept, [0] * 4, tableau.a, tableau.b, 0)
            _cuda.trajectory_adaptive(
                found.field, solve, control, log, taken, room, by_row, blocks, *queue
            )

        steps = take_steps(
            _cuda, launch, tableau, control, y0, t, kept_stages, by_row=by_row, blocks=blocks
        )
        return out, split, steps

    def _by_parts(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs, rows: int
    ) -> Inputs:
        """Do so many rows after another, whose values and gradients fit into `ROOM`."""
        conds = [x.split(rows) for x in inputs.conds]
        shared: list[Tensor | None] = []
        parts = []
        for i, y0 in enumerate(inputs.y0.split(rows) if inputs.y0 is not None else ()):
            at = slice(i * rows, i * rows + len(y0))
            some = Inputs(y0, inputs.parameters, inputs.tables, [x[i] for x in conds])
            part = self.backward(program, some, kept.rows(at), grad[:, at], wanted)
            both = [*part.parameters, *part.tables]
            shared = [
                x if total is None or x is None else total.add_(x)
                for total, x in zip(shared or [None] * len(both), both, strict=True)
            ]
            parts.append([part.y0, *part.conds])
        first, *rest = [
            None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*parts, strict=True)
        ]
        return rebuild(inputs, [first, *shared, *rest])


def _evaluations(control: Control, tableau: Any, attempts: Any) -> Any:
    """Return how many evaluations of the field so many attempts take."""
    return (2 if control.first_step is None else 1) + (len(tableau.b) - 1) * attempts


def _rows_at_once(program: Program) -> int:
    """How many samples the values and the gradients of all layers may be kept of."""
    width = 2 * sum(layer.width for layer in program.network.layers)
    return max(MIN_ROWS, ROOM // (4 * width * max(1, program.steps * program.stages)))


def _square(a: tuple[Row, ...]) -> list[list[float]]:
    """Return a with rows of one length."""
    return [[*row, *[0.0] * (len(a) - len(row))] for row in a]


def _forward_call(
    inputs: Inputs,
    out: Tensor,
    kept: Tensor | None,
    uploaded: list[int],
    a: tuple[Row, ...],
    b: Row,
    steps: int,
) -> Any:
    """Return a solve in the form of the binding."""
    assert inputs.y0 is not None
    return _cuda.Solve(
        [
            [inputs.y0.data_ptr(), out.data_ptr(), _address(kept), 0, 0, 0],
            [*uploaded, 0, 0],
            [x.data_ptr() for x in inputs.parameters],
            [x.data_ptr() for x in inputs.tables],
            [x.data_ptr() for x in inputs.conds],
            [],
            [],
            [],
        ],
        _columns_of(inputs),
        [],
        [],
        0,
        _square(a),
        b,
        len(inputs.y0),
        steps,
    )


def _room(network: Network, stage_inputs: Tensor, gaps: bool) -> tuple[list[Any], list[Any]]:
    """Return memory for the values and the gradients of all layers in all stages.

    gaps: whether kernels leave out samples that have no step there.
    """
    count, batch, _ = stage_inputs.shape
    make = stage_inputs.new_zeros if gaps else stage_inputs.new_empty
    deltas = [make(count, batch, layer.width) for layer in network.layers]
    values: list[Any] = [make(x.shape) for x in deltas[:-1]]
    # Where nothing was written any number may be, and times 0 that need not be 0.
    first = stage_inputs.nan_to_num() if gaps else stage_inputs
    return [first, *values, None], deltas


def _add_products(network: Network, grads: list[Any], values: list[Any], deltas: list[Any]) -> None:
    """Write the gradients of the matrices, one product over all stages each."""
    for layer, delta in zip(network.layers, deltas, strict=True):
        for term in layer.terms:
            if term.weight is None or grads[term.weight] is None:
                continue
            columns = slice(term.column, term.column + network.width(term.source))
            grads[term.weight][:, columns] = delta.flatten(0, 1).T @ values[term.source].flatten(
                0, 1
            )


KERNELS = _Trajectory()
