"""Fields that are solved layer by layer, for tests of recorded solves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fmft_fast import cuda_graphs, fused, odeint, solve
from fmft_fast.fields import GAV, MLP
from fmft_fast.ops.trajectory_layered import KERNELS
from fmft_fast.solvers import recorded_solve, whole_solve
from fmft_fast.train import FinetuneConfig, MLEFineTuner


@pytest.fixture
def layered(monkeypatch):
    """Every solve goes layer by layer."""
    recorded_solve.clear()
    monkeypatch.setattr(whole_solve, "choose_trajectory", lambda *_: KERNELS)
    with fused("require"):
        yield
    recorded_solve.clear()


class Embedded(nn.Module):
    """A field that sees its time by an embedding, so that kernels are given tables."""

    def __init__(self):
        super().__init__()
        self.first, self.time, self.last = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("rates", torch.arange(1.0, 5.0))

    def forward(self, t, x):
        return self.last(torch.tanh(self.first(x) + self.time(torch.sin(t * self.rates))))


FIELDS = {
    "mlp": lambda: MLP(3, (8, 7), "silu"),
    "tables": Embedded,
    "derived weights": lambda: GAV(3, width=8),
    "lambda": lambda: nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 3)),
}


def make(name="mlp"):
    return FIELDS[name]().double()


def state(rows=5):
    return torch.randn(rows, 3, dtype=torch.float64)


def call(field, x, cond=None, **settings):
    """The states of a solve."""
    if isinstance(field, nn.Sequential):
        inner = field
        field = lambda t, x: inner(x) - x  # noqa: E731
    if "t" in settings:
        return odeint(field, x, **settings)
    return solve(field, x, cond=cond, **{"steps": 4, **settings}).y


def run(field, x, cond=None, **settings):
    """The states of a solve and all gradients of a sum of them."""
    x = x.detach().clone().requires_grad_()
    leaves = [x, *(p for p in field.parameters() if p.requires_grad)]
    if cond is not None:
        cond = cond.clone().requires_grad_()
        leaves.append(cond)
    y = call(field, x, cond, **settings)
    return [y, *torch.autograd.grad(total(y), leaves)]


def total(y):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device)
    return (y * weights.reshape(y.shape)).sum()


def usual(compute, *args, **settings):
    """The same without recordings."""
    with cuda_graphs(False):
        return compute(*args, **settings)


def equal(a, b):
    return all(map(torch.equal, a, b)) and len(a) == len(b)


@torch.no_grad()
def move(field):
    """As an optimiser does."""
    for p in field.parameters():
        p.add_(0.1 * torch.randn_like(p))


CASES = [
    {"method": "euler"},
    {"method": "rk4", "save": "all"},
    {"method": "midpoint", "gradient": "backprop", "t0": 1.0, "t1": -0.5},
    {"method": "dopri5", "steps": torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64)},
    {"method": "heun2", "t": torch.linspace(0, 1, 4)},
]


CHANGES = {
    "data": lambda field: setattr(field.linears[0].weight, "data", torch.randn(8, 4).double()),
    "assign": lambda field: field.load_state_dict(make().state_dict(), assign=True),
    "copy": lambda field: field.load_state_dict(make().state_dict()),
    "parameter": lambda field: setattr(
        field.linears[1], "bias", nn.Parameter(torch.ones(7, dtype=torch.float64))
    ),
    "frozen": lambda field: field.linears[1].weight.requires_grad_(False),
    "module": lambda field: field.linears.__setitem__(2, nn.Linear(7, 3).double()),
    "there and back": lambda field: field.float().double(),
}


def train(field, device="cpu", **settings):
    """The weights after fine-tuning."""
    torch.manual_seed(0)
    default = {"steps": 12, "solver_steps": (2, 3), "method": "midpoint", "batch_size": 16}
    default |= {"coupling": "ot-fixed", "warmup": 3, "lr": 1e-2}
    config = FinetuneConfig(**{**default, "device": device, **settings})
    tuner = MLEFineTuner(field, torch.randn(64, 3), config=config, progress=False)
    return list(tuner.run().model.state_dict().values())
