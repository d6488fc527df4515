"""`explain`: which path a solve takes, and what of it stands in the way of the fused one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fusion import NotFusable, Plan
from ..ops.backend import LAYERED, choose_kernels
from .inputs import State, normalise
from .recorded_solve import with_recordings
from .whole_solve import find_route, obstacle


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` it.

    Attributes:
        fused: whether the solve, and its adjoint, is done as a whole by one call of kernels each.
        backend: whose kernels run: those of the whole solve, or else those of the step ops.
        plan: the field as the kernels see it, if it can be fused.
        reason: why it is not fused, or None.
        where: the line of the field that is at fault, or None.
        remedy: what would make it fusable, or None.
        recorded: whether both are recorded, and replayed from the second solve of a kind on.
    """

    fused: bool
    backend: str
    plan: Plan | None = None
    reason: str | None = None
    where: str | None = None
    remedy: str | None = None
    recorded: bool = False

    def __str__(self) -> str:
        if self.fused and self.backend == LAYERED:
            replays = ", from the second one on as one CUDA graph" if self.recorded else ""
            return (
                f"fused: layer by layer by torch's matrix products each way{replays}; {self.plan}"
            )
        if self.fused:
            return f"fused: one call of the {self.backend} kernels each way; {self.plan}"
        lines = [f"step by step, by the step ops of backend {self.backend}"]
        notes = {"why": self.reason, "where": self.where, "to fuse it": self.remedy}
        return "\n".join(lines + [f"{name}: {note}" for name, note in notes.items() if note])


def explain(
    field: Callable[..., Tensor],
    x0: State,
    t: Tensor | None = None,
    *,
    method: str = "euler",
    cond: Tensor | None = None,
    backend: str = "auto",
    options: dict[str, Any] | None = None,
) -> Explanation:
    """Say which path `odeint` and `solve` take with these arguments; nothing is solved.

    What only `solve` has stands in the way besides: time_table, checkpoint_every, times that
    require grad, and save="all" with tolerances but no grid. `fused("require")` around a solve says
    why that very one is not fused.

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
    device = x0.device if isinstance(x0, Tensor) else times.device
    bound = field if cond is None else lambda t, x: field(t, x, cond)
    # Steps of the samples' own take the same path.
    others = {name: x for name, x in (options or {}).items() if name != "per_sample"}
    problem = normalise(
        bound, x0, times.to(device), rtol=1e-5, atol=1e-5, method=method, options=others
    )
    steps = choose_kernels(problem.y0, backend).name
    reason = obstacle(problem)
    if reason is not None:
        return Explanation(False, steps, reason=reason)
    assert isinstance(x0, Tensor) and problem.spec.tableau is not None
    stages, adaptive = problem.spec.tableau.stages, problem.spec.family == "adaptive"
    found = find_route(field, x0, stages, backend, cond, adaptive, anew=True)
    if isinstance(found, NotFusable):
        return Explanation(False, steps, None, found.reason, found.where, found.remedy)
    kernels = with_recordings(found.kernels, found.plan, x0.device)
    recorded = kernels is not found.kernels
    return Explanation(True, kernels.name, found.plan, recorded=recorded)
