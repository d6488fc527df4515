"""A chain of dense layers on few rows, in one call that reads every weight once, where it lies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmft_fast.ops.compiled import CPU, TYPE_CODES
from fmft_fast.ops.network import ACTIVATIONS

MAX_ROWS = 4


class Link(NamedTuple):
    """A value: a product with a matrix plus a bias, or the activation of an earlier value.

    Attributes:
        source: 0 for the input, i + 1 for the value of link i.
        width: size of the value.
        weight, bias: [width, size of the source] and [width], or None.
        activation, slope: as in `Layer`, of a link without weight.
    """

    source: int
    width: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "identity"
    slope: float = 1.0


class Chain:
    """Links on one input, whose tensors keep their shapes, dtypes and devices.

    Args:
        width: size of the input.
        links: in the order of evaluation.
        wanted: numbers of the values that `run` gives, as in `Link.source`.

    Attributes:
        wanted: as above.
        tensors: weights and biases, as the compiled links number them.
        leading: distances of their rows.
        compiled: the links in the compiled module's form, or None.
    """

    def __init__(self, width: int, links: Sequence[Link], wanted: Sequence[int]) -> None:
        self._widths = [width, *(link.width for link in links)]
        self.tensors: list[Tensor] = []
        self.wanted = list(wanted)
        self._links = [
            (
                link.source,
                self._number(link.weight),
                self._number(link.bias),
                ACTIVATIONS.index(link.activation),
                link.slope,
                self._widths[link.source],
                link.width,
            )
            for link in links
        ]
        self.leading = [w.shape[-1] for w in self.tensors]
        self._dtype = _dtype_of(self.tensors)
        self.compiled = None if CPU is None else CPU.Chain(self._links)

    def run(self, x: Tensor) -> list[Tensor] | None:
        """The wanted values [rows, width] of x [rows, width], without a graph.

        None where torch has to do it: for many rows, with gradients, or not on the host.
        """
        compiled = self.compiled
        if compiled is None or torch.is_grad_enabled() or not self.takes(x):
            return None
        rows = x.shape[0]
        found = {i: x.new_empty(rows, self._widths[i]) for i in self.wanted}
        values = [0] * len(self._widths)
        values[0] = x.data_ptr()
        for i, value in found.items():
            values[i] = value.data_ptr()
        compiled.run(
            TYPE_CODES[x.dtype],
            rows,
            [w.data_ptr() for w in self.tensors],
            self.leading,
            values,
        )
        return [found[i] for i in self.wanted]

    def width(self, value: int) -> int:
        """Size of a value."""
        return self._widths[value]

    def choose(self, numbers: Sequence[int]) -> Chain:
        """The same with some of the wanted values, in another order."""
        chosen = copy.copy(self)
        chosen.wanted = [self.wanted[i] for i in numbers]
        return chosen

    def takes(self, x: Tensor) -> bool:
        """Whether the compiled links take such an input, without a gradient."""
        return (
            self.compiled is not None
            and x.ndim == 2
            and 0 < x.shape[0] <= MAX_ROWS
            and x.shape[1] == self._widths[0]
            and x.dtype is self._dtype
            and x.is_cpu
            and x.is_contiguous()
            and all(map(Tensor.is_contiguous, self.tensors))
        )

    def _number(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def _dtype_of(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of tensors on the host that kernels take; None if there is none."""
    kinds = {(x.dtype, x.device.type) for x in tensors}
    known = kinds & {(dtype, "cpu") for dtype in TYPE_CODES}
    return next(iter(known))[0] if len(kinds) == len(known) == 1 else None
