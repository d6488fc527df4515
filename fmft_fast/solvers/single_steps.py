"""Explicit steps one after the other, and the short way to those that are asked for again.

A field that no kernel takes whole may be so small, or asked for so few steps, that what leads to
them shows. What is noted of a solve without a gradient spares it, and reads nothing of the field: a
field that can be fused by now is found out later.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..fusion import place_of_notes
from ..ops.backend import choose_kernels
from ..ops.finite import all_finite
from .discrete_adjoint import DiscretePlan, StageField
from .fixed import equal_steps
from .inputs import real_dtype
from .methods import find_method
from .recorder import find_recorder
from .repeated import PLAIN_TENSORS, Given, likeness, look_up
from .stats import SolveStats


def versions_of(*tensors: Tensor) -> list[int]:
    """How often each was changed in place; torch does not count it for inference tensors."""
    return [t._version for t in tensors if not t.is_inference()]


def unroll(plan: DiscretePlan, x: Tensor, table: Tensor, cond: Tensor | None) -> Tensor:
    """All steps as ordinary operations."""
    times = [row.unbind() for row in table.unbind()]
    states = [x]
    for n in range(len(plan.h)):
        y, _ = plan.step(n, states[-1], lambda n, i, y: plan.field(times[n][i], y, cond))
        states.append(y)
    return torch.stack(states) if plan.save_all else states[-1]


def refuse_changes(versions: list[int], *tensors: Tensor) -> None:
    """Raise if a field changed its arguments in place.

    Args:
        versions: of the tensors before its evaluations.
        tensors: the state and the times.
    """
    if versions != versions_of(*tensors):
        raise InputError(
            "the field changed t or x in place, which spoils the other steps: write t = t * 2 "
            "and the like in place of t *= 2"
        )


@torch.no_grad()
def find_not_finite(
    plan: DiscretePlan, x: Tensor, table: Tensor, cond: Tensor | None, grid: Tensor
) -> None:
    """Raise for a result that is not finite; the steps are repeated to find the one that broke."""
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("x0 holds NaN or infinite values: expected finite numbers")
    times = [row.unbind() for row in table.unbind()]
    for n in range(len(plan.h)):

        def evaluate(n: int, i: int, y: Tensor) -> Tensor:
            f = plan.field(times[n][i], y, cond)
            if not bool(torch.isfinite(f).all()):
                raise NonFiniteError(
                    f"the field returned NaN or infinite values in step {n} of {len(plan.h)}, "
                    f"stage {i}, t = {grid[n].item()} to {grid[n + 1].item()}. Check its "
                    "parameters, or take smaller steps"
                )
            return f

        x, _ = plan.step(n, x, evaluate)
    raise NonFiniteError(
        "the solution became NaN or infinite, but a second run did not: is the field random?"
    )


class RepeatedSteps:
    """Equal steps without a graph, with everything that is the same for all of their kind.

    Args:
        kind: see `solve_kind`.
        given: the state, and the condition if there is one.
        alike: the test of such tensors.
        save_all: whether all states are wanted.

    Attributes:
        fuses, stats: see `Repeat`.
    """

    fuses = False

    def __init__(self, kind: tuple, given: Given, alike: Callable[..., bool], save_all: bool):
        y0, (method, steps, t0, t1) = given[0], kind[2:6]
        tableau = find_method(method).tableau
        assert tableau is not None
        self._alike, self._save_all, self._dtype = alike, save_all, torch.get_default_dtype()
        self._tableau, self._kernels = tableau.advancing, choose_kernels(y0)
        self._steps = t0, t1, steps, real_dtype(y0.dtype)
        last = equal_steps(self._tableau, *self._steps).h[-1]
        self.stats = SolveStats(method, steps * self._tableau.stages, steps, 0, abs(last))

    def fits(self, entry: Any, given: Given) -> bool:
        """Whether the field was found not to be fusable lately, and the tensors are alike."""
        same = torch.get_default_dtype() is self._dtype and self._alike(*given)
        return same and entry.is_refused_still()

    def solve(self, field: Callable[..., Tensor], given: Given) -> Tensor:
        """The final state, or all states.

        Raises:
            InputError: the field changed its arguments.
            NonFiniteError: the final state is not finite.
        """
        y0, cond = given if len(given) == 2 else (*given, None)
        grid, table, h = equal_steps(self._tableau, *self._steps)
        plan = DiscretePlan(
            StageField(field, y0.dtype), self._tableau, self._kernels, h, self._save_all
        )
        versions = versions_of(y0, table)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            y = unroll(plan, y0, table, cond)
        refuse_changes(versions, y0, table)
        if not all_finite(y[-1] if self._save_all else y):
            find_not_finite(plan, y0, table, cond, grid)
        return y


def remember_steps(
    kind: tuple,
    field: Callable[..., Tensor],
    refusal: Any,
    y0: Tensor,
    cond: Tensor | None,
    save_all: bool = False,
) -> None:
    """Note a solve without a graph that takes single steps, if it is the second one of its kind.

    Args:
        kind: see `solve_kind`.
        field: the user's callable.
        refusal: what `find_plan` found.
        y0, cond: the tensors.
        save_all: whether all states are wanted.
    """
    given = (y0,) if cond is None else (y0, cond)
    if any(type(x) not in PLAIN_TENSORS for x in given) or not y0.is_cpu:
        return
    entry = place_of_notes(field, refusal)
    if entry is None or find_recorder(y0.device) is not None:
        return
    place = look_up(entry.notes, kind, given)
    if place is not None:
        alike = likeness(given)
        entry.notes[place] = alike is not None and RepeatedSteps(kind, given, alike, save_all)
