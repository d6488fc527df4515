"""Dense output: the solution as a function of time, from what the steps left behind."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


class DenseSolution:
    """Piecewise polynomial solution; callable at any time of its interval.

    Args:
        t: [N + 1] times of the step ends, strictly monotonic; may require grad.
        coefficients: [N, degree + 1, *state]; step n is sum_j coefficients[n, j] theta^j with
            theta = (t - t_n) / (t_{n+1} - t_n) in [0, 1].
        t_end: last time that the caller asked for (the steps may reach further).
    """

    def __init__(self, t: Tensor, coefficients: Tensor, t_end: float):
        self.t = t
        self.coefficients = coefficients
        self.t_end = t_end
        self._sign = 1.0 if t[-1] > t[0] else -1.0

    def __call__(self, t: Tensor | float) -> Tensor:
        """The state at t: [*state] for a number or 0-d tensor, [T, *state] for t of shape [T].

        Raises:
            InputError: a time lies outside the interval of the solve.
        """
        t = torch.as_tensor(t, dtype=self.t.dtype, device=self.t.device)
        first, last = sorted((self.t[0].item(), self.t_end))
        if bool(((t < first) | (t > last)).any()):
            raise InputError(
                f"dense output holds between t = {first} and {last}, got {t.tolist()}; "
                "solve over a longer interval"
            )
        times = t.reshape(-1)
        nodes = self._sign * self.t.detach()
        n = torch.searchsorted(nodes, self._sign * times.detach(), right=True) - 1
        n = n.clamp(0, len(self.t) - 2)
        theta = (times - self.t[n]) / (self.t[n + 1] - self.t[n])
        c = self.coefficients[n]
        theta = theta.to(c.abs().dtype).reshape(-1, *[1] * (c.ndim - 2))
        y = c[:, -1]
        for j in range(c.shape[1] - 2, -1, -1):
            y = y * theta + c[:, j]
        return y.reshape(*t.shape, *y.shape[1:])


def hermite_coefficients(h: Tensor, y0: Tensor, f0: Tensor, y1: Tensor, f1: Tensor) -> Tensor:
    """[4, *state] coefficients of the cubic through (y0, f0) and (y1, f1) over a step h."""
    rise = y1 - y0
    return torch.stack((y0, h * f0, 3 * rise - h * (2 * f0 + f1), h * (f0 + f1) - 2 * rise))
