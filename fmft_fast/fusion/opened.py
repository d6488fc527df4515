"""Fields that hold a condition: `lambda t, x: model(t, x, observation)`, `self.observation`.

The tensor, of which every sample has a row, becomes an argument; so the next solve, with another
observation, finds the same plan.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor


class Opened:
    """A callable (t, x) as one of (t, x, cond).

    Attributes:
        field: the callable, or its like without the condition.
        name: where it holds the condition.
    """

    field: Any
    name: Any

    def __call__(self, t: Tensor, x: Tensor, cond: Tensor) -> Any:
        """Evaluate; nobody else sees the condition."""
        raise NotImplementedError


class OpenedFunction(Opened):
    """A function that closes over the condition."""

    def __init__(self, function: FunctionType, number: int):
        self.name, self._cell = number, CellType(None)
        cells = list(function.__closure__ or ())
        cells[number] = self._cell
        self.field = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(cells),
        )
        self.field.__kwdefaults__ = function.__kwdefaults__

    def __call__(self, t: Tensor, x: Tensor, cond: Tensor) -> Any:
        """See `Opened`; the cell is empty again afterwards."""
        self._cell.cell_contents = cond
        try:
            return self.field(t, x)
        finally:
            self._cell.cell_contents = None


class OpenedPartial(Opened):
    """A `functools.partial` with the condition as a keyword."""

    def __init__(self, field: functools.partial, name: str):
        rest = {key: value for key, value in field.keywords.items() if key != name}
        self.field, self.name = functools.partial(field.func, *field.args, **rest), name

    def __call__(self, t: Tensor, x: Tensor, cond: Tensor) -> Any:
        """See `Opened`."""
        return self.field(t, x, **{self.name: cond})


class OpenedObject(Opened):
    """An object, or a method of one, with the condition as an attribute.

    Attributes:
        owner: the object; it is only read.
        twin: an object with the same attributes, on which the field runs; None before it has run.
    """

    def __init__(self, field: Any, owner: Any, name: str):
        self.field, self.owner, self.name = field, owner, name
        self.twin: Any = None

    def __call__(self, t: Tensor, x: Tensor, cond: Tensor) -> Any:
        """See `Opened`."""
        if self.twin is None:
            self.twin = object.__new__(type(self.owner))
            self.twin.__dict__.update(self.owner.__dict__)
        self.twin.__dict__[self.name] = cond
        try:
            bound = isinstance(self.field, MethodType)
            return self.field.__func__(self.twin, t, x) if bound else self.twin(t, x)
        finally:
            self.twin.__dict__[self.name] = None


def open_condition(field: Any, y0: Tensor) -> tuple[Opened, Tensor] | None:
    """A field with its condition apart, if it holds exactly one tensor with a row per sample."""
    if y0.ndim != 2:
        return None
    if type(field) is FunctionType:
        try:
            cells = [cell.cell_contents for cell in field.__closure__ or ()]
        except ValueError:  # a variable without a value
            return None
        found = _only_rows(enumerate(cells), len(y0))
        return found and (OpenedFunction(field, found[0]), found[1])
    if type(field) is functools.partial:
        found = _only_rows(field.keywords.items(), len(y0))
        return found and (OpenedPartial(field, found[0]), found[1])
    owner = field.__self__ if type(field) is MethodType else field
    scope = getattr(owner, "__dict__", None)
    if type(scope) is not dict or hasattr(type(owner), "__del__"):
        return None
    found = _only_rows(scope.items(), len(y0))
    return found and (OpenedObject(field, owner, found[0]), found[1])


def _only_rows(values: Iterable[tuple[Any, Any]], rows: int) -> tuple[Any, Tensor] | None:
    """The name and value of the only tensor with so many rows."""
    found = [(name, x) for name, x in values if type(x) is Tensor and x.ndim > 1]
    found = [(name, x) for name, x in found if x.shape[0] == rows]
    return found[0] if len(found) == 1 else None
