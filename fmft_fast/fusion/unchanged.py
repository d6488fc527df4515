"""Snapshots of what a field reads, and the test that everything is as it was."""

from __future__ import annotations

import collections
import enum
from collections.abc import Callable, Iterable
from functools import partial
from operator import contains, getitem
from typing import Any

import torch

PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size,
    torch.memory_format, torch.layout, enum.Enum, range, slice, type(Ellipsis),
)  # fmt: skip
CONTAINERS = (dict, list, tuple, set, frozenset, collections.OrderedDict)


class _Same:
    """Equal to one object only: for what compares by value."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return other is self.value or (type(other) is _Same and other.value is self.value)

    __hash__ = None  # type: ignore[assignment]


class Ordered:
    """Equal to a dictionary or set of one type with the same in the same order."""

    __slots__ = ("kind", "items")

    def __init__(self, kind: type, items: list[Any]):
        self.kind, self.items = kind, items

    def __eq__(self, other: Any) -> bool:
        if type(other) is Ordered:
            return other.kind is self.kind and other.items == self.items
        return type(other) is self.kind and self.items == _items(other)

    __hash__ = None  # type: ignore[assignment]


def _items(value: Any) -> list[Any]:
    return list(value.items() if isinstance(value, dict) else value)


def snapshot(value: Any) -> Any:
    """What a value is compared with later: copies of containers, the objects in them themselves."""
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(map(snapshot, value))
    if type(value) in CONTAINERS:
        if isinstance(value, dict) and len(value) < 2:
            return {k: snapshot(v) for k, v in value.items()}
        return Ordered(type(value), snapshot(_items(value)))
    if isinstance(value, PLAIN) or type(value).__eq__ is object.__eq__:
        return value
    return _Same(value)


class PlainUnchanged:
    """What `fmft_fast._cpu.Unchanged` does, in Python: things to look at, and what was there.

    What is equal counts as the same, apart from `named`. What cannot be looked at has changed.
    """

    def __init__(self) -> None:
        self._looks: list[tuple[Callable[[], Any], Any]] = []

    def size(self, scope: Any, size: int) -> None:
        """A dictionary, or the view of a class's, and its size."""
        self.call(partial(len, scope), size)

    def entry(self, scope: Any, key: Any, want: Any) -> None:
        """A value in a dictionary."""
        self.call(partial(getitem, scope, key), want)

    def listing(self, scope: Any, key: Any, items: Iterable[tuple[Any, Any]]) -> None:
        """A value that is a plain dictionary, by its items in their order."""
        self.entry(scope, key, Ordered(dict, list(items)))

    def named(self, found: dict[str, Any], ids: Iterable[tuple[str, int]]) -> None:
        """The names in a plain dictionary and the identities of what they stand for."""
        self.call(partial(_named, found), list(ids))

    def absent(self, scope: dict[str, Any], key: str) -> None:
        """A name that a dictionary lacks."""
        self.call(partial(contains, scope, key), False)

    def type(self, thing: Any, kind: type) -> None:
        """The type of an object."""
        self.call(partial(type, thing), kind)

    def attribute(self, thing: Any, name: str, want: Any) -> None:
        """An attribute of an object."""
        self.call(partial(getattr, thing, name), want)

    def call(self, look: Callable[[], Any], want: Any) -> None:
        """What a function gives."""
        self._looks.append((look, want))

    def hold(self) -> bool:
        """Whether everything is as it was."""
        try:
            return all(want is (now := look()) or want == now for look, want in self._looks)
        except Exception:  # a comparison that fails is a change as well
            return False


def _named(found: dict[str, Any]) -> list[tuple[str, int]]:
    return [(name, id(value)) for name, value in found.items()]


try:
    from fmft_fast._cpu import Unchanged
except ImportError:
    Unchanged = PlainUnchanged  # type: ignore[assignment,misc]
