"""What a solve did: evaluations, accepted and rejected steps, last step size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class SolveStats:
    """Statistics of one solve.

    Attributes:
        method: name of the method.
        evaluations: calls of the field.
        accepted: accepted steps.
        rejected: rejected steps (0 with fixed steps).
        last_step: size |h| of the last accepted step; None if it was never on the host.
    """

    method: str
    evaluations: int
    accepted: int
    rejected: int = 0
    last_step: float | None = None


_logs: ContextVar[tuple[list[SolveStats], ...]] = ContextVar("solve_logs", default=())


@contextmanager
def record_stats() -> Iterator[list[SolveStats]]:
    """Collect the statistics of every solve inside the block, in order of completion.

    The solves of a continuous adjoint's backward pass count when it runs inside the block.

    Example:
        >>> import torch
        >>> from fmft_fast import odeint, record_stats
        >>> with record_stats() as log:
        ...     y = odeint(lambda t, y: -y, torch.ones(3), torch.tensor([0.0, 1.0]))
        >>> log[0].accepted > 0
        True
    """
    log: list[SolveStats] = []
    token = _logs.set((*_logs.get(), log))
    try:
        yield log
    finally:
        _logs.reset(token)


def report(stats: SolveStats) -> None:
    """Append to every open log."""
    for log in _logs.get():
        log.append(stats)
