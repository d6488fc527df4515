"""Whole-trajectory kernels of the compiled module `fmft_fast._cuda`, on torch tensors of a GPU.

A block of the kernels keeps all weights and the values of all layers in shared memory; `cuda_plan`
says what lies where. Where the gradients of the weights do not fit as well, they are left to one
product per matrix at the end (`deferred`); a field that does not fit even so is refused.
Products are made of one to three bf16 terms of each number, as
`torch.get_float32_matmul_precision()` asks; all else is float32.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fmft_fast import _cuda
from fmft_fast.errors import InputError
from fmft_fast.ops.cuda_plan import Plan, lay_out, with_identities
from fmft_fast.ops.network import Inputs, Layer, Network, Term
from fmft_fast.ops.precision import matmul_precision
from fmft_fast.ops.trajectory import Keep, Program, rebuild

SPLITS = {"medium": 1, "high": 2, "highest": 3}
MAX_STAGES, MAX_LAYERS, MAX_TERMS, MAX_SKIPS = 7, 12, 24, 12
MAX_PARAMETERS, MAX_TABLES, MAX_CONDS = 32, 12, 4
# Bytes for what a deferred backward pass keeps, and rows that fill a GPU, which it may take anyhow.
ROOM, MIN_ROWS = 1 << 32, 4096

plan = functools.partial(lay_out, _cuda.Field)


@functools.lru_cache(maxsize=256)
def _closed(same: _Same) -> Network:
    """The network, with an identity after a last layer of which kernels take no part as last."""
    network: Network = same.it
    *_, last = network.layers
    if last.activation == "identity" and last.cond is None:
        return network
    end = Layer(last.width, (Term(len(network.layers), None),))
    return replace(network, layers=(*network.layers, end))


@functools.lru_cache(maxsize=256)
def _closed_program(same: _Same) -> Program:
    program: Program = same.it
    network = _closed(_Same(program.network))
    return program if network is program.network else replace(program, network=network)


@functools.lru_cache(maxsize=256)
def _unsupported(same: _Same, stages: int, empty: bool, dtype: torch.dtype) -> str | None:
    network: Network = same.it
    layers = with_identities(network)
    terms = [term for layer in layers for term in layer.terms]
    weights = [term.weight for term in terms]
    numbers = [n for x in layers for n in (*(t.weight for t in x.terms), x.bias) if n is not None]
    numbers += [layer.time[0] for layer in layers if layer.time]
    limits = (
        ("layers", len(layers), MAX_LAYERS),
        ("matrices", len(terms), MAX_TERMS),
        ("skips", sum(len(layer.skips) for layer in layers), MAX_SKIPS),
        ("stages", stages, MAX_STAGES),
        ("parameters", max(numbers, default=-1) + 1, MAX_PARAMETERS),
        ("tables", len([x for x in layers if x.table is not None]), MAX_TABLES),
        ("per-sample biases", len([x for x in layers if x.cond is not None]), MAX_CONDS),
    )
    if dtype != torch.float32:
        return f"the kernels take float32, got {dtype}"
    if empty:
        return "the batch is empty"
    for name, count, limit in limits:
        if count > limit:
            return f"the kernels take at most {limit} {name}, got {count}"
    if any(not layer.terms for layer in layers):
        return "a layer reads no value"
    used = _columns(network)
    if any(len(set(columns)) < len(columns) for columns in used.values()):
        return "two layers share a parameter"
    for name in ("table", "cond"):
        uses = [n for layer in layers if (n := getattr(layer, name)) is not None]
        if len(set(uses)) < len(uses):
            return f"two layers share a {name}"
    return None if weights else "the field has no matrix"


def _columns(network: Network) -> dict[int, list[int]]:
    """Return the columns of every parameter that the network reads."""
    used: dict[int, list[int]] = defaultdict(list)
    for layer in network.layers:
        for term in layer.terms:
            if term.weight is not None:
                width = network.width(term.source)
                used[term.weight] += range(term.column, term.column + width)
        if layer.bias is not None:
            used[layer.bias].append(0)
        if layer.time is not None:
            used[layer.time[0]].append(layer.time[1])
    return used


@functools.lru_cache(maxsize=256)
def _reads_all(same: _Same, *columns: int) -> bool:
    """Tell whether every column of every parameter is read, so that every gradient is written."""
    used = _columns(same.it)
    return all(len(used[i]) == count for i, count in enumerate(columns))


def _split() -> int:
    return SPLITS[matmul_precision()]


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """Return the shared memory of a block and the number of multiprocessors."""
    return _cuda.trajectory_shared_memory(device), _cuda.multiprocessors(device)


class _Same:
    """A key that is equal to itself alone, and so found without a look at what is in it."""

    def __init__(self, it: Any):
        self.it = it

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.it is self.it


@functools.lru_cache(maxsize=256)
def _fitting(
    network: _Same, split: int, stages: int, narrow: bool, backward: bool, limit: int
) -> Plan | None:
    """Return the plan to run; more rows share the weights, fewer fill a machine sooner."""
    for deferred in (False, True) if backward else (False,):
        for row_tiles in (1,) if narrow else (2, 1):
            found = plan(network.it, split, row_tiles, stages, backward, deferred)
            if found.bytes <= limit:
                return found
    return None


@functools.lru_cache(maxsize=256)
def _unfit(network: _Same, split: int, stages: int, limit: int) -> str | None:
    """Say why no plan fits the device."""
    for backward in (False, True):
        if _fitting(network, split, stages, True, backward, limit) is None:
            need = plan(network.it, split, 1, stages, backward, backward).bytes
            return (
                f"its weights and values take {need} bytes of shared memory and the device has "
                f"{limit} for a block"
            )
    return None


@functools.lru_cache(maxsize=256)
def _capacity(found: Plan, backward: bool, device: int) -> int:
    """Return how many blocks run at once; it also lets the kernel use the memory it needs."""
    return max(1, _cuda.trajectory_capacity(found.field, backward, device))


def _chosen(program: Program, y0: Tensor, split: int, backward: bool, device: int):
    """Return the plan and the number of blocks; raise for what `refuses` keeps from here."""
    network, batch = _Same(program.network), y0.shape[0]
    limit, processors = _limits(device)
    reason = _unsupported(network, program.stages, batch == 0, y0.dtype)
    reason = reason or _unfit(network, split, program.stages, limit)
    if reason:
        raise InputError(
            "expected a solve that the CUDA trajectory kernels take, got one that they refuse: "
            f"{reason}; use backend='auto'"
        )
    narrow = batch <= 16 * processors
    found = _fitting(network, split, program.stages, narrow, backward, limit)
    assert found is not None
    return found, min(-(-batch // found.rows), _capacity(found, backward, device))


def _device() -> int:
    return torch.cuda.current_device()


def _queue(y: Tensor) -> tuple[int, int]:
    return y.device.index, torch.cuda.current_stream(y.device).cuda_stream


_UPLOADS: dict[Any, Tensor] = {}
_CAPTURED: dict[Any, Tensor] = {}


@functools.lru_cache(maxsize=64)
def _host_steps(same: _Same) -> tuple[Tensor, bytes, tuple[int, ...]]:
    """Return times, h, first outputs and dense weights in one, its bytes, and where each begins."""
    program: Program = same.it
    states = [sum(o < n for o in program.outputs) for n in range(program.steps + 2)]
    first = torch.tensor(states, dtype=torch.int32).view(torch.float32)
    parts = [program.times.flatten().float(), program.h.float(), first]
    if program.weights is not None:
        parts.append(program.weights.flatten().float())
    host = torch.cat(parts)
    starts = tuple(4 * sum(p.numel() for p in parts[:i]) for i in range(len(parts)))
    return host, host.numpy().tobytes(), starts


@functools.cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device that every stream may read; only the copy is waited for."""
    if device.type != "cuda":
        return host.to(device)
    with torch.cuda.stream(_upload_stream(device)):
        return host.to(device)


