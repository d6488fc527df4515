"""Claims: errors can be caught, and warnings come, as with torchdiffeq (see `oracle`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import CALLBACKS, Run, largest, oracle_for, run
from torch import Tensor

import fmft_fast
from fmft_fast.errors import FmftError


def _growing(t: Tensor, y: Tensor) -> Tensor:
    return y * y


def _nan_after_half(t: Tensor, y: Tensor) -> Tensor:
    return torch.where(t > 0.5, torch.full_like(y, float("nan")), -y)


Y0 = torch.ones(2, dtype=torch.float64)
T = torch.tensor([0.0, 1.0], dtype=torch.float64)
WRONG_CALLS = {
    "unknown method": dict(method="no such method"),
    "t is a list": dict(t=[0.0, 1.0]),
    "t is integer": dict(t=torch.tensor([0, 1])),
    "t is 2-D": dict(t=T[None]),
    "t repeats": dict(t=torch.tensor([0.0, 1.0, 1.0])),
    "t turns round": dict(t=torch.tensor([0.0, 1.0, 0.5])),
    "y0 is a list": dict(y0=[Y0]),
    "rtol needs gradient": dict(rtol=torch.tensor(1e-3, requires_grad=True)),
    "atol needs gradient": dict(atol=torch.tensor(1e-3, requires_grad=True)),
    "rtol of wrong length": dict(y0=(Y0, Y0), rtol=(1e-3,), base=lambda t, y: y),
    "two ways to a grid": dict(
        method="euler", options=dict(step_size=0.1, grid_constructor=lambda f, y, t: t)
    ),
    "unknown interpolation": dict(method="euler", options=dict(step_size=0.3, interp="magic")),
    "grid beside t": dict(method="euler", options=dict(grid_constructor=lambda f, y, t: t[1:])),
    "order of Adams too high": dict(method="implicit_adams", options=dict(max_order=13)),
    "too few steps allowed": dict(options=dict(max_num_steps=3)),
    "singularity": dict(base=_growing, t=torch.tensor([0.0, 2.0], dtype=torch.float64)),
    "field becomes NaN": dict(base=_nan_after_half),
    "NaN in y0": dict(y0=Y0 * float("nan")),
    "jump at a step": dict(options=dict(step_t=torch.tensor([0.5]), jump_t=torch.tensor([0.5]))),
    "three times with an event": dict(t=torch.linspace(0, 1, 3), event_fn=lambda t, y: y[0]),
    "event without step_size": dict(method="rk4", event_fn=lambda t, y: y[0] - 0.5),
    "adjoint of a function": dict(entry="odeint_adjoint", as_function=True),
    "adjoint options unclear": dict(
        entry="odeint_adjoint", options=dict(first_step=0.1), adjoint_method="rk4"
    ),
    "dense output of a tuple": dict(
        entry="odeint_dense", y0=(Y0,), t=T[0], t1=T[1], method="dopri5"
    ),
}


def _decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def _outcome(package: Any, call: dict[str, Any]) -> Run:
    call = {"entry": "odeint", "base": _decay, "y0": Y0, "t": T, "as_function": False, **call}
    entry, base, y0, t = (call.pop(name) for name in ("entry", "base", "y0", "t"))
    as_function, t1 = call.pop("as_function"), call.pop("t1", None)

    def solve(recorder: Any, y0: Any, t: Any, **kwargs: Any) -> Any:
        times = (t,) if t1 is None else (t, t1)
        return getattr(package, entry)(base if as_function else recorder, y0, *times, **kwargs)

    return run(solve, lambda: base, y0, t, **call)


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_errors_can_be_caught_as_those_of_torchdiffeq(call):
    theirs, ours = _outcome(oracle_for(), call), _outcome(fmft_fast, call)
    assert theirs.error is not None
    assert isinstance(ours.error, type(theirs.error)), repr(ours.error)
    assert isinstance(ours.error, FmftError) and len(str(ours.error)) > 30


def _no_callback(t: Tensor, y: Tensor, dt: Tensor) -> None:
    pass


DUBIOUS_CALLS = {
    "unknown option": dict(method="dopri5", options=dict(no_such_option=1)),
    "unknown option of a fixed grid": dict(method="rk4", options=dict(no_such_option=1)),
    "option of another family": dict(method="dopri5", options=dict(step_size=0.1)),
    "callbacks without effect": dict(method="rk4", callbacks=CALLBACKS),
    "callbacks with scipy": dict(method="scipy_solver", callbacks=CALLBACKS),
    "low order of Adams": dict(method="explicit_adams", options=dict(max_order=3)),
    "corrector without end": dict(
        method="implicit_adams",
        t=torch.linspace(0, 2, 6, dtype=torch.float64),
        options=dict(max_iters=1),
    ),
    "implicit stages without end": dict(method="implicit_midpoint", options=dict(max_iters=1)),
    "nothing dubious": dict(method="dopri5"),
}


@pytest.mark.parametrize("call", DUBIOUS_CALLS.values(), ids=DUBIOUS_CALLS)
def test_warnings_come_as_often_and_in_the_same_categories(call):
    theirs, ours = _outcome(oracle_for(call["method"]), call), _outcome(fmft_fast, call)
    assert theirs.error is None and ours.error is None
    assert len(ours.warnings) == len(theirs.warnings)
    for (category, _), (reference, _) in zip(ours.warnings, theirs.warnings, strict=True):
        assert issubclass(category, reference)


def test_adjoint_warns_of_parameters_that_a_norm_will_not_see():
    frozen = torch.ones(2)
    call = dict(
        entry="odeint_adjoint", adjoint_params=(frozen,), adjoint_options=dict(norm=largest)
    )
    theirs, ours = _outcome(oracle_for(), call), _outcome(fmft_fast, call)
    assert len(theirs.warnings) == len(ours.warnings) == 1
