"""Functions that close over a condition: `lambda t, x: model(t, x, observation)`.

The tensor, of which every sample has a row, becomes an argument; so the next solve, with another
observation, finds the same plan.
"""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any

from torch import Tensor


class Opened:
    """A function(t, x) as one of (t, x, cond), where cond is what one of its cells holds."""

    def __init__(self, function: FunctionType, number: int):
        self.cell = CellType(None)
        cells = list(function.__closure__ or ())
        cells[number] = self.cell
        self.function = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(cells),
        )
        self.function.__kwdefaults__ = function.__kwdefaults__

    def __call__(self, t: Tensor, x: Tensor, cond: Tensor) -> Any:
        """Evaluate; the cell is empty again afterwards."""
        self.cell.cell_contents = cond
        try:
            return self.function(t, x)
        finally:
            self.cell.cell_contents = None


def open_condition(field: Any, y0: Tensor) -> tuple[Opened, Tensor] | None:
    """A function with its condition apart, if it closes over one tensor with a row per sample."""
    if type(field) is not FunctionType or not field.__closure__ or y0.ndim != 2:
        return None
    found = []
    for number, cell in enumerate(field.__closure__):
        try:
            value = cell.cell_contents
        except ValueError:  # a variable without a value
            return None
        if type(value) is Tensor and value.ndim > 1 and value.shape[0] == y0.shape[0]:
            found.append((number, value))
    if len(found) != 1:
        return None
    number, cond = found[0]
    return Opened(field, number), cond
