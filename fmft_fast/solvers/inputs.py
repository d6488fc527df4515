"""From what the user passed to what the solvers take: one flat state, one field, checked times."""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, InputTypeError
from .methods import Family, Method, find_method

Norm = Callable[[Any], Any]
State = Tensor | tuple[Tensor, ...]

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
_VALID_CALLBACKS: dict[Family, tuple[str, ...]] = {
    "adaptive": CALLBACKS,
    "fixed": CALLBACKS[:1],
    "implicit": CALLBACKS[:1],
    "adams": CALLBACKS[:1],
    "bdf": CALLBACKS[:1],
    "scipy": (),
}


_REAL = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real part (`dtype.to_real()` cannot be traced by torch.compile)."""
    return _REAL.get(dtype, dtype)


class Perturb(Enum):
    """Whether a field is evaluated at t or at the neighbouring representable time."""

    NONE = 0
    PREV = 1
    NEXT = 2


def rms_norm(x: Tensor) -> Tensor:
    """Root mean square of the absolute values, 0-d; 0 for an empty tensor."""
    size = x.abs()
    return size.square().mean().sqrt() if x.numel() else size.sum()


def max_rms_norm(xs: Sequence[Tensor]) -> Tensor | float:
    """Largest RMS norm of the parts of a tuple state."""
    return max((rms_norm(x) for x in xs), default=0.0)


def unflatten(flat: Tensor, lead: tuple[int, ...], shapes: Sequence[torch.Size]) -> tuple:
    """Views of the parts of a flat state: [*lead, sum of sizes] to one [*lead, *shape] each."""
    parts, start = [], 0
    for shape in shapes:
        stop = start + shape.numel()
        parts.append(flat[..., start:stop].view((*lead, *shape)))
        start = stop
    return tuple(parts)


def shift_time(t: Tensor, towards: Tensor) -> Tensor:
    """The neighbour of t in the direction of `towards`; the gradient passes through to t."""
    if not t.requires_grad:
        return torch.nextafter(t, towards)
    with torch.no_grad():
        ulp = torch.nextafter(t, towards) - t
    return t + ulp


class NormalisedField:
    """The user's field as f(t, y) on one tensor, with a count of its evaluations.

    Args:
        base: the user's callable.
        shapes: shapes of the parts when the state is a tuple.
        dtype: dtype of the user's state; a bf16 or fp16 field works on a rounded copy of the
            float32 state of the solver.
        direction: +1 or -1, the sign of the steps; it gives `Perturb` its meaning.
    """

    def __init__(
        self,
        base: Callable,
        shapes: Sequence[torch.Size] | None,
        dtype: torch.dtype,
        direction: int,
    ):
        self.base = base
        self.shapes = shapes
        self.dtype = dtype
        self.time_dtype = real_dtype(dtype)
        self.direction = direction
        self.evaluations = 0

    def split(self, y: Tensor) -> State:
        """The state as the user's callables see it."""
        if y.dtype != self.dtype:
            y = y.to(self.dtype)
        return y if self.shapes is None else unflatten(y, (), self.shapes)

    def __call__(self, t: Tensor, y: Tensor, perturb: Perturb = Perturb.NONE) -> Tensor:
        """Evaluate at t (0-d) and y; the result has the shape of y."""
        self.evaluations += 1
        if t.dtype != self.time_dtype:
            t = t.to(self.time_dtype)
        if perturb is not Perturb.NONE:
            forward = (perturb is Perturb.NEXT) == (self.direction > 0)
            t = shift_time(t, t + 1 if forward else t - 1)
        f = self.base(t, self.split(y))
        if self.shapes is not None:
            return self._join(f)
        if f.shape != y.shape:
            f = expand_result(f, y)
        return f

    def _join(self, f: Sequence[Tensor]) -> Tensor:
        """One flat tensor; a part needs as many entries as that of the state, in any shape."""
        assert self.shapes is not None
        got = [tuple(part.shape) for part in f]
        if [math.prod(shape) for shape in got] != [shape.numel() for shape in self.shapes]:
            raise InputError(
                "the field must return a tuple with the shapes of its state: expected "
                f"{[tuple(shape) for shape in self.shapes]}, got {got}"
            )
        return torch.cat([part.reshape(-1) for part in f])


def expand_result(f: Tensor, y: Tensor) -> Tensor:
    """A field's result in the shape of its state."""
    try:
        return f.expand_as(y)
    except RuntimeError:
        raise InputError(
            f"the field must return the shape of its state: expected {tuple(y.shape)}, "
            f"got {tuple(f.shape)}"
        ) from None


@dataclass(frozen=True)
class FixedOptions:
    """Options of the methods on a fixed grid (see `odeint`)."""

    step_size: float | Tensor | None = None
    grid_constructor: Callable | None = None
    interp: str = "linear"
    perturb: bool = False

    def __post_init__(self) -> None:
        if self.step_size is not None and self.grid_constructor is not None:
            raise InputError(
                "step_size and grid_constructor are mutually exclusive arguments: pass one of them"
            )
        if self.interp not in ("linear", "cubic"):
            raise InputError(
                f'Unknown interpolation method {self.interp}: expected "linear" or "cubic"'
            )


