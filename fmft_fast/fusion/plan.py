"""A field as a `Network` with its tensors: found once, kept while nothing it read has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.chain import Chain
from ..ops.layout import is_plain
from ..ops.network import Inputs, Network, evaluate
from .assembly import Found
from .compare import alike, generalise
from .effects import Watch
from .hoist import (
    Fitted,
    KeptTables,
    Recipe,
    conditions,
    rows_suffice,
    tables_by_rows,
    tables_by_times,
)
from .recognise import Recogniser
from .refusal import Refusal
from .tracer import Trace, record

# Leading sizes that a field is traced with; with the second ones it is tried on numbers as well.
_SIZES = ((101, 103, 107, 109), (2, 3, 5, 7))
BATCH_MATTERS = (
    "what the field computes depends on the batch size",
    None,
    "do not branch on the number of samples",
)


class Parts(NamedTuple):
    """The tensors of a solve, where nothing else is to be computed.

    Attributes:
        tables: gives the tables at times that nobody changes.
        parameters: of the field.
        chain: what computes the conditions; None if there are none.
    """

    tables: Callable[[Tensor], list[Tensor]]
    parameters: list[Tensor]
    chain: Chain | None


class Plan:
    """A field that kernels can evaluate.

    Attributes:
        network: its layers.
        needs_tables: whether the stage times must be known before the solve.
        constant: whether `bind` gives the tensors of the field and nothing else.
        tensors: of the field, one for every parameter of the network, None for those derived.
    """

    def __init__(self, found: Found, axes: int, state: Tensor, trace: Trace):
        self.network: Network = found.network
        self.axes, self.trace = axes, trace
        self.found = found
        self.needs_tables = bool(found.tables)
        derived = any(node.tensor is None for node in found.parameters)
        self.constant = not (derived or found.tables or found.conds)
        self.tensors: list[Any] = [node.tensor for node in found.parameters]
        self._times = Fitted(found.tables, frozenset(["t"]))
        self._kept = KeptTables(self._times)
        self._conds = Fitted(found.conds, frozenset(["cond"]))
        self._rest = Recipe(
            [*found.parameters, *found.tables, *found.conds],
            known=[*self._times.nodes, *self._conds.nodes],
        )
        self._by_rows = rows_suffice(self._times, axes, state) if self._times.nodes else False

    def flatten(self, y: Tensor) -> Tensor:
        """A state [*lead, state] as [batch, state]."""
        return y if y.ndim == 2 else y.reshape(-1, y.shape[-1])

    def restore(self, y: Tensor, lead: Sequence[int]) -> Tensor:
        """States [*, batch, state] with the leading dimensions that they had."""
        return y if len(lead) == 1 else y.reshape(*y.shape[:-2], *lead, y.shape[-1])

    def bind(
        self, times: Tensor | None, cond: Tensor | None = None, lead: Sequence[int] | None = None
    ) -> Inputs:
        """The tensors of a solve, with their graph; y0 is left to the caller.

        Args:
            times: [S] times of all stages in the state's dtype; only read for tables.
            cond: the condition of the solve.
            lead: leading dimensions of the state, if they are not those of the condition.
        """
        if self.constant:
            return Inputs(None, [_plain(x) for x in self.tensors])
        known: list[Tensor] = []
        if self._times.nodes:
            assert times is not None
            known += self._kept.of(times, partial(self._tables, times))
        if self._conds.nodes:
            assert cond is not None
            lead = tuple(cond.shape[: self.axes] if lead is None else lead)
            known += conditions(self._conds, cond, lead)
        values = self._rest.run((1,) * self.axes, {}, known)
        first, second = len(self.found.parameters), len(values) - len(self.found.conds)
        return Inputs(
            None,
            [_by_rows(_plain(x)) for x in values[:first]],
            [_plain(x).contiguous() for x in values[first:second]],
            [_plain(x).contiguous() for x in values[second:]],
        )

    def parts(self, cond: Tensor | None, batch: int) -> Parts | None:
        """How `bind` comes by its tensors without a graph, if it takes them as they are.

        Args:
            cond: a condition like those that will come.
            batch: rows of the states.
        """
        if self._rest.computes or None in self.tensors:
            return None
        if not self._conds.nodes:
            return Parts(self._kept_tables, self.tensors, None)
        chain = self._conds.chain
        if chain is None or cond is None or len(cond) != batch or not chain.takes(cond):
            return None
        if self._conds.sizes != [chain.width(i) for i in chain.wanted]:
            return None
        numbers = [self._conds.nodes.index(node) for node in self.found.conds]
        return Parts(self._kept_tables, self.tensors, chain.choose(numbers))

    def _kept_tables(self, times: Tensor) -> list[Tensor]:
        """The tables that `bind` gives, if nothing is computed from them."""
        found = self._kept.of(times, partial(self._tables, times))
        numbers = [self._times.nodes.index(node) for node in self.found.tables]
        return [_plain(found[i]).contiguous() for i in numbers]

    def _tables(self, times: Tensor) -> list[Tensor]:
        """The values that depend on time, for all stages."""
        if self._by_rows:
            return tables_by_rows(self._times, times)
        return tables_by_times(self._times, times, self.axes)

    @property
    def flops(self) -> int:
        """Floating point operations of one evaluation for one sample, activations left out."""
        layers = self.network.layers
        return sum(
            2 * layer.width * self.network.width(term.source)
            for layer in layers
            for term in layer.terms
            if term.weight is not None
        )

    def __str__(self) -> str:
        rows = [("layer", "from", "width", "activation", "adds")]
        for i, layer in enumerate(self.network.layers, 1):
            read = " ".join(
                ("x" if term.source == 0 else str(term.source))
                + ("" if term.weight is None else "*W")
                for term in layer.terms
            )
            adds = [
                name
                for name, there in (
                    ("bias", layer.bias),
                    ("t", layer.time),
                    ("time table", layer.table),
                    ("cond", layer.cond),
                )
                if there is not None
            ]
            adds += ["skip " + ("x" if s == 0 else str(s)) for s in layer.skips]
            act = layer.activation
            if act in ("leaky_relu", "elu", "softplus"):
                act += f"({layer.slope:g})"
            rows.append((str(i), read, str(layer.width), act, ", ".join(adds) or "-"))
        sizes = [max(len(row[k]) for row in rows) for k in range(5)]
        table = [
            "  " + "  ".join(cell.ljust(n) for cell, n in zip(row, sizes, strict=True)).rstrip()
            for row in rows
        ]
        derived = sum(node.tensor is None for node in self.found.parameters)
        parameters = f"{len(self.found.parameters)} parameters"
        if derived:
            parameters += f" ({derived} computed once per solve)"
        if self.needs_tables:
            time = "by tables, computed once per solve"
        elif any(layer.time for layer in self.network.layers):
            time = "as a column of a matrix"
        else:
            time = "not at all"
        return "\n".join(
            [
                f"state of width {self.network.state}, {len(rows) - 1} layers",
                *table,
                f"  {parameters}; time enters {time}; {self.flops} FLOPs per sample and evaluation",
            ]
        )


def _plain(value: Tensor) -> Tensor:
    return value if is_plain(value) else value.clone()


def _by_rows(value: Tensor) -> Tensor:
    if value.is_contiguous() or value.stride(-1) == 1 or value.numel() == 0:
        return value
    return value.contiguous()


def make_plan(field: Callable, y0: Tensor, cond: Tensor | None, watch: Watch) -> Plan:
    """Trace a field twice, recognise its layers, and try the result on numbers."""
    axes = y0.ndim - 1
    sizes = [s[:axes] for s in _SIZES]
    traces = [record(field, s, y0, cond, watch) for s in sizes]
    generalise(traces[0], traces[1], (sizes[0], sizes[1]))
    for tensor in traces[0].outside:
        if tensor.device != y0.device and tensor.ndim:
            raise Refusal(
                f"a tensor on {tensor.device} meets a state on {y0.device}",
                remedy="move the field and the state to one device",
            )
    like = torch.empty(0, dtype=y0.dtype, device=y0.device)
    plan = Plan(Recogniser(y0.shape[-1], axes, like).find(traces[0]), axes, like, traces[0])
    if not confirm(plan, field, y0, cond):
        raise Refusal(*BATCH_MATTERS)
    _try(plan, field, y0, cond)
    return plan


@torch.no_grad()
def _try(plan: Plan, field: Callable, y0: Tensor, cond: Tensor | None) -> None:
    """Compare network and field on two samples at two times; random numbers of our own."""
    g = torch.Generator().manual_seed(0)
    lead, n = _SIZES[1][: plan.axes], y0.shape[-1]
    y = torch.randn(*lead, n, generator=g, dtype=torch.float64).to(y0)
    times = torch.tensor([0.3125, 0.8125], dtype=y0.dtype, device=y0.device)
    if cond is not None:
        for axis in range(min(plan.axes, cond.ndim)):
            if cond.shape[axis] == y0.shape[axis]:
                rows = torch.arange(lead[axis], device=cond.device) % cond.shape[axis]
                cond = cond.index_select(axis, rows)
    inputs = plan.bind(times, cond, lead)
    eps = torch.finfo(y0.dtype).eps
    for q, t in enumerate(times.unbind()):
        want = field(t, y) if cond is None else field(t, y, cond)
        got = evaluate(plan.network, inputs, float(t), q, plan.flatten(y)).reshape(want.shape)
        size = want.abs().max().clamp(min=1e-3)
        slack = 1e4 if y0.device.type == "cpu" else 1e5
        if not torch.allclose(got, want, rtol=0, atol=float(size) * eps * slack, equal_nan=True):
            raise Refusal("the recognised network gives other numbers than the field")


def confirm(plan: Plan, field: Callable, y0: Tensor, cond: Tensor | None) -> bool:
    """Whether the field computes the same for the leading sizes of y0."""
    try:
        again = record(field, y0.shape[:-1], y0, cond, Watch())
    except (Refusal, Exception):
        return False
    return alike(plan.trace, again, y0.shape[:-1])
