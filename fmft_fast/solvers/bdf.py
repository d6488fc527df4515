"""The place for the backward differentiation formula of order two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .implicit import BroydenStepper
from .implicit_tableaux import IMPLICIT_TABLEAUX


class BDF2Stepper(BroydenStepper):
    """Steps of BDF2 with steps of any length: one implicit equation and one past state each.

    With the ratio w = h_n / h_{n-1} of the steps and the slope k at the end of the step,

        y_{n+1} = y_n + w^2 / (1 + 2 w) (y_n - y_{n-1}) + h_n (1 + w) / (1 + 2 w) k
        k = f(t_{n+1}, y_{n+1})

    The first step is one of TR-BDF2: of order two and L-stable as well. The slope at the start of a
    step is the one that the last step found, so the field is not evaluated for it. BDF2 is stable
    on grids whose steps grow by a factor below 1 + sqrt(2) each time.

    Args:
        func: field, called `func(t, y, perturb=Perturb.X)` with t 0-d and y shaped as `y0`.
        y0: state that fixes shape, dtype and device: [*state], real or complex.
        perturb, max_iters: see `BroydenStepper`, whose tolerance holds here, too.

    Attributes:
        history: what a step needs besides the state: nothing before the first one, then the last
            step (0-d), the state before it, and the slope at its end, both [*state].

    Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section III.5.
    """

    def __init__(
        self,
        func: Callable[..., Tensor],
        y0: Tensor,
        *,
        perturb: bool = False,
        max_iters: int = 100,
    ) -> None:
        tableau = IMPLICIT_TABLEAUX["trbdf2"]
        super().__init__(func, y0, tableau, perturb=perturb, max_iters=max_iters, diagonal=True)
        self.end = tableau.stages - 1  # the stage at the end of a step

    def step(self, t0: Tensor, t1: Tensor, h: Tensor | float, y: Tensor) -> tuple[Tensor, Tensor]:
        """Advance from t0 to t1 = t0 + h; the steps of a solve have to come in order.

        Args and Returns: see `BroydenStepper.step`.
        """
        h = torch.as_tensor(h, dtype=self.time_dtype, device=y.device)
        if not self.history:
            f0 = self.start_slope(t0, y)
            slopes = self.slopes(t0, t1, h, y, f0)
            slope, y1 = slopes[self.end], y + self.increment(slopes, h)
        else:
            h_before, y_before, f0 = self.history
            w = h / h_before
            base = y + w * w / (1 + 2 * w) * (y - y_before)
            weight = (h * (1 + w) / (1 + 2 * w)).to(y.dtype)
            slope = self.solve([self.end], base, weight.view(1, 1), f0[None], t0, t1, h)[0]
            y1 = base + weight * slope
        self.history = (h, y, slope)
        return y1, f0
