"""One adapter per rival: a final state from (case, field, x0), ready for `backward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

import fmft_fast

from .cases import Case, Field

Peer = Callable[[Case, Field, Tensor], Tensor]


def _arguments(case: Case, x0: Tensor) -> tuple[Tensor, dict]:
    options = {"rtol": case.tol, "atol": case.tol, "method": case.method}
    if case.steps is None:
        return torch.tensor([0.0, 1.0], dtype=x0.dtype), options
    return torch.linspace(0, 1, case.steps + 1, dtype=x0.dtype), options


def _through(package: str, function: str) -> Peer:
    def run(case: Case, field: Field, x0: Tensor) -> Tensor:
        module = fmft_fast if package == "fmft_fast" else __import__(package)
        t, options = _arguments(case, x0)
        if function == "odeint_adjoint" and case.steps is not None:
            # The adjoint is for solves that keep nothing between the ends.
            options["options"] = {"step_size": 1 / case.steps}
            t = t[[0, -1]]
        return getattr(module, function)(field, x0, t, **options)[-1]

    return run


def _solve(gradient: Literal["discrete", "backprop"]) -> Peer:
    def run(case: Case, field: Field, x0: Tensor) -> Tensor:
        if case.steps is None:
            steps: dict = {"rtol": case.tol, "atol": case.tol}
        else:
            steps = {"steps": case.steps}
        return fmft_fast.solve(field, x0, method=case.method, gradient=gradient, **steps).y

    return run


def _euler_loop(case: Case, field: Field, x0: Tensor) -> Tensor:
    if case.method != "euler" or case.steps is None:
        raise NotApplicable("the plain loop is written for Euler steps")
    x, h = x0, 1 / case.steps
    for n in range(case.steps):
        x = x + h * field(torch.tensor(n * h, dtype=x0.dtype), x)
    return x


class NotApplicable(Exception):
    """A peer does not run a case."""


PEERS: dict[str, Peer] = {
    "torchdiffeq.odeint": _through("torchdiffeq", "odeint"),
    "torchdiffeq.odeint_adjoint": _through("torchdiffeq", "odeint_adjoint"),
    "plain loop": _euler_loop,
    "fmft_fast.odeint": _through("fmft_fast", "odeint"),
    "fmft_fast.odeint_adjoint": _through("fmft_fast", "odeint_adjoint"),
    "fmft_fast.solve": _solve("discrete"),
    'fmft_fast.solve(gradient="backprop")': _solve("backprop"),
}
