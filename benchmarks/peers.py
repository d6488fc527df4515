"""One adapter per rival: from (problem, operation) to a call that does the operation once.

A call returns what can be compared: "forward" the final state; "gradient" the final state and the
gradient of its mean square in every parameter; "training" the parameters after a step of AdamW.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import fmft_fast

from .cases import Operation, Problem

Call = Callable[[], Sequence[Any]]
Solver = Callable[[Tensor], Tensor]
LEARNING_RATE = 1e-6  # so small that a thousand steps leave the field as it was
CHUNK = 16  # evaluations in one compiled graph: more take minutes to compile


class NotApplicable(Exception):
    """A peer does not run a case; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A rival.

    Attributes:
        name: key on the command line.
        prepare: the adapter.
        approximate: its gradient is that of another discretisation, so its error is no fault.
        kind: "eager" calls the field itself, "traced" runs what it recorded in torch, "jax".
    """

    name: str
    prepare: Callable[[Problem, Operation], Call]
    approximate: bool = False
    kind: Literal["eager", "traced", "jax"] = "eager"


def torch_operation(
    problem: Problem, operation: Operation, solver: Solver, capturable: bool = False
) -> Call:
    """The operation around a torch solver."""
    x0, parameters = problem.x0, problem.parameters

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [solver(x0)]

    def gradient() -> Sequence[Tensor]:
        state = solver(x0)
        return [state.detach(), *torch.autograd.grad(state.square().mean(), parameters)]

    if operation == "forward":
        return forward
    if operation == "gradient":
        return gradient
    optimiser = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=0, fused=True, capturable=capturable
    )

    def training() -> Sequence[Tensor]:
        optimiser.zero_grad()
        solver(x0).square().mean().backward()
        optimiser.step()
        return parameters

    return training


def unroll(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """Explicit Runge-Kutta steps in plain torch: from a state and stage times [steps, stages]."""
    if problem.case.steps is None:
        raise NotApplicable("a plain loop has no step control")
    field, tableau, h = problem.velocity, problem.case.tableau, 1 / problem.case.steps

    def run(x: Tensor, times: Tensor) -> Tensor:
        for row in times.unbind():
            k: list[Tensor] = []
            for t, weights in zip(row.unbind(), tableau.a, strict=True):
                k.append(field(t, _add(x, h, weights, k)))
            x = _add(x, h, tableau.b, k)
        return x

    return run


def _add(x: Tensor, h: float, weights: Sequence[float], k: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, k, strict=True):
        if weight:
            x = torch.add(x, slope, alpha=h * weight)
    return x


def stage_times(problem: Problem) -> Tensor:
    """[steps, stages] times of the evaluations."""
    steps = problem.case.steps
    assert steps is not None
    start = torch.arange(steps, dtype=torch.float64) / steps
    nodes = torch.tensor(problem.case.tableau.c, dtype=torch.float64) / steps
    return (start[:, None] + nodes).to(problem.x0)


def plain_loop(problem: Problem, operation: Operation) -> Call:
    run = unroll(problem)
    times = stage_times(problem)
    return torch_operation(problem, operation, lambda x0: run(x0, times))


def compiled_loop(problem: Problem, operation: Operation) -> Call:
    return torch_operation(problem, operation, _compile(problem))


def compiled_loop_reduced(problem: Problem, operation: Operation) -> Call:
    _need_cuda(problem)
    call = torch_operation(problem, operation, _compile(problem, mode="reduce-overhead"))

    def step() -> Sequence[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return step


def _compile(problem: Problem, mode: str | None = None) -> Solver:
    run = torch.compile(unroll(problem), mode=mode, fullgraph=True, dynamic=False)
    times = stage_times(problem)
    steps = max(1, CHUNK // times.shape[1])
    if times.shape[0] % steps:
        steps = times.shape[0]
    pieces = times.split(steps)

    def solver(x: Tensor) -> Tensor:
        for piece in pieces:
            x = run(x, piece)
        return x

    return solver


def graphed_loop(problem: Problem, operation: Operation) -> Call:
    _need_cuda(problem)
    run, times = unroll(problem), stage_times(problem)
    call = torch_operation(problem, operation, lambda x0: run(x0, times), capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    if operation == "training":  # the warm-up was a few steps: begin again
        fresh = Problem(problem.case, problem.x0.dtype, problem.x0.device)
        with torch.no_grad():
            for old, new in zip(problem.parameters, fresh.parameters, strict=True):
                old.copy_(new)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return found

    return replay


def _need_cuda(problem: Problem) -> None:
    if problem.x0.device.type != "cuda":
        raise NotApplicable("CUDA graphs need a CUDA device")


def _drop_in(package: str, function: str) -> Callable[[Problem, Operation], Call]:
    def prepare(problem: Problem, operation: Operation) -> Call:
        solve = getattr(importlib.import_module(package), function)
        case, t = problem.case, problem.times
        options: dict[str, Any] = {"method": case.method, "rtol": case.tol, "atol": case.tol}
        if function == "odeint_adjoint" and case.steps is not None:
            # The adjoint is for solves that keep nothing between the ends.
            options["options"] = {"step_size": 1 / case.steps}
            t = t[[0, -1]]
        # A module, in which the adjoint looks for parameters; otherwise a function will do.
        field = problem.velocity if function == "odeint_adjoint" else problem.function
        return torch_operation(problem, operation, lambda x0: solve(field, x0, t, **options)[-1])

    return prepare


def _solve(gradient: Literal["discrete", "backprop"]) -> Callable[[Problem, Operation], Call]:
    def prepare(problem: Problem, operation: Operation) -> Call:
        case = problem.case
        options: dict[str, Any] = {"method": case.method, "gradient": gradient}
        if case.steps is None:
            options |= {"rtol": case.tol, "atol": case.tol}
        else:
            options["steps"] = case.steps
        field, cond = problem.field, problem.cond
        return torch_operation(
            problem,
            operation,
            lambda x0: fmft_fast.solve(field, x0, cond=cond, **options).y,
        )

    return prepare


def torchdyn(problem: Problem, operation: Operation) -> Call:
    numerics = importlib.import_module("torchdyn.numerics")
    case, t, field = problem.case, problem.times, problem.velocity
    if case.method not in ("euler", "dopri5"):
        raise NotApplicable(f"its {case.method} has other coefficients")

    def solver(x0: Tensor) -> Tensor:
        if case.steps is None:
            return numerics.odeint(field, x0, t, case.method, atol=case.tol, rtol=case.tol)[1][-1]
        return numerics.odeint(field, x0, t, case.method)[1][-1]

    return torch_operation(problem, operation, solver)


def torchode(problem: Problem, operation: Operation) -> Call:
    to = importlib.import_module("torchode")
    case, shape, field = problem.case, problem.x0.shape, problem.velocity
    methods = {"euler": to.Euler, "dopri5": to.Dopri5}
    if case.method not in methods:
        raise NotApplicable(f"it has no {case.method}")
    # It takes flat states and a time per sample.
    term = to.ODETerm(lambda t, x: field(t, x.reshape(shape)).flatten(1))
    method = methods[case.method](term=term)
    batch = problem.x0.new_zeros(case.batch)
    if case.steps is None:
        control = to.IntegralController(atol=case.tol, rtol=case.tol, term=term)
        dt = None
    else:
        control, dt = to.FixedStepController(), batch + 1 / case.steps
    adjoint = to.AutoDiffAdjoint(method, control, backprop_through_step_size_control=False)

    def solver(x0: Tensor) -> Tensor:
        task = to.InitialValueProblem(y0=x0.flatten(1), t_start=batch, t_end=batch + 1)
        return adjoint.solve(task, dt0=dt).ys[:, -1].reshape(shape)

    return torch_operation(problem, operation, solver)


def _jax(name: str) -> Callable[[Problem, Operation], Call]:
    def prepare(problem: Problem, operation: Operation) -> Call:
        return getattr(importlib.import_module("benchmarks.jax_peers"), name)(problem, operation)

    return prepare


BASELINE = "torchdiffeq.odeint"
PEERS = {
    peer.name: peer
    for peer in (
        Peer("torchdiffeq.odeint", _drop_in("torchdiffeq", "odeint")),
        Peer(
            "torchdiffeq.odeint_adjoint",
            _drop_in("torchdiffeq", "odeint_adjoint"),
            approximate=True,
        ),
        Peer("plain loop", plain_loop),
        Peer("torch.compile", compiled_loop, kind="traced"),
        Peer("torch.compile reduce-overhead", compiled_loop_reduced, kind="traced"),
        Peer("CUDA-graphed loop", graphed_loop, kind="traced"),
        Peer("torchdyn", torchdyn),
        Peer("torchode", torchode),
        Peer("diffrax", _jax("diffrax_recursive"), kind="jax"),
        Peer("diffrax DirectAdjoint", _jax("diffrax_direct"), kind="jax"),
        Peer("jax", _jax("unrolled"), kind="jax"),
        Peer("fmft_fast.odeint", _drop_in("fmft_fast", "odeint")),
        Peer("fmft_fast.odeint_adjoint", _drop_in("fmft_fast", "odeint_adjoint"), approximate=True),
        Peer("fmft_fast.solve", _solve("discrete")),
        Peer('fmft_fast.solve(gradient="backprop")', _solve("backprop")),
    )
}
