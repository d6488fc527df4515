"""Claims: gradients, adjoints and events are those of torchdiffeq (see `oracle`)."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    ADAPTIVE,
    CALLBACKS,
    FIXED,
    TUPLE_STATE,
    TupleField,
    assert_same_gradients,
    assert_same_solve,
    assert_same_steps,
    assert_same_times,
    both,
    largest,
    oracle_for,
    over_directions,
    relative_difference,
    run,
)
from problems import PROBLEMS, NeuralField, random_state
from torch import Tensor, nn

import fmft_fast


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("options", [None, dict(step_size=0.13, interp="cubic")], ids=["", "cubic"])
def test_gradients_through_fixed_grids_agree(method, options):
    t = PROBLEMS["oscillator"].times(5)
    theirs, ours = both(
        "odeint", NeuralField, random_state(4, 3), t, method=method, options=options, grad=True
    )
    assert_same_gradients(theirs, ours, 1e-9)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("options", [None, dict(first_step=0.1)], ids=["chosen", "given"])
def test_gradients_through_adaptive_steps_agree(method, options):
    """The oracle differentiates its choice of the first step too, an effect of the tolerance."""
    t = PROBLEMS["oscillator"].times(5)
    theirs, ours = both(
        "odeint",
        NeuralField,
        random_state(4, 3),
        t,
        method=method,
        options=options,
        grad=True,
        rtol=1e-6,
        atol=1e-8,
    )
    assert_same_gradients(theirs, ours, 1e-8 if options else 1e-4)


ADJOINTS = {
    "dopri5": dict(method="dopri5"),
    "bosh3": dict(method="bosh3", rtol=1e-5, atol=1e-7),
    "rk4": dict(method="rk4"),
    "rk4_step_size": dict(method="rk4", options=dict(step_size=0.13)),
    "implicit_adams": dict(method="implicit_adams", options=dict(step_size=0.1)),
    "radauIIA3": dict(method="radauIIA3"),
    "other_method": dict(
        method="dopri5", adjoint_method="rk4", adjoint_options=dict(step_size=0.1)
    ),
    "other_tolerance": dict(method="dopri5", adjoint_rtol=1e-4, adjoint_atol=1e-5),
    "seminorm": dict(method="dopri5", adjoint_options=dict(norm="seminorm")),
    "own_norm": dict(
        method="dopri5", adjoint_options=dict(norm=lambda parts: max(largest(p) for p in parts))
    ),
}


@pytest.mark.parametrize("call", ADJOINTS.values(), ids=ADJOINTS)
@pytest.mark.parametrize("t_grad", [True, False], ids=["t_grad", "no_t_grad"])
@over_directions
def test_adjoint_gradients_agree(call, t_grad, reverse):
    t = PROBLEMS["oscillator"].times(4, reverse=reverse)
    theirs, ours = both(
        "odeint_adjoint", NeuralField, random_state(2, 3), t, grad=True, t_grad=t_grad, **call
    )
    assert_same_solve(theirs, ours, 1e-9)
    fixed_steps = call.get("adjoint_method", call["method"]) in FIXED
    if t_grad or fixed_steps:
        assert_same_gradients(theirs, ours, 1e-8)
        assert_same_times(theirs.backward_times, ours.backward_times, 1e-5)
    else:
        # torchdiffeq means to leave the unwanted dL/dt out of its step control but does not.
        assert_same_gradients(theirs, ours, 1e-3)
        assert len(ours.backward_times) <= len(theirs.backward_times)


@pytest.mark.parametrize("norm", [{}, dict(norm="seminorm"), dict(norm=lambda p: largest(p[2]))])
def test_adjoint_gradients_of_tuple_states_agree(norm):
    t = PROBLEMS["oscillator"].times(4)
    theirs, ours = both(
        "odeint_adjoint",
        TupleField,
        TUPLE_STATE,
        t,
        grad=True,
        method="dopri5",
        adjoint_options=norm,
    )
    assert_same_solve(theirs, ours, 1e-9)
    assert_same_gradients(theirs, ours, 1e-8)


def test_adjoint_callbacks_agree():
    names = CALLBACKS + tuple(f"{name}_adjoint" for name in CALLBACKS)
    theirs, ours = both(
        "odeint_adjoint",
        NeuralField,
        random_state(2, 3),
        PROBLEMS["oscillator"].times(3),
        method="dopri5",
        callbacks=names,
        grad=True,
    )
    assert_same_steps(theirs, ours, 1e-5)
    assert any(step[0] == "callback_step_adjoint" for step in ours.backward_steps)


def _crosses(t: Tensor, y: Tensor) -> Tensor:
    return y[0, 0] - 0.3


def _one_of_two(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[0, 0] - 0.3, y[1, 0] + 0.4, t + 9.0))


class _Ball(nn.Module):
    """The oscillator's field as a plain network-free module on [4, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[:, 1], -self.omega * y[:, 0]), dim=-1)


# torchdiffeq rounds a Python number to float32 inside the stages of implicit methods.
STEP = torch.tensor(0.05, dtype=torch.float64)
EVENT_METHODS = {
    "dopri5": dict(method="dopri5"),
    "bosh3": dict(method="bosh3", rtol=1e-6, atol=1e-8),
    "rk4": dict(method="rk4", options=dict(step_size=STEP)),
    "rk4_cubic": dict(method="rk4", options=dict(step_size=STEP, interp="cubic")),
    "explicit_adams": dict(method="explicit_adams", options=dict(step_size=STEP, interp="cubic")),
    "radauIIA3": dict(method="radauIIA3", options=dict(step_size=STEP, interp="cubic")),
}
BALL_STATE = torch.tensor([[1.0, 0.5], [0.9, 0.0], [0.1, 1.0], [2.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("call", EVENT_METHODS.values(), ids=EVENT_METHODS)
@pytest.mark.parametrize("event_fn", [_crosses, _one_of_two], ids=["scalar", "several"])
@over_directions
def test_events_agree(call, event_fn, reverse):
    t = torch.tensor([0.2, -0.8 if reverse else 1.2], dtype=torch.float64)
    theirs, ours = both("odeint", _Ball, BALL_STATE, t, event_fn=event_fn, **call)
    assert_same_solve(theirs, ours, 1e-9)
    assert float(ours.result[0]) != float(t[0])


@pytest.mark.parametrize("call", EVENT_METHODS.values(), ids=EVENT_METHODS)
@pytest.mark.parametrize("reverse_time", [False, True])
@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
def test_gradients_of_events_agree(call, reverse_time, interface):
    outcomes = []
    for package in (oracle_for(call["method"]), fmft_fast):
        outcomes.append(run(
            package.odeint_event, _Ball, BALL_STATE, torch.tensor(0.2, dtype=torch.float64),
            event_fn=_crosses, reverse_time=reverse_time, grad=True,
            odeint_interface=getattr(package, interface), **call,
        ))  # fmt: skip
    theirs, ours = outcomes
    assert relative_difference(ours.result, theirs.result) <= 1e-9
    assert_same_gradients(theirs, ours, 1e-5)
    # The slope at the event is evaluated in the forward pass here, in the backward pass there; and
    # once more for the gradient of odeint_adjoint's own event time, which is zero there.
    extra = 1 if interface == "odeint_adjoint" else 0
    calls = len(theirs.times + theirs.backward_times)
    assert len(ours.times + ours.backward_times) == calls + extra