@dataclass(frozen=True)
class ImplicitOptions(FixedOptions):
    """Options of the implicit Runge-Kutta methods and of BDF2."""

    max_iters: int = 100


@dataclass(frozen=True)
class AdamsOptions(FixedOptions):
    """Options of the Adams methods."""

    max_iters: int = 4
    max_order: int = 12


@dataclass(frozen=True)
class AdaptiveOptions:
    """Options of the adaptive methods (see `odeint`); times and sizes in units of t."""

    first_step: float | Tensor | None = None
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = float("inf")
    max_num_steps: int = 2**31 - 1
    dtype: torch.dtype = torch.float64
    step_t: Tensor | Sequence[float] | None = None
    jump_t: Tensor | Sequence[float] | None = None


@dataclass(frozen=True)
class ScipyOptions:
    """Options of `scipy_solver`; grid_points and eps are accepted for old code and not used."""

    solver: str = "LSODA"
    min_step: float = 0.0
    max_step: float = float("inf")
    grid_points: Any = None
    eps: Any = None


_OPTIONS: dict[Family, type] = {
    "fixed": FixedOptions,
    "implicit": ImplicitOptions,
    "adams": AdamsOptions,
    "bdf": ImplicitOptions,
    "adaptive": AdaptiveOptions,
    "scipy": ScipyOptions,
}

_DEFAULTS = {family: options() for family, options in _OPTIONS.items()}
_OPTION_NAMES = {family: frozenset(f.name for f in fields(o)) for family, o in _OPTIONS.items()}


def parse_options(method: str, family: Family, options: dict[str, Any]) -> Any:
    """The options of a family as a dataclass; unknown ones warn, as in torchdiffeq."""
    if not options:
        return _DEFAULTS[family]
    names = _OPTION_NAMES[family]
    unknown = {name: value for name, value in options.items() if name not in names}
    if unknown:
        warnings.warn(
            f"{method}: Unexpected arguments {unknown}. Known ones: {', '.join(sorted(names))}",
            stacklevel=4,
        )
    return _OPTIONS[family](**{name: value for name, value in options.items() if name in names})


@dataclass
class Problem:
    """An initial value problem in the form that the solvers take.

    Attributes:
        field: the normalised field.
        y0: flat state (float32 for half-precision users).
        t: [T] times, on the device of y0.
        method: name of the method.
        rtol, atol: floats, or tensors that broadcast with y0.
        norm: maps a tensor of the state's shape to a 0-d tensor; None is the RMS norm.
        options: dataclass of the family.
        event_fn: event function on the normalised state, or None.
        callbacks: the supported callbacks that the user's field has, called as (t, y, dt).
    """

    field: NormalisedField
    y0: Tensor
    t: Tensor
    method: str
    spec: Method
    rtol: float | Tensor
    atol: float | Tensor
    norm: Norm | None
    options: Any
    event_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    callbacks: dict[str, Callable] = dataclasses.field(default_factory=dict)

    @property
    def shapes(self) -> Sequence[torch.Size] | None:
        """Shapes of the parts of a tuple state, or None."""
        return self.field.shapes

    def restore(self, solution: Tensor, lead: tuple[int, ...]) -> Any:
        """A solution [*lead, *flat] in the user's structure and dtype."""
        if solution.dtype != self.field.dtype:
            solution = solution.to(self.field.dtype)
        return solution if self.shapes is None else unflatten(solution, lead, self.shapes)


def _check_times(t: Any) -> None:
    if not isinstance(t, Tensor):
        raise InputTypeError(f"t must be a torch.Tensor, got {type(t).__name__}")
    if not torch.is_floating_point(t):
        raise InputTypeError(f"`t` must be a floating point Tensor but is a {t.dtype}")
    if t.ndim != 1:
        raise InputError(f"t must be one dimensional, got shape {tuple(t.shape)}")
    if t.numel() == 0:
        raise InputError("t must hold at least the initial time, got an empty tensor")


def direction_of(t: Tensor) -> int:
    """Sign of the steps; raises unless t is strictly monotonic and finite."""
    if torch.compiler.is_compiling():
        return 1
    values = t.tolist()  # sync: once per solve, the order of the times is checked here
    if len(values) < 2:
        return 1
    sign = 1 if values[1] > values[0] else -1
    in_order = list(map(operator.lt if sign > 0 else operator.gt, values, values[1:]))
    if not all(in_order):
        i = in_order.index(False)
        raise InputError(
            "t must be strictly increasing or decreasing, got "
            f"t[{i}] = {values[i]} and t[{i + 1}] = {values[i + 1]}; "
            "sort it and drop repeated times"
        )
    if math.isinf(values[0]) or math.isinf(values[-1]):
        raise InputError(
            f"t must be finite, got {values[0]} to {values[-1]}: end where y is wanted"
        )
    return sign


