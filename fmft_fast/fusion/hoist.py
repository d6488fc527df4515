"""Compute once per solve what does not depend on the state: weights, time tables, conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import getitem, itemgetter
from typing import Any

import torch
from torch import Tensor

from ..ops.copies import Copies, can_copy
from .chains import chain_of
from .tracer import Lead, Node


class Recipe:
    """How nodes are computed: the calls in their order, laid out once for many solves.

    Every number, tensor and result has a place in a list, from which a call takes its arguments.

    Args:
        wanted: the nodes whose values `run` gives.
        known: nodes whose values `run` is given.
    """

    def __init__(self, wanted: Sequence[Node], known: Sequence[Node] = ()) -> None:
        self._start: list[Any] = []  # what is there before the first call
        self._inputs: dict[str, int] = {}
        self._leads: dict[int, int] = {}
        self._calls: list[tuple[Callable, Callable, dict[str, int], int]] = []
        self._places = {node: self._new() for node in known}
        self._known = list(self._places.values())
        self._wanted = [self._place(node) for node in wanted]

    def run(
        self, lead: Sequence[int], given: Mapping[str, Tensor], known: Sequence[Tensor] = ()
    ) -> list[Any]:
        """The values of the wanted nodes.

        Args:
            lead: sizes in the place of the leading dimensions.
            given: tensors of the inputs that are read, by name.
            known: the values of the known nodes.
        """
        values = self._start.copy()
        for axis, place in self._leads.items():
            values[place] = lead[axis]
        for name, place in self._inputs.items():
            values[place] = given[name]
        for place, value in zip(self._known, known, strict=True):
            values[place] = value
        for func, pick, named, place in self._calls:
            if named:
                kwargs = {name: values[i] for name, i in named.items()}
                values[place] = func(*pick(values), **kwargs)
            else:
                values[place] = func(*pick(values))
        return [values[place] for place in self._wanted]

    @property
    def computes(self) -> bool:
        """Whether anything is called."""
        return bool(self._calls)

    def tensors(self) -> list[Tensor]:
        """The tensors from outside that are read."""
        return [value for value in self._start if isinstance(value, Tensor)]

    def _new(self, value: Any = None) -> int:
        self._start.append(value)
        return len(self._start) - 1

    def _input(self, places: dict[Any, int], name: Any) -> int:
        if name not in places:
            places[name] = self._new()
        return places[name]

    def _place(self, value: Any) -> int:
        """Where a value will be found."""
        if isinstance(value, Lead):
            return self._input(self._leads, value.axis)
        if isinstance(value, Node):
            if value not in self._places:
                self._places[value] = self._of_node(value)
            return self._places[value]
        if _is_fixed(value):
            return self._new(value)
        if isinstance(value, slice):
            return self._call(slice, (value.start, value.stop, value.step))
        if hasattr(value, "_fields"):
            return self._call(type(value), tuple(value))
        return self._call(_tuple if isinstance(value, tuple) else _list, tuple(value))

    def _of_node(self, node: Node) -> int:
        if node.tensor is not None:
            return self._new(node.tensor)
        if node.name == "fit":
            return self._call(fit, node.args)
        if node.name == "part":
            return self._call(getitem, node.args)
        if node.func is None:
            return self._input(self._inputs, node.name)
        return self._call(node.func, node.args, node.kwargs)

    def _call(self, func: Callable, args: tuple, kwargs: Mapping[str, Any] | None = None) -> int:
        """Note a call behind those that it needs; the place of its result."""
        kwargs = kwargs or {}
        if fixed := {name: value for name, value in kwargs.items() if _is_fixed(value)}:
            func = partial(func, **fixed)
        places = [self._place(value) for value in args]
        named = {name: self._place(v) for name, v in kwargs.items() if name not in fixed}
        # A getter of one place gives no tuple, that of a slice does.
        many = len(places) > 1
        first = places[0] if places else 0
        pick = itemgetter(*places) if many else itemgetter(slice(first, first + len(places)))
        place = self._new()
        self._calls.append((func, pick, named, place))
        return place


def _is_fixed(value: Any) -> bool:
    """Whether an argument is the same in every solve."""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, (tuple, list)):
        return all(map(_is_fixed, value))
    return not isinstance(value, (Node, Lead))


def _tuple(*items: Any) -> tuple[Any, ...]:
    return items


def _list(*items: Any) -> list[Any]:
    return list(items)


def fit(value: Tensor, size: int) -> Tensor:
    """A value that is the same for all samples as a vector [size]."""
    return value.reshape(-1).expand(size)


class Fitted:
    """The values of one kind that enter nodes, each where it leaves the user's own shapes.

    Attributes:
        nodes: of the fitted values.
        recipe: of the values before they are fitted, and `sizes` to which they are.
        chain: the same for few rows, where the values are layers on the condition.
    """

    def __init__(self, into: Sequence[Node], kind: frozenset[str]) -> None:
        found: dict[Node, None] = {}
        seen: set[Node] = set()
        todo = list(into)
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
        self.nodes = list(found)
        whole = [node.args[0] for node in self.nodes]
        self.recipe, self.chain = Recipe(whole), chain_of(whole)
        self.sizes: list[int] = [node.args[1] for node in self.nodes]


def tables_by_rows(fitted: Fitted, times: Tensor) -> list[Tensor]:
    """Tables [S, width], with the stage times [S] in the place of a batch."""
    tables = []
    found = fitted.recipe.run((len(times),), {"t": times})
    for value, size in zip(found, fitted.sizes, strict=True):
        if value.ndim != 2 or len(value) != len(times):
            raise ValueError("the times do not stay apart")
        tables.append(value.expand(len(times), size))
    return tables


# What may be kept of a solve for the next one, and compared with it: bytes.
MAX_KEPT = 1 << 20


class KeptTables:
    """The tables of the last solve without gradient, while nothing that gives them has changed."""

    def __init__(self, fitted: Fitted) -> None:
        self._tensors = fitted.recipe.tensors()
        self._last: tuple[Tensor, Copies, list[Tensor]] | None = None

    def of(self, times: Tensor, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The tables for these times, a tensor that nobody changes; from `compute` if not kept."""
        if torch.is_grad_enabled():
            return compute()
        # Read once: another thread may solve with the same field.
        if (last := self._last) is not None:
            kept, copies, tables = last
            if kept is times and copies.hold():
                return tables
        # Copied first: what changes meanwhile is seen the next time.
        copies = Copies(self._tensors) if can_copy(self._tensors, MAX_KEPT) else None
        tables = compute()
        self._last = None
        if copies is not None and can_copy(tables, MAX_KEPT):
            self._last = times, copies, tables
        return tables


