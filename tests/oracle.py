"""torchdiffeq beside this package: the installed release, and its newest source where one is named.

Environment:
    FMFT_TORCHDIFFEQ_SOURCE: folder of a checkout of torchdiffeq. The release on PyPI lacks methods
        that the source has under the same version number; tests of those skip without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from problems import NeuralField, Problem, random_state
from torch import Tensor, nn

import fmft_fast

EXPLICIT = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
# gl4 has other nodes, see test_gl4_is_never_less_accurate.
IMPLICIT = (
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "radauIIA3",
    "radauIIA5",
    "gl6",
    "sdirk2",
    "trbdf2",
)
FIXED = EXPLICIT + ADAMS + IMPLICIT
# tsit5 has other weights, see test_tsit5_is_never_less_accurate.
ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8")
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
over_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])

SOURCE_VARIABLE = "FMFT_TORCHDIFFEQ_SOURCE"
NO_SOURCE = f"needs {SOURCE_VARIABLE}=<checkout of torchdiffeq>, whose newest source"
_SOURCE_NAME = "torchdiffeq_newest_source"


def source_folder() -> Path | None:
    """The checkout of torchdiffeq, or None."""
    folder = os.environ.get(SOURCE_VARIABLE)
    return Path(folder) if folder else None


def _newest_source() -> ModuleType | None:
    folder = source_folder()
    if folder is None:
        return None
    if _SOURCE_NAME not in sys.modules:
        package = folder / "torchdiffeq"
        spec = importlib.util.spec_from_file_location(
            _SOURCE_NAME, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_SOURCE_NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[_SOURCE_NAME]


def oracle_for(method: str | None = None) -> ModuleType:
    """A torchdiffeq that has this method: the installed one, else the newest source, else skip."""
    installed = pytest.importorskip("torchdiffeq")
    known = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    if method is None or method in known or method == "no such method":
        return installed
    newest = _newest_source()
    if newest is None:
        pytest.skip(f"{NO_SOURCE} has the method {method!r}")
    return newest


class Recorder(nn.Module):
    """Passes a field through and notes when it was evaluated and which steps were taken.

    Args:
        base: the field.
        callbacks: names of the callbacks to offer.
    """

    def __init__(self, base: Callable, callbacks: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.base = base
        self.times: list[float] = []
        self.events: list[tuple[str, float, float]] = []
        for name in callbacks:
            setattr(self, name, self._note(name))

    def _note(self, name: str) -> Callable:
        def callback(t: Tensor, y: Any, dt: Tensor) -> None:
            self.events.append((name, float(t.detach()), float(dt.detach())))

        return callback

    def forward(self, t: Tensor, y: Any) -> Any:
        assert t.ndim == 0
        self.times.append(t.detach().item())
        return self.base(t, y)


@dataclass
class Run:
    """What one call of a package did.

    Attributes:
        result: its return value, or None when it raised.
        error: what it raised.
        warnings: categories and texts.
        times: times of the evaluations of the forward solve.
        steps: callbacks as (name, t, dt).
        gradients: of the inputs and parameters, in the order given.
        backward_times: times of the evaluations during the backward pass.
        backward_steps: callbacks during the backward pass.
    """

    result: Any = None
    error: Exception | None = None
    warnings: list[tuple[type, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    steps: list[tuple[str, float, float]] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    backward_times: list[float] = field(default_factory=list)
    backward_steps: list[tuple[str, float, float]] = field(default_factory=list)


def leaves(value: Any) -> list[Tensor]:
    """All tensors of a nested tuple, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for part in value for leaf in leaves(part)]


