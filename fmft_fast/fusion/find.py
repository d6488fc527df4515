"""`find_plan`: the plan of a field from the cache, or from a trace."""

from __future__ import annotations

import functools
import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from ..ops.contract import is_traced
from ..ops.layout import is_plain
from .effects import Watch, check_module
from .guards import UNREAD, Guards
from .opened import Opened, OpenedObject
from .plan import BATCH_MATTERS, Plan, confirm, make_plan
from .refusal import OWN, TORCH, NotFusable, Refusal, source_line
from .unchanged import CONTAINERS, snapshot

_LIMIT = 32  # results kept per field or code: an ensemble's members may take turns
_FIELDS = 512  # with results: what a field holds that holds the field itself goes with the oldest
_SEEN = 1024  # batch sizes remembered per result
_PATIENCE = 64  # traces of a field, none of which was used again
_TRUST = 32  # calls for which a field that was not fusable is taken to be so still
_cache: dict[Any, list[_Entry]] = {}
_traces: dict[Any, int] = {}


class _Entry:
    """A result, for which fields and arguments it holds, and what it depends on."""

    __slots__ = (
        "parts", "about", "rest", "guards", "result", "seen", "refused", "used", "notes", "trust",
        "training",
    )  # fmt: skip

    def __init__(self, parts: list[Any], about: tuple, rest: Any, guards: Guards, result: Any):
        self.parts, self.about, self.rest = parts, about, rest
        self.guards, self.result = guards, result
        self.trust = _TRUST if isinstance(result, NotFusable) else 0
        self.training = _training([ref() for ref in parts])
        self.seen: set[tuple[int, ...]] = set()
        self.refused: set[tuple[int, ...]] = set()
        self.used = False
        self.notes: dict[Any, Any] = {}

    def is_of(self, parts: tuple, rest: Any) -> bool:
        """Whether a field is the same one."""
        if len(self.parts) != len(parts):
            return False
        for i, ref in enumerate(self.parts):
            if ref() is not parts[i]:
                return False
        return self.rest == rest

    def matches(self, parts: tuple, about: tuple, rest: Any) -> bool:
        """Whether a call asks for this."""
        return self.about == about and self.is_of(parts, rest) and self.guards.hold()

    def is_refused_still(self) -> bool:
        """Whether a call need not look whether it can be fused by now; if not, it has to."""
        if not self.trust:
            return False
        self.trust -= 1
        return bool(self.trust) and self.training == _training([ref() for ref in self.parts])


def find_plan(
    field: Callable, y0: Tensor, cond: Tensor | None = None, trusting: bool = False
) -> Plan | NotFusable:
    """The network of a field for states like y0, or why there is none.

    The field is never called in a way that anyone could notice. The result is kept until something
    that the field reads has changed.

    Args:
        field: `field(t, x)` or `field(t, x, cond)`.
        y0: [*lead, state] state.
        cond: the condition, if there is one.
        trusting: whether a field without a network counts as one for some calls, as long as it is
            not switched between training and evaluation, even if what it reads has changed. To
            look at all of a large one would take as long as some of its layers.
    """
    if (refusal := _surroundings(y0, cond)) is not None:
        return refusal
    key, parts, rest = _identity(field)
    about = _about(y0, cond)
    entries = _cache.get(key, ())
    for entry in entries:
        asked = trusting and entry.trust and entry.about == about and entry.is_of(parts, rest)
        if asked and entry.is_refused_still():
            return entry.result
        if entry.matches(parts, about, rest):
            result = entry.result
            if not entry.used:
                entry.used, _traces[key] = True, 0
            entry.trust = _TRUST if isinstance(result, NotFusable) else 0
            if y0.shape[:-1] in entry.seen or _admit(entry, field, y0, cond):
                return result
            return NotFusable(*BATCH_MATTERS)
    return _find(field, y0, cond, key, parts, rest, about)


