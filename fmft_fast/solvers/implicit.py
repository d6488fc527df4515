"""The place for one step of an implicit Runge-Kutta method, solved by Broyden's method.

The slopes k of the stages satisfy k_i = f(t_i, y + h sum_j a_ij k_j). Broyden's "good" method
starts from the identity as Jacobian and the slope at the start of the step as guess, so the field
is only ever evaluated, never differentiated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .inputs import Perturb
from .tableau import Tableau

NOT_CONVERGED = "Functional iteration did not converge. Solution may be incorrect."


def broyden(
    residual: Callable[[Tensor], Tensor], x: Tensor, *, tol: float | Tensor, max_iters: int
) -> tuple[Tensor, bool]:
    """Solve residual(x) = 0 by Broyden's good method from the Jacobian J = 1.

    The iterates are those of the textbook form J += r s^H / (s^H s), s = -J^-1 r with a dense J
    (r: the residual after the step s), but J^-1 is kept as the product of the rank-one factors
    (1 + s_{j+1} s_j^H / s_j^H s_j). So only the steps are stored: O(n m) memory and work per
    iteration for n unknowns and m steps so far, instead of O(n^2) and O(n^3).

    Everything is made of differentiable torch operations: autograd runs back through the iteration.

    Args:
        residual: function of a tensor shaped as `x` that returns a tensor of the same shape.
        x: starting point, real or complex (holomorphic residual for the classical convergence).
        tol: stop when the 2-norm of the residual is below it, a number or 0-d.
        max_iters: at most so many steps.

    Returns:
        The last iterate, and whether it was seen to converge. A Jacobian that became singular
        stops the iteration at the last iterate, unconverged.

    Source: Kelley, "Solving Nonlinear Equations with Newton's Method", SIAM 2003, section 4.3.

    Example:
        >>> root, converged = broyden(lambda x: x - x.cos(), torch.zeros(1), tol=1e-6, max_iters=9)
        >>> converged, round(root.item(), 4)
        (True, 0.7391)
    """
    r = residual(x)
    steps: list[Tensor] = []
    inverse_squares: list[Tensor] = []
    # What rounding leaves of a denominator of zero: J is singular to working precision.
    singular_below = 4 * torch.finfo(x.dtype).eps
    for _ in range(max_iters):
        if torch.linalg.vector_norm(r.detach()) < tol:  # sync: the iteration ends by its residual
            return x, True
        s = -r.reshape(-1)
        for previous, after, inverse_square in zip(
            steps[:-1], steps[1:], inverse_squares[:-1], strict=True
        ):
            s = s + after * (torch.vdot(previous, s) * inverse_square)
        if steps:
            denominator = 1 - torch.vdot(steps[-1], s) * inverse_squares[-1]
            if not denominator.detach().abs() > singular_below:  # sync: NaN stops too
                return x, False
            s = s / denominator
        steps.append(s)
        inverse_squares.append(1 / torch.vdot(s, s))
        x = x + s.reshape(x.shape)
        r = residual(x)
    return x, False


class _System:
    """Stages that are solved together, the earlier stages that they see, and both blocks of a."""

    def __init__(self, stages: list[int], known: list[int], a: Tensor, device: torch.device):
        self.stages = stages
        self.known = known
        self.weights = a[stages][:, stages].to(device)
        self.known_weights = a[stages][:, known].to(device)


class BroydenStepper:
    """Steps of a fully or diagonally implicit Runge-Kutta method.

    Args:
        func: field, called `func(t, y, perturb=Perturb.X)` with t 0-d and y shaped as `y0`.
        y0: state that fixes shape, dtype and device: [*state], real or complex.
        tableau: implicit tableau, see `implicit_tableaux`.
        perturb: evaluate the slope at the start of a step just after its time, so that a step can
            start at a discontinuity. (Stages at the end of a step always lie just before it.)
        max_iters: at most so many Broyden steps for each system.
        diagonal: solve one system per stage (a lower triangular tableau) instead of one for all.

    The residual's 2-norm has to fall below 1e-6 for float32 and complex64, else 1e-8. Its absolute
    meaning is torchdiffeq's, kept so that results agree. Where rounding alone exceeds it, since the
    slopes are large or many, 32 units in the last place of their 2-norm do.
    """

    ROUNDING = 32
    history: tuple[Tensor, ...] = ()

    def __init__(
        self,
        func: Callable[..., Tensor],
        y0: Tensor,
        tableau: Tableau,
        *,
        perturb: bool = False,
        max_iters: int = 100,
        diagonal: bool,
    ) -> None:
        self.func = func
        self.max_iters = max_iters
        self.start_perturb = Perturb.NEXT if perturb else Perturb.NONE
        self.time_dtype = y0.dtype.to_real()
        self.tol = 1e-6 if self.time_dtype == torch.float32 else 1e-8
        self.c = tableau.c
        a, b = (torch.tensor(x, dtype=torch.float64).to(y0.dtype) for x in (tableau.a, tableau.b))
        self.b = b.to(y0.device)
        implicit = [i for i in range(tableau.stages) if tableau.c[i] != 0 or any(tableau.a[i])]
        self.systems = [
            _System(stages, [j for j in range(stages[0]) if a[stages, j].any()], a, y0.device)
            for stages in ([[i] for i in implicit] if diagonal else [implicit])
        ]

    def step(self, t0: Tensor, t1: Tensor, h: Tensor | float, y: Tensor) -> tuple[Tensor, Tensor]:
        """Advance from t0 to t1 = t0 + h.

        Args:
            t0: start of the step, 0-d.
            t1: end of the step, 0-d.
            h: signed length of the step, 0-d.
            y: state at t0: [*state].

        Returns:
            The state at t1 and the slope at t0, both [*state]. Warns when a system did not
            converge.
        """
        h = torch.as_tensor(h, dtype=self.time_dtype, device=y.device)
        f0 = self.start_slope(t0, y)
        return y + self.increment(self.slopes(t0, t1, h, y, f0), h), f0

    def start_slope(self, t0: Tensor, y: Tensor) -> Tensor:
        """The slope at the start of a step, in the dtype of the solver's state."""
        return self.func(t0, y, perturb=self.start_perturb).to(y.dtype)

    def increment(self, k: list[Tensor], h: Tensor) -> Tensor:
        """What a step h with the slopes k of all stages adds to the state."""
        return torch.tensordot(h * self.b, torch.stack(k), dims=1)

    def slopes(self, t0: Tensor, t1: Tensor, h: Tensor, y: Tensor, f0: Tensor) -> list[Tensor]:
        """The slopes of all stages, found from the slope f0 at the start of the step."""
        k = [f0] * len(self.c)
        for system in self.systems:
            base, stages = y, system.stages
            if system.known:
                known_slopes = torch.stack([k[j] for j in system.known])
                base = y + torch.tensordot(h * system.known_weights, known_slopes, dims=1)
            guess = torch.stack([k[i] for i in stages])
            solution = self.solve(stages, base, h * system.weights, guess, t0, t1, h)
            for i, slope in zip(stages, solution, strict=True):
                k[i] = slope
        return k

    def solve(
        self,
        stages: list[int],
        base: Tensor,
        weights: Tensor,
        guess: Tensor,
        t0: Tensor,
        t1: Tensor,
        h: Tensor,
    ) -> Tensor:
        """The slopes k = f(base + weights k) of stages that depend on each other.

        Args:
            stages: their numbers, m of them, which give the times of the field.
            base: what the slopes are added to: [*state].
            weights: [m, m], in the dtype of the state.
            guess: the slopes to start from: [m, *state].
            t0, t1, h: the step, as in `step`, h as a tensor.
        """
        t0, t1 = t0.to(self.time_dtype), t1.to(self.time_dtype)

        def residual(slopes: Tensor) -> Tensor:  # [m, *state]
            y_stages = base + torch.tensordot(weights, slopes, dims=1)
            fields = [
                self._field(i, t0, t1, h, y_i) for i, y_i in zip(stages, y_stages, strict=True)
            ]
            return slopes - torch.stack(fields)

        tol = self._tolerance(guess.detach())
        solution, converged = broyden(residual, guess, tol=tol, max_iters=self.max_iters)
        if not converged:
            warnings.warn(NOT_CONVERGED, stacklevel=6)  # the caller of odeint
        return solution

    def _tolerance(self, guess: Tensor) -> Tensor:
        """What the residual's 2-norm has to fall below."""
        rounding = self.ROUNDING * torch.finfo(guess.dtype).eps
        return (rounding * torch.linalg.vector_norm(guess)).clamp(min=self.tol)

    def _field(self, i: int, t0: Tensor, t1: Tensor, h: Tensor, y: Tensor) -> Tensor:
        end = self.c[i] == 1
        t, perturb = (t1, Perturb.PREV) if end else (t0 + self.c[i] * h, Perturb.NONE)
        return self.func(t, y, perturb=perturb).to(y.dtype)
