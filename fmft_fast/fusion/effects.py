"""Keep a trace from having effects: refuse code before it runs, not after.

While a field is traced, a profile function sees every call before it is made. A Python function of
the user's is scanned for instructions that store anywhere but in its own variables; a builtin or a
function of torch has to be one that is known to compute and nothing else.
"""

from __future__ import annotations

import builtins
import dis
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import nn

from .refusal import OWN, TORCH, Refusal, source_line, user_line

_STORES = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global variable",
    "DELETE_GLOBAL": "deletes a global variable",
    "STORE_NAME": "sets a global variable",
    "STORE_SUBSCR": "writes into a container or tensor",
    "STORE_SLICE": "writes into a container or tensor",
    "DELETE_SUBSCR": "deletes from a container",
    "IMPORT_NAME": "imports a module",
    "PRINT_EXPR": "prints",
    "YIELD_FROM": "is a coroutine or delegates to a generator",
    "GET_AWAITABLE": "is a coroutine",
    "SETUP_FINALLY": "has a try or with statement",
    "SETUP_WITH": "has a try or with statement",
    "BEFORE_WITH": "has a with statement",
    "LOAD_SPECIAL": "has a with statement",
    "PUSH_EXC_INFO": "has a try or with statement",
}
_LOADS = (
    "LOAD_ATTR",
    "LOAD_GLOBAL",
    "LOAD_DEREF",
    "LOAD_NAME",
    "LOAD_CLASSDEREF",
    "LOAD_FROM_DICT_OR_DEREF",
    "BINARY_SUBSCR",
    "FOR_ITER",
    "UNPACK_SEQUENCE",
)
_REMEDY = (
    "compute only, and count or log outside of the field; a field with effects is called as written"
)

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
    "<genexpr>",
    "<listcomp>",
    "forward",
}
# nn.Module.__getattr__ serves a parametrized weight by a property, which may be anything.
_PLAIN_BUILTINS = {
    getattr(builtins, name)
    for name in (
        "abs all any callable divmod getattr hasattr id isinstance issubclass iter len max min next "
        "pow round sorted sum"
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
    torch._C._nn,
    torch._C._linalg,  # type: ignore[attr-defined]
    torch._C._special,  # type: ignore[attr-defined]
    torch._C._fft,  # type: ignore[attr-defined]
}
_VARIABLE_NAMES = set(dir(torch._C._VariableFunctions))


def scan(code: CodeType) -> None:
    """Refuse a function whose instructions may have an effect outside of its own variables."""
    before: dict[str, set[str]] = {}
    updated: list[tuple[str, int]] = []
    line, previous = code.co_firstlineno, ""
    pending = False
    for i in dis.get_instructions(code):
        if i.starts_line is not None:
            number = getattr(i, "line_number", None) or i.starts_line
            line = line if number is True else number
        problem = _STORES.get(i.opname)
        if i.opname in ("STORE_DEREF", "DELETE_DEREF") and i.argval in code.co_freevars:
            problem = f"sets {i.argval} of the enclosing function"
        if pending:
            if not i.opname.startswith("STORE_FAST"):
                problem = "updates something in place"
            for name in _names(i.argval):
                updated.append((name, line))
            pending = False
        if problem:
            where = source_line(code.co_filename, line)
            raise Refusal(f"the field {problem}", where, _REMEDY)
        if i.opname.startswith("STORE_FAST"):
            for name in _names(i.argval):
                before.setdefault(name, set()).add(previous)
        pending = i.opname.startswith("INPLACE_") or (
            i.opname == "BINARY_OP" and i.argrepr.endswith("=")
        )
        previous = i.opname
    for name, line in updated:
        if before.get(name, set()) & set(_LOADS):
            raise Refusal(
                f"the field updates {name} in place, which belongs to someone else",
                source_line(code.co_filename, line),
                f"write {name} = {name} + ... instead",
            )


def _names(argval: Any) -> tuple[str, ...]:
    return argval if isinstance(argval, tuple) else (argval,)


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
        self.paused = False
        self.refusal: Refusal | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the calls of this block; it must not be left by a swallowed refusal."""
        if sys.getprofile() is not None:
            raise Refusal("a profiler is at work, so that calls cannot be watched")
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
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
        if file.endswith(f"{os.sep}contextlib.py") and by.startswith((TORCH, OWN, file)):
            return  # torch's own way into the tracer
        if not file.startswith(TORCH):
            if code not in self.codes:
                scan(code)
                self.codes[code] = frame.f_globals
            return
        if file.startswith(_MODULES):
            if code.co_name == "_call_impl":
                module = frame.f_locals["self"]
                self.modules[id(module)] = module
            if code.co_name in _MODULE_METHODS or by.startswith(TORCH):
                return
        elif file in _PATHS:
            return
        raise Refusal(
            f"the field calls {code.co_name} of torch{_dotted(file)}, which may do more than "
            "compute a value",
            user_line(caller),
            _REMEDY,
        )

    def _builtin(self, frame: FrameType, called: Any) -> None:
        if frame.f_code.co_filename.startswith((TORCH, OWN)):
            return
        if frame.f_code.co_filename.endswith(f"{os.sep}contextlib.py"):
            return
        if not _computes(called):
            raise Refusal(
                f"the field calls {getattr(called, '__qualname__', called)}, which may have an "
                "effect",
                user_line(frame),
                _REMEDY,
            )


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
        return (
            isinstance(called, BuiltinFunctionType)
            and name in _VARIABLE_NAMES
            and getattr(torch._C._VariableFunctions, name, None) == called
        )
    if isinstance(owner, ModuleType):
        return owner is math or owner in _TORCH_NAMESPACES
    if type(owner) in _PLAIN_METHODS:
        names = _PLAIN_METHODS[type(owner)]
        return names is None or name in names
    return False
