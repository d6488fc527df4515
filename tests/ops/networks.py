"""Small networks of every kind that trajectory kernels take, with random tensors."""

from __future__ import annotations

import torch

from fmft_fast.fields import GAV, MLP, Residual
from fmft_fast.fusion import Plan, find_plan
from fmft_fast.ops.network import Inputs, Layer, Network, Term
from fmft_fast.ops.trajectory import Program
from fmft_fast.solvers.methods import METHODS


def chain(state, hidden, activation="selu", slope=1.0, time="column", cond=False, skips=False):
    """An MLP; time is "column" (of the first matrix), "tables" (of every layer) or None."""
    widths, layers, parameters = (state, *hidden, state), [], []
    for i, (n_in, n_out) in enumerate(zip(widths, widths[1:], strict=False)):
        first, last = i == 0, i == len(widths) - 2
        extra = int(first and time == "column")
        parameters += [(n_out, n_in + extra), (n_out,)]
        layers.append(
            Layer(
                width=n_out,
                terms=(Term(i, 2 * i),),
                bias=2 * i + 1,
                time=(0, n_in) if extra else None,
                table=i if time == "tables" else None,
                cond=0 if first and cond else None,
                activation="identity" if last else activation,
                slope=slope,
                skips=(i,) if skips and n_in == n_out and not first else (),
            )
        )
    return Network(state, tuple(layers)), parameters


def viscosity(state, hidden, branches=2, base=False):
    """A0 x + sum_j A_j f_j(D_j x); with `base` on top of an MLP in (t, x)."""
    layers, parameters, terms = [], [(state, state)], [Term(0, 0)]
    if base:
        parameters += [(hidden, state + 1), (hidden,), (state, hidden)]
        layers.append(Layer(hidden, (Term(0, 1),), 2, (1, state), activation="silu"))
        terms.append(Term(1, 3))
    for _ in range(branches):
        p = len(parameters)
        parameters += [(hidden, state), (hidden,), (state, hidden)]
        layers.append(Layer(hidden, (Term(0, p),), p + 1, activation="tanh"))
        terms.append(Term(len(layers), p + 2))
    layers.append(Layer(state, tuple(terms), bias=len(parameters)))
    parameters.append((state,))
    return Network(state, tuple(layers)), parameters


# v + GAV: every construction, activation, centre and metric, with and without a condition.
CENTER = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
RESIDUALS = {
    "collocated": {"activation": ("tanh", "softsign", "asinh"), "center": CENTER},
    "collocated, condition": {
        "activation": ("clipped_cube", "leaky_relu"),
        "center": "condition",
        "cond_dim": 2,
    },
    "lmi, low rank": {
        "construction": "lmi",
        "activation": ("asinh", "clipped_cube"),
        "center": "learned",
        "rank": 2,
    },
    "lmi, metric": {"construction": "lmi", "activation": ("leaky_relu",), "metric": "learned"},
    "schur-cayley, metric": {
        "construction": "schur-cayley",
        "activation": ("softsign", "tanh"),
        "metric": "learned",
    },
    "schur-cayley-free, condition": {
        "construction": "schur-cayley-free",
        "activation": ("tanh", "asinh"),
        "center": "condition",
        "cond_dim": 2,
    },
}


def residual_field(name, seed=0, joint=False):
    """A field of `RESIDUALS` in float64, its parameters away from where they start."""
    torch.manual_seed(seed)
    options = dict(RESIDUALS[name])
    construction = options.get("construction", "collocated")
    width = None if construction.startswith("schur") else 12
    count, cond = len(options["activation"]), options.get("cond_dim", 0)
    branch = GAV(3, branches=count, width=width, **options)
    field = Residual(MLP(3, (10, 10), "silu", cond_dim=cond), branch, joint).double()
    with torch.no_grad():
        for part, p in branch.named_parameters():
            # Tiny gains would make the branch stiff, and gradients ill-conditioned.
            small = part.endswith(("gain", "diagonal"))
            p.copy_(0.1 + 0.1 * torch.rand_like(p) if small else 0.3 * torch.randn_like(p))
    return field


@torch.no_grad()
def residual(name, batch, method="midpoint", steps=2, outputs=None):
    """Steps of such a field as one network, with its tensors."""
    field = residual_field(name)
    y0 = torch.randn(batch, 3, dtype=torch.float64)
    width = RESIDUALS[name].get("cond_dim", 0)
    cond = torch.randn(batch, width, dtype=torch.float64) if width else None
    plan = find_plan(field, y0, cond)
    assert isinstance(plan, Plan), str(plan)
    inputs = plan.bind(None, cond, y0.shape[:-1])
    inputs.y0 = y0
    return make_program(plan.network, method, steps, outputs, uneven=True), inputs


def odd_arguments(dtype):
    """Zero, subnormal and huge numbers, infinities, NaN, and the neighbours of 1."""
    kind = torch.finfo(dtype)
    sizes = [0.0, kind.tiny * kind.eps, kind.tiny, 2.0**-30, 1 - kind.eps / 2, 1.0, 1 + kind.eps]
    sizes += [8192.0, 8193.0, 2.0**28, 2.0**64, kind.max, torch.inf]
    return torch.tensor([*sizes, *(-x for x in sizes), torch.nan], dtype=dtype)


def activation_alone(activation):
    """One Euler step of 1 from 0 of a field that is the activation of its condition."""
    network = Network(1, (Layer(1, (), cond=0, activation=activation),))
    times, h = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return Program(network, ((),), (1.0,), times, h, (1,))


def make_inputs(network, shapes, batch, stages, dtype=torch.float64, device="cpu", seed=0):
    """Random tensors of a sensible size for a solve with so many stages in all."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(device, dtype)

    tables = {x.table: x.width for x in network.layers if x.table is not None}
    conds = {x.cond: x.width for x in network.layers if x.cond is not None}
    return Inputs(
        draw(batch, network.state),
        [draw(*s, scale=1 / s[-1] ** 0.5 if len(s) == 2 else 0.3) for s in shapes],
        [draw(stages, tables[i], scale=0.3) for i in sorted(tables)],
        [draw(batch, conds[i], scale=0.3) for i in sorted(conds)],
    )


def make_program(network, method="euler", steps=3, outputs=None, uneven=False):
    """Steps of a named method over [0, 1]."""
    tableau = METHODS[method].tableau.advancing
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    grid = grid**1.3 if uneven else grid
    h = grid[1:] - grid[:-1]
    times = grid[:-1, None] + h[:, None] * torch.tensor(tableau.c, dtype=torch.float64)
    return Program(network, tableau.a, tableau.b, times, h, outputs or (steps,))
