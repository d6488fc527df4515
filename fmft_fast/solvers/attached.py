"""The place of a whole solve in autograd: its outputs as a function of what went into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.contract import is_traced
from ..ops.layout import is_plain
from ..ops.network import Inputs
from ..ops.trajectory import Program, TrajectoryKernels, flatten, rebuild, run


@dataclass
class Solved:
    """A solve that was done, and what its backward pass needs.

    Torch keeps the tensors as well, and so sees changes in place. `inputs` stay what they were also
    where a parameter was given other memory since, by `p.data = ...`.
    """

    kernels: TrajectoryKernels
    program: Program
    out: Tensor
    kept: Any
    inputs: Inputs

    def run(self, inputs: Inputs) -> Tensor:
        """The outputs in plain torch, with a graph."""
        return run(self.program, inputs)

    def pull_back(self, inputs: Inputs, grad: Tensor, wanted: Inputs) -> Inputs:
        """The gradients of the inputs from that of the outputs."""
        return self.kernels.backward(self.program, inputs, self.kept, grad, wanted)

    def gradients(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """Like `pull_back`, of those that are wanted in the order of `flatten`."""
        return flatten(self.pull_back(self.inputs, grad, rebuild(self.inputs, list(wanted))))


def attach(solved: Solved, inputs: Inputs) -> Tensor:
    """The outputs of a solve with their place in the graph."""
    solved.inputs = rebuild(inputs, [x.detach() for x in flatten(inputs)])
    tensors = (x.clone() if x.is_inference() else x for x in flatten(inputs))
    attached = SolvedInOneCall.apply(solved, *tensors)
    assert isinstance(attached, Tensor)
    return attached


class SolvedInOneCall(torch.autograd.Function):
    """The outputs of a solve as a function of the tensors that went into it."""

    @staticmethod
    def forward(ctx, solved, *tensors):
        """Hand out what was computed before."""
        out, solved.out = solved.out, None
        ctx.solved = solved
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the discrete adjoint, or differentiate plain torch where kernels cannot follow."""
        solved, tensors, wants = ctx.solved, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or is_traced() or _is_batched(grad):
            return None, *_differentiate(solved, tensors, wants, grad)
        if not is_plain(grad):
            grad = grad.clone()
        return None, *solved.gradients(grad, wants)


def _differentiate(
    solved: Solved, tensors: Sequence[Tensor], wants: Sequence[bool], grad: Tensor
) -> Iterator[Tensor | None]:
    """The gradients by torch: for create_graph=True, and for many gradients at once (vmap)."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one tensor may have been computed from another one.
        views = [x.view_as(x) if again else x.detach() for x in tensors]
        asked = [x for x, wanted in zip(views, wants, strict=True) if wanted]
        if not again:
            for x in asked:
                x.requires_grad_()
        out = solved.run(rebuild(solved.inputs, views))
    found = iter(torch.autograd.grad(out, asked, grad, create_graph=again, allow_unused=True))
    return (next(found) if wanted else None for wanted in wants)


def _is_batched(grad: Tensor) -> bool:
    """Whether autograd was called with is_grads_batched=True."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)  # type: ignore[attr-defined]


def wants_gradient(inputs: Inputs) -> bool:
    """Whether the solve needs a place in the graph."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in flatten(inputs))
