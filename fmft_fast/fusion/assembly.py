"""Number the layers and tensors that the velocity needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.network import Layer, Network, Term
from .affine import Affine, Algebra, hoisted
from .tracer import Node


@dataclass
class Draft:
    """A layer whose tensors are still nodes."""

    affine: Affine
    activation: str = "identity"
    slope: float = 1.0
    skips: list[int] = field(default_factory=list)


@dataclass
class Found:
    """A network and the nodes of its tensors."""

    network: Network
    parameters: list[Node]
    tables: list[Node]
    conds: list[Node]


class Assembly:
    """Numbers the layers and tensors that the velocity needs."""

    def __init__(self, state: int, drafts: list[Draft], algebra: Algebra, out: int):
        self.state, self.drafts, self.algebra, self.out = state, drafts, algebra, out
        self.parameters: list[Node] = []
        self.tables: list[Node] = []
        self.conds: list[Node] = []
        self.sums: dict[tuple, Node] = {}

    def found(self) -> Found:
        """The network."""
        self._fold_skips()
        live = sorted(self._live())
        numbers = {0: 0} | {old: new + 1 for new, old in enumerate(live)}
        layers = tuple(self._layer(self.drafts[i - 1], numbers) for i in live)
        network = Network(self.state, layers)
        return Found(network, self.parameters, self.tables, self.conds)

    def _sources(self, draft: Draft) -> list[int]:
        return [term.source for term in draft.affine.terms] + draft.skips

    def _live(self) -> set[int]:
        live, todo = set(), [self.out]
        while todo:
            i = todo.pop()
            if i and i not in live:
                live.add(i)
                todo.extend(self._sources(self.drafts[i - 1]))
        return live

    def _fold_skips(self) -> None:
        """Turn a layer that only adds up values into skips of the last of them."""
        for i in sorted(self._live()):
            draft = self.drafts[i - 1]
            terms = draft.affine.terms
            plain = draft.activation == "identity" and not draft.affine.adds and len(terms) > 1
            if not plain or any(term.weight is not None for term in terms):
                continue
            sources = sorted([term.source for term in terms] + draft.skips)
            into = sources.pop()
            readers = [j for j in self._live() if into in self._sources(self.drafts[j - 1])]
            if readers != [i] or into == sources[-1] or not into:
                continue
            target = self.drafts[into - 1]
            # The folded layer takes the number of the sum, so that its readers stay right.
            self.drafts[i - 1] = Draft(
                target.affine, target.activation, target.slope, target.skips + sources
            )

    def _number(self, nodes: list[Node], node: Node) -> int:
        if node not in nodes:
            nodes.append(node)
        return nodes.index(node)

    def _layer(self, draft: Draft, numbers: dict[int, int]) -> Layer:
        part = draft.affine
        terms = tuple(
            Term(
                numbers[term.source],
                None
                if term.weight is None
                else self._number(self.parameters, _rowmajor(term.weight)),
                term.column,
            )
            for term in part.terms
        )
        times = [add for add in part.adds if add.kind == "time"]
        time = None
        if len(times) == 1 and times[0].node is not None:
            time = (self._number(self.parameters, _rowmajor(times[0].node)), times[0].column)
        elif times:
            column = self._sum([self.algebra.time_column(part.width, add) for add in times])
            time = (self._number(self.parameters, column), 0)
        numbered: dict[str, int | None] = {}
        for kind, nodes in (
            ("const", self.parameters),
            ("table", self.tables),
            ("cond", self.conds),
        ):
            found = [add.node for add in part.adds if add.kind == kind and add.node is not None]
            numbered[kind] = self._number(nodes, self._sum(found)) if found else None
        return Layer(
            part.width,
            terms,
            numbered["const"],
            time,
            numbered["table"],
            numbered["cond"],
            draft.activation,
            draft.slope,
            tuple(numbers[s] for s in draft.skips),
        )

    def _sum(self, nodes: list[Node]) -> Node:
        total = nodes[0]
        for node in nodes[1:]:
            key = (total, node)
            if key not in self.sums:
                self.sums[key] = hoisted(torch.add, node.shape, total, node)
            total = self.sums[key]
        return total


def _rowmajor(node: Node) -> Node:
    """A matrix whose columns lie next to each other."""
    if node.tensor is None or node.tensor.stride(-1) == 1:
        return node
    if node.contiguous is None:
        node.contiguous = hoisted(Tensor.contiguous, node.shape, node)
    return node.contiguous
