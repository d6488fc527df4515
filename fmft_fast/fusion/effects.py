"""Keep a trace from having effects: refuse code before it runs, not after.

While a field is traced, a profile function sees every call before it is made. A Python function of
the user's is scanned for instructions that store anywhere but in its own variables; a builtin or a
function of torch has to be one that is known to compute and nothing else.
"""

from __future__ import annotations

import builtins
import gc
import inspect
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from .refusal import OWN, TORCH, Refusal, is_library, source_line, user_line
from .scan import REMEDY, scan

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Files of torch that only compute, and what of them may be called from a field.
_FILES = ("functional.py", "_tensor.py", "overrides.py", "_VF.py", "_jit_internal.py")
_PATHS = {TORCH + name for name in _FILES} | {os.path.join(TORCH, "nn", "functional.py")}
_MODULES = os.path.join(TORCH, "nn", "modules") + os.sep
_MODULE_METHODS = {
    "_wrapped_call_impl",
    "_call_impl",
    "__getattr__",
    "__iter__",
    "__len__",
    "__getitem__",
    "__contains__",
    "_get_abs_string_index",
    "keys",
    "values",
    "items",
    "parameters",
    "named_parameters",
    "buffers",
    "named_buffers",
    "modules",
    "named_modules",
    "children",
    "named_children",
    "_named_members",
    "<genexpr>",
    "<listcomp>",
    "forward",
}
# What evaluates a parametrized tensor; a cache of such tensors is no business of a trace.
_PARAMETRIZED = {"get_parametrized", "forward", "<genexpr>"}
_CODES = {
    torch.is_tensor.__code__,
    parametrizations._Orthogonal.forward.__code__,
    parametrizations._WeightNorm.forward.__code__,
}
_PLAIN_BUILTINS = {
    getattr(builtins, name)
    for name in (
        "abs all any callable divmod getattr hasattr id isinstance issubclass iter len max min "
        "next pow round sorted sum"
    ).split()
}
_PLAIN_METHODS = {
    str: None,
    int: None,
    float: None,
    tuple: None,
    bytes: None,
    frozenset: None,
    list: {"index", "count", "copy"},
    dict: {"get", "keys", "values", "items", "copy"},
    torch.Size: None,
}
_TORCH_NAMESPACES = {
    torch._C._nn,  # type: ignore[attr-defined]
    torch._C._linalg,  # type: ignore[attr-defined]
    torch._C._special,  # type: ignore[attr-defined]
    torch._C._fft,  # type: ignore[attr-defined]
}
_FUNCTIONS: Any = torch._C._VariableFunctions  # type: ignore[attr-defined]


def _check_callables(frame: FrameType) -> None:
    """Refuse objects in reach of a function whose calls would not be seen."""
    code = frame.f_code
    names = set(code.co_names)
    scope = frame.f_globals
    todo = [(n, scope[n], 0) for n in sorted(names & scope.keys())]
    todo += [(n, v, 0) for n, v in frame.f_locals.items()]
    seen: set[int] = set()
    while todo:
        name, value, depth = todo.pop()
        if id(value) in seen or isinstance(value, torch.Tensor):
            continue
        seen.add(id(value))
        if callable(value) and not _is_seen(value):
            raise Refusal(
                f"the field reads {name}, a {type(value).__name__}, whose calls cannot be watched",
                source_line(code.co_filename, code.co_firstlineno),
                "use plain functions and modules",
            )
        if hasattr(type(value), "__next__"):
            raise Refusal(
                f"the field reads {name}, an iterator, which changes when it is read",
                source_line(code.co_filename, code.co_firstlineno),
                "use a list or tuple",
            )
        if depth < 4 and not _is_trusted_module(value):
            for n in names & _attributes(value):
                todo.append((n, inspect.getattr_static(value, n, None), depth + 1))
        items: Any = value.values() if type(value) is dict else value
        if type(value) in (list, tuple, dict) and len(items) < 1000 and depth < 4:
            todo += [(name, v, depth + 1) for v in items]


def _attributes(value: Any) -> set[str]:
    if isinstance(value, (type, ModuleType)):
        return set(vars(value))
    own = vars(value).keys() if hasattr(value, "__dict__") else ()
    return {*own, *(n for base in type(value).__mro__[:-1] for n in vars(base))} - _DERIVED


_DERIVED = set(dir(nn.Module))


def _is_trusted_module(value: Any) -> bool:
    return isinstance(value, ModuleType) and (
        value is math or value.__name__.partition(".")[0] == "torch"
    )


def _is_seen(value: Any) -> bool:
    """Whether a call of this is one that the profile function sees, or known to be harmless."""
    if isinstance(value, (MethodType, staticmethod, classmethod)):
        return isinstance(value.__func__, FunctionType)
    if isinstance(value, (FunctionType, type, nn.Module)):
        return True
    if isinstance(value, BuiltinFunctionType):
        return _computes(value) or isinstance(value.__self__, (type(None), ModuleType))
    if type(value).__module__ == "numpy" and type(value).__name__ == "ufunc":
        return True
    # Methods of builtin types in their class, and objects with a __call__ in Python.
    return isinstance(value, (MethodDescriptorType, WrapperDescriptorType)) or isinstance(
        inspect.getattr_static(type(value), "__call__", None), FunctionType
    )


