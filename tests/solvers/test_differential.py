"""Claims: what torchdiffeq's users observe is the same here, or better where a test says so.

The reference is the installed torchdiffeq; methods that it lacks are compared when the environment
variable FMFT_TORCHDIFFEQ_SOURCE names a checkout of its newest source, else skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import (
    ADAMS,
    ADAPTIVE,
    CALLBACKS,
    FIXED,
    IMPLICIT,
    TUPLE_STATE,
    Run,
    TupleField,
    assert_same_gradients,
    assert_same_solve,
    assert_same_steps,
    both,
    largest,
    oracle_for,
    over_directions,
    relative_difference,
    settings,
)
from problems import COMPLEX_PROBLEMS, PROBLEMS, REAL_PROBLEMS, NeuralField, Problem, random_state
from torch import Tensor

import fmft_fast

# Adding the same numbers in another order, over tens of steps.
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12, torch.complex128: 1e-12}
CASES = [
    *((problem, dtype) for problem in REAL_PROBLEMS for dtype in (torch.float32, torch.float64)),
    *((problem, torch.complex128) for problem in COMPLEX_PROBLEMS),
]


def over_cases(methods: tuple[str, ...], comparable: Callable[..., bool]) -> pytest.MarkDecorator:
    """Every method on every problem, dtype and direction for which `comparable` holds."""
    cases = [
        pytest.param(*case, id=f"{method}-{problem.name}-{str(dtype)[6:]}-{way}")
        for method in methods
        for problem, dtype in CASES
        for way, reverse in (("forward", False), ("reverse", True))
        if comparable(*(case := (method, problem, dtype, reverse)))
    ]
    return pytest.mark.parametrize(("method", "problem", "dtype", "reverse"), cases)


def _fixed_comparable(method: str, problem: Problem, dtype: torch.dtype, reverse: bool) -> bool:
    # Backwards, and with Adams methods, the stiff problem lets rounding grow without bound.
    unstable = problem.name == "stiff" and (reverse or method in ADAMS)
    # test_implicit.py has those: float32 stages end where rounding ends them, and torchdiffeq's
    # complex secants lack the conjugate.
    return not unstable and (method not in IMPLICIT or dtype == torch.float64)


@over_cases(FIXED, _fixed_comparable)
def test_fixed_grid_solves_agree_to_rounding(method, problem, dtype, reverse):
    # High orders of Adams methods amplify rounding, see also test_fixed_grid_options_agree.
    low_order = dict(rtol=1e-3, atol=1e-4, options=dict(max_order=6)) if method in ADAMS else {}
    theirs, ours = both(
        "odeint",
        *settings(problem, dtype, 22, reverse=reverse),
        method=method,
        callbacks=("callback_step",),
        **low_order,
    )
    assert_same_solve(theirs, ours, ROUNDING[dtype])
    assert_same_steps(theirs, ours, ROUNDING[dtype])
    assert ours.warnings == theirs.warnings


FIXED_OPTIONS = {
    "step_size": dict(step_size=0.13),
    "tensor_step_size": dict(step_size=torch.tensor(0.13, dtype=torch.float64)),
    "cubic": dict(step_size=0.13, interp="cubic"),
    "perturb": dict(step_size=0.25, perturb=True),
    "perturb_on_given_grid": dict(perturb=True),
    "grid": dict(grid_constructor=lambda f, y0, t: t[0] + (t[-1] - t[0]) * _uneven_grid(17)),
    "cubic_on_grid": dict(
        interp="cubic",
        grid_constructor=lambda f, y0, t: t[0] + (t[-1] - t[0]) * _uneven_grid(9),
    ),
}


def _uneven_grid(count: int) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64) ** 1.5


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("options", FIXED_OPTIONS.values(), ids=FIXED_OPTIONS)
@over_directions
def test_fixed_grid_options_agree(method, options, reverse):
    t = PROBLEMS["oscillator"].times(6, reverse=reverse)
    theirs, ours = both(
        "odeint",
        NeuralField,
        random_state(4, 3),
        t,
        method=method,
        options=options,
        callbacks=("callback_step",),
    )
    assert_same_solve(theirs, ours, 1e-12)
    assert_same_steps(theirs, ours, 1e-12)


@pytest.mark.parametrize("method", ["euler", "heun2", "rk4", "implicit_adams", "trapezoid"])
@over_directions
def test_perturb_moves_ends_of_steps_by_one_representable_value(method, reverse):
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    t = t.flip(0) if reverse else t
    theirs, ours = both(
        "odeint", NeuralField, random_state(2, 3), t, method=method, options=dict(perturb=True)
    )
    grid = set(t.tolist())
    assert not grid & set(ours.times)
    near = [
        {x for x in times if min(abs(x - g) for g in grid) < 1e-15}
        for times in (theirs.times, ours.times)
    ]
    assert near[0] == near[1] and near[0]


@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "dopri5", "bosh3"])
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.float64])
def test_dtypes_of_time_and_state_are_independent(method, t_dtype, y_dtype):
    tolerances = dict(rtol=1e-4, atol=1e-5) if y_dtype == torch.float32 else {}
    theirs, ours = both(
        "odeint",
        lambda: NeuralField().to(y_dtype),
        random_state(4, 3).to(y_dtype),
        torch.linspace(0, 1, 7, dtype=t_dtype),
        method=method,
        **tolerances,
    )
    single = torch.float32 in (t_dtype, y_dtype)
    assert_same_solve(theirs, ours, 1e-5 if single else 1e-10)


# With a tiny first step the error estimate of a high order is all rounding, and the next step too.
FIRST_STEP = {"dopri5": dict(first_step=0.3), "dopri8": dict(first_step=0.6)}


def _adaptive_comparable(method: str, problem: Problem, dtype: torch.dtype, reverse: bool) -> bool:
    unstable = problem.name == "stiff" and reverse
    below_rounding = method in FIRST_STEP and dtype == torch.float32
    return not unstable and not below_rounding


@over_cases(ADAPTIVE, _adaptive_comparable)
def test_adaptive_solves_take_the_same_steps(method, problem, dtype, reverse):
    single = dtype == torch.float32
    tolerances = dict(rtol=1e-3, atol=1e-4) if single else dict(rtol=1e-5, atol=1e-7)
    theirs, ours = both(
        "odeint",
        *settings(problem, dtype, 5, reverse=reverse),
        method=method,
        callbacks=CALLBACKS,
        options=FIRST_STEP.get(method),
        **tolerances,
    )
    # The size of a step follows from an error estimate, which is a difference of near numbers.
    of_steps = 1e-2 if single else 1e-5
    assert_same_solve(theirs, ours, 1e-3 if single else 1e-8, of_steps)
    assert_same_steps(theirs, ours, of_steps)


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8"])
def test_chosen_first_step_agrees(method):
    problem = PROBLEMS["oscillator"]
    theirs, ours = both(
        "odeint",
        *settings(problem, torch.float64, 2, reverse=False),
        method=method,
        callbacks=CALLBACKS,
    )
    assert math.isclose(ours.steps[0][2], theirs.steps[0][2], rel_tol=1e-12)


@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_adams", "gl6", "sdirk2", "dopri5"])
def test_scalar_states_agree(method):
    theirs, ours = both(
        "odeint",
        lambda: PROBLEMS["forced"].make_field(),
        torch.tensor(2.8, dtype=torch.float64),
        PROBLEMS["forced"].times(9),
        method=method,
        grad=True,
    )
    assert_same_solve(theirs, ours, 1e-9)
    assert_same_gradients(theirs, ours, 1e-6)


ADAPTIVE_OPTIONS = {
    "first_step": dict(first_step=0.05),
    "first_step_tensor": dict(first_step=torch.tensor(0.05)),
    "min_step": dict(min_step=0.2),
    "max_step": dict(max_step=0.07),
    "controller": dict(safety=0.7, ifactor=3.0, dfactor=0.5, first_step=1.0),
    "enough_steps": dict(max_num_steps=1000),
    "float32_time": dict(dtype=torch.float32),
    "step_t": dict(step_t=torch.tensor([0.31, 0.9, 7.0], dtype=torch.float64)),
    "jump_t": dict(jump_t=torch.tensor([0.5, 0.25], dtype=torch.float64)),
    "step_and_jump": dict(step_t=torch.tensor([0.4, 0.8]), jump_t=torch.tensor([0.6])),
    "norm": dict(norm=largest),
}


@pytest.mark.parametrize("method", [m for m in ADAPTIVE if m != "dopri8"])
@pytest.mark.parametrize("options", ADAPTIVE_OPTIONS.values(), ids=ADAPTIVE_OPTIONS)
@over_directions
def test_adaptive_options_agree(method, options, reverse):
    t = PROBLEMS["oscillator"].times(4, reverse=reverse)
    theirs, ours = both(
        "odeint",
        NeuralField,
        random_state(4, 3),
        t,
        method=method,
        options=options,
        rtol=1e-5,
        atol=1e-7,
        callbacks=CALLBACKS,
    )
    assert_same_solve(theirs, ours, 1e-8)
    assert_same_steps(theirs, ours, 1e-5)


@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "trbdf2", "dopri5", "bosh3"])
@over_directions
def test_tuple_states_agree(method, reverse):
    t = PROBLEMS["oscillator"].times(5, reverse=reverse)
    theirs, ours = both(
        "odeint",
        TupleField,
        TUPLE_STATE,
        t,
        method=method,
        grad=True,
        rtol=(1e-5, 1e-6),
        atol=(1e-7, 1e-8),
        callbacks=("callback_step",),
        options=dict(first_step=0.1) if method in ADAPTIVE else None,
    )
    assert isinstance(ours.result, tuple)
    assert_same_solve(theirs, ours, 1e-9)
    assert_same_gradients(theirs, ours, 1e-8)


def test_norms_of_tuple_states_see_the_tuple():
    seen = []

    def norm(parts: Any) -> Tensor:
        seen.append([part.shape for part in parts])
        return max(largest(part) for part in parts)

    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    theirs, ours = both(
        "odeint", TupleField, TUPLE_STATE, t, method="dopri5", options=dict(norm=norm)
    )
    assert_same_solve(theirs, ours, 1e-9)
    assert all(shapes == [(4, 3), ()] for shapes in seen) and seen


def test_dense_output_agrees():
    """Of increasing solves: the oracle's cannot be evaluated after a decreasing one."""
    start, end = torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.9, dtype=torch.float64)
    y0 = random_state(4, 3)
    theirs, ours = (
        package.odeint_dense(NeuralField(), y0, start, end) for package in (oracle_for(), fmft_fast)
    )
    for t in torch.linspace(0.1, 1.89, 31, dtype=torch.float64):
        assert relative_difference(ours(t), theirs(t)) <= 1e-9


