"""What lies where in the shared memory of a block of the CUDA trajectory kernels, and when."""

from __future__ import annotations

import functools
import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fmft_fast.ops.network import ACTIVATIONS, Layer, Network, Term

MAX_WARPS = 8
# Bytes of the records of trajectory_block.h: Ahead and Back of a layer, Outer of a term.
OF_LAYER, OF_TERM = 64 + 64, 48


@dataclass(frozen=True)
class Plan:
    """A field as a kernel takes it.

    Attributes:
        field: the plan in the form of the binding.
        rows: samples of a block.
        bytes: shared memory of a block.
        deferred: whether the gradients of the weights are left to `backward`.
    """

    field: Any
    rows: int
    bytes: int
    deferred: bool


@functools.lru_cache(maxsize=256)
def lay_out(
    make_field: Callable[..., Any],
    network: Network,
    split: int,
    row_tiles: int,
    stages: int,
    backward: bool,
    deferred: bool,
    by_row: bool = False,
) -> Plan:
    """Lay out shared memory and the order of work for a network that kernels support.

    by_row: whether every sample has a time of its own.
    """
    layers, last = with_identities(network), len(network.layers) - 1
    rows, tiles = 16 * row_tiles, [tiles_of(network.width(v)) for v in range(len(layers) + 1)]
    team = min(MAX_WARPS // row_tiles, max(tiles))
    warps = team * row_tiles
    terms = [(i, term) for i, layer in enumerate(layers) for term in layer.terms]
    readers = [[j for j, (_, x) in enumerate(terms) if x.source == v] for v in range(last + 1)]
    skippers = [[i for i, x in enumerate(layers) if v in x.skips] for v in range(last + 1)]
    order = _Order(layers, backward, backward and not deferred)

    def staged(v: int) -> int:
        return 2 * split * rows * (16 * tiles[v] + 8)

    lanes = [1024 * row_tiles * n for n in tiles]
    fixed = _Region()
    packed = [
        fixed.take(2 * split * 16 * tiles[i + 1] * (16 * tiles[term.source] + 8))
        for i, term in terms
    ]
    vectors = [
        fixed.take(64 * tiles[i + 1] * (1 + (x.time is not None) + 2 * (x.table is not None)))
        for i, x in enumerate(layers)
    ]
    records_at = fixed.take(OF_LAYER * len(layers) + OF_TERM * len(terms))
    stages_at = fixed.take(4 * (1 + stages) * rows * network.state)
    slopes_at = fixed.take(4 * rows * network.state * backward)
    inputs_at = fixed.take(4 * rows * network.state * backward)
    row_times_at = fixed.take(4 * rows * by_row)
    conds = [fixed.take(lanes[i + 1] * (x.cond is not None)) for i, x in enumerate(layers)]
    cond_sums = [
        fixed.take(lanes[i + 1] * (x.cond is not None and backward)) for i, x in enumerate(layers)
    ]
    zero_begin = fixed.size
    state_value = fixed.take(staged(0))
    slope_staged = fixed.take(staged(0) * backward)
    sums = [
        fixed.take(1024 * tiles[i + 1] * tiles[term.source] * (backward and not deferred))
        for i, term in terms
    ]
    vector_sums = [
        fixed.take(64 * tiles[i + 1] * (2 + (x.time is not None)) * row_tiles * backward)
        if x.bias is not None or x.time is not None or x.table is not None
        else -1
        for i, x in enumerate(layers)
    ]
    zero_end = fixed.size

    lives = {("value", i): (staged(i + 1), *order.value(i + 1)) for i in range(last)}
    if backward:
        lives |= {("delta", i): (staged(i + 1), *order.delta(i)) for i in range(last)}
        lives |= {("derivative", i): (lanes[i + 1], *order.derivative(i)) for i in range(last)}
        lives |= {
            ("gradient", i): (lanes[i + 1], *order.delta(i)) for i in range(last) if layers[i].skips
        }
    splits = max(1, team // tiles[0])
    lives["partial", 0] = (64 * splits * tiles[0] * (rows + 4), order.end, order.end + 1)
    places, total = _place(lives, zero_end)

    def place(name: str, i: int) -> int:
        return places.get((name, i), -1)

    starts = _starts([tiles[i + 1] for i in range(last + 1)], team)
    sum_starts = _starts([tiles[i + 1] * -(-tiles[x.source] // 2) for i, x in terms], warps)
    consumers, skipper_list, skip_list = _Chained(readers), _Chained(skippers), _Chained([])
    described = []
    for i, layer in enumerate(layers):
        v = i + 1
        first_term = next(j for j, (owner, _) in enumerate(terms) if owner == i)
        time, column = layer.time or (-1, 0)
        described.append(
            [
                layer.width,
                tiles[v],
                starts[i],
                order.waits[i],
                order.waits_backward[i],
                first_term,
                len(layer.terms),
                *skip_list.add(list(layer.skips)),
                *(consumers.at[v] if i < last else (0, 0)),
                *(skipper_list.at[v] if i < last else (0, 0)),
                _number(layer.bias),
                time,
                column,
                _number(layer.table),
                _number(layer.cond),
                ACTIVATIONS.index(layer.activation),
                struct.unpack("i", struct.pack("f", layer.slope))[0],
                vectors[i],
                place("value", i),
                slope_staged if i == last else place("delta", i),
                place("derivative", i),
                place("gradient", i),
                conds[i],
                cond_sums[i],
                vector_sums[i],
                i if deferred else -1,
            ]
        )
    head = [split, row_tiles, warps, total, network.state, tiles[0], len(layers), len(terms)]
    head += [*consumers.at[0], *skipper_list.at[0], zero_begin, zero_end, state_value, stages_at]
    head += [splits, place("partial", 0), slopes_at, inputs_at, records_at, deferred]
    head += [row_times_at]
    field = make_field(
        [int(x) for x in head],
        [[int(x) for x in row] for row in described],
        [
            [i, x.source, _number(x.weight), x.column, packed[j], sums[j], sum_starts[j]]
            for j, (i, x) in enumerate(terms)
        ],
        skip_list.flat,
        skipper_list.flat,
        consumers.flat,
    )
    return Plan(field, rows, total, deferred)


class _Order:
    """Between which layers a block waits, and so when each value is written and last read.

    Time is counted in barriers since the start of a stage.
    """

    def __init__(self, layers: list[Layer], backward: bool, weights: bool):
        last = len(layers) - 1
        now = 1
        self.made: dict[Any, int] = {0: 0}
        self.read: dict[Any, int] = defaultdict(int)
        self.waits, self.waits_backward = [0] * len(layers), [0] * len(layers)
        for i, layer in enumerate(layers):
            if backward and i == last:
                break
            sources = [*(term.source for term in layer.terms), *layer.skips]
            self.waits[i] = int(any(self.made[v] == now for v in sources))
            now += self.waits[i]
            self.made[i + 1] = now
            self.read |= {v: now for v in sources}
        if backward:
            now = self._backward(layers, now, weights)
        self.end = now

    def _backward(self, layers: list[Layer], now: int, weights: bool) -> int:
        last = done = len(layers) - 1
        done += 1
        self.made["delta", last] = 0
        for v in range(last, -1, -1):
            readers = [
                i for i, x in enumerate(layers) if v in (*(t.source for t in x.terms), *x.skips)
            ]
            if v == 0 or any(self.made["delta", i] == now for i in readers):
                now += 1
                self.waits_backward[v - 1] = int(v > 0)
                for i in range(v, done) if weights else ():
                    self.read["delta", i] = max(self.read["delta", i], now)
                    self.read |= {term.source: now for term in layers[i].terms}
                done = v
            self.read |= {("delta", i): now for i in readers}
            self.made["delta", v - 1] = now
        return now

    def value(self, v: int) -> tuple[int, int]:
        """When value v is written and last read."""
        return self.made[v], max(self.read[v], self.made[v])

    def delta(self, i: int) -> tuple[int, int]:
        """The same for the gradients that belong to layer i."""
        return self.made["delta", i], max(self.read["delta", i], self.made["delta", i])

    def derivative(self, i: int) -> tuple[int, int]:
        """The same for the derivative of the activation of layer i."""
        return self.made[i + 1], self.made["delta", i]


class _Region:
    """Memory that is given away piece by piece."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, size: int) -> int:
        self.size += size
        return self.size - size


class _Chained:
    """Lists in one, and where each begins and how long it is."""

    def __init__(self, lists: list[list[int]]):
        self.flat: list[int] = []
        self.at = [self.add(numbers) for numbers in lists]

    def add(self, numbers: list[int]) -> tuple[int, int]:
        self.flat += numbers
        return len(self.flat) - len(numbers), len(numbers)


def _place(lives: dict[Any, tuple[int, int, int]], base: int) -> tuple[dict[Any, int], int]:
    """Place pieces of (size, first use, last use) so that those in use together do not overlap."""
    places: dict[Any, int] = {}
    for name, (size, first, end) in sorted(lives.items(), key=lambda x: (-x[1][0], x[1][1])):
        others = [
            (places[other], places[other] + lives[other][0])
            for other in places
            if lives[other][1] <= end and first <= lives[other][2]
        ]
        candidates = sorted([base, *(stop for _, stop in others)])
        places[name] = next(
            at for at in candidates if all(at + size <= a or at >= b for a, b in others)
        )
    return places, max([base, *(places[name] + lives[name][0] for name in places)])


def with_identities(network: Network) -> list[Layer]:
    """Return the layers; values that the last one adds become terms with the identity."""
    *hidden, last = network.layers
    added = tuple(Term(v, None) for v in last.skips)
    return [*hidden, replace(last, terms=(*last.terms, *added), skips=())]


def tiles_of(width: int) -> int:
    """The number of 16 columns that a width takes."""
    return -(-width // 16)


def _number(index: int | None) -> int:
    return -1 if index is None else index


def _starts(counts: list[int], warps: int) -> list[int]:
    """Return the warp that begins each list of items, so that the last ones go on from there."""
    return [sum(counts[:i]) % warps for i in range(len(counts))]
