"""What a whole-trajectory kernel can read of a velocity field: affine layers and activations.

A `Network` is a description without tensors. Values are numbered: value 0 is the state [batch,
state], value i + 1 is the output of `layers[i]`, and the last layer gives the velocity. A layer
computes, for stage q (of all stages of all steps) at time t_q,

    z = sum over terms of W[:, column : column + width of source] source
        + bias + t_q W[:, column of time] + table[q] + cond          (each where it is present)
    value = activation(z) + sum over skips

The tensors come apart as `Inputs`, in the order in which the description numbers them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmft_fast.ops.activations import clipped_cube

# In the order of the codes that the kernels take.
ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "silu",
    "gelu",
    "gelu_tanh",
    "tanh",
    "sigmoid",
    "softplus",
    "softsign",
    "asinh",
    "clipped_cube",
)


@dataclass(frozen=True)
class Term:
    """A summand of a layer: a matrix, or the identity, times an earlier value.

    Attributes:
        source: number of the value that is read.
        weight: number of the matrix among the parameters; None is the identity.
        column: first column of the matrix that belongs to the source.
    """

    source: int
    weight: int | None
    column: int = 0


@dataclass(frozen=True)
class Layer:
    """One layer (see the module).

    Attributes:
        width: size of the value.
        terms: what is added up.
        bias: number of a vector [width] among the parameters.
        time: number of a matrix among the parameters, and its column that t multiplies.
        table: number of a table [stages of the solve, width].
        cond: number of a per-sample bias [batch, width].
        activation: a name in `ACTIVATIONS`.
        slope: negative slope of leaky_relu, alpha of elu, beta of softplus.
        skips: numbers of the values added after the activation.
    """

    width: int
    terms: tuple[Term, ...]
    bias: int | None = None
    time: tuple[int, int] | None = None
    table: int | None = None
    cond: int | None = None
    activation: str = "identity"
    slope: float = 1.0
    skips: tuple[int, ...] = ()


@dataclass(frozen=True)
class Network:
    """A velocity field: the width of the state and the layers in the order of evaluation."""

    state: int
    layers: tuple[Layer, ...]

    def width(self, value: int) -> int:
        """Size of a value."""
        return self.layers[value - 1].width if value else self.state


@dataclass
class Inputs:
    """The tensors of a solve, and in the same form their gradients.

    Attributes:
        y0: [batch, state].
        parameters: matrices [width, columns] and vectors [width]; columns lie next to each other.
        tables: [stages of the solve, width].
        conds: [batch, width].
    """

    y0: Tensor | None
    parameters: list[Any] = field(default_factory=list)
    tables: list[Any] = field(default_factory=list)
    conds: list[Any] = field(default_factory=list)


PLAIN = {"relu": F.relu, "selu": F.selu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}
PLAIN |= {"sigmoid": torch.sigmoid, "softsign": F.softsign, "asinh": torch.asinh}
PLAIN |= {"clipped_cube": clipped_cube}


def activate(z: Tensor, name: str, slope: float) -> Tensor:
    """The activation of a layer, in torch."""
    if name == "identity":
        return z
    if name == "leaky_relu":
        return F.leaky_relu(z, slope)
    if name == "elu":
        return F.elu(z, slope)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "softplus":
        return F.softplus(z, slope)
    return PLAIN[name](z)


def evaluate(network: Network, inputs: Inputs, t: float | Tensor, q: int, y: Tensor) -> Tensor:
    """The velocity [batch, state] at y and t (or t [batch, 1]) in stage q, in plain torch."""
    values = [y]
    for layer in network.layers:
        z: Any = 0
        for term in layer.terms:
            x = values[term.source]
            if term.weight is not None:
                columns = slice(term.column, term.column + network.width(term.source))
                x = x @ inputs.parameters[term.weight][:, columns].T
            z = z + x
        if layer.bias is not None:
            z = z + inputs.parameters[layer.bias]
        if layer.time is not None:
            z = z + t * inputs.parameters[layer.time[0]][:, layer.time[1]]
        if layer.table is not None:
            z = z + inputs.tables[layer.table][q]
        if layer.cond is not None:
            z = z + inputs.conds[layer.cond]
        z = activate(z, layer.activation, layer.slope)
        for skip in layer.skips:
            z = z + values[skip]
        values.append(z)
    return values[-1]
