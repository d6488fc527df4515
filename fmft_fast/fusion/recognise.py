"""From the calls of a field to a `Network`: which of them are layers, and what is known before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .affine import KIND, Add, Affine, Algebra, Product, Row, constant, hoisted, width
from .assembly import Assembly, Draft, Found
from .calls import (
    ACTIVATIONS,
    ROWWISE,
    SEVERAL,
    TAKES_SIZE,
    activation_of,
    argument,
    fill_of,
    has_lead,
    name_of,
    shown,
    time_of,
    transposed,
)
from .refusal import Refusal
from .tracer import Lead, Node, Trace


class Recogniser:
    """Turns a trace into layers.

    Args:
        state: width of the state.
        axes: number of its leading dimensions.
        like: a tensor of its dtype and device.
    """

    def __init__(self, state: int, axes: int, like: Tensor):
        self.state, self.axes, self.like = state, axes, like
        self.lead = tuple(Lead(i) for i in range(axes))
        self.widths = [state]
        self.drafts: list[Draft] = []
        self.algebra = Algebra(like, self.widths)
        self.rows: dict[Node, Row] = {}
        self.values: dict[tuple, int] = {}

    def refuse(self, node: Node, reason: str, remedy: str | None = None) -> Refusal:
        """A refusal at the line of a node."""
        return Refusal(reason, node.where, remedy)

    def row(self, node: Node) -> Row:
        """What a node is."""
        if node not in self.rows:
            self.rows[node] = self._row(node)
        return self.rows[node]

    def _row(self, node: Node) -> Row:
        if node.name == "x":
            return (Affine(self.state, (Product(0, None),)),)
        if node.deps in KIND and not (node.deps == {"t"} and self._linear_in_time(node)):
            if name_of(node) == "cat" and self._along_last(node):
                return self._cat(node)
            return self.known(node, node.shape[-1] if node.shape else 1)
        time = time_of(node, self.like.dtype)
        if time is not None:
            return self._time(*time, node.shape[-1] if node.shape else 1)
        if "x" in node.deps and node.name != "part":
            if node.name not in SEVERAL and (node.shape[:-1] != self.lead or not node.shape):
                raise self.refuse(
                    node,
                    f"{node.name} gives the shape {shown(node.shape)}, which mixes samples or "
                    "moves the last axis",
                    "work on the last axis only",
                )
            if node.dtype != self.like.dtype:
                raise self.refuse(node, f"{node.name} changes the dtype of the state")
        handler: Callable[[Node], Row] | None = getattr(self, f"_do_{name_of(node)}", None)
        if name_of(node) in ACTIVATIONS:
            handler = self._activation
        if handler is None:
            raise self.refuse(
                node,
                f"{node.name} is no layer that kernels know",
                "affine layers and the activations "
                + ", ".join(sorted(ACTIVATIONS))
                + " can be fused",
            )
        return handler(node)

    def _linear_in_time(self, node: Any) -> bool:
        """Whether a value is an affine function of t, so that no table is needed."""
        if not isinstance(node, Node) or not node.deps:
            return True
        if time_of(node, self.like.dtype) is not None:
            return True
        name = name_of(node)
        if node.dtype != self.like.dtype:
            return False
        if name == "cat":
            return self._along_last(node) and all(map(self._linear_in_time, node.args[0]))
        if name in ("linear", "add", "sub", "rsub", "neg"):
            return all(self._linear_in_time(n) for n in node.inputs())
        return False

    def known(self, node: Node, size: int) -> Row:
        """A value that is known before the solve, spread to a width."""
        if node.deps != {"cond"}:
            self._check_rowwise(node, set())
        if node.dtype != self.like.dtype:
            node = hoisted(_cast, node.shape, node, self.like.dtype)
        if node.shape != (size,) or node.deps:
            shape = node.shape
            node = Node("fit", None, (node, size), shape=(size,), deps=node.deps, where=node.where)
            if shape and shape[-1] not in (1, size):
                raise self.refuse(node, f"a value of shape {shown(shape)} meets a width of {size}")
        return (Affine(size, (), (Add(KIND[node.deps], node),)),)

    def _check_rowwise(self, node: Node, seen: set[Node]) -> None:
        """Refuse what is known before the solve, but depends on the batch or differs in it."""
        if node in seen:
            return
        seen.add(node)
        name = name_of(node)
        inputs = node.inputs()
        sized = any(has_lead(n.shape) for n in (node, *inputs))
        if (has_lead(node.args) or has_lead(tuple(node.kwargs.values()))) and (
            name not in TAKES_SIZE
        ):
            raise self.refuse(node, f"the batch size enters a value ({node.name})")
        if sized and name not in ROWWISE:
            raise self.refuse(
                node, f"{node.name} may mix samples", "compute it before the batch is formed"
            )
        for n in inputs:
            self._check_rowwise(n, seen)

    def _time(self, a: float, b: float, size: int) -> Row:
        adds = [Add("time", None)]
        if a != 1:
            adds = [Add("time", constant(self.like.new_full((size, 1), a)))]
        if b:
            adds.append(Add("const", self.algebra.full(size, b)))
        return (Affine(size, (), tuple(adds)),)

    def operand(self, value: Any, size: int, node: Node) -> Row:
        """An operand of an elementwise call as a row of its result's size."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return (Affine(size, (), (Add("const", self.algebra.full(size, float(value))),)),)
        if not isinstance(value, Node):
            raise self.refuse(node, f"{node.name} takes a {type(value).__name__}")
        time = time_of(value, self.like.dtype)
        if time is not None:
            return self._time(*time, size)
        row = self._settled(self.row(value))
        if width(row) == size:
            return row
        if "x" not in value.deps and value.deps in KIND:
            return self.known(value, size)
        raise self.refuse(node, f"{node.name} broadcasts one entry of the state over others")

    def _settled(self, row: Row) -> Row:
        """A row in which a sum that has become a layer is that layer's value."""
        parts = []
        for part in row:
            value = self.values.get((part, "identity", 1.0))
            known = value is not None
            parts.append(Affine(part.width, (Product(value, None),)) if known else part)
        return tuple(parts)

    def value_of(self, part: Affine, activation: str = "identity", slope: float = 1.0) -> int:
        """The number of the value that a layer gives."""
        if activation == "identity" and part.single is not None:
            return part.single
        key = (part, activation, slope)
        if key not in self.values:
            if not part.terms:
                raise Refusal("a layer depends on the time and the condition, but not on the state")
            self.drafts.append(Draft(part, activation, slope))
            self.widths.append(part.width)
            self.values[key] = len(self.drafts)
        return self.values[key]

    # Handlers: one per name of a call on the state.

    def _activation(self, node: Node) -> Row:
        try:
            name, slope = activation_of(node)
        except ValueError as error:
            raise self.refuse(node, str(error)) from None
        parts = []
        for part in self.row(node.args[0]):
            if not part.terms:
                raise self.refuse(
                    node,
                    "an activation acts on something that depends on the time and the condition "
                    "at once, or lies next to the state",
                    "add them after their own layers",
                )
            value = self.value_of(part, name, slope)
            parts.append(Affine(part.width, (Product(value, None),)))
        return tuple(parts)

    def _do_same(self, node: Node) -> Row:
        inner = node.args[0]
        if inner.shape != node.shape or inner.dtype != node.dtype:
            raise self.refuse(node, f"{node.name} changes the shape or dtype of the state")
        found: list[Any] = [*node.args[1:], *node.kwargs.values()]
        for device in (v for v in found if isinstance(v, (str, torch.device))):
            if isinstance(device, torch.device) and device == self.like.device:
                continue
            raise self.refuse(node, "the state is moved to another device")
        return self.row(inner)

    def _do_dropout(self, node: Node) -> Row:
        if argument(node, 2, "training", True) and argument(node, 1, "p", 0.5):
            raise self.refuse(node, "dropout is active", "put the field in eval() mode")
        return self.row(node.args[0])

    def _do_add(self, node: Node, sign: float = 1) -> Row:
        size, (left, right) = node.shape[-1], node.args[:2]
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)) or len(node.args) > 2:
            raise self.refuse(node, "alpha is not a number given by name")
        if fill_of(left) == 0:
            parts = self.operand(right, size, node)
            return self._scaled(parts, sign * alpha)
        a = self.operand(left, size, node)
        if fill_of(right) == 0:
            return a
        return self.algebra.add(a, self._scaled(self.operand(right, size, node), sign * alpha))

    def _do_sub(self, node: Node) -> Row:
        return self._do_add(node, -1)

    def _do_rsub(self, node: Node) -> Row:
        flipped = Node(
            "sub", node.func, (node.args[1], node.args[0]), {}, node.shape, node.dtype, node.deps
        )
        if node.kwargs or len(node.args) > 2:
            raise self.refuse(node, "rsub with alpha")
        flipped.where = node.where
        return self._do_sub(flipped)

    def _do_neg(self, node: Node) -> Row:
        return self._scaled(self.row(node.args[0]), -1)

    def _scaled(self, row: Row, factor: float) -> Row:
        return tuple(self.algebra.scale(part, factor) for part in row)

    def _do_mul(self, node: Node) -> Row:
        left, right = node.args[:2]
        if isinstance(left, Node) and isinstance(right, Node) and left.deps and right.deps:
            return self._gated(node, left, right)
        if not isinstance(left, Node) or not left.deps:
            left, right = right, left
        return self._times(node, left, right, inverse=False)

    def _do_div(self, node: Node) -> Row:
        left, right = node.args[:2]
        if node.kwargs.get("rounding_mode") or not isinstance(left, Node):
            raise self.refuse(node, "the state is a divisor, or is rounded")
        if isinstance(right, Node) and right.deps:
            raise self.refuse(node, "the state is divided by a value that is not constant")
        return self._times(node, left, right, inverse=True)

    def _times(self, node: Node, value: Node, factor: Any, inverse: bool) -> Row:
        size = node.shape[-1]
        row = self.operand(value, size, node)
        number = fill_of(factor)
        if number is not None:
            if inverse and number == 0:
                raise self.refuse(node, "the state is divided by zero")
            return self._scaled(row, 1 / number if inverse else number)
        if not isinstance(factor, Node):
            raise self.refuse(node, f"the state is multiplied by a {shown(factor)}")
        (known,) = self.known(factor, size)
        vector = known.adds[0].node
        assert vector is not None
        if inverse:
            vector = hoisted(torch.reciprocal, (size,), vector)
        parts, begin = [], 0
        for part in row:
            own = vector
            if part.width != size:
                own = hoisted(_part, (part.width,), vector, begin, begin + part.width)
            parts.append(self.algebra.scale(part, own))
            begin += part.width
        return tuple(parts)

    def _gated(self, node: Node, left: Node, right: Node) -> Row:
        """The product z sigmoid(z), which is silu; no other product of two values."""
        for z, gate in ((left, right), (right, left)):
            if name_of(gate) == "sigmoid" and gate.args[0] is z and "x" in z.deps:
                parts = [(part, self.value_of(part, "silu")) for part in self.row(z)]
                return tuple(Affine(p.width, (Product(v, None),)) for p, v in parts)
        names = {"x": "the state", "t": "the time", "cond": "the condition"}
        by = sorted((left.deps | right.deps) - {"x"}) or ["x"]
        raise self.refuse(
            node,
            f"the state is multiplied by a value that depends on {names[by[0]]}",
            "add it instead, or let a layer combine them",
        )

    def _along_last(self, node: Node) -> bool:
        dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
        return dim in (-1, len(node.shape) - 1)

    def _cat(self, node: Node) -> Row:
        parts: list[Affine] = []
        for value in node.args[0] if node.args else node.kwargs["tensors"]:
            parts.extend(self.row(value))
        return tuple(parts)

    def _do_cat(self, node: Node) -> Row:
        if not self._along_last(node):
            raise self.refuse(node, "tensors are joined along another axis than the last")
        return self._cat(node)

    _do_hstack = _cat

    def _do_linear(self, node: Node) -> Row:
        bias = argument(node, 2, "bias", None)
        return self._affine(node, node.args[0], argument(node, 1, "weight", None), bias)

    def _do_matmul(self, node: Node) -> Row:
        left, right = node.args[:2]
        if not left.deps and len(right.shape) == 1:
            return self._affine(node, right, left, None)
        if len(right.shape) != 2:
            raise self.refuse(node, "a product of the state is not with a matrix")
        return self._affine(node, left, transposed(right), None)

    def _do_addmm(self, node: Node) -> Row:
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            raise self.refuse(node, "addmm has factors", "use F.linear")
        return self._affine(node, node.args[1], transposed(node.args[2]), node.args[0])

    def _affine(self, node: Node, x: Node, weight: Node, bias: Node | None) -> Row:
        if weight.deps or "x" in (bias.deps if bias is not None else ()):
            raise self.refuse(
                node,
                "a matrix depends on the state, the time or the condition",
                "matrices have to be the same in all stages",
            )
        if len(weight.shape) != 2 or has_lead(weight.shape) or weight.dtype != self.like.dtype:
            raise self.refuse(node, f"the matrix has the shape {shown(weight.shape)}")
        self._check_rowwise(weight, set())
        out = (self.algebra.linear(self.row(x), weight, self.value_of),)
        if bias is None:
            return out
        return self.algebra.add(out, self.operand(bias, weight.shape[0], node))

    def _do_part(self, node: Node) -> Row:
        parent, i = node.args
        if parent.name not in SEVERAL:
            raise self.refuse(node, f"{parent.name} is no layer that kernels know")
        source = parent.args[0]
        dim = argument(parent, 2, "dim", 0)
        if dim not in (-1, len(source.shape) - 1):
            raise self.refuse(node, "the state is split along another axis than the last")
        sizes = [n.shape[-1] for n in self.parts[parent]]
        start = sum(sizes[:i])
        return self.algebra.slice(self.row(source), start, start + sizes[i])

    def _do___getitem__(self, node: Node) -> Row:
        source, index = node.args
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            fill = (slice(None),) * (len(source.shape) - len(index) + 1)
            index = index[:at] + fill + index[at + 1 :]
        index += (slice(None),) * (len(source.shape) - len(index))
        *outer, last = index
        whole = all(isinstance(i, slice) and i == slice(None) for i in outer)
        if len(index) != len(source.shape) or not whole or not isinstance(last, slice):
            raise self.refuse(
                node, "the state is indexed otherwise than by a slice of its last axis"
            )
        start, stop, step = last.indices(source.shape[-1])
        if step != 1:
            raise self.refuse(node, "the state is sliced with a step")
        return self.algebra.slice(self.row(source), start, stop)

    def find(self, trace: Trace) -> Found:
        """The network of a trace."""
        self.parts: dict[Node, list[Node]] = {}
        for node in trace.nodes:
            if node.name == "part":
                self.parts.setdefault(node.args[0], []).append(node)
        result = trace.result
        if "x" not in result.deps:
            raise self.refuse(result, "the field does not depend on the state")
        if result.shape != (*self.lead, self.state):
            raise self.refuse(
                result,
                f"the field returns the shape {shown(result.shape)}, not that of its state",
            )
        needed, todo = set(), [result]
        while todo:
            node = todo.pop()
            if node not in needed and "x" in node.deps:
                needed.add(node)
                todo.extend(node.inputs())
        for node in trace.nodes:  # in the order of the calls, so that sums are shared
            if node in needed and node.name not in SEVERAL:
                self.row(node)
        last = self.algebra.join(self._settled(self.row(result)))
        out = last.single
        if out is None or out == 0:
            self.drafts.append(Draft(last))
            self.widths.append(last.width)
            out = len(self.drafts)
        return Assembly(self.state, self.drafts, self.algebra, out).found()


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)


def _part(value: Tensor, start: int, stop: int) -> Tensor:
    return value[start:stop]