class Watch:
    """Sees every call during a trace.

    Attributes:
        codes: the code of the user's functions that ran, with their globals.
        modules: the modules that were called.
        paused: set while the tracer itself calls torch.
    """

    def __init__(self) -> None:
        self.codes: dict[CodeType, dict[str, Any]] = {}
        self.modules: dict[int, nn.Module] = {}
        self.fresh: dict[int, list] = {}
        self.paused = False
        self.refusal: Refusal | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the calls of this block; it must not be left by a swallowed refusal."""
        if sys.getprofile() is not None:
            raise Refusal("a profiler is at work, so that calls cannot be watched")
        collects = gc.isenabled()
        gc.disable()  # a callback of the collector or a finalizer is no call of the field's
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            if collects:
                gc.enable()
        if self.refusal is not None:
            raise self.refusal

    def _see(self, frame: FrameType, event: str, arg: Any) -> None:
        if self.paused or event not in ("call", "c_call"):
            return
        try:
            if event == "call":
                self._python(frame)
            else:
                self._builtin(frame, arg)
        except Refusal as refusal:
            self.refusal = self.refusal or refusal
            raise

    def _python(self, frame: FrameType) -> None:
        code, caller = frame.f_code, frame.f_back
        file = code.co_filename
        by = caller.f_code.co_filename if caller else ""
        if file.startswith(OWN):
            return
        if file.endswith(f"{os.sep}contextlib.py") and by.startswith((TORCH, *OWN, file)):
            return  # torch's own way into the tracer
        if not file.startswith(TORCH):
            if code not in self.codes:
                try:
                    scan(code)
                    _check_callables(frame)
                except Refusal as refusal:
                    found = refusal.result
                    if is_library(file):
                        raise Refusal(found.reason, user_line(caller), found.remedy) from None
                    raise
                self.codes[code] = frame.f_globals
            return
        if file.startswith(_MODULES):
            if code.co_name == "_call_impl":
                module = frame.f_locals["self"]
                check_module(module, user_line(caller))
                self.modules[id(module)] = module
            if code.co_name in _MODULE_METHODS or by.startswith(TORCH):
                return
        elif file in _PATHS or code in _CODES:
            return
        elif file == parametrize.__file__ and code.co_name in _PARAMETRIZED:
            return
        raise Refusal(
            f"the field calls {code.co_name} of torch{_dotted(file)}, which may do more than "
            "compute a value",
            user_line(caller),
            REMEDY,
        )

    def _builtin(self, frame: FrameType, called: Any) -> None:
        if frame.f_code.co_filename.startswith((TORCH, *OWN)):
            return
        if frame.f_code.co_filename.endswith(f"{os.sep}contextlib.py"):
            return
        if getattr(called, "__name__", "") in ("append", "extend") and self._is_fresh(called):
            return
        if not _computes(called):
            raise Refusal(
                f"the field calls {getattr(called, '__qualname__', called)}, which may have an "
                "effect",
                user_line(frame),
                REMEDY,
            )

    def _is_fresh(self, method: Any) -> bool:
        """Whether a list is in the hands of running functions only, and of nothing that stays."""
        owner = method.__self__
        if type(owner) is not list:
            return False
        if id(owner) not in self.fresh:
            others = [
                r
                for r in gc.get_referrers(owner)
                if r is not method and r is not self.fresh and not isinstance(r, FrameType)
            ]
            if others:
                return False
            self.fresh[id(owner)] = owner
        return True


def check_module(module: nn.Module, where: str | None = None) -> None:
    """Refuse what is no plain module, before anything of it runs."""
    name, home = type(module).__name__, type(module).__module__
    if home.startswith(("torch.jit", "torch._dynamo", "torch.distributed", "torch.ao", "torch.fx")):
        raise Refusal(
            f"{name} is compiled, distributed or quantised", where, "pass the module inside"
        )
    if isinstance(module, (nn.DataParallel, torch.jit.ScriptModule)):
        raise Refusal(f"{name} is no plain module", where, "pass the module inside")
    if any(module.__dict__.get(hooks) for hooks in HOOKS):
        raise Refusal(
            f"{name} has hooks", where, "remove them (weight_norm: fuse it into the weight)"
        )
    if "forward" in module.__dict__ or module.__dict__.get("_compiled_call_impl"):
        raise Refusal(f"forward of {name} was replaced or compiled", where)


def _dotted(file: str) -> str:
    name = file.removeprefix(TORCH).removesuffix(".py").replace(os.sep, ".")
    return "" if name == "__init__" else "." + name


def _computes(called: Any) -> bool:
    """Whether a builtin is known to have no effect."""
    if called in _PLAIN_BUILTINS:
        return True
    owner = getattr(called, "__self__", None)
    name = getattr(called, "__name__", "")
    if isinstance(owner, torch.Tensor):
        return True  # the tracer sees it
    if owner is None or isinstance(owner, type):
        return isinstance(called, BuiltinFunctionType) and getattr(_FUNCTIONS, name, None) == called
    if isinstance(owner, ModuleType):
        return owner is math or owner in _TORCH_NAMESPACES
    if type(owner) in _PLAIN_METHODS:
        names = _PLAIN_METHODS[type(owner)]
        return names is None or name in names
    return False
