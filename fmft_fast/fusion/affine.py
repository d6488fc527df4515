"""Values before an activation: sums of matrices times earlier values, plus what is known before.

Weights and vectors are nodes: tensors from outside as they are, or torch calls on such, which run
once per solve. `Affine` says what a value of some width is; a `Row` is several side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .tracer import Node

Kind = Literal["const", "time", "table", "cond"]
KIND: dict[frozenset[str], Kind] = {
    frozenset(): "const",
    frozenset(["t"]): "table",
    frozenset(["cond"]): "cond",
}


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix's columns from `column` on (None: the identity) times an earlier value."""

    source: int
    weight: Node | None
    column: int = 0


@dataclass(frozen=True, eq=False)
class Add:
    """A summand that is known before the solve; of "time", a column (None: ones) times t."""

    kind: Kind
    node: Node | None
    column: int = 0


@dataclass(frozen=True, eq=False)
class Affine:
    """A sum of products and summands."""

    width: int
    terms: tuple[Product, ...] = ()
    adds: tuple[Add, ...] = ()

    @property
    def single(self) -> int | None:
        """The number of the value that this is, if it is one."""
        if len(self.terms) == 1 and not self.adds and self.terms[0].weight is None:
            return self.terms[0].source
        return None


Row = tuple[Affine, ...]


def width(row: Row) -> int:
    """Size of a row."""
    return sum(part.width for part in row)


