"""What the CUDA trajectory kernels take, whatever the device."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from fmft_fast.ops.cuda_plan import with_identities
from fmft_fast.ops.network import Layer, Network, Term
from fmft_fast.ops.trajectory import Program

MAX_STAGES, MAX_LAYERS, MAX_TERMS, MAX_SKIPS = 7, 12, 24, 12
MAX_PARAMETERS, MAX_TABLES, MAX_CONDS = 32, 12, 4


class Same:
    """A key that is equal to itself alone, and so found without a look at what is in it."""

    def __init__(self, it: Any):
        self.it = it

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.it is self.it


@functools.lru_cache(maxsize=256)
def closed(same: Same) -> Network:
    """The network, with an identity after a last layer of which kernels take no part as last."""
    network: Network = same.it
    *_, last = network.layers
    if last.activation == "identity" and last.cond is None:
        return network
    end = Layer(last.width, (Term(len(network.layers), None),))
    return replace(network, layers=(*network.layers, end))


@functools.lru_cache(maxsize=256)
def closed_program(same: Same) -> Program:
    """The program of the closed network."""
    program: Program = same.it
    network = closed(Same(program.network))
    return program if network is program.network else replace(program, network=network)


@functools.lru_cache(maxsize=256)
def unsupported(same: Same, stages: int, empty: bool, dtype: torch.dtype) -> str | None:
    """Why no device takes a solve, as the end of a sentence; None if one may."""
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
    used = columns_read(network)
    if any(len(set(columns)) < len(columns) for columns in used.values()):
        return "two layers share a parameter"
    for name in ("table", "cond"):
        uses = [n for layer in layers if (n := getattr(layer, name)) is not None]
        if len(set(uses)) < len(uses):
            return f"two layers share a {name}"
    return None if weights else "the field has no matrix"


def columns_read(network: Network) -> dict[int, list[int]]:
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
def reads_all(same: Same, *columns: int) -> bool:
    """Tell whether every column of every parameter is read, so that every gradient is written."""
    used = columns_read(same.it)
    return all(len(used[i]) == count for i, count in enumerate(columns))
