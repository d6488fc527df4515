"""Traces of one field for several batch sizes: what differs has to be the size itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .refusal import Refusal
from .tracer import Lead, Node, Trace


def generalise(first: Trace, second: Trace, leads: tuple[Sequence[int], Sequence[int]]) -> None:
    """Turn the leading sizes in the first trace into `Lead`s; the second has to be the same."""
    pairs = {}
    for axis, pair in enumerate(zip(*leads, strict=True)):
        pairs[pair] = Lead(axis)
    index = {id(n): i for i, n in enumerate(first.nodes)}
    other = {id(n): i for i, n in enumerate(second.nodes)}

    def differ(node: Node) -> Refusal:
        return Refusal("what the field computes depends on the batch size", node.where)

    def merge(a: Any, b: Any, node: Node) -> Any:
        if isinstance(a, Node):
            if not isinstance(b, Node) or index[id(a)] != other[id(b)]:
                raise differ(node)
            return a
        if isinstance(a, (tuple, list)):
            if type(a) is not type(b) or len(a) != len(b):
                raise differ(node)
            return (
                type(a)([merge(p, q, node) for p, q in zip(a, b, strict=True)])
                if (type(a) in (tuple, list))
                else tuple(merge(p, q, node) for p, q in zip(a, b, strict=True))
            )
        if isinstance(a, slice):
            ends = [(a.start, b.start), (a.stop, b.stop), (a.step, b.step)]
            return slice(*(merge(p, q, node) for p, q in ends))
        if type(a) is type(b) and a == b:
            return a
        if isinstance(a, int) and isinstance(b, int) and (a, b) in pairs:
            return pairs[a, b]
        raise differ(node)

    if len(first.nodes) != len(second.nodes):
        raise Refusal("what the field computes depends on the batch size")
    for a, b in zip(first.nodes, second.nodes, strict=True):
        if a.name != b.name or a.tensor is not b.tensor or a.kwargs.keys() != b.kwargs.keys():
            if not (a.name == b.name == "tensor" and _same_constant(a.tensor, b.tensor)):
                raise differ(a)
        a.args = merge(a.args, b.args, a)
        a.kwargs = {k: merge(v, b.kwargs[k], a) for k, v in a.kwargs.items()}
        a.shape = merge(a.shape, b.shape, a)
        if a.dtype != b.dtype:
            raise differ(a)
    if index[id(first.result)] != other[id(second.result)]:
        raise differ(first.result)


def _same_constant(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether torch.tensor was called with the same values in both traces."""
    return (
        a is not None
        and b is not None
        and not isinstance(a, torch.nn.Parameter)
        and a.dtype == b.dtype
        and torch.equal(a, b)
    )


def alike(trace: Trace, again: Trace, sizes: Sequence[int]) -> bool:
    """Whether a trace is another one, generalised, with these sizes for its `Lead`s."""
    index = {id(n): i for i, n in enumerate(trace.nodes)}
    other = {id(n): i for i, n in enumerate(again.nodes)}

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Node):
            return isinstance(b, Node) and index[id(a)] == other[id(b)]
        if isinstance(a, Lead):
            return b == sizes[a.axis]
        if isinstance(a, (tuple, list)):
            return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, slice) and isinstance(b, slice):
            return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        return type(a) is type(b) and a == b

    return (
        len(trace.nodes) == len(again.nodes)
        and index[id(trace.result)] == other[id(again.result)]
        and all(
            a.name == b.name
            and same((a.args, a.shape), (b.args, b.shape))
            and a.kwargs.keys() == b.kwargs.keys()
            and all(same(v, b.kwargs[k]) for k, v in a.kwargs.items())
            for a, b in zip(trace.nodes, again.nodes, strict=True)
        )
    )