def _training(parts: Sequence[Any]) -> list[Any]:
    """Which modules among the parts of a field are being trained, as dropout is then at work."""
    return [getattr(part, "training", None) for part in parts if isinstance(part, nn.Module)]


def undisturbed() -> bool:
    """Whether nothing is at work around the call."""
    return not (
        is_traced()
        or torch._C._len_torch_function_stack()
        or torch.is_autocast_enabled("cpu")
        or hooks_on_all_modules()
    )


def noted(field: Callable) -> list[_Entry]:
    """The kept plans of this very field with notes.

    Before one is used `undisturbed` has to be asked, `Guards.scopes_hold`, and whether the tensors
    that the guards name are alike.
    """
    name, parts, rest = _identity(field)
    return [e for e in _cache.get(name, ()) if e.notes and e.is_of(parts, rest)]


def place_of_notes(field: Callable, plan: Plan | NotFusable) -> _Entry | None:
    """The place for notes that last as long as a plan of this very field, or its refusal."""
    name, parts, rest = _identity(field)
    for entry in _cache.get(name, ()):
        if entry.result is plan and entry.is_of(parts, rest):
            return entry
    return None


def _surroundings(y0: Tensor, cond: Tensor | None) -> NotFusable | None:
    """What rules fusion out whatever the field is."""
    if is_traced() or (torch._C._len_torch_function_stack() and not _harmless_modes()):
        return NotFusable("torch.compile, a torch mode or a functorch transform is at work")
    if type(y0) is not Tensor and type(y0) is not nn.Parameter:
        return NotFusable(f"the state is a {type(y0).__name__}, not a plain tensor")
    if y0.dtype is not torch.float32 and y0.dtype is not torch.float64:
        return NotFusable(
            f"the state has the dtype {y0.dtype}", remedy="use float32 or float64 states"
        )
    if y0.layout is not torch.strided or y0.is_meta or not 0 < y0.ndim <= 5 or not y0.numel():
        return NotFusable(f"the state has the shape {list(y0.shape)}, or is no plain tensor")
    if cond is not None and type(cond) is not Tensor and type(cond) is not nn.Parameter:
        return NotFusable(f"the condition is a {type(cond).__name__}, not a plain tensor")
    if not is_plain(y0) or (cond is not None and not is_plain(cond)):
        return NotFusable(
            "the state or the condition is a lazily negated view, or zeros without memory",
            remedy="clone it",
        )
    if torch.is_autocast_enabled(y0.device.type):
        return NotFusable("autocast is enabled", remedy="leave autocast around the solve")
    if hooks_on_all_modules():
        return NotFusable("hooks on all modules are registered (torch.nn.modules.module)")
    return None


def hooks_on_all_modules() -> bool:
    """Whether there are hooks that every module runs when it is called."""
    return bool(
        torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_hooks_always_called
        or torch_module._global_forward_hooks_with_kwargs
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    )


def _harmless_modes() -> bool:
    modes = torch.overrides._get_current_function_mode_stack()
    return all(type(m).__name__ == "DeviceContext" for m in modes)


def _about(y0: Tensor, cond: Tensor | None) -> tuple:
    device = torch.get_default_device() if torch._C._len_torch_function_stack() else None
    about = (y0.ndim, y0.shape[-1], y0.dtype, y0.device, torch.get_default_dtype(), device)
    if cond is None:
        return about
    lead = tuple(
        -1 if i < y0.ndim - 1 and n == y0.shape[i] else n for i, n in enumerate(cond.shape)
    )
    return (*about, lead, cond.dtype, cond.device)