def tables_by_times(fitted: Fitted, times: Tensor, axes: int) -> list[Tensor]:
    """Tables [S, width], one stage time after the other for certain (by torch.vmap)."""

    def at(t: Tensor) -> tuple[Tensor, ...]:
        found = fitted.recipe.run((1,) * axes, {"t": t})
        return tuple(map(fit, found, fitted.sizes))

    return list(torch.vmap(at)(times))


def rows_suffice(fitted: Fitted, axes: int, like: Tensor) -> bool:
    """Whether `tables_by_rows` gives the tables, tried on some times."""
    if axes != 1:
        return False
    for count in (1, 3, 5):
        times = torch.linspace(0.13, 0.91, count, dtype=like.dtype, device=like.device)
        try:
            rows = tables_by_rows(fitted, times)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        for p, q in zip(rows, tables_by_times(fitted, times, axes), strict=True):
            if p.shape != q.shape or not torch.allclose(p, q, rtol=1e-4, atol=1e-5, equal_nan=True):
                return False
    return True


def conditions(fitted: Fitted, cond: Tensor, lead: Sequence[int]) -> list[Tensor]:
    """Values [batch, width] of what depends on the condition."""
    found = None if fitted.chain is None else fitted.chain.run(cond)
    if found is None:
        found = fitted.recipe.run(lead, {"cond": cond})
    return [
        value
        if len(lead) == 1 and value.shape == (*lead, size)
        else value.expand(*lead, size).reshape(-1, size)
        for value, size in zip(found, fitted.sizes, strict=True)
    ]
