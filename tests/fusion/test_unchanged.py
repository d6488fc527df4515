"""The compiled comparison of objects with what they were, and the one in Python: alike."""

from __future__ import annotations

import collections
import gc
import types
import weakref

import pytest
import torch

from fmft_fast.fusion import guards
from fmft_fast.fusion.unchanged import Ordered, PlainUnchanged, Unchanged, snapshot

KINDS = {"compiled": Unchanged, "plain": PlainUnchanged}


@pytest.fixture(params=KINDS)
def unchanged(request):
    return KINDS[request.param]()


def broken():
    raise ValueError("cannot be read")


class Weird:
    """Breaks or lies in comparisons."""

    def __init__(self, answer):
        self.answer = answer

    def __eq__(self, other):
        if self.answer is None:
            raise RuntimeError("no comparison")
        return self.answer

    __hash__ = None  # type: ignore[assignment]


class Thing:
    kind = 1

    def __init__(self):
        self.scope = {"a": 1.5, "b": [1, 2], "c": {}, "d": {"x": 1, "y": 2}, "n": float("nan")}
        self.found = {"weight": torch.ones(2), "bias": None}
        self.value = 3
        self.reads = 0

    def read(self):
        self.reads += 1
        return self.value

    def method(self):
        return 1

    def note(self, unchanged):
        """Everything that there is to look at."""
        scope = self.scope
        unchanged.size(scope, len(scope))
        unchanged.size(vars(Thing), len(vars(Thing)))
        for key in ("a", "b", "c", "n"):
            unchanged.entry(scope, key, snapshot(scope[key]))
        unchanged.listing(scope, "d", list(scope["d"].items()))
        unchanged.entry(vars(Thing), "kind", 1)
        unchanged.named(self.found, [(name, id(x)) for name, x in self.found.items()])
        unchanged.absent(scope, "z")
        unchanged.type(self, Thing)
        unchanged.attribute(Thing.method, "__code__", Thing.method.__code__)
        unchanged.attribute(self.found["weight"], "dtype", torch.float32)
        unchanged.attribute(self.found["weight"], "shape", torch.Size([2]))
        unchanged.call(self.read, 3)


def reorder(mapping, key):
    mapping[key] = mapping.pop(key)


def swap_name(thing):
    del thing.scope["a"]
    thing.scope["z"] = 1.5


CHANGES = {
    "longer": lambda x: x.scope.update(z=1),
    "shorter": lambda x: x.scope.pop("n"),
    "another name": swap_name,
    "number": lambda x: x.scope.update(a=1.25),
    "other type": lambda x: x.scope.update(a="text"),
    "cannot be compared": lambda x: x.scope.update(a=torch.ones(3)),
    "breaks": lambda x: x.scope.update(a=Weird(None)),
    "lies": lambda x: x.scope.update(a=Weird(False)),
    "entry of a list": lambda x: x.scope["b"].__setitem__(0, 5),
    "entry where none was": lambda x: x.scope["c"].update(hook=1),
    "order": lambda x: reorder(x.scope["d"], "x"),
    "value in order": lambda x: x.scope["d"].update(y=3),
    "listing longer": lambda x: x.scope["d"].update(z=3),
    "listing shorter": lambda x: x.scope["d"].pop("y"),
    "listing of another type": lambda x: x.scope.update(d=collections.OrderedDict(x=1, y=2)),
    "tensor": lambda x: x.found.update(weight=torch.ones(2)),
    "no tensor any more": lambda x: x.found.update(weight=None),
    "other name of a tensor": lambda x: x.found.update(gain=x.found.pop("bias")),
    "order of tensors": lambda x: reorder(x.found, "weight"),
    "one tensor more": lambda x: x.found.update(more=None),
    "class": lambda x: setattr(x, "__class__", type("Other", (Thing,), {})),
    "dtype": lambda x: setattr(x.found["weight"], "data", torch.ones(2).double()),
    "shape": lambda x: setattr(x.found["weight"], "data", torch.ones(3)),
    "value": lambda x: setattr(x, "value", 4),
    "value that breaks": lambda x: setattr(x, "value", Weird(None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(unchanged, change):
    thing = Thing()
    thing.note(unchanged)
    assert unchanged.hold() and unchanged.hold()
    CHANGES[change](thing)
    assert not unchanged.hold()


def test_changes_of_a_class_and_of_code_are_seen(unchanged, monkeypatch):
    Thing().note(unchanged)
    with monkeypatch.context() as change:
        change.setattr(Thing, "kind", 2)
        assert not unchanged.hold()
    with monkeypatch.context() as change:
        change.setattr(Thing, "more", 2, raising=False)
        assert not unchanged.hold()
    with monkeypatch.context() as change:
        change.setattr(Thing.method, "__code__", (lambda self: 2).__code__)
        assert not unchanged.hold()
    assert unchanged.hold()


def test_equal_is_the_same(unchanged):
    thing = Thing()
    thing.note(unchanged)
    thing.scope["b"] = [1, 2]
    thing.scope["c"] = collections.OrderedDict()
    thing.scope["d"] = {"x": 1, "y": 2}
    thing.scope["a"] = 3 / 2
    assert unchanged.hold()
    assert thing.reads == 1


def test_what_cannot_be_read_has_changed(unchanged):
    unchanged.call(broken, None)
    assert not unchanged.hold()
    torch.ones(1)  # no exception is left behind


def test_an_attribute_that_is_gone_has_changed(unchanged):
    thing = types.SimpleNamespace(x=1)
    unchanged.attribute(thing, "x", 1)
    assert unchanged.hold()
    del thing.x
    assert not unchanged.hold()


def test_ordered_dictionaries_are_compared_in_their_order(unchanged):
    scope = {"hooks": collections.OrderedDict(a=1, b=2)}
    want = snapshot(scope["hooks"])
    assert type(want) is Ordered
    unchanged.entry(scope, "hooks", want)
    assert unchanged.hold()
    scope["hooks"].move_to_end("a")
    assert not unchanged.hold()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_noted_is_let_go(kind):
    unchanged, thing = KINDS[kind](), Thing()
    thing.note(unchanged)
    assert unchanged.hold()
    alive = weakref.ref(thing)
    del thing
    assert alive() is not None
    del unchanged
    gc.collect()
    assert alive() is None


def test_guards_use_the_compiled_one():
    from fmft_fast import _cpu

    assert guards.Unchanged is _cpu.Unchanged
