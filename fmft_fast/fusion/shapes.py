"""Shapes of the results of frequent calls.

torch could tell all of them by running the call on tensors without data. But the first such call
imports torch's compiler, which takes more than a second, and each is slower than the kernel itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Without data these are fast as they are.
VIEWS = set(
    "expand expand_as unsqueeze squeeze view view_as reshape reshape_as flatten unflatten T mT t "
    "transpose swapaxes chunk split to type_as float double contiguous clone __getitem__ "
    "broadcast_to".split()
)
_SAME = set(
    "relu leaky_relu elu selu silu gelu tanh sigmoid softplus softsign asinh arcsinh clipped_cube "
    "sin cos exp sqrt rsqrt log log1p "
    "expm1 square reciprocal neg __neg__ negative".split()
)
_BINARY = set(
    "add sub rsub mul div true_divide multiply subtract divide pow __add__ __radd__ __sub__ "
    "__rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__".split()
)
_FACTORIES = {"arange", "linspace", "logspace", "eye", "zeros", "ones", "full"}


def argument(args: tuple, kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    """An argument that may be given either way."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def shape_only(name: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """A result without data, or None where torch has to be asked (or to complain)."""
    first = args[0] if args else None
    if name in _FACTORIES and not _tensors((*args, *kwargs.values())):
        made = func(*args, **{**kwargs, "device": "cpu"})
        return _empty(made.shape, made.dtype)
    if name == "full" and len(args) == 2 and isinstance(args[1], Tensor):
        return _empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
    if name == "repeat" and isinstance(first, Tensor):
        times = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        shape = (1,) * (len(times) - first.ndim) + tuple(first.shape)
        return _empty([n * m for n, m in zip(shape, times, strict=True)], first.dtype)
    if name in ("new_zeros", "new_ones"):
        return Tensor.new_empty(*args, **kwargs)
    if name in ("zeros_like", "ones_like"):
        return _empty(args[0].shape, kwargs.get("dtype") or args[0].dtype)
    if name in ("cat", "concat", "concatenate"):
        return _joined(first, argument(args, kwargs, 1, "dim", 0)) if first else None
    if name in _BINARY and len(args) == 2 and not kwargs:
        return _binary(*args)
    if not isinstance(first, Tensor) or not first.dtype.is_floating_point:
        return None
    if name == "dropout":  # without effect it gives its argument itself
        active = argument(args, kwargs, 2, "training", True) and argument(args, kwargs, 1, "p", 0.5)
        return None if active else first
    if name in _SAME:
        return _empty(first.shape, first.dtype)
    if name in ("matmul", "mm", "__matmul__") and isinstance(args[1], Tensor):
        return _product(first, args[1].T) if args[1].ndim == 2 else None
    if name == "addmm" and len(args) == 3 and not kwargs and args[1].ndim == args[2].ndim == 2:
        same = first.dtype == args[1].dtype and first.shape[-1:] == args[2].shape[1:]
        return _product(args[1], args[2].T) if same else None
    if name != "linear" or len(args) < 2 or args[1].ndim != 2:
        return None
    bias = argument(args, kwargs, 2, "bias", None)
    if bias is not None and (bias.shape, bias.dtype) != (args[1].shape[:1], first.dtype):
        return None
    return _product(first, args[1])


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _tensors(values: tuple) -> bool:
    return any(isinstance(v, Tensor) for v in values)


def _product(x: Tensor, weight: Tensor) -> Tensor | None:
    if not x.ndim or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    return x.new_empty((*x.shape[:-1], len(weight)))


def _binary(a: Any, b: Any) -> Tensor | None:
    dtype = torch.result_type(a, b)
    if not dtype.is_floating_point:
        return None
    shapes = [tuple(v.shape) if isinstance(v, Tensor) else () for v in (a, b)]
    ndim = max(map(len, shapes))
    padded = [(1,) * (ndim - len(shape)) + shape for shape in shapes]
    shape = []
    for n, m in zip(*padded, strict=True):
        if n != m and 1 not in (n, m):
            return None
        shape.append(m if n == 1 else n)
    return _empty(shape, dtype)


def _joined(parts: Any, dim: Any) -> Tensor | None:
    first = parts[0]
    if not isinstance(dim, int) or not first.ndim:
        return None
    dim %= first.ndim
    shape = list(first.shape)
    for part in parts[1:]:
        rest = (*part.shape[:dim], *part.shape[dim + 1 :])
        if part.dtype != first.dtype or rest != (*shape[:dim], *shape[dim + 1 :]):
            return None
        shape[dim] += part.shape[dim]
    return first.new_empty(shape)
