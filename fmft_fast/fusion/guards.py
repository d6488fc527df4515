"""What a plan depends on besides its arguments, and a quick test that it is all as it was.

From the field on, everything is walked that Python code can read without calling anything:
modules, closures, default arguments, attributes, and the global names in the code that ran. What
cannot be compared later is refused.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

from torch import Tensor, nn

from .effects import HOOKS
from .opened import Opened, OpenedObject
from .refusal import TORCH, Refusal
from .unchanged import CONTAINERS, PLAIN, Ordered, Unchanged, snapshot

# Of a module's dictionary, what no evaluation reads.
UNREAD = {
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_is_full_backward_hook",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_compiled_call_impl",
}
_TRUSTED = (
    "torch",
    "types",
    "math",
    "typing",
    "collections",
    "builtins",
    "operator",
    "__future__",
    "abc",
)


# Of a class, what decides what a call of its instances does.
_CALLS = set("forward __call__ __getattr__ __getattribute__ _call_impl _wrapped_call_impl".split())


def _is_numpy_function(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ufunc"


class Guards:
    """Everything that a field reads; true as long as nothing of it has changed.

    Args:
        codes: the code of the user's functions that ran, with their globals.
    """

    def __init__(self, codes: dict[CodeType, dict[str, Any]]) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self._ran, self._reached = codes, set[CodeType]()
        self._names = {name for code in codes for name in code.co_names}
        self._names |= {c for code in codes for c in code.co_consts if isinstance(c, str)}
        self._all = bool(self._names & {"getattr", "vars", "__dict__"})
        self._seen: dict[int, Any] = {}
        self._roots: set[int] = set()
        self._condition: Any = None  # of which object which attribute may change
        self._classes: dict[type, None] = {}
        self._things: list[Any] = []
        self._functions: dict[int, tuple[FunctionType, CodeType]] = {}
        self._checks: list[tuple[dict[str, Any], int, dict[str, Any]]] = []
        self._named: list[tuple[dict, list[tuple[str, int]]]] = []  # the tensors are held below
        self._tensors: list[Tensor] = []
        self._looks: list[tuple[Callable[[], Any], Any]] = []
        self._entries: list[tuple[Any, str, Any]] = []
        self._absent: list[tuple[dict[str, Any], str]] = []
        self._unchanged = self._alike = Unchanged()

    def walk(self, value: Any, name: str) -> None:
        """Note a value and what it leads to."""
        if isinstance(value, type):
            self._classes[value] = None
        if isinstance(value, (*PLAIN, type)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
            if id(value) not in self._roots:
                self._tensors.append(value)
        elif isinstance(value, ModuleType):
            self._namespace(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.walk(value.__func__, name)
            self.walk(value.__self__, name)
        elif isinstance(value, functools.partial):
            self.walk(value.func, name)
            for part in ("args", "keywords"):
                self._look(functools.partial(getattr, value, part), name)
        elif isinstance(value, property):
            self.walk(value.fget, name)
        elif isinstance(value, (staticmethod, classmethod)):
            self.walk(value.__func__, name)
        elif type(value) in CONTAINERS:
            for v in value.values() if isinstance(value, dict) else value:
                self.walk(v, name)
        elif _simple_object(value):
            self._object(value)
        elif not isinstance(value, BuiltinFunctionType) and not _is_numpy_function(value):
            raise Refusal(
                f"the field reads {name}, a {type(value).__name__}, whose changes go unnoticed",
                remedy="keep plain numbers, tensors, modules and functions there",
            )

    def root(self, field: Any, parts: tuple) -> None:
        """Walk the field itself, without holding it or the objects that it is made of.

        That these are the same is what makes a field the same one.
        """
        if isinstance(field, OpenedObject):
            self._condition = (id(field.owner), field.name)
            self.modules[id(field.twin)] = field.twin
        if isinstance(field, Opened):
            field = field.field
        self._roots = {id(field), *map(id, parts)}
        if isinstance(field, functools.partial):
            self.walk(field.args, "a partial argument")
            self.walk(field.keywords, "a partial argument")
            field = field.func
        if isinstance(field, MethodType):
            self.walk(field.__self__, "self")
            field = field.__func__
        if not isinstance(field, FunctionType):
            self.walk(field, type(field).__name__)
            return
        self._code(field.__code__)
        self._attributes(field)
        for name, cell in _cells(field):
            self.walk(cell.cell_contents, name)
        self.walk(field.__defaults__, "a default argument")
        self.walk(field.__kwdefaults__, "a default argument")

    def _function(self, f: FunctionType) -> None:
        if f.__code__.co_filename.startswith(TORCH):
            return
        self._functions[id(f)] = (f, f.__code__)
        self._attributes(f)
        if f.__code__ not in self._ran:
            return
        self._code(f.__code__)
        for name, cell in _cells(f):
            self._look(functools.partial(getattr, cell, "cell_contents"), name)
        for part in ("__defaults__", "__kwdefaults__"):
            if getattr(f, part) is not None:
                self._look(functools.partial(getattr, f, part), "a default argument")

    def _attributes(self, f: FunctionType) -> None:
        if f.__dict__ or self._all:
            self._scope(f.__dict__, list(f.__dict__), f.__name__)

    def _namespace(self, module: ModuleType) -> None:
        """Note what code may read of a file of the user's."""
        if module.__name__.partition(".")[0] in (*_TRUSTED, "numpy"):
            return
        scope = vars(module)
        for name in sorted(scope):
            kept = isinstance(scope[name], (*PLAIN, *CONTAINERS, Tensor, nn.Module))
            if name in self._names or (self._all and kept and not name.startswith("__")):
                self._read(scope, name, scope[name], f"{module.__name__}.{name}")
        if self._all:
            self._scope(scope, [], module.__name__)

    def _look(self, look: Callable[[], Any], name: str) -> None:
        value = look()
        self.walk(value, name)
        self._looks.append((look, snapshot(value)))

    def _code(self, code: CodeType) -> None:
        self._reached.add(code)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)

    def _object(self, value: Any, always: tuple[str, ...] = ()) -> None:
        """Note the attributes that code has read; of what derives from torch's layers, all."""
        self._classes[type(value)] = None
        if id(value) not in self._roots:
            self._things.append(value)
        scope = value.__dict__
        bases = [base for base in type(value).__mro__ if base is not nn.Module]
        whole = self._all or any(b.__module__.startswith("torch.nn.modules") for b in bases)
        unread = UNREAD if isinstance(value, nn.Module) else ()
        keys = [
            k for k in scope if k in always or ((whole or k in self._names) and k not in unread)
        ]
        keys = [k for k in keys if (id(value), k) != self._condition]
        self._scope(scope, keys, type(value).__name__)

    def _scope(self, scope: dict[str, Any], keys: list[str], shown: str) -> None:
        """Note some values of a dictionary, and its size: names that come can hide others."""
        for key in keys:
            if key not in HOOKS:
                self.walk(scope[key], f"{shown}.{key}")
        self._checks.append((scope, len(scope), {key: snapshot(scope[key]) for key in keys}))

    def _module(self, module: nn.Module) -> None:
        self.modules[id(module)] = module
        for kind in ("_parameters", "_buffers"):
            found = module.__dict__[kind]
            for tensor in found.values():
                if tensor is not None:
                    self.tensors[id(tensor)] = tensor
                    self._tensors.append(tensor)
            if found:
                self._named.append((found, [(name, id(x)) for name, x in found.items()]))
        self._object(module, ("training", "_modules", *HOOKS))

    def finish(self) -> Guards:
        """Note the global names and class attributes that were read; walking ends."""
        for code, scope in self._ran.items():
            self._globals(code, scope)
        self._class_attributes()
        for code in self._ran:
            if set(code.co_freevars) - {"__class__"} and code not in self._reached:
                raise Refusal(f"{code.co_name} closes over variables that cannot be seen")
        return self

    def release(self) -> Guards:
        """Forget what only walking needed, so that no more is held than is tested."""
        self._ran, self._reached = {}, set()
        self._seen, self._classes, self.modules, self.tensors = {}, {}, {}, {}
        self._absent = list({(id(s), name): (s, name) for s, name in self._absent}.values())
        self._entries = list({(id(e[0]), e[1]): e for e in self._entries}.values())
        self._tensors = list({id(tensor): tensor for tensor in self._tensors}.values())
        self._unchanged, self._alike = self._scopes(), Unchanged()
        for tensor in self._tensors:
            for name in ("dtype", "shape", "device"):
                self._alike.attribute(tensor, name, getattr(tensor, name))
        return self

    def apart_from(self, scope: dict[str, Any], parts: Sequence[Any]) -> Guards:
        """The same without what a dictionary says itself, and without holding some objects."""
        left_out = {id(scope), *map(id, parts)}
        guards = copy.copy(self)
        guards._checks = [check for check in self._checks if id(check[0]) not in left_out]
        guards._things = [thing for thing in self._things if id(thing) not in left_out]
        guards._tensors = [tensor for tensor in self._tensors if id(tensor) not in left_out]
        return guards.release()

    def _globals(self, code: CodeType, scope: dict[str, Any]) -> None:
        value: Any = None
        shown = ""
        for i in dis.get_instructions(code):
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                shown, value = i.argval, scope.get(i.argval)
                if i.argval in scope:
                    self._read(scope, i.argval, value, shown)
                else:
                    self._absent.append((scope, i.argval))
            elif i.opname in ("LOAD_ATTR", "LOAD_METHOD") and _has_names(value):
                held, shown = value, f"{shown}.{i.argval}"
                value = inspect.getattr_static(held, i.argval, None)
                if i.argval in vars(held):
                    self._read(vars(held), i.argval, value, shown)
            elif i.opname not in ("PUSH_NULL", "CACHE", "PRECALL", "EXTENDED_ARG"):
                value = None

    def _read(self, scope: Any, name: str, value: Any, shown: str) -> None:
        self.walk(value, shown)
        self._entries.append((scope, name, snapshot(value)))

    def _class_attributes(self) -> None:
        wanted = self._names | _CALLS
        done: set[type] = set()
        while todo := [cls for cls in self._classes if cls not in done]:
            done.update(todo)
            for base in {base: None for cls in todo for base in cls.__mro__}:
                scope: Any = vars(base)
                top = base.__module__.partition(".")[0]
                if top not in _TRUSTED:
                    for name in sorted(scope):
                        if name in wanted or (self._all and not name.startswith("_")):
                            self._read(scope, name, scope[name], f"{base.__name__}.{name}")
                elif top == "torch":
                    names = [n for n in scope if n in _CALLS or type(scope[n]) is property]
                    self._entries += [(scope, n, scope[n]) for n in sorted(names)]
                if top not in _TRUSTED or top == "torch":
                    self._scope(scope, [], base.__name__)

    def _scopes(self) -> Unchanged:
        """Everything but the tensors, for later."""
        found = Unchanged()
        for scope, size, wants in self._checks:
            found.size(scope, size)
            for key, want in wants.items():
                if type(want) is Ordered and want.kind is dict:
                    found.listing(scope, key, want.items)
                else:
                    found.entry(scope, key, want)
        for thing in self._things:
            found.type(thing, type(thing))
        for names, ids in self._named:
            found.named(names, ids)
        for entry in self._entries:
            found.entry(*entry)
        for scope, name in self._absent:
            found.absent(scope, name)
        for f, code in self._functions.values():
            found.attribute(f, "__code__", code)
        for look, want in self._looks:
            found.call(look, want)
        return found

    def hold(self) -> bool:
        """Whether everything is as it was."""
        return self._unchanged.hold() and self._alike.hold()

    def scopes_hold(self) -> bool:
        """Whether everything is as it was, apart from the tensors' dtypes, shapes and devices."""
        return self._unchanged.hold()

    @property
    def tensors_read(self) -> list[Tensor]:
        """The tensors that the field can read."""
        return list(self._tensors)


def _cells(f: FunctionType) -> list[tuple[str, Any]]:
    """What a function closes over, by name."""
    cells = zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
    return [(name, cell) for name, cell in cells if name != "__class__"]


def _has_names(value: Any) -> bool:
    """Whether attributes of a value are names of a file or class of the user's."""
    if isinstance(value, ModuleType):
        return value is not math and value.__name__.partition(".")[0] != "torch"
    return isinstance(value, type) and value.__module__.partition(".")[0] not in _TRUSTED


def _simple_object(value: Any) -> bool:
    """Whether an object is what its dictionary says."""
    cls = type(value)
    if cls is SimpleNamespace:
        return True
    top = cls.__module__.partition(".")[0]
    plain = cls.__flags__ & (1 << 9) and top not in ("torch", "numpy")  # a class made in Python
    slots = any("__slots__" in vars(base) for base in cls.__mro__)
    builtin = any(base in (dict, list, tuple, set) for base in cls.__mro__)
    return bool(plain) and hasattr(value, "__dict__") and not slots and not builtin
