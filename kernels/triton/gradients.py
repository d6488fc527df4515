"""The memory of a backward pass, and the gradients that it leaves there."""

from __future__ import annotations

import torch
import triton
from fmft_fast.kernels.trajectory_source import Wanted, offsets
from fmft_fast.kernels.writer import used
from torch import Tensor

from fmft_fast.ops.network import Inputs, Network


class Gradients:
    """Where the programs of a backward kernel write.

    Every program adds up gradients of its own, which are summed in a fixed order afterwards.

    Attributes:
        wanted: what the kernel computes.
        shapes: of the parameters.
        size: of what a program adds up.
        y0: [batch, state], written whether it is wanted or not.
        written: of the conditions that are wanted and read, in the order of the arguments.
    """

    def __init__(self, network: Network, inputs: Inputs, wanted: Inputs, stages: int) -> None:
        assert inputs.y0 is not None
        self.wanted = Wanted(tuple(wanted.parameters), tuple(wanted.tables), tuple(wanted.conds))
        self.shapes = tuple(tuple(p.shape) for p in inputs.parameters)
        self._inputs, self._wants_y0, self._stages = inputs, wanted.y0, stages
        used_tables, used_conds = used(network)
        self._ends = offsets(self.shapes, self.wanted)
        self._widths = {i: inputs.tables[i].shape[1] for i in used_tables if self.wanted.tables[i]}
        self.size = self._ends[-1] + stages * sum(self._widths.values())
        self.y0 = torch.empty_like(inputs.y0, memory_format=torch.contiguous_format)
        self._conds = [
            torch.zeros_like(c, memory_format=torch.contiguous_format) if w else None
            for c, w in zip(inputs.conds, self.wanted.conds, strict=False)
        ]
        self.written = [self._conds[i] for i in used_conds if self.wanted.conds[i]]

    def programs(self, block: int) -> int:
        """How many programs there are, each over blocks of samples one after another."""
        most = 2
        if self.y0.device.type == "cuda":
            most *= torch.cuda.get_device_properties(self.y0.device).multi_processor_count
        return min(triton.cdiv(self.y0.shape[0], block), most)

    def collect(self, partials: Tensor) -> Inputs:
        """The gradients from what the programs have added up, [programs, size]."""
        sums, ends, stages = partials.sum(0), self._ends, self._stages
        parts = [sums[i:j] for i, j in zip(ends, ends[1:], strict=False)]
        rest = iter(sums[ends[-1] :].split([stages * w for w in self._widths.values()]))
        tables = {i: next(rest).view(stages, w) for i, w in self._widths.items()}
        return Inputs(
            self.y0 if self._wants_y0 else None,
            [
                p.view(s) if w else None
                for p, s, w in zip(parts, self.shapes, self.wanted.parameters, strict=False)
            ],
            [
                tables.get(i, torch.zeros_like(x)) if w else None
                for i, (x, w) in enumerate(
                    zip(self._inputs.tables, self.wanted.tables, strict=True)
                )
            ],
            self._conds,
        )
