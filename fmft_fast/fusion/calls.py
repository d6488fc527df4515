"""Calls that mean the same under one name, and values that are a t + b or one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .affine import hoisted
from .tracer import Lead, Node

_NAMES = {
    **dict.fromkeys(("add", "__add__", "__radd__", "__iadd__"), "add"),
    **dict.fromkeys(("sub", "__sub__", "subtract", "__isub__"), "sub"),
    **dict.fromkeys(("__rsub__", "rsub"), "rsub"),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply", "__imul__"), "mul"),
    **dict.fromkeys(("div", "__truediv__", "true_divide", "divide", "__itruediv__"), "div"),
    **dict.fromkeys(("neg", "__neg__", "negative"), "neg"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "cat"),
    **dict.fromkeys(("matmul", "__matmul__", "mm"), "matmul"),
    **dict.fromkeys(("t", "T", "mT", "adjoint"), "transpose"),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), "swap"),
    **dict.fromkeys(("to", "type_as", "float", "double", "contiguous", "clone", "alias"), "same"),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), "same"),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "positive", "__pos__"), "same"),
    **dict.fromkeys(("relu_",), "relu"),
    **dict.fromkeys(("special_expit", "expit"), "sigmoid"),
    **dict.fromkeys(("arcsinh",), "asinh"),
}
BROADCASTS = {"repeat", "unsqueeze", "squeeze", "atleast_1d", "atleast_2d", "tile", "__getitem__"}
FILLS = {"ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}
FILLS |= {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0}
# Calls on rows of which each stays for itself; what is known once holds for every sample then.
ROWWISE = (
    set(FILLS) | BROADCASTS | {"full", "full_like", "new_full", "like", "tensor", "t", "part"}
) | set(
    "add sub rsub mul div neg cat matmul same linear addmm sin cos exp expm1 log log1p sqrt rsqrt "
    "square pow __pow__ tanh sigmoid relu leaky_relu elu selu silu gelu softplus mish abs "
    "softsign asinh clipped_cube "
    "reciprocal clamp minimum maximum sinh cosh erf chunk split layer_norm dropout".split()
)
TAKES_SIZE = set(FILLS) | {"full", "new_full", "like", "same", "repeat"}
SEVERAL = {"chunk", "split", "tensor_split"}
ACTIVATIONS = set(
    "relu leaky_relu elu selu silu gelu tanh sigmoid softplus softsign asinh clipped_cube".split()
)


def name_of(node: Node) -> str:
    """The common name of a call that has several."""
    if node.name == "t":
        return "t" if node.func is None else "transpose"
    return _NAMES.get(node.name, node.name)


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument that may be given either way."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def activation_of(node: Node) -> tuple[str, float]:
    """The kernels' name of an activation, and its slope.

    Raises:
        ValueError: with these arguments kernels do not know it.
    """
    name, slope = name_of(node), 1.0
    if name == "leaky_relu":
        slope = argument(node, 1, "negative_slope", 0.01)
    elif name == "elu":
        slope = argument(node, 1, "alpha", 1.0)
        if set(node.kwargs) - {"alpha", "inplace"} or len(node.args) > 3:
            raise ValueError("elu with further scales is no known activation")
    elif name == "softplus":
        slope = argument(node, 1, "beta", 1)
        if argument(node, 2, "threshold", 20) != 20:
            raise ValueError("softplus has a threshold other than 20")
    elif name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}[argument(node, 1, "approximate", "none")]
    if not isinstance(slope, (int, float)) or not node.args:
        raise ValueError(f"the slope of {name} is not a number")
    return name, float(slope)


def fill_of(node: Any) -> float | None:
    """The number that a constant consists of, if it is one everywhere."""
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        return float(node)
    if not isinstance(node, Node):
        return None
    if node.name in FILLS:
        return FILLS[node.name]
    if node.name in ("full", "full_like", "new_full"):
        value = argument(node, 2 if node.name == "new_full" else 1, "fill_value", None)
        return float(value) if isinstance(value, (int, float)) else None
    if name_of(node) == "same" or node.name in BROADCASTS:
        return fill_of(node.args[0])
    return None


def time_of(node: Any, dtype: torch.dtype) -> tuple[float, float] | None:
    """The numbers (a, b) if a value is a t + b in every entry."""
    if not isinstance(node, Node) or node.deps != frozenset("t"):
        return None
    if node.dtype != dtype:
        return None
    if node.name == "t" and node.func is None:
        return 1.0, 0.0
    name = name_of(node)
    if name == "same" or node.name in BROADCASTS:
        return time_of(node.args[0], dtype) if isinstance(node.args[0], Node) else None
    if name in ("full_like", "full", "new_full"):
        return time_of(argument(node, 2 if name == "new_full" else 1, "fill_value", None), dtype)
    if name == "neg":
        inner = time_of(node.args[0], dtype)
        return inner and (-inner[0], -inner[1])
    if name not in ("add", "sub", "rsub", "mul", "div") or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args if name != "rsub" else reversed(node.args)
    p, q = time_of(left, dtype), time_of(right, dtype)
    c, d = fill_of(left), fill_of(right)
    if name == "mul":
        p, d = (p, d) if p else (q, c)
        return p and d is not None and (p[0] * d, p[1] * d) or None
    if name == "div":
        return (p[0] / d, p[1] / d) if p and d else None
    p, q = p or (None if c is None else (0.0, c)), q or (None if d is None else (0.0, d))
    sign = 1 if name == "add" else -1
    return (p[0] + sign * q[0], p[1] + sign * q[1]) if p and q else None


def transposed(node: Node) -> Node:
    """The transpose of a matrix; of a transpose, what it was made from."""
    name = name_of(node)
    swapped = name == "swap" and sorted(d % 2 for d in node.args[1:3]) == [0, 1]
    if len(node.shape) == 2 and (name == "transpose" or swapped):
        return node.args[0]
    out = hoisted(_transpose, node.shape[::-1], node)
    out.dtype = node.dtype
    return out


def _transpose(value: Tensor) -> Tensor:
    return value.T.contiguous()


def has_lead(value: Any) -> bool:
    """Whether the size of a leading dimension is in an argument."""
    if isinstance(value, (tuple, list)):
        return any(map(has_lead, value))
    if isinstance(value, slice):
        return has_lead((value.start, value.stop, value.step))
    return isinstance(value, Lead)


def shown(value: Any) -> str:
    """A shape, or the type of something else, for a message."""
    if isinstance(value, tuple):
        return "[" + ", ".join("batch" if isinstance(n, Lead) else str(n) for n in value) + "]"
    return type(value).__name__
