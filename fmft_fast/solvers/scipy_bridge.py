"""The place where SciPy's solvers integrate a torch field, as a reference or for stiff problems."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingDependencyError, NonFiniteError, StepUnderflowError
from .inputs import Perturb

# These two have no complex arithmetic, so they see a complex state as pairs of real numbers.
_REAL_ONLY = ("LSODA", "Radau")

# LSODA can creep towards a singularity for ever: give up after so many evaluations within this
# share of the interval. A Jacobian by finite differences needs one evaluation per element only.
_MAX_STALLED = 100_000
_PROGRESS = 1e-10


def integrate_with_scipy(
    func: Callable[..., Tensor],
    y0: Tensor,
    t: Tensor,
    *,
    rtol: float | Tensor,
    atol: float | Tensor,
    solver: str = "LSODA",
    min_step: float = 0.0,
    max_step: float = inf,
) -> Tensor:
    """Integrate with `scipy.integrate.solve_ivp`, in float64 on the CPU and without gradient.

    Args:
        func: field, called `func(t, y, perturb=Perturb.NONE)` with t 0-d, y: [*state].
        y0: initial state: [*state], real or complex.
        t: observation times, strictly monotonic: [N].
        rtol: relative tolerance, a float or one value per element of the state.
        atol: absolute tolerance, likewise.
        solver: a name that `solve_ivp` knows: RK45, RK23, DOP853, Radau, BDF or LSODA.
        min_step: lower bound of the step. Only LSODA has this option; SciPy warns for the others.
        max_step: upper bound of the step.

    Returns:
        The states at the times `t`: [N, *state], dtype and device of `y0`.

    Raises:
        MissingDependencyError: SciPy is not installed.
        NonFiniteError: SciPy gave up and the field had become NaN or infinite.
        StepUnderflowError: SciPy gave up for any other reason; the message says where.
    """
    if len(t) == 1:
        return y0.detach()[None].clone()
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise MissingDependencyError(
            "method 'scipy_solver' needs SciPy, which is not installed: pip install scipy"
        ) from error

    times = t.detach().double().cpu().numpy()
    as_pairs = y0.is_complex() and solver in _REAL_ONLY
    field = _NumpyField(func, y0, times, solver, as_pairs=as_pairs)
    options: dict[str, Any] = {"min_step": min_step} if solver == "LSODA" or min_step else {}
    try:
        result = solve_ivp(
            field,
            (times[0], times[-1]),
            field.to_numpy(y0).copy(),
            method=solver,
            t_eval=times,
            rtol=field.tolerance(rtol),
            atol=field.tolerance(atol),
            max_step=max_step,
            **options,
        )
    except ValueError as error:
        if field.first_bad_time is None:
            raise
        raise field.failure(str(error)) from error
    if not result.success:
        raise field.failure(result.message)
    if not np.isfinite(result.y).all():
        raise field.failure("the solution is not finite.")
    return torch.stack([y0.detach(), *(field.to_torch(y) for y in result.y.T[1:])])


class _NumpyField:
    """A torch field as a function of (float, flat array), which remembers where it broke."""

    def __init__(
        self,
        func: Callable[..., Tensor],
        y0: Tensor,
        times: np.ndarray,
        solver: str,
        *,
        as_pairs: bool,
    ) -> None:
        self.func = func
        self.like = y0.detach()
        self.start, self.end = float(times[0]), float(times[-1])
        self.solver = solver
        self.as_pairs = as_pairs
        self.last_time = self.furthest = self.start
        self.stalled = 0
        self.first_bad_time: float | None = None

    def __call__(self, time: float, y: np.ndarray) -> np.ndarray:
        t = torch.tensor(time, dtype=torch.float64, device=self.like.device)
        with torch.no_grad():
            slope = self.to_numpy(self.func(t, self.to_torch(y), perturb=Perturb.NONE))
        self.last_time = float(time)
        if self.first_bad_time is None and not np.isfinite(slope).all():
            self.first_bad_time = self.last_time
        self._watch_progress()
        return slope

    def _watch_progress(self) -> None:
        if (self.last_time - self.furthest) / (self.end - self.start) > _PROGRESS:
            self.furthest, self.stalled = self.last_time, 0
        self.stalled += 1
        if self.stalled > _MAX_STALLED:
            raise self.failure(f"no progress in {_MAX_STALLED} evaluations.")

    def failure(self, message: str) -> NonFiniteError | StepUnderflowError:
        """The error that says where the solver stopped and whether the field was finite."""
        where = (
            f"SciPy's {self.solver} could not integrate from t = {self.start:g} to "
            f"t = {self.end:g}; it last evaluated the field at t = {self.last_time:g}: "
            f"{message.rstrip('.')}."
        )
        if self.first_bad_time is not None:
            return NonFiniteError(
                f"{where} The field was NaN or infinite at t = {self.first_bad_time:g} first."
            )
        return StepUnderflowError(f"{where} The solution may end there; else loosen rtol and atol.")

    def to_numpy(self, y: Tensor) -> np.ndarray:
        y = y.detach().resolve_conj()
        return (torch.view_as_real(y) if self.as_pairs else y).reshape(-1).cpu().numpy()

    def to_torch(self, y: np.ndarray) -> Tensor:
        state = torch.tensor(y)
        if self.as_pairs:
            state = torch.view_as_complex(state.double().reshape(-1, 2))
        return state.to(self.like.device, self.like.dtype).reshape(self.like.shape)

    def tolerance(self, value: float | Tensor) -> float | np.ndarray:
        if not isinstance(value, Tensor):
            return value
        array = value.detach().double().cpu().numpy()
        if array.ndim == 0:
            return float(array)
        return np.repeat(array.reshape(-1), 2 if self.as_pairs else 1)
