"""What a plan depends on besides its arguments, and a quick test that it is all as it was.

From the field on, everything is walked that Python code can read without calling anything:
modules, closures, default arguments, attributes, and the global names in the code that ran. What
cannot be compared later is refused.
"""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from operator import itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .refusal import TORCH, Refusal

# Of a module's dictionary, what no evaluation reads.
_UNREAD = {
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
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size,
    torch.memory_format, torch.layout, enum.Enum, range, slice, type(Ellipsis),
)  # fmt: skip
_TRUSTED = ("torch", "math", "typing", "collections", "builtins", "operator", "__future__", "abc")


class _Same:
    """Equal to one object only: for what compares by value."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return other is self.value

    __hash__ = None  # type: ignore[assignment]


def _is_numpy_function(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ufunc"


def snapshot(value: Any) -> Any:
    """What a value is compared with later: copies of containers, the objects in them themselves."""
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(map(snapshot, value))
    if isinstance(value, (set, frozenset)):
        return set(value)
    if isinstance(value, _PLAIN) or type(value).__eq__ is object.__eq__:
        return value
    return _Same(value)


class Guards:
    """Everything that was walked; true as long as nothing of it has changed."""

    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self.codes: set[CodeType] = set()
        self.classes: dict[type, None] = {}
        self._seen: dict[int, Any] = {}
        self._unknown: list[tuple[str, Any]] = []
        self._objects: list[tuple[dict[str, Any], str]] = []
        self._checks: list[tuple[dict[str, Any], int, Callable, Any]] = []
        self._parameters: list[tuple[dict, tuple]] = []
        self._looks: list[tuple[Callable[[], Any], Any]] = []
        self._names: list[tuple[Any, str, Any]] = []

    # Walking.

    def walk(self, value: Any, name: str = "the field") -> None:
        """Note a value and what it leads to."""
        if isinstance(value, _PLAIN) or isinstance(value, (type, ModuleType)):
            if isinstance(value, type):
                self.classes[value] = None
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
            self._parameters.append(({0: value}, (_tensor(0, value),)))
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, FunctionType):
            self.function(value)
        elif isinstance(value, MethodType):
            self.walk(value.__func__)
            self.walk(value.__self__)
        elif isinstance(value, functools.partial):
            self.walk(value.func)
            self.walk(list(value.args))
            self.walk(dict(value.keywords))
        elif isinstance(value, dict):
            for k, v in value.items():
                self.walk(v, f"{name}[{k!r}]")
        elif isinstance(value, (list, tuple, set, frozenset)):
            for v in value:
                self.walk(v, f"an entry of {name}")
        elif isinstance(value, (BuiltinFunctionType, staticmethod, classmethod, property)):
            for f in (getattr(value, "fget", None), getattr(value, "__func__", None)):
                if f is not None:
                    self.walk(f)
        elif _is_numpy_function(value):
            pass
        elif _simple_object(value):
            self.classes[type(value)] = None
            self._objects.append((value.__dict__, name))
            for k, v in value.__dict__.items():
                self.walk(v, k)
        else:
            self._unknown.append((name, value))

    def function(self, f: FunctionType) -> None:
        """Note a function: its code, closure and defaults."""
        if f.__code__.co_filename.startswith(TORCH):
            return
        self._codes(f.__code__)
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            if name == "__class__":
                continue
            try:
                contents = cell.cell_contents
            except ValueError:
                raise Refusal(f"the field closes over {name}, which has no value yet") from None
            self.walk(contents, name)
            self._looks.append((functools.partial(getattr, cell, "cell_contents"), contents))
        for part in ("__defaults__", "__kwdefaults__"):
            if (value := getattr(f, part)) is not None:
                self.walk(value, "a default argument")
                self._looks.append((functools.partial(getattr, f, part), value))

    def root(self, f: FunctionType) -> None:
        """Note the field itself, a function, without holding it or what it closes over.

        That these are the same is what makes a field the same one.
        """
        self._codes(f.__code__)
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            if name != "__class__":
                self.walk(cell.cell_contents, name)
        self.walk(f.__defaults__, "a default argument")
        self.walk(f.__kwdefaults__, "a default argument")

    def _codes(self, code: CodeType) -> None:
        self.codes.add(code)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._codes(constant)

    def _module(self, module: nn.Module) -> None:
        self.modules[id(module)] = module
        self.classes[type(module)] = None
        entries = []
        for kind in ("_parameters", "_buffers"):
            for name, tensor in module.__dict__[kind].items():
                if tensor is not None:
                    self.tensors[id(tensor)] = tensor
                    self._seen[id(tensor)] = tensor
            found = module.__dict__[kind]
            entries.append((found, tuple(_tensor(k, v) for k, v in found.items())))
        self._parameters += [entry for entry in entries if entry[1]]
        self._objects.append((module.__dict__, type(module).__name__))
        for name, value in module.__dict__.items():
            if name not in _UNREAD and name not in _HOOKS:
                self.walk(value, f"{type(module).__name__}.{name}")

    # After the trace: what the code that ran could read.

    def code_ran(self, codes: dict[CodeType, dict[str, Any]]) -> None:
        """Note the global names and class attributes that functions read."""
        names: set[str] = set()
        done: set[CodeType] = set()
        while todo := [code for code in codes if code not in done]:
            for code in todo:
                done.add(code)
                names.update(code.co_names)
                self._globals(code, codes[code])
        for code in codes:
            if set(code.co_freevars) - {"__class__"} and code not in self.codes:
                self._class_functions(names)
                if code not in self.codes:
                    raise Refusal(f"{code.co_name} closes over variables that cannot be seen")
        self._class_functions(names)
        for name, value in self._unknown:
            if name.rpartition(".")[2].partition("[")[0] in names or "." not in name:
                raise Refusal(
                    f"the field reads {name}, a {type(value).__name__}, whose changes go unnoticed",
                    remedy="keep plain numbers, tensors, modules and functions there",
                )

    def _globals(self, code: CodeType, scope: dict[str, Any]) -> None:
        value: Any = None
        owner = ""
        for i in dis.get_instructions(code):
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name, owner = i.argval, i.argval
                if name not in scope:
                    value = None
                    continue
                value = scope[name]
                self._read(scope, name, value)
            elif i.opname in ("LOAD_ATTR", "LOAD_METHOD") and _has_names(value):
                held = value
                owner = f"{owner}.{i.argval}"
                value = inspect.getattr_static(held, i.argval, None)
                if i.argval in vars(held):
                    self._read(vars(held), i.argval, value, owner)
            elif i.opname not in ("PUSH_NULL", "CACHE", "PRECALL", "EXTENDED_ARG", "RESUME"):
                value = None

    def _read(self, scope: Any, name: str, value: Any, shown: str | None = None) -> None:
        self.walk(value, shown or name)
        self._names.append((scope, name, snapshot(value)))

    def _class_functions(self, names: Iterable[str]) -> None:
        wanted = {*names, "forward", "__call__", "__getattr__", "__getattribute__"}
        done: set[type] = set()
        while todo := [cls for cls in self.classes if cls not in done]:
            for cls in todo:
                done.add(cls)
                for base in cls.__mro__:
                    top = base.__module__.partition(".")[0]
                    if base is nn.Module or top in _TRUSTED and top != "torch":
                        continue
                    found = wanted if top != "torch" else {"forward"}
                    for name in found & vars(base).keys():
                        value = vars(base)[name]
                        if top != "torch":
                            self.walk(value, name)
                        self._names.append((vars(base), name, snapshot(value)))

    # Testing.

    def seal(self) -> Guards:
        """Make the test ready."""
        unknown = {id(value) for _, value in self._unknown}
        for scope, _ in self._objects:
            keys = [k for k, v in scope.items() if k not in _UNREAD and id(v) not in unknown]
            if "_modules" in scope:
                scope_keys = [k for k in keys if scope[k] is not None or k not in _UNREAD]
                keys = scope_keys
            if len(keys) > 1:
                get = itemgetter(*keys)
            else:
                get = _one(keys[0]) if keys else _nothing
            want = (
                tuple(snapshot(scope[k]) for k in keys)
                if len(keys) > 1
                else (snapshot(scope[keys[0]]) if keys else None)
            )
            self._checks.append((scope, len(scope), get, want))
        known: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        for scope, name, want in self._names:
            known[id(scope), name] = (scope, name, want)
        self._names = list(known.values())
        self._functions = [
            (f, f.__code__)
            for f in self._seen.values()
            if isinstance(f, FunctionType) and not f.__code__.co_filename.startswith(TORCH)
        ]
        self._values = [(look, snapshot(value)) for look, value in self._looks]
        self._seen.clear()
        self._looks.clear()
        self._objects.clear()
        self.modules, self.tensors = {}, {}
        return self

    def hold(self) -> bool:
        """Whether everything is as it was."""
        try:
            for scope, size, get, want in self._checks:
                if len(scope) != size or want != get(scope):
                    return False
            for found, entries in self._parameters:
                if len(found) != len(entries):
                    return False
                for name, tensor, dtype, shape, device in entries:
                    now = found[name]
                    if now is not tensor:
                        return False
                    if tensor is not None and (
                        now.dtype is not dtype or now.shape != shape or now.device != device
                    ):
                        return False
            for scope, name, want in self._names:
                if want is not (now := scope[name]) and want != now:
                    return False
            for f, code in self._functions:
                if f.__code__ is not code:
                    return False
            for look, want in self._values:
                if want is not (now := look()) and want != now:
                    return False
        except Exception:  # a comparison that fails is a change as well
            return False
        return True


def _tensor(name: Any, tensor: Tensor | None) -> tuple:
    if tensor is None:
        return name, None, None, None, None
    return name, tensor, tensor.dtype, tensor.shape, tensor.device


def _one(key: str) -> Callable:
    return itemgetter(key)


def _nothing(scope: Any) -> None:
    return None


def _has_names(value: Any) -> bool:
    """Whether attributes of a value are names of a file or class of the user's."""
    if isinstance(value, ModuleType):
        return value is not math and value.__name__.partition(".")[0] != "torch"
    return isinstance(value, type) and value.__module__.partition(".")[0] not in _TRUSTED


def _simple_object(value: Any) -> bool:
    """Whether an object is what its dictionary says."""
    cls = type(value)
    top = cls.__module__.partition(".")[0]
    plain = cls.__flags__ & (1 << 9) and top not in ("torch", "numpy")  # a class made in Python
    slots = any("__slots__" in vars(base) for base in cls.__mro__)
    builtin = any(base in (dict, list, tuple, set) for base in cls.__mro__)
    return bool(plain) and hasattr(value, "__dict__") and not slots and not builtin