def _identity(field: Any) -> tuple[Any, tuple, Any]:
    """The key of a field, the objects that it must be made of, and what else must be equal.

    A function is known by its code and what it closes over, so that a lambda which is written
    anew for every solve is found again.
    """
    if isinstance(field, Opened):
        key, parts, rest = _identity(field.field)
        return key, parts, ["opened", rest, field.name]
    if type(field) is functools.partial:
        key, parts, rest = _identity(field.func)
        more: list[Any] = []
        rest = ["partial", rest, _note((*field.args, field.keywords), more)]
        return key, (*parts, *more), rest
    if type(field) is FunctionType:
        return _of_function(field)
    if type(field) is MethodType and type(field.__func__) is FunctionType:
        key, parts, rest = _of_function(field.__func__)
        return key, (field.__self__, *parts), [type(field.__self__), rest]
    return id(field), (field,), type(field)


def _of_function(f: FunctionType) -> tuple[Any, tuple, Any]:
    cells = f.__closure__
    if cells is None and f.__defaults__ is None and f.__kwdefaults__ is None:
        return f.__code__, (), id(f.__globals__)
    try:
        values = [cell.cell_contents for cell in cells or ()]
    except ValueError:  # a variable without a value: the trace will say so
        return id(f), (f,), None
    parts: list[Any] = []
    rest = _note((*values, f.__defaults__, f.__kwdefaults__), parts)
    return f.__code__, tuple(parts), [id(f.__globals__), rest]


def _of_object(field: Any) -> tuple[Any, tuple, Any] | None:
    """As `_identity`, of an object that may be made anew for every solve around what stays."""
    opened = None
    if isinstance(field, OpenedObject):
        field, opened = field.field, field.name
    scope = getattr(field, "__dict__", None)
    if type(scope) is not dict or isinstance(field, (*_NAMED, Opened)):
        return None
    parts: list[Any] = []
    inner, own = {}, scope
    if isinstance(field, nn.Module):
        if "_modules" not in scope or scope["_parameters"] or scope["_buffers"]:
            return None  # compiled by TorchScript, or with tensors of its own
        inner = scope["_modules"]
        own = {name: v for name, v in scope.items() if name not in UNREAD and name != "_modules"}
    values = [v for name, v in own.items() if name != opened]
    rest = [*inner, *own, opened, _note((*inner.values(), *values), parts)]
    return type(field), tuple(parts), rest


def _note(values: Sequence[Any], parts: list[Any]) -> list[Any]:
    """What values must be equal to; objects are added to the parts, which must be the same."""
    rest: list[Any] = []
    for value in values:
        kind = type(value)
        if kind in _WHOLE:
            rest.append((kind, value))
        elif kind in CONTAINERS:
            rest.append(snapshot(value))
        else:
            parts.append(value)
            tensor = isinstance(value, Tensor)
            rest.append((value.dtype, value.shape, value.device) if tensor else kind)
    return rest


_WHOLE = {int, float, str, bool, type(None)}
_NAMED = (FunctionType, MethodType, functools.partial)  # found again by `_identity`


def _find(
    field: Any, y0: Tensor, cond: Tensor | None, key: Any, parts: tuple, rest: Any, about: tuple
) -> Plan | NotFusable:
    if sys.getprofile() is not None:
        return NotFusable("a profiler is at work, so that calls cannot be watched")
    if y0.is_cuda and torch.cuda.is_current_stream_capturing():
        return NotFusable("a CUDA graph is being captured", remedy="solve once before the capture")
    other = _of_object(field)
    if other is not None:
        for entry in _cache.get(other[0], ()):
            if entry.matches(other[1], about, other[2]) and _admit(entry, field, y0, cond):
                return entry.result
    _traces[key] = _traces.get(key, 0) + 1
    if _traces[key] > _PATIENCE and not any(entry.used for entry in _cache.get(key, ())):
        return NotFusable(
            "something that the field reads is another one at every call",
            remedy="keep what changes in a tensor, or pass it as the condition",
        )
    watch = Watch()
    result: Plan | NotFusable
    try:
        _check_root(field)
        result = make_plan(field, y0, cond, watch)
    except (Refusal, Exception) as error:
        result = _refusal(error)
    if isinstance(result, NotFusable) and parametrize._cache_enabled:
        return result  # perhaps for no other reason than that
    guards = Guards(watch.codes)
    try:
        guards.root(field, parts)
        guards.finish()
        if isinstance(result, Plan):
            _check_reached(guards, watch, result.trace.outside)
    except (Refusal, Exception) as error:
        result = _refusal(error) if isinstance(result, Plan) else result
    guards.release()
    found = [(key, parts, rest, guards)]
    if other is not None:
        scope = (field.owner if isinstance(field, OpenedObject) else field).__dict__
        found.append((*other, guards.apart_from(scope, other[1])))
    for key, parts, rest, guards in found:
        entry = _Entry(_weak(parts, key), about, rest, guards, result)
        entry.seen.add(y0.shape[:-1])
        _keep(key, entry)
    return result


