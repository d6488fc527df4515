"""What depends on the condition alone, as a chain of dense layers where it is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops.chain import Chain, Link
from .calls import ACTIVATIONS, activation_of, argument, name_of
from .tracer import Node


class NotAChain(Exception):
    """A node is no dense layer."""


def chain_of(wanted: Sequence[Node]) -> Chain | None:
    """Nodes as dense layers on a condition [batch, width], or None if they are anything else."""
    conditions = {node for node in _reached(wanted) if node.name == "cond"}
    if len(conditions) != 1 or len((cond := conditions.pop()).shape) != 2:
        return None
    links: list[Link] = []
    numbers = {cond: 0}

    def number(node: Any) -> int:
        if node not in numbers:
            links.append(_link(node, number(_source(node))))
            numbers[node] = len(links)
        return numbers[node]

    try:
        found = [number(node) for node in wanted]
    except (NotAChain, ValueError):
        return None
    return Chain(cond.shape[1], links, found) if all(found) else None


def _source(node: Any) -> Node:
    """What a layer works on."""
    if not isinstance(node, Node) or name_of(node) not in {"linear", *ACTIVATIONS}:
        raise NotAChain
    return argument(node, 0, "input", None)


def _link(node: Node, source: int) -> Link:
    if name_of(node) in ACTIVATIONS:
        name, slope = activation_of(node)
        return Link(source, node.shape[-1], activation=name, slope=slope)
    weight, bias = (argument(node, i, name, None) for i, name in ((1, "weight"), (2, "bias")))
    if bias is not None:  # torch spreads one number over the width, a chain does not
        bias = _tensor(bias, node.shape[-1:])
    return Link(source, node.shape[-1], _tensor(weight), bias)


def _tensor(value: Any, shape: tuple | None = None) -> Tensor:
    """A tensor that exists outside of the field, not one that is computed first."""
    if not isinstance(value, Node) or value.tensor is None:
        raise NotAChain
    if shape is not None and value.shape != shape:
        raise NotAChain
    return value.tensor


def _reached(nodes: Sequence[Node]) -> set[Node]:
    """The nodes and all that they are computed from."""
    seen: set[Node] = set()
    todo = list(nodes)
    while todo:
        if (node := todo.pop()) not in seen:
            seen.add(node)
            todo.extend(node.inputs())
    return seen
