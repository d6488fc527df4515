"""The solves that are timed: one literal each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fmft_fast import odeint, record_stats
from fmft_fast.solvers.methods import find_method
from fmft_fast.solvers.tableau import Tableau

from .fields import MLP, Bound, ResidualGAV, UNet, residual_gav

Operation = Literal["forward", "gradient", "training"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
FieldName = Literal["mlp", "policy", "gav", "residual", "unet"]


@dataclass(frozen=True)
class Case:
    """A solve from t = 0 to 1 of one field.

    Attributes:
        name: key on the command line.
        batch: number of states.
        shape: shape of one state.
        field: "mlp" (SELU), "policy" (SiLU, with a condition), "gav" (free matrices),
            "residual" (a `GAV` beside an MLP) or "unet".
        hidden: widths of the hidden layers; of the UNet its channels.
        method: name of the method.
        steps: number of equal steps, or None for adaptive steps.
        tol: rtol and atol of the adaptive steps.
        cond: width of the condition.
        devices: where it is timed unless asked for by name.
        operations: what is timed unless asked for by name.
    """

    name: str
    batch: int
    shape: tuple[int, ...]
    field: FieldName = "mlp"
    hidden: tuple[int, ...] = (64, 64, 64)
    method: str = "euler"
    steps: int | None = 16
    tol: float = 1e-5
    cond: int = 0
    devices: tuple[str, ...] = ("cpu", "cuda")
    operations: tuple[Operation, ...] = ("forward", "gradient")

    @property
    def tableau(self) -> Tableau:
        """The method's coefficients."""
        tableau = find_method(self.method).tableau
        assert tableau is not None and tableau.explicit
        return tableau.advancing

    @property
    def title(self) -> str:
        """The case in a few words."""
        sizes = "x".join(map(str, self.shape))
        widths = "x".join(map(str, self.hidden))
        steps = f"{self.steps} steps" if self.steps else f"tolerance {self.tol:g}"
        cond = f", condition {self.cond}" if self.cond else ""
        field = f"{self.field} {widths}, state {sizes}{cond}"
        return f"{field}, batch {self.batch}, {self.method}, {steps}"


CASES = {
    case.name: case
    for case in (
        Case("small", 256, (2,), operations=OPERATIONS),
        Case("narrow", 16, (2,)),
        Case("wide", 1024, (32,), hidden=(512, 512, 512)),
        Case("rk4", 256, (2,), method="rk4"),
        Case(
            "policy", 256, (32,), "policy", (256, 256, 256), steps=4, cond=66, operations=OPERATIONS
        ),
        Case("gav", 256, (8,), "gav"),
        Case("residual", 256, (8,), "residual"),
        Case("unet", 16, (1, 28, 28), "unet", (16,), steps=4),
        Case("dopri5", 256, (2,), method="dopri5", steps=None),
        Case("long", 256, (2,), steps=256),
        Case("p1", 4096, (2,), devices=("cuda",), operations=OPERATIONS),
    )
}


class Problem:
    """A case made: the field with its weights and the data, the same on every call.

    Attributes:
        case: what it was made from.
        field: field(t, x) or, with a condition, field(t, x, cond).
        velocity: field(t, x), the condition bound in a module.
        function: the same bound in a lambda.
        x0: initial states [batch, *shape].
        cond: condition [batch, cond], or None.
        parameters: what gradients are taken of.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ):
        self.case = case
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            field = _make_field(case)
            x0 = torch.randn(case.batch, *case.shape)
            cond = torch.randn(case.batch, case.cond) if case.cond else None
        self.field = field.to(device, dtype)
        self.x0 = x0.to(device, dtype)
        self.cond = None if cond is None else cond.to(device, dtype)
        self.velocity = self.function = self.field
        if self.cond is not None:
            inner, bound = self.field, self.cond
            self.velocity, self.function = Bound(inner, bound), lambda t, x: inner(t, x, bound)
        self.parameters = list(self.field.parameters())

    @property
    def times(self) -> Tensor:
        """The times to pass to a solver: the ends of the steps, or of the interval."""
        return torch.linspace(
            0, 1, (self.case.steps or 1) + 1, dtype=self.x0.dtype, device=self.x0.device
        )

    @cached_property
    def evaluations(self) -> int:
        """Evaluations that the method needs: with adaptive steps, the accepted steps' only."""
        stages = self.case.tableau.stages
        if self.case.steps:
            return self.case.steps * stages
        tol = self.case.tol
        with torch.no_grad(), record_stats() as log:
            odeint(self.velocity, self.x0, self.times, method=self.case.method, rtol=tol, atol=tol)
        return log[0].accepted * stages

    def useful_flops(self, operation: Operation) -> float:
        """FLOPs of the products and convolutions that cannot be avoided.

        The backward pass counts twice the forward pass, without computing anything again; the
        product with a condition counts once in a solve. Activations are not counted.
        """
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.velocity(self.times[0], self.x0)
        flops = counter.get_total_flops() * self.evaluations
        if self.case.cond:
            of_cond = 2 * self.case.batch * self.case.cond * self.case.hidden[0]
            flops -= of_cond * (self.evaluations - 1)
        return float(flops * (1 if operation == "forward" else 3))

    def useful_bytes(self, operation: Operation) -> float:
        """Bytes that have to be moved: weights and states once, their gradients once."""
        size = self.x0.element_size()
        data = sum(p.numel() for p in self.parameters) + 2 * self.x0.numel()
        data += 0 if self.cond is None else self.cond.numel()
        # The optimiser reads and writes two moments and writes the weights.
        share = {"forward": 1, "gradient": 2, "training": 2}[operation]
        moments = 5 * sum(p.numel() for p in self.parameters) if operation == "training" else 0
        return float(size * (data * share + moments))


def _make_field(case: Case) -> nn.Module:
    if case.field == "unet":
        return UNet(case.shape[0], case.hidden[0])
    (dim,) = case.shape
    if case.field == "gav":
        return ResidualGAV(dim, case.hidden)
    if case.field == "residual":
        return residual_gav(dim, case.hidden)
    act = nn.SiLU if case.field == "policy" else nn.SELU
    return MLP(dim, case.hidden, act, case.cond)


def tiny(case: Case) -> Case:
    """The same kind of case at a size for tests."""
    hidden = (8,) if case.field == "unet" else (8,) * len(case.hidden)
    shape = (1, 8, 8) if case.field == "unet" else case.shape
    steps = None if case.steps is None else min(case.steps, 2)
    return replace(case, batch=5, shape=shape, hidden=hidden, steps=steps, tol=1e-6)
