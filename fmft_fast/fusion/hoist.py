"""Compute once per solve what does not depend on the state: weights, time tables, conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tracer import Lead, Node, convert


class Values:
    """The values of nodes under given inputs of the field.

    Args:
        lead: sizes in the place of the leading dimensions.
        given: tensors of the inputs that may be read, by name.
    """

    def __init__(self, lead: Sequence[int], given: dict[str, Tensor]):
        self.lead, self.given = tuple(lead), given
        self.known: dict[Node, Any] = {}

    def of(self, node: Node) -> Any:
        """The value of a node."""
        if node.tensor is not None:
            return node.tensor
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def _compute(self, node: Node) -> Any:
        if node.name == "fit":
            return fit(self.of(node.args[0]), node.args[1])
        if node.name == "part":
            return self.of(node.args[0])[node.args[1]]
        if node.func is None:
            return self.given[node.name]
        kwargs = {k: convert(v, self._fill) for k, v in node.kwargs.items()}
        return node.func(*convert(node.args, self._fill), **kwargs)

    def _fill(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self.of(value)
        return self.lead[value.axis] if isinstance(value, Lead) else value


def fit(value: Tensor, size: int) -> Tensor:
    """A value that is the same for all samples as a vector [size]."""
    return value.reshape(-1).expand(size)


def fitted(nodes: Sequence[Node], kind: frozenset[str]) -> list[Node]:
    """The values of one kind that enter nodes, each where it leaves the user's own shapes."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name == "fit":
            if node.deps == kind:
                found[node] = None
        elif node.name == "hoisted":
            todo.extend(node.inputs())
    return list(found)


def tables_by_rows(nodes: Sequence[Node], times: Tensor) -> list[Tensor]:
    """Tables [S, width], with the stage times in the place of a batch."""
    values = Values((len(times),), {"t": times})
    tables = []
    for node in nodes:
        value = values.of(node.args[0])
        if value.ndim != 2 or len(value) != len(times):
            raise ValueError("the times do not stay apart")
        tables.append(value.expand(len(times), node.args[1]))
    return tables


def tables_by_times(nodes: Sequence[Node], times: Tensor, axes: int) -> list[Tensor]:
    """Tables [S, width], one stage time after the other for certain (by torch.vmap)."""

    def at(t: Tensor) -> tuple[Tensor, ...]:
        values = Values((1,) * axes, {"t": t})
        return tuple(values.of(node) for node in nodes)

    return list(torch.vmap(at)(times))


def rows_suffice(nodes: Sequence[Node], axes: int, like: Tensor) -> bool:
    """Whether `tables_by_rows` gives the tables, tried on some times."""
    if axes != 1:
        return False
    for count in (1, 3, 5):
        times = torch.linspace(0.13, 0.91, count, dtype=like.dtype, device=like.device)
        try:
            rows = tables_by_rows(nodes, times)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        for p, q in zip(rows, tables_by_times(nodes, times, axes), strict=True):
            if p.shape != q.shape or not torch.allclose(p, q, rtol=1e-4, atol=1e-5, equal_nan=True):
                return False
    return True


def conditions(nodes: Sequence[Node], cond: Tensor, lead: Sequence[int]) -> list[Tensor]:
    """Values [batch, width] of what depends on the condition."""
    values = Values(lead, {"cond": cond})
    out = []
    for node in nodes:
        value = values.of(node.args[0])
        out.append(value.expand(*lead, node.args[1]).reshape(-1, node.args[1]))
    return out