def weighted_sum(value: Any) -> Tensor:
    """A real scalar that depends on every entry, with fixed uneven weights."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in leaves(value):
        parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        weights = torch.linspace(0.5, 1.5, parts.numel(), dtype=torch.float64)
        total = total + (parts.reshape(-1).double() * weights).sum()
    return total


def run(
    call: Callable[..., Any],
    make_field: Callable[[], Callable],
    y0: Any,
    t: Any,
    *,
    grad: bool = False,
    t_grad: bool = True,
    callbacks: tuple[str, ...] = (),
    **kwargs: Any,
) -> Run:
    """Call `call(field, y0, t, **kwargs)` on fresh copies and note everything observable.

    With `grad` a weighted sum of the result is differentiated with respect to y0, t (`t_grad`) and
    the parameters of the field.
    """
    recorder = Recorder(make_field(), callbacks)
    outcome = Run()
    if grad:
        y0 = _map(lambda x: x.clone().requires_grad_(), y0)
        t = t.clone().requires_grad_(t_grad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome.result = call(recorder, y0, t, **kwargs)
        except Exception as error:
            outcome.error = error
        outcome.times, outcome.steps = list(recorder.times), list(recorder.events)
        if grad and outcome.error is None:
            inputs = [*leaves(y0), *([t] if t_grad else []), *recorder.parameters()]
            total = weighted_sum(outcome.result)
            outcome.gradients = list(torch.autograd.grad(total, inputs, allow_unused=True))
            outcome.backward_times = recorder.times[len(outcome.times) :]
            outcome.backward_steps = recorder.events[len(outcome.steps) :]
    outcome.warnings = [(w.category, str(w.message)) for w in caught]
    if outcome.error is None:
        outcome.result = _map(torch.Tensor.detach, outcome.result)
    return outcome


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return tuple(_map(function, part) for part in value)


def relative_difference(left: Any, right: Any) -> float:
    """Largest difference of two results over the largest entry of each tensor."""
    worst = 0.0
    for a, b in zip(leaves(left), leaves(right), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(float(b.detach().abs().max()), 1e-300)
        worst = max(worst, float((a - b).detach().abs().max()) / scale)
    return worst


def both(
    entry: str, make_field: Callable[[], Callable], y0: Any, t: Any, **kwargs: Any
) -> tuple[Run, Run]:
    """The same call of torchdiffeq and of this package."""
    theirs = oracle_for(kwargs.get("method"))
    return (
        run(getattr(theirs, entry), make_field, y0, t, **kwargs),
        run(getattr(fmft_fast, entry), make_field, y0, t, **kwargs),
    )


def assert_same_solve(
    theirs: Run, ours: Run, tolerance: float, time_tolerance: float | None = None
) -> None:
    """Equal values, and the field evaluated as often and at the same times."""
    for outcome in (theirs, ours):
        if outcome.error is not None:
            raise outcome.error
    assert relative_difference(ours.result, theirs.result) <= tolerance
    assert_same_times(theirs.times, ours.times, time_tolerance or tolerance)


def assert_same_times(theirs: list[float], ours: list[float], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert math.isclose(mine, reference, rel_tol=tolerance, abs_tol=tolerance)


def assert_same_steps(theirs: Run, ours: Run, tolerance: float) -> None:
    """The callbacks came in the same order, with the same times and step sizes."""
    steps, reference = ours.steps + ours.backward_steps, theirs.steps + theirs.backward_steps
    assert [step[0] for step in steps] == [step[0] for step in reference]
    for (_, t, dt), (_, t_reference, dt_reference) in zip(steps, reference, strict=True):
        assert math.isclose(t, t_reference, rel_tol=tolerance, abs_tol=tolerance)
        assert math.isclose(dt, dt_reference, rel_tol=tolerance)


def assert_same_gradients(theirs: Run, ours: Run, tolerance: float) -> None:
    """The gradients of all inputs and parameters agree; those that are absent are so in both."""
    assert len(theirs.gradients) == len(ours.gradients) > 0
    for mine, reference in zip(ours.gradients, theirs.gradients, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None:
            assert relative_difference(mine, reference) <= tolerance


def settings(problem: Problem, dtype: torch.dtype, count: int, *, reverse: bool) -> tuple:
    """Field factory, initial state and times of a problem in a dtype."""
    t = problem.times(count, reverse=reverse)
    own_dtype = problem.start(t).dtype

    def make_field() -> nn.Module:
        field = problem.make_field()
        return field if dtype == own_dtype else field.to(dtype)

    return make_field, problem.start(t).to(dtype), t


def largest(y: Tensor) -> Tensor:
    return y.abs().max()


class TupleField(nn.Module):
    """Two coupled parts of different shape."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NeuralField()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert isinstance(y, tuple)
        matrix, scalar = y
        return self.inner(t, matrix) * scalar, self.gain * torch.cos(t) - matrix.mean()


TUPLE_STATE = (random_state(4, 3), random_state(seed=2))
