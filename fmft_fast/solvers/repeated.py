"""Solves that are asked for again: the commonest calls, without the way that leads to them.

The second solve of a kind by kernels on the host is noted with the plan of its field. A later call
is of that kind if its key is equal, if everything that the field reads is as it was, and if all
tensors are alike in everything but their numbers. Then nothing on the way to the kernels can come
out differently, and they run at once. Every other call goes the whole way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..fusion import place_of_notes
from ..ops.network import Inputs
from ..ops.trajectory import Program
from .attached import Solved, SolvedInOneCall
from .stats import SolveStats, report

if TYPE_CHECKING:
    from .whole_solve import Route

PLAIN_TENSORS = (Tensor, nn.Parameter)
KINDS = 32  # noted with a plan; of each the shapes of a batch, and a number of steps

# Without the care for functorch's transforms and what they leave behind: there is none of either.
_attach = super(torch.autograd.Function, SolvedInOneCall).apply  # type: ignore[misc]


def odeint_kind(y0: Tensor, method: str, dtype: torch.dtype, times: Sequence[float]) -> tuple:
    """The kind of a call of `odeint` with default options at times of a dtype."""
    return (*_mode(y0), method, dtype, *times)


def solve_kind(
    x0: Tensor, times: tuple[Any, Any], steps: Any, method: str, gradient: str, save: str
) -> tuple | None:
    """The kind of a call of `solve` with equal steps; None if it is of another sort."""
    if type(steps) is not int or type(times[0]) is not float or type(times[1]) is not float:
        return None
    return (*_mode(x0), method, steps, *times, gradient, save)


def _mode(y0: Tensor) -> tuple:
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (y0.shape, y0.requires_grad, *modes)


def repeat(plans: Sequence[Any], kind: tuple, given: tuple[Tensor, ...]) -> Repeat | None:
    """The noted solve of a kind, if the arguments fit.

    Args:
        plans: what `noted` found for the user's callable.
        kind: see `odeint_kind` and `solve_kind`.
        given: the tensors among the arguments, y0 first; `undisturbed` is true of it.
    """
    for plan in plans:
        found = plan.notes.get(kind)
        if found and plan.guards.scopes_hold():
            if found.fits(given):
                return found
            plan.notes[kind] = None
    return None


def remember(
    field: Callable,
    kind: tuple,
    given: tuple[Tensor, ...],
    route: Route,
    program: Program,
    low_memory: bool,
    stats: SolveStats,
    final: bool = False,
) -> None:
    """Note a solve that went the whole way, if it is the second one of its kind.

    Args:
        field: the user's callable.
        kind, given: see `repeat`.
        route, program, low_memory: how it went, see `Route.solve`.
        stats: what it reported.
        final: whether the only output is wanted without its number.
    """
    plan, y0 = route.plan, given[0]
    if not plan.constant or route.cond is not None or route.kernels.name != "cpu":
        return
    if y0.ndim != 2 or not y0.is_contiguous():
        return
    entry = place_of_notes(field, plan)
    if entry is None:
        return
    notes = entry.notes
    if kind not in notes:
        notes[kind] = None  # seen once
        if len(notes) > KINDS:
            notes.pop(next(iter(notes)))
    elif notes[kind] is None:
        read = entry.guards.tensors_read
        made = _make(given, read, route, program, low_memory, stats, final)
        notes[kind] = made or False  # cannot be repeated


def _make(
    given: tuple[Tensor, ...],
    read: Sequence[Tensor],
    route: Route,
    program: Program,
    low_memory: bool,
    stats: SolveStats,
    final: bool,
) -> Repeat | None:
    y0 = given[0]
    inputs, keep = route.prepare(program, y0, low_memory)
    parameters = inputs.parameters
    if any(x is not own for x, own in zip(parameters, route.plan.tensors, strict=True)):
        return None  # made for this solve alone
    if any(x.is_inference() or not x.is_contiguous() for x in (y0, *parameters)):
        return None
    known = {id(x) for x in parameters}
    others = [x for x in read if id(x) not in known]
    alike = likeness((*given, *parameters, *others))
    if alike is None:
        return None
    kernels: Any = route.kernels
    solve = kernels.repeated(program, inputs, keep, final)
    return Repeat(solve, program, inputs, others, alike, keep != "nothing", stats, final)


def likeness(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A test whether tensors are like these in everything but their numbers.

    That is their type, dtype, device, shape, strides and requires_grad, and what torch's dispatch
    goes by: whether they are views that are negated later, or made for inference, or wrapped, and
    whether autocast or a transform is at work. None if torch has no such test, or a tensor is there
    twice.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards  # type: ignore[import-not-found]
    except ImportError:
        return None
    test = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return test if test(*tensors) else None


class Repeat:
    """A solve with everything that is the same for all of its kind."""

    def __init__(
        self,
        solve: Any,
        program: Program,
        inputs: Inputs,
        others: Sequence[Tensor],
        alike: Callable[..., bool],
        wants_grad: bool,
        stats: SolveStats,
        final: bool,
    ):
        self._kernels, self._program = solve, program
        self._parameters, self._others = inputs.parameters, others
        self._alike, self._wants_grad = alike, wants_grad
        self._solved, self.stats = SolvedFinal if final else SolvedAgain, stats
        self._dtype = torch.get_default_dtype()

    def fits(self, given: tuple[Tensor, ...]) -> bool:
        """Whether the tensors are like those of the first solve."""
        alike = self._alike(*given, *self._parameters, *self._others)
        return alike and torch.get_default_dtype() is self._dtype

    def solve(self, y0: Tensor) -> Tensor | None:
        """The outputs [K, batch, state], or the final one; None if the last is not finite."""
        tensors = (y0, *self._parameters)
        out, run = self._kernels.forward(tensors)
        if not run.finite:
            return None
        if self._wants_grad:
            y0, *parameters = [x.detach() for x in tensors]  # the kernels have their addresses
            inputs = Inputs(y0, parameters, [], [])
            solved = self._solved(self._kernels, self._program, out, run, inputs)
            del out
            out = _attach(solved, *tensors)
        report(self.stats)
        return out


@dataclass
class SolvedAgain(Solved):
    """See `Solved`."""

    def gradients(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """The gradients of the tensors from that of the outputs."""
        given = (self.inputs.y0, *self.inputs.parameters)
        return self.kernels.backward(self.kept, grad, given, wanted)  # type: ignore


class SolvedFinal(SolvedAgain):
    """See `Solved`; the only output comes without its number."""

    def run(self, inputs: Inputs) -> Tensor:
        """The output in plain torch, with a graph."""
        return super().run(inputs)[0]