def _flatten_state(y0: Any) -> tuple[Tensor, list[torch.Size] | None]:
    if isinstance(y0, Tensor):
        return y0, None
    if not isinstance(y0, tuple) or not all(isinstance(part, Tensor) for part in y0):
        raise InputTypeError(
            f"y0 must be either a torch.Tensor or a tuple of them, got {type(y0).__name__}"
        )
    return torch.cat([part.reshape(-1) for part in y0]), [part.shape for part in y0]


def _tolerance(name: str, tol: Any, shapes: Sequence[torch.Size] | None, y0: Tensor) -> Any:
    if isinstance(tol, Tensor) and tol.requires_grad:
        raise InputError(f"{name} cannot require gradient; pass {name}.detach()")
    if shapes is not None and not isinstance(tol, (int, float)) and getattr(tol, "ndim", 1):
        tol = tuple(tol)
        if len(tol) != len(shapes):
            raise InputError(
                f"If using tupled {name} it must have the same length as the tuple y0: "
                f"expected {len(shapes)}, got {len(tol)}"
            )
        parts = [torch.as_tensor(x).expand(s.numel()) for x, s in zip(tol, shapes, strict=True)]
        tol = torch.cat([part.to(y0.device, y0.abs().dtype) for part in parts])
    if isinstance(tol, Tensor) and tol.ndim:
        return tol.to(y0.device, y0.abs().dtype)
    tol = float(tol)
    if not tol >= 0:
        raise InputError(f"{name} must be a number >= 0, got {tol}")
    return tol


def _split_norm(norm: Norm | None, shapes: Sequence[torch.Size] | None) -> Norm | None:
    """A norm on the flat state from one on the user's state."""
    if shapes is None:
        return norm
    on_parts = max_rms_norm if norm is None else norm
    return lambda y: on_parts(unflatten(y, (), shapes))


def find_callbacks(func: Any) -> dict[str, Callable]:
    """The callbacks that a user's field has, by name."""
    kind = type(func)
    if isinstance(func, nn.Module) and kind.__getattr__ is nn.Module.__getattr__:
        # `hasattr` takes a microsecond for each that a module lacks.
        own = func.__dict__
        modules, parameters = own.get("_modules", ()), own.get("_parameters", ())
        buffers = own.get("_buffers", ())
        for name in CALLBACKS:
            if name in own or name in modules or name in parameters or name in buffers:
                break
            if hasattr(kind, name):
                break
        else:
            return {}
    return {name: getattr(func, name) for name in CALLBACKS if hasattr(func, name)}


def _collect_callbacks(func: Any, method: str, normal: NormalisedField) -> dict[str, Callable]:
    found = find_callbacks(func)
    if not found:
        return found
    valid = _VALID_CALLBACKS[find_method(method).family]
    invalid = set(found) - set(valid)
    if invalid:
        warnings.warn(f"Solver '{method}' does not support callbacks {invalid}", stacklevel=4)

    def bind(callback: Callable) -> Callable:
        return lambda t, y, dt: callback(t, normal.split(y), dt)

    return {name: bind(callback) for name, callback in found.items() if name in valid}


def normalise(
    func: Callable,
    y0: State,
    t: Tensor,
    *,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Callable | None = None,
) -> Problem:
    """Check the arguments of `odeint` and bring them into one form.

    Raises:
        InputError, InputTypeError, UnknownMethodError: see the messages.
    """
    method = "dopri5" if method is None else method
    spec = find_method(method)
    _check_times(t)
    state, shapes = _flatten_state(y0)
    if event_fn is not None:
        if len(t) != 2:
            raise InputError(
                f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}."
            )
        if spec.family == "scipy":
            raise InputError("scipy_solver has no event handling; use dopri5 or another method")
    if not (state.is_floating_point() or state.is_complex()):
        raise InputTypeError(f"y0 must be floating point or complex, got {state.dtype}")
    rtol = _tolerance("rtol", rtol, shapes, state)
    atol = _tolerance("atol", atol, shapes, state)
    direction = direction_of(t)
    if t.device != state.device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=3)
        t = t.to(state.device)
    if t.dtype in (torch.float16, torch.bfloat16):
        t = t.float()

    normal = NormalisedField(func, shapes, state.dtype, direction)
    if state.dtype in (torch.float16, torch.bfloat16):
        state = state.float()
    options = dict(options or {})
    norm = _split_norm(options.pop("norm", None), shapes)
    return Problem(
        field=normal,
        y0=state,
        t=t,
        method=method,
        spec=spec,
        rtol=rtol,
        atol=atol,
        norm=norm,
        options=parse_options(method, spec.family, options),
        event_fn=event_fn and (lambda t, y: event_fn(t, normal.split(y))),
        callbacks=_collect_callbacks(func, method, normal),
    )
