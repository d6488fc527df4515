"""An adaptive solve as a fixed grid: the accepted steps, with times that keep their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.backend import StepKernels
from .adaptive import AdaptiveSolver
from .inputs import Problem

States = list[Tensor]


@torch.no_grad()
def find_accepted_steps(
    problem: Problem, times: Tensor, kernels: StepKernels, keep_inputs: bool
) -> tuple[Tensor, tuple[States, list[States], Tensor], AdaptiveSolver]:
    """Control the steps so that they meet every one of `times` [T].

    Args:
        problem: what to solve.
        times: [T] times, which may require grad.
        kernels: the step ops.
        keep_inputs: whether to return the stage inputs.

    Returns:
        The grid [N + 1], differentiable in `times`: a step keeps its size, and the one that meets
        a time takes up its change. The states [N + 1], the stage inputs [N][s] (empty lists if not
        kept) and the first slope. The solver, for its counts.
    """
    solver = AdaptiveSolver(problem, kernels, problem.options, strict=True)
    targets = [solver.direction * t for t in times.tolist()]  # sync: control is on the host
    solver.stops = sorted({*solver.stops, *targets[1:]})
    nodes: list[tuple[int, float]] = [(0, 0.0)]
    states, slope = [problem.y0.detach()], solver.f
    inputs: list[States] = []
    for j, target in enumerate(targets[1:]):
        attempts = 0
        while solver.s < target:
            solver.count(attempts)
            attempts += 1
            if solver.attempt():
                offset = solver.direction * (solver.s - targets[j])
                nodes.append((j + 1, 0.0) if solver.s == target else (j, offset))
                states.append(solver.y)
                inputs.append(_stage_inputs(solver) if keep_inputs else [])
    index, offsets = zip(*nodes, strict=True)
    with torch.enable_grad():
        shift = torch.tensor(offsets, dtype=torch.float64, device=times.device)
        grid = times[torch.tensor(index, device=times.device)] + shift
    return grid, (states, inputs, slope), solver


def _stage_inputs(solver: AdaptiveSolver) -> States:
    """Y_i of the last accepted step, without the FSAL stage."""
    last = solver.last
    assert last is not None
    step = solver.direction * last.h
    rows = enumerate(solver.tableau.advancing.a)
    return [solver.kernels.rk_combine(last.y0, last.k[:i], step, a) for i, a in rows]
