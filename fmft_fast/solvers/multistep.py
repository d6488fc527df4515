"""The place for the Adams methods: explicit (Bashforth) and implicit (Bashforth-Moulton)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from ..errors import InputError
from .implicit import NOT_CONVERGED
from .inputs import Perturb

MIN_ORDER = 4
MAX_ORDER = 12


@cache
def adams_weights(nodes: int, *, implicit: bool) -> tuple[float, ...]:
    """Weights w of y(t + h) - y(t) = h sum_i w_i f_i over equally spaced slopes, newest first.

    They integrate the polynomial through the slopes at t, t - h, t - 2h, ... (explicit:
    Bashforth) or at t + h, t, t - h, ... (implicit: Moulton) over [t, t + h], exactly: the
    integrals of the Lagrange polynomials in rational numbers, rounded once at the end.

    Args:
        nodes: how many slopes, at least 1. It is also the order of the method.
        implicit: whether the first slope is the one at t + h.

    Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section III.1.

    Example:
        >>> adams_weights(2, implicit=False), adams_weights(2, implicit=True)
        ((1.5, -0.5), (0.5, 0.5))
    """
    x = [(1 if implicit else 0) - i for i in range(nodes)]
    weights = []
    for i in range(nodes):
        lagrange = [Fraction(1)]  # coefficients by rising power
        for m in (m for m in range(nodes) if m != i):
            shifted = [Fraction(0), *lagrange]
            scaled = [x[m] * coefficient for coefficient in lagrange] + [Fraction(0)]
            lagrange = [(p - q) / (x[i] - x[m]) for p, q in zip(shifted, scaled, strict=True)]
        weights.append(float(sum(p / (power + 1) for power, p in enumerate(lagrange))))
    return tuple(weights)


class AdamsStepper:
    """Steps of an Adams method whose order grows with the history of slopes.

    The first steps, until three slopes are known, are those of the 3/8-rule of Kutta. Then the
    Bashforth formula over all known slopes (`max_order` - 1 at most) predicts, and with `implicit`
    the Moulton formula of one order more corrects by fixed-point iteration.

    The weights are those for equal steps. As in torchdiffeq they are used on any grid, where the
    order is lost when the steps vary: take an explicit Runge-Kutta method there.

    Args:
        func: field, called `func(t, y, perturb=Perturb.X)` with t 0-d and y shaped as `y0`.
        y0: state that fixes shape, dtype and device: [*state], real or complex.
        implicit: whether to correct.
        rtol: relative tolerance of the corrector, a float or a tensor that broadcasts to the state.
        atol: absolute tolerance of the corrector.
        max_order: order of the method after its start, at most 12. Below 4 all steps are those of
            the start.
        max_iters: at most so many corrector iterations in a step. A step that does not converge
            warns and drops the oldest slope.
        perturb: evaluate at the start of a step just after and at its end just before its time.

    Attributes:
        history: the slopes at the starts of the steps so far, the newest first.

    Raises:
        InputError: `max_order` is above 12.
    """

    def __init__(
        self,
        func: Callable[..., Tensor],
        y0: Tensor,
        *,
        implicit: bool,
        rtol: float | Tensor,
        atol: float | Tensor,
        max_order: int = MAX_ORDER,
        max_iters: int = 4,
        perturb: bool = False,
    ) -> None:
        if max_order > MAX_ORDER:
            raise InputError(f"max_order must be at most {MAX_ORDER}, got {max_order}.")
        if max_order < MIN_ORDER:
            warnings.warn(
                f"max_order is below {MIN_ORDER}, so the solver reduces to `rk4`.", stacklevel=7
            )
        real_dtype = y0.dtype.to_real()
        self.func = func
        self.implicit = implicit
        self.rtol = torch.as_tensor(rtol, dtype=real_dtype, device=y0.device)
        self.atol = torch.as_tensor(atol, dtype=real_dtype, device=y0.device)
        self.max_iters = max_iters
        self.start_perturb = Perturb.NEXT if perturb else Perturb.NONE
        self.end_perturb = Perturb.PREV if perturb else Perturb.NONE
        self.max_slopes = max(int(max_order) - 1, 0)
        self.history: tuple[Tensor, ...] = ()

    def step(self, t0: Tensor, t1: Tensor, h: Tensor | float, y: Tensor) -> tuple[Tensor, Tensor]:
        """Advance from t0 to t1 = t0 + h; the steps of a solve have to come in order.

        Args:
            t0: start of the step, 0-d.
            t1: end of the step, 0-d.
            h: signed length of the step, 0-d.
            y: state at t0: [*state].

        Returns:
            The state at t1 and the slope at t0, both [*state].
        """
        f0 = self.func(t0, y, perturb=self.start_perturb)
        self.history = (f0, *self.history)[: self.max_slopes]
        known = len(self.history)
        if known < MIN_ORDER - 1:
            return y + self._kutta_increment(t0, t1, h, y, f0), f0
        increment = h * self._weighted_sum(adams_weights(known, implicit=False))
        if self.implicit:
            increment = self._correct(t1, h, y, increment)
        return y + increment, f0

    def _correct(self, t1: Tensor, h: Tensor | float, y: Tensor, increment: Tensor) -> Tensor:
        weight_new, *weights = adams_weights(len(self.history) + 1, implicit=True)
        from_history = h * self._weighted_sum(weights)
        for _ in range(self.max_iters):
            previous = increment
            f1 = self.func(t1, y + previous, perturb=self.end_perturb)
            increment = h * weight_new * f1 + from_history
            if self._converged(previous, increment):
                return increment
        warnings.warn(NOT_CONVERGED, stacklevel=6)  # the caller of odeint
        self.history = self.history[:-1]
        return increment

    @torch.no_grad()
    def _converged(self, previous: Tensor, increment: Tensor) -> bool:
        scale = self.atol + self.rtol * torch.maximum(previous.abs(), increment.abs())
        return bool(((previous - increment).abs() / scale).max() < 1)  # sync: ends the iteration

    def _weighted_sum(self, weights: tuple[float, ...] | list[float]) -> Tensor:
        total = weights[0] * self.history[0]
        for weight, slope in zip(weights[1:], self.history[1:], strict=True):
            total = torch.add(total, slope, alpha=weight)
        return total

    def _kutta_increment(
        self, t0: Tensor, t1: Tensor, h: Tensor | float, y: Tensor, k1: Tensor
    ) -> Tensor:
        """Increment of the 3/8-rule, whose first slope is known."""
        k2 = self.func(t0 + h * (1 / 3), y + h * k1 * (1 / 3), perturb=Perturb.NONE)
        k3 = self.func(t0 + h * (2 / 3), y + h * (k2 - k1 * (1 / 3)), perturb=Perturb.NONE)
        k4 = self.func(t1, y + h * (k1 - k2 + k3), perturb=self.end_perturb)
        return (k1 + 3 * (k2 + k3) + k4) * h * 0.125