def _refusal(error: BaseException) -> NotFusable:
    if isinstance(error, Refusal):
        return error.result
    text = str(error).splitlines()[0] if str(error) else ""
    reason = f"{type(error).__name__} while it was traced: {text}"
    return NotFusable(reason, _blame(error))


def _check_root(field: Any) -> None:
    if isinstance(field, OpenedObject):
        field = field.owner
    if isinstance(field, nn.Module):
        for module in field.modules():
            check_module(module)
    if isinstance(field, FunctionType) and field.__code__.co_filename.startswith(TORCH):
        raise Refusal(
            f"{field.__qualname__} is made by torch", None, "pass the function or module inside"
        )


def _check_reached(guards: Guards, watch: Watch, outside: Sequence[Tensor]) -> None:
    for module in watch.modules.values():
        if id(module) not in guards.modules:
            raise Refusal(
                f"a {type(module).__name__} is reached in a way that cannot be followed",
                remedy="keep it as a submodule, or in a variable that the field closes over",
            )
    for tensor in outside:
        if id(tensor) not in guards.tensors:
            raise Refusal(
                f"a tensor of shape {list(tensor.shape)} is reached in a way that cannot be "
                "followed",
                remedy="keep it as a parameter, a buffer or an attribute",
            )


def _weak(parts: tuple, key: Any) -> list[Any]:
    def dropped(_: Any) -> None:
        entries = _cache.get(key)
        if entries is not None:
            entries[:] = [e for e in entries if all(ref() is not None for ref in e.parts)]
            if not entries:
                _forget(key)

    refs = []
    for part in parts:
        try:
            refs.append(weakref.ref(part, dropped))
        except TypeError:
            refs.append(functools.partial(_itself, part))
    return refs


def _forget(key: Any) -> None:
    _cache.pop(key, None)
    if isinstance(key, int):  # an id, which another object may get
        _traces.pop(key, None)


def _itself(part: Any) -> Any:
    return part


def _keep(key: Any, entry: _Entry) -> None:
    entries = _cache.setdefault(key, [])
    while len(_cache) > _FIELDS:
        _forget(next(iter(_cache)))
    entries[:] = [
        e
        for e in entries
        if not (
            e.about == entry.about
            and e.rest == entry.rest
            and all(p() is q() for p, q in zip(e.parts, entry.parts, strict=True))
        )
    ][-_LIMIT + 1 :]
    entries.append(entry)


def _admit(entry: _Entry, field: Any, y0: Tensor, cond: Tensor | None) -> bool:
    """Whether a result holds for leading sizes that it may not have met."""
    lead = y0.shape[:-1]
    if lead in entry.seen or isinstance(entry.result, NotFusable):
        return True
    if not entry.result.trace.asked and 1 not in lead:
        return True
    if lead in entry.refused or sys.getprofile() is not None:
        return False
    known = entry.seen if confirm(entry.result, field, y0, cond) else entry.refused
    if len(known) < _SEEN:
        known.add(lead)
    return known is entry.seen


def _blame(error: BaseException) -> str | None:
    """The innermost line of the user's in a traceback."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((TORCH, *OWN)) and frame.lineno:
            return source_line(frame.filename, frame.lineno)
    return None
