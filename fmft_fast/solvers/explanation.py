"""`explain`: which path a solve takes, and what of it stands in the way of the fused one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fusion import NotFusable, Plan
from ..ops.backend import choose_kernels
from .inputs import normalise
from .whole_solve import find_route, obstacle


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` it.

    Attributes:
        fused: whether the whole solve, and its adjoint, is one kernel call each.
        backend: whose kernels run: those of the whole solve, or else those of the step ops.
        plan: the field as the kernels see it, if it can be fused.
        reason: why it is not fused, or None.
        where: the line of the field that is at fault, or None.
    """

    fused: bool
    backend: str
    plan: Plan | None = None
    reason: str | None = None
    where: str | None = None

    def __str__(self) -> str:
        if self.fused:
            return f"fused: one call of the {self.backend} kernels each way\n{self.plan}"
        lines = [f"step by step, by the step ops of backend {self.backend}", f"why: {self.reason}"]
        return "\n".join(lines if self.where is None else [*lines, f"where: {self.where}"])


def explain(
    field: Callable[..., Tensor],
    x0: Tensor,
    t: Tensor | None = None,
    *,
    method: str = "euler",
    cond: Tensor | None = None,
    backend: str = "auto",
    options: dict[str, Any] | None = None,
) -> Explanation:
    """Say which path `solve` and `odeint` take with these arguments; nothing is solved.

    Args:
        field, x0, t, method, cond, backend, options: as in `solve` and `odeint`; by default t goes
            from 0 to 1. The field may be called once, on two rows.

    Returns:
        An `Explanation`.

    Raises:
        InputError, InputTypeError, UnknownMethodError, MissingBackendError: as the solve would.

    Example:
        >>> import torch
        >>> from fmft_fast import explain
        >>> from fmft_fast.fields import MLP
        >>> explain(MLP(2), torch.zeros(8, 2)).fused
        True
        >>> print(explain(lambda t, x: x.sort().values, torch.zeros(8, 2)).fused)
        False
    """
    times = torch.tensor([0.0, 1.0]) if t is None else t
    bound = field if cond is None else lambda t, x: field(t, x, cond)
    problem = normalise(
        bound, x0, times.to(x0.device), rtol=1e-5, atol=1e-5, method=method, options=options
    )
    steps = choose_kernels(problem.y0, backend).name
    reason = obstacle(problem)
    if reason is not None:
        return Explanation(False, steps, reason=reason)
    assert problem.spec.tableau is not None
    stages, adaptive = problem.spec.tableau.stages, problem.spec.family == "adaptive"
    found = find_route(field, x0, stages, backend, cond, adaptive)
    if isinstance(found, NotFusable):
        return Explanation(False, steps, reason=found.reason, where=found.where)
    return Explanation(True, found.kernels.name, found.plan)