def _uploaded(program: Program, y: Tensor, device: int) -> list[int]:
    """Return the addresses of times, h, first outputs and dense weights on the device.

    They are kept for the next solve of the same steps, and for good once a graph reads them.
    """
    host, content, starts = _host_steps(_Same(program))
    key = content, device
    found = _CAPTURED.get(key, _UPLOADS.pop(key, None))
    captured = y.is_cuda and torch.cuda.is_current_stream_capturing()
    if found is None and captured:
        raise InputError(
            "expected a captured solve to take steps that ran before, got new ones; "
            "run the solve once before the capture"
        )
    if found is None:
        found = _upload(host, y.device)
    if captured:
        _CAPTURED[key] = found
    elif key not in _CAPTURED:
        if y.is_cuda:
            found.record_stream(torch.cuda.current_stream(y.device))
        while len(_UPLOADS) >= 64:
            del _UPLOADS[next(iter(_UPLOADS))]
        _UPLOADS[key] = found
    return [found.data_ptr() + at for at in starts] + [0] * (4 - len(starts))


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
        same = _Same(_closed(_Same(network)))
        reason = _unsupported(same, stages, batch == 0, dtype)
        return reason or _unfit(same, _split(), stages, _limits(_device())[0])

    def forward(self, program: Program, inputs: Inputs, keep: Keep) -> tuple[Tensor, Any]:
        """See `TrajectoryKernels`."""
        program, inputs, split = _closed_program(_Same(program)), _contiguous(inputs), _split()
        y0 = inputs.y0
        assert y0 is not None
        batch, state = y0.shape
        queue = _queue(y0)
        found, blocks = _chosen(program, y0, split, False, queue[0])
        out = y0.new_empty(len(program.outputs), batch, state)
        kept = None
        if keep != "nothing":
            kept = y0.new_empty(program.steps * program.stages, batch, state)
        solve = _cuda.Solve(
            [
                [y0.data_ptr(), out.data_ptr(), _address(kept), 0, 0, 0],
                _uploaded(program, y0, queue[0]),
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
            _square(program),
            program.b,
            batch,
            program.steps,
        )
        _cuda.trajectory_forward(found.field, solve, blocks, *queue)
        return out, (kept, split)

    def backward(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """See `TrajectoryKernels`."""
        stage_inputs, split = kept
        program = _closed_program(_Same(program))
        inputs, grad = _contiguous(inputs), grad.contiguous()
        y0 = inputs.y0
        assert y0 is not None
        batch, network = y0.shape[0], program.network
        queue = _queue(y0)
        found, blocks = _chosen(program, y0, split, True, queue[0])
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
        whole = not found.deferred and _reads_all(_Same(network), *_columns_of(inputs))
        make = y0.new_empty if whole else y0.new_zeros
        partials = make((blocks, total)) if total else None
        flat = y0.new_empty(total)
        grad_y0 = torch.empty_like(y0) if wanted.y0 else None
        conds = [
            torch.empty_like(x) if w else None
            for x, w in zip(inputs.conds, wanted.conds, strict=True)
        ]
        values, deltas = _room(network, stage_inputs) if found.deferred else ([], [])
        split_at = len(inputs.parameters)
        solve = _cuda.Solve(
            [
                [y0.data_ptr(), 0, stage_inputs.data_ptr(), grad.data_ptr(), _address(grad_y0)]
                + [_address(partials)],
                _uploaded(program, y0, queue[0]),
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
            _square(program),
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

    def _by_parts(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs, rows: int
    ) -> Inputs:
        """Do so many rows after another, whose values and gradients fit into `ROOM`."""
        stage_inputs, split = kept
        conds = [x.split(rows) for x in inputs.conds]
        shared: list[Tensor | None] = []
        parts = []
        for i, y0 in enumerate(inputs.y0.split(rows) if inputs.y0 is not None else ()):
            at = slice(i * rows, i * rows + len(y0))
            some = Inputs(y0, inputs.parameters, inputs.tables, [x[i] for x in conds])
            own = stage_inputs[:, at].contiguous(), split
            part = self.backward(program, some, own, grad[:, at], wanted)
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


def _rows_at_once(program: Program) -> int:
    """How many samples the values and the gradients of all layers may be kept of."""
    width = 2 * sum(layer.width for layer in program.network.layers)
    return max(MIN_ROWS, ROOM // (4 * width * max(1, program.steps * program.stages)))


def _square(program: Program) -> list[list[float]]:
    """Return a with rows of one length."""
    return [[*row, *[0.0] * (program.stages - len(row))] for row in program.a]


def _room(network: Network, stage_inputs: Tensor) -> tuple[list[Any], list[Any]]:
    """Return memory for the values and the gradients of all layers in all stages."""
    count, batch, _ = stage_inputs.shape
    rooms = [stage_inputs.new_empty(count, batch, layer.width) for layer in network.layers]
    return [stage_inputs, *(torch.empty_like(x) for x in rooms[:-1]), None], rooms


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