@pytest.mark.parametrize("solver", ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"])
@over_directions
def test_scipy_solves_agree(solver, reverse):
    pytest.importorskip("scipy")
    problem = PROBLEMS["forced"]
    theirs, ours = both(
        "odeint",
        *settings(problem, torch.float64, 5, reverse=reverse),
        method="scipy_solver",
        options=dict(solver=solver),
    )
    if solver == "LSODA":
        # torchdiffeq rounds the times that LSODA asks for to float32.
        assert relative_difference(ours.result, theirs.result) <= 1e-6
    else:
        assert_same_solve(theirs, ours, 1e-9)


def _error(outcome: Run, problem: Problem, t: Tensor) -> float:
    assert outcome.error is None
    return relative_difference(outcome.result, problem.y_exact(t).to(outcome.result.dtype))


@pytest.mark.parametrize("problem", REAL_PROBLEMS, ids=lambda problem: problem.name)
def test_gl4_is_never_less_accurate(problem):
    """The oracle has the node 1/2 - sqrt(3)/6 twice, hence order 1 when the field sees time."""
    make_field, y0, t = settings(problem, torch.float64, 1 + problem.steps // 2, reverse=False)
    theirs, ours = both("odeint", make_field, y0, t, method="gl4")
    # The stages are solved to a residual of 1e-8.
    assert _error(ours, problem, t) <= max(_error(theirs, problem, t), 1e-8)


@pytest.mark.parametrize("problem", REAL_PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
def test_tsit5_is_never_less_accurate(problem, rtol):
    """The oracle carries on the embedded solution of order 4 (with twice the error weights)."""
    make_field, y0, t = settings(problem, torch.float64, 6, reverse=False)
    theirs, ours = both("odeint", make_field, y0, t, method="tsit5", rtol=rtol, atol=rtol / 100)
    assert _error(ours, problem, t) <= _error(theirs, problem, t)
