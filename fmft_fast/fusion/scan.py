"""Which instructions of a function may have an effect outside of its own variables."""

from __future__ import annotations

import dis
from types import CodeType
from typing import Any

from .refusal import Refusal, source_line

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
_MUTATORS = set(
    "append extend insert pop popitem remove clear update setdefault add discard sort reverse "
    "appendleft popleft write put send throw seek".split()
)
_MUTATING_DUNDERS = set(
    "__setattr__ __delattr__ __setitem__ __delitem__ __iadd__ __ior__ __setstate__".split()
)
_ACTING_BUILTINS = set(
    "print setattr delattr exec eval compile open input globals locals vars __import__".split()
)

REMEDY = (
    "compute only, and count or log outside of the field; a field with effects is called as written"
)


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
        problem = _STORES.get(i.opname) or _passes_on(i)
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
            raise Refusal(f"the field {problem}", where, REMEDY)
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


def _passes_on(i: dis.Instruction) -> str | None:
    """What is wrong with a load of something with an effect that is not called on the spot.

    A builtin that another builtin calls (`map(log.append, ...)`) is not seen when it is called.
    """
    if i.opname in ("LOAD_ATTR", "LOAD_METHOD") and i.argval in _MUTATING_DUNDERS:
        return f"uses {i.argval}"
    if i.opname == "LOAD_ATTR" and i.argval in _MUTATORS and "NULL" not in i.argrepr:
        return f"passes on {i.argval}"
    if i.opname == "LOAD_GLOBAL" and "NULL" not in i.argrepr and i.argval in _ACTING_BUILTINS:
        return f"uses {i.argval}"
    return None


def _names(argval: Any) -> tuple[str, ...]:
    return argval if isinstance(argval, tuple) else (argval,)