def hoisted(func: Callable, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Node:
    """A torch call that is made once per solve."""
    node = Node("hoisted", func, args, kwargs, shape)
    node.deps = frozenset().union(*(n.deps for n in node.inputs()))
    return node


def constant(tensor: Tensor) -> Node:
    """A tensor of our own."""
    return Node("tensor", shape=tuple(tensor.shape), dtype=tensor.dtype, tensor=tensor)


def columns(weight: Node, start: int, count: int) -> Node:
    """Some columns of a matrix."""
    rows, total = weight.shape
    if (start, count) == (0, total):
        return weight
    return hoisted(_columns, (rows, count), weight, start, count)


def _columns(weight: Tensor, start: int, count: int) -> Tensor:
    return weight[:, start : start + count]


def _rows(value: Tensor, start: int, stop: int) -> Tensor:
    return value[start:stop]


def _last(value: Tensor, start: int, stop: int) -> Tensor:
    return value[..., start:stop]


def _scale_rows(weight: Tensor, factor: Tensor) -> Tensor:
    return weight * factor[:, None]


def _apply_vector(weight: Tensor, vector: Tensor) -> Tensor:
    return weight @ vector


class Algebra:
    """What can be done with rows, for values of known widths on a device.

    Args:
        like: a tensor of the state's dtype and device.
        widths: sizes of the values so far.
    """

    def __init__(self, like: Tensor, widths: list[int]):
        self.like, self.widths = like, widths
        self._eyes: dict[int, Node] = {}

    def eye(self, n: int) -> Node:
        """The identity matrix."""
        if n not in self._eyes:
            self._eyes[n] = constant(torch.eye(n, dtype=self.like.dtype, device=self.like.device))
        return self._eyes[n]

    def full(self, n: int, value: float) -> Node:
        """A vector of one value."""
        return constant(self.like.new_full((n,), value))

    def matrix(self, term: Product) -> Node:
        """The columns of a term's matrix as one of their own."""
        size = self.widths[term.source]
        return self.eye(size) if term.weight is None else columns(term.weight, term.column, size)

    def scale(self, part: Affine, factor: float | Node) -> Affine:
        """A multiple, by a number or by a vector [width]."""
        if not isinstance(factor, Node) and factor == 1:
            return part
        vector = isinstance(factor, Node)
        terms, adds = [], []
        for term in part.terms:
            weight = self.eye(part.width) if term.weight is None else term.weight
            func = _scale_rows if vector else torch.mul
            scaled = hoisted(func, weight.shape, weight, factor)
            terms.append(Product(term.source, scaled, term.column))
        for add in part.adds:
            node = add.node
            if add.kind == "time":
                node = self.time_column(part.width, add)
                node = hoisted(_scale_rows if vector else torch.mul, node.shape, node, factor)
                adds.append(Add("time", node))
            else:
                assert node is not None
                adds.append(Add(add.kind, hoisted(torch.mul, node.shape, node, factor)))
        return Affine(part.width, tuple(terms), tuple(adds))

    def time_column(self, n: int, add: Add) -> Node:
        """What t is multiplied by, as a matrix of one column [n, 1]."""
        if add.node is None:
            return constant(self.like.new_ones((n, 1)))
        return columns(add.node, add.column, 1)

    def slice(self, row: Row, start: int, stop: int) -> Row:
        """Some entries of a row; whole parts stay what they are."""
        parts, begin = [], 0
        for part in row:
            lo, hi = max(start - begin, 0), min(stop - begin, part.width)
            if lo < hi:
                parts.append(part if hi - lo == part.width else self._cut(part, lo, hi))
            begin += part.width
        return tuple(parts)

    def _cut(self, part: Affine, lo: int, hi: int) -> Affine:
        terms, adds, n = [], [], hi - lo
        for term in part.terms:
            weight = self.eye(part.width) if term.weight is None else term.weight
            cut = hoisted(_rows, (n, weight.shape[1]), weight, lo, hi)
            terms.append(Product(term.source, cut, term.column))
        for add in part.adds:
            if add.node is None:
                adds.append(add)
            elif add.kind == "time":
                cut = hoisted(_rows, (n, add.node.shape[1]), add.node, lo, hi)
                adds.append(Add("time", cut, add.column))
            else:
                adds.append(Add(add.kind, hoisted(_last, (n,), add.node, lo, hi)))
        return Affine(n, tuple(terms), tuple(adds))

    def add(self, a: Row, b: Row) -> Row:
        """The sum of two rows of one size."""
        ends = sorted({*self._ends(a), *self._ends(b)})
        parts = []
        for lo, hi in zip([0, *ends], ends, strict=False):
            (p,), (q,) = self.slice(a, lo, hi), self.slice(b, lo, hi)
            parts.append(Affine(hi - lo, p.terms + q.terms, p.adds + q.adds))
        return tuple(parts)

    @staticmethod
    def _ends(row: Row) -> list[int]:
        ends, end = [], 0
        for part in row:
            end += part.width
            ends.append(end)
        return ends

    def join(self, row: Row) -> Affine:
        """A row as one value, by matrices with rows of zeros."""
        if len(row) == 1:
            return row[0]
        total, begin = width(row), 0
        terms, adds = [], []
        for part in row:
            after = total - begin - part.width
            for term in part.terms:
                weight = self.eye(part.width) if term.weight is None else term.weight
                shape = (total, weight.shape[1])
                padded = hoisted(F.pad, shape, weight, (0, 0, begin, after))
                terms.append(Product(term.source, padded, term.column))
            for add in part.adds:
                if add.kind == "time":
                    node = self.time_column(part.width, add)
                    pad = (0, 0, begin, after)
                    adds.append(Add("time", hoisted(F.pad, (total, 1), node, pad)))
                else:
                    assert add.node is not None
                    pad = (begin, after)
                    adds.append(Add(add.kind, hoisted(F.pad, (total,), add.node, pad)))
            begin += part.width
        return Affine(total, tuple(terms), tuple(adds))

    def linear(self, row: Row, weight: Node, value_of: Callable[[Affine], int]) -> Affine:
        """A matrix times a row; `value_of` makes a layer of a part that is not a value yet."""
        begin, n = 0, weight.shape[0]
        terms: list[Product] = []
        adds: list[Add] = []
        for part in row:
            own: Node | None = None

            def block(begin: int = begin, part: Affine = part) -> Node:
                return columns(weight, begin, part.width)

            if len(part.terms) == 1 and part.terms[0].weight is None:
                terms.append(Product(part.terms[0].source, weight, begin))
                rest = part.adds
            elif len(part.terms) == 1 and self._selects(part.terms[0]):
                own = self.matrix(part.terms[0])
                shape = (n, own.shape[1])
                product = hoisted(torch.matmul, shape, block(), own)
                terms.append(Product(part.terms[0].source, product))
                rest = part.adds
            elif part.terms:
                terms.append(Product(value_of(part), weight, begin))
                rest = ()
            else:
                rest = part.adds
            for add in rest:
                if add.kind == "time":
                    if add.node is None and part.width == 1:
                        adds.append(Add("time", weight, begin))
                    else:
                        column = self.time_column(part.width, add)
                        adds.append(Add("time", hoisted(torch.matmul, (n, 1), block(), column)))
                elif add.kind == "const":
                    adds.append(Add("const", hoisted(_apply_vector, (n,), block(), add.node)))
                else:
                    adds.append(Add(add.kind, hoisted(F.linear, (n,), add.node, block())))
            begin += part.width
        return Affine(n, tuple(terms), tuple(adds))

    def _selects(self, term: Product) -> bool:
        """Whether a term only picks some columns of a value."""
        node = term.weight
        while node is not None and node.func in (_rows, _columns):
            node = node.args[0]
        return node is not None and node in self._eyes.values()
