"""The steps that a device has accepted, as the program that its backward pass runs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from fmft_fast.ops.network import Network
from fmft_fast.ops.trajectory import Program

OUTCOMES = ("done", "too many steps", "underflow", "not finite")


def accepted_program(
    network: Network,
    tableau: Any,
    nodes: Sequence[float],
    sizes: Sequence[float],
    t: Sequence[float],
    ends_only: bool,
) -> Program:
    """The program of accepted steps, with the weights of the output at every time.

    Args:
        network: the field.
        tableau: a `fmft_fast.solvers.Tableau` whose last stage is the first of the next step.
        nodes: [N + 1] times where the steps begin, and the end of the last one.
        sizes: [N] signed steps; not quite the differences of the nodes, which are rounded.
        t: [T] times of the output, from nodes[0] to at most nodes[N].
        ends_only: whether every time is a node: the last stage then has no weight and is left out.
    """
    method = tableau.advancing if ends_only else tableau
    direction = 1 if nodes[-1] >= nodes[0] else -1
    ends = [direction * node for node in nodes[1:]]
    times = [
        [end if c == 1 else start + c * h for c in method.c]
        for start, end, h in zip(nodes, nodes[1:], sizes, strict=False)
    ]
    outputs = [0, *(bisect_left(ends, direction * x) for x in t[1:])]
    weights = [[0.0] * len(method.b)]
    for n, x in zip(outputs[1:], t[1:], strict=True):
        theta = (x - nodes[n]) / sizes[n]
        exact = x == nodes[n + 1]
        weights.append(list(method.b) if exact else dense_weights(tableau, theta))
    return Program(
        network,
        method.a,
        method.b,
        torch.tensor(times, dtype=torch.float64).view(-1, len(method.b)),
        torch.tensor(sizes, dtype=torch.float64),
        tuple(outputs),
        torch.tensor(weights, dtype=torch.float64),
    )


def dense_weights(tableau: Any, theta: float) -> list[float]:
    """The weight of every stage inside a step, theta of the way."""
    weights = []
    for row in tableau.dense:
        weight = 0.0
        for coefficient in reversed(row):
            weight = (weight + coefficient) * theta
        weights.append(weight)
    return weights
