"""Solves that are asked for again: the commonest calls, without the way that leads to them.

The second solve of a kind by kernels on the host is noted with the plan of its field. A later call
is of that kind if its key is equal, if everything that the field reads is as it was, and if all
tensors are alike in everything but their numbers. Then nothing on the way to the kernels can come
out differently, and they run at once. Every other call goes the whole way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..fusion import noted, open_condition, place_of_notes, undisturbed
from ..ops.layout import is_plain
from ..ops.network import Inputs
from ..ops.trajectory import Keep, Program, flatten, rebuild
from .attached import Solved, SolvedInOneCall
from .stats import SolveStats, report

if TYPE_CHECKING:
    from .whole_solve import Route

PLAIN_TENSORS = (Tensor, nn.Parameter)
KINDS = 32  # noted with a plan; of each the shapes of a batch, and a number of steps

Given = tuple[Tensor, ...]  # the tensors among the arguments: y0, perhaps t, perhaps a condition

# Without the care for functorch's transforms and what they leave behind: there is none of either.
_attach = super(torch.autograd.Function, SolvedInOneCall).apply  # type: ignore[misc]


def odeint_kind(method: str, times: Sequence[float]) -> tuple:
    """The kind of a call of `odeint` with default options."""
    return (*_modes(), method, *times)


def solve_kind(
    times: tuple[Any, Any], steps: Any, method: str, gradient: str, save: str
) -> tuple | None:
    """The kind of a call of `solve` with equal steps; None if it is of another sort."""
    if type(steps) is not int or type(times[0]) is not float or type(times[1]) is not float:
        return None
    return (*_modes(), method, steps, *times, gradient, save)


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _of(given: Given, kind: tuple) -> tuple:
    """A kind for tensors of these shapes."""
    return (*kind, *[(x.shape, x.dtype, x.requires_grad) for x in given])


def repeat(
    field: Callable, kind: tuple, given: Given, cond: Tensor | None, may_step: bool
) -> tuple[Tensor, SolveStats] | None:
    """The outputs of a solve of a noted kind and its statistics; None if it is not noted.

    Also None if the last state is not finite: whoever goes the whole way finds out where.

    Args:
        field: the user's callable.
        kind: see `odeint_kind` and `solve_kind`.
        given: the state, and the times if they are a tensor, all on the host.
        cond: the condition, if it is given; that which a field holds is looked for.
        may_step: whether single steps are as welcome as kernels.
    """
    plans = noted(field)
    if not plans and cond is None and (opened := open_condition(field, given[0])) is not None:
        plans, cond = noted(opened[0]), opened[1]
    if not plans or not undisturbed():
        return None
    if cond is not None:
        if type(cond) not in PLAIN_TENSORS:
            return None
        given = (*given, cond)
    kind = _of(given, kind)
    for plan in plans:
        found = plan.notes.get(kind)
        if found and (found.fuses or may_step):
            if found.fits(plan, given):
                out = found.solve(field, given)
                if out is None:
                    return None
                report(found.stats)
                return out, found.stats
            plan.notes[kind] = None
    return None


def remember(
    kind: tuple,
    given: Given,
    route: Route,
    program: Program,
    low_memory: bool,
    stats: SolveStats,
    final: bool = False,
) -> None:
    """Note a solve that went the whole way, if it is the second one of its kind.

    Args:
        kind, given: see `repeat`.
        route, program, low_memory: how it went, see `Route.solve`.
        stats: what it reported.
        final: whether the only output is wanted without its number.
    """
    y0 = given[0]
    if route.kernels.name != "cpu" or y0.ndim != 2 or not y0.is_contiguous():
        return
    entry = place_of_notes(route.field, route.plan)
    if entry is None:
        return
    given = given if route.cond is None else (*given, route.cond)
    place = look_up(entry.notes, kind, given)
    if place is not None:
        read = entry.guards.tensors_read
        made = _make(given, read, route, program, low_memory, stats, final)
        entry.notes[place] = made or False  # cannot be repeated


def look_up(notes: dict[tuple, Any], kind: tuple, given: Given) -> tuple | None:
    """The place of a solve among notes, if it is to be noted: it was asked for once before."""
    place = _of(given, kind)
    if place in notes:
        return place if notes[place] is None else None
    notes[place] = None
    if len(notes) > KINDS:
        notes.pop(next(iter(notes)))
    return None


def _make(
    given: Given,
    read: Sequence[Tensor],
    route: Route,
    program: Program,
    low_memory: bool,
    stats: SolveStats,
    final: bool,
) -> Repeat | None:
    inputs, keep = route.prepare(program, given[0], low_memory)
    inputs.parameters = [x.contiguous() for x in inputs.parameters]
    own = [p for p in route.plan.tensors if p is not None]
    if not all(map(is_plain, (*given, *read))) or not all(x.is_contiguous() for x in own):
        return None
    if keep != "nothing" and any(x.is_inference() for x in (*given, *read)):
        return None  # cannot be kept for the backward pass
    alike = likeness((*given, *read))
    if alike is None:
        return None
    return Repeat(route, program, stats, read, alike, inputs, keep, final)


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
    """A solve with everything that is the same for all of its kind.

    Args:
        route, program, stats: see `remember`.
        read: the tensors that the field reads.
        alike: the test of the tensors among the arguments, and of those.
        inputs, keep: as `Route.prepare` gives them.
        final: see `remember`.

    Attributes:
        fuses: whether kernels run, not single steps.
        stats: what every solve reports.
    """

    fuses = True

    def __init__(
        self,
        route: Route,
        program: Program,
        stats: SolveStats,
        read: Sequence[Tensor],
        alike: Callable[..., bool],
        inputs: Inputs,
        keep: Keep,
        final: bool,
    ):
        y0, kernels = inputs.y0, cast(Any, route.kernels)
        assert y0 is not None
        self._plan, self._program, self.stats = route.plan, program, stats
        self._read, self._alike, self._dtype = read, alike, torch.get_default_dtype()
        self._lead, self._has_cond = y0.shape[:-1], route.cond is not None
        self._times = program.flat_times(y0.dtype) if route.plan.needs_tables else None
        self._wants_grad = keep != "nothing"
        self._parts = None if self._wants_grad else route.plan.parts(route.cond, len(y0))
        chain = self._parts and self._parts.chain
        self._of_cond = () if chain is None else tuple(chain.tensors)
        self._kernels = kernels.repeated(program, inputs, keep, final, chain)
        self._solved = SolvedFinal if final else SolvedAgain

    def fits(self, entry: Any, given: Given) -> bool:
        """Whether everything but numbers is like in the first solve."""
        same = torch.get_default_dtype() is self._dtype and entry.guards.scopes_hold()
        return same and self._alike(*given, *self._read)

    def solve(self, field: Callable, given: Given) -> Tensor | None:
        """The outputs [K, batch, state], or the final one; None if the last is not finite."""
        if self._wants_grad:
            return self._with_graph(given)
        if not torch.is_grad_enabled():
            return self._without_graph(given)
        with torch.no_grad():
            return self._without_graph(given)

    def _with_graph(self, given: Given) -> Tensor | None:
        inputs = self._bind(given)
        tensors = flatten(inputs)
        out, run = self._kernels.forward(tensors)
        if not run.finite:
            return None
        own = rebuild(inputs, [x.detach() for x in tensors])  # the kernels have their addresses
        solved = self._solved(self._kernels, self._program, out, run, own)
        del out
        return _attach(solved, *tensors)

    def _without_graph(self, given: Given) -> Tensor | None:
        parts = self._parts
        if parts is None:
            tensors = flatten(self._bind(given))
        else:
            tensors = [given[0], *parts.parameters]
            if self._times is not None:
                tensors += parts.tables(self._times)
            if self._of_cond:
                tensors += (given[-1], *self._of_cond)
        out, run = self._kernels.forward(tensors)
        return out if run.finite else None

    def _bind(self, given: Given) -> Inputs:
        """The tensors of the solve."""
        cond = given[-1] if self._has_cond else None
        inputs = self._plan.bind(self._times, cond, self._lead)
        inputs.y0 = given[0]
        inputs.parameters = [x.contiguous() for x in inputs.parameters]
        return inputs


@dataclass
class SolvedAgain(Solved):
    """See `Solved`."""

    def gradients(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """The gradients of the tensors from that of the outputs."""
        return self.kernels.backward(self.kept, grad, flatten(self.inputs), wanted)  # type: ignore


class SolvedFinal(SolvedAgain):
    """See `Solved`; the only output comes without its number."""

    def run(self, inputs: Inputs) -> Tensor:
        """The output in plain torch, with a graph."""
        return super().run(inputs)[0]
