"""What a function that serves as a field holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .continuous_adjoint import find_parameters

_LONGEST = 1000  # containers beyond are data


def leaves_of(field: Any) -> Iterator[Tensor]:
    """The leaves of the graph that a field holds, as far as they are found without calling it.

    Those of a module are its parameters. A function holds what it closes over, its defaults and the
    global variables that its code names; a method its object, and that its attributes.
    The functions that these call may hold more.
    """
    seen: set[int] = set()
    todo = [field]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if thing.is_leaf:
                yield thing
        elif isinstance(thing, nn.Module):
            yield from find_parameters(thing)
        elif isinstance(thing, functools.partial):
            todo += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, MethodType):
            todo += [thing.__func__, thing.__self__]
            todo += getattr(thing.__self__, "__dict__", {}).values()
        elif isinstance(thing, FunctionType):
            todo += _held_by(thing)
        elif isinstance(thing, (list, tuple, dict)) and len(thing) <= _LONGEST:
            todo += thing.values() if isinstance(thing, dict) else thing
        elif thing is field:
            todo += getattr(thing, "__dict__", {}).values()


def _held_by(f: FunctionType) -> Iterator[Any]:
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable without a value
            pass
    yield from f.__defaults__ or ()
    yield from (f.__kwdefaults__ or {}).values()
    for name in f.__code__.co_names:
        value = f.__globals__.get(name)
        if isinstance(value, (Tensor, nn.Module, list, tuple, dict)):
            yield value
