"""Gradients in float32 err no more than torch's own, however many rows and steps they sum over."""

from __future__ import annotations

import functools

import pytest
import torch
from ops.networks import chain, make_inputs, make_program, residual, viscosity

from fmft_fast.ops.network import evaluate
from fmft_fast.ops.trajectory import Control, Reference, flatten, rebuild
from fmft_fast.solvers.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

cpu = pytest.importorskip("fmft_fast.ops.trajectory_cpu", exc_type=ImportError)
KERNELS, REFERENCE = cpu.KERNELS, Reference()
# Network, method, steps, batch.
SOLVES = {
    "small": (chain(2, (64, 64, 64)), "euler", 16, 256),
    "many steps": (chain(2, (64, 64), "silu"), "euler", 256, 256),
    "many rows": (chain(2, (24,), "tanh"), "euler", 8, 4096),
    "few columns": (chain(2, (8, 8), "sigmoid"), "euler", 32, 512),
    "one layer": (chain(5, ()), "euler", 64, 512),
    "tables": (chain(7, (24, 24), "gelu", time="tables", cond=True, skips=True), "heun3", 8, 256),
    "viscosity": (viscosity(7, 40, 3, base=True), "midpoint", 16, 256),
    "few sums": (chain(32, (70, 130), "softplus", 1.5), "euler", 4, 256),
    "wide": (chain(32, (300, 300), "tanh"), "euler", 4, 1024),
}
RESIDUALS = ("collocated, condition", "lmi, low rank")


def cast(inputs, dtype):
    return rebuild(inputs, [x.to(dtype) for x in flatten(inputs)])


def everything(inputs):
    return rebuild(inputs, [True] * len(flatten(inputs)))


def upstream(y):
    """Gradients of one sign, so that sums of theirs grow, and others around zero."""
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [torch.ones_like(noise), noise]


def gradients(kernels, program, inputs, keep="inputs"):
    """The flat gradients of every upstream one."""
    out, kept = kernels.forward(program, inputs, keep)
    return [
        flatten(kernels.backward(program, inputs, kept, g.to(out.dtype), everything(inputs)))
        for g in upstream(out)
    ]


def check(found, exact, rough):
    """Errors are at most twice those of torch in the same precision, or some rounding."""
    for ours, truths, theirs in zip(found, exact, rough, strict=True):
        for x, truth, y in zip(ours, truths, theirs, strict=True):
            assert x.dtype == torch.float32
            own = torch.linalg.vector_norm(y.double() - truth)
            slack = torch.finfo(torch.float32).eps * torch.linalg.vector_norm(truth)
            assert torch.linalg.vector_norm(x.double() - truth) <= 2 * own + slack


@functools.cache
def fixed(name):
    """A solve in float32, with its gradients in float64 and by torch."""
    if name in SOLVES:
        (network, shapes), method, steps, batch = SOLVES[name]
        program = make_program(network, method, steps)
        inputs = make_inputs(network, shapes, batch, steps * program.stages, torch.float32)
    else:
        program, inputs = residual(name, 256, "midpoint", 16)
        inputs = cast(inputs, torch.float32)
    exact = gradients(REFERENCE, program, cast(inputs, torch.float64))
    return program, inputs, exact, gradients(REFERENCE, program, inputs)


@pytest.mark.parametrize("name", [*SOLVES, *RESIDUALS])
def test_fixed_steps(isa, name):
    program, inputs, *known = fixed(name)
    check(gradients(KERNELS, program, inputs), *known)
    if name == "small":
        check(gradients(KERNELS, program, inputs, "activations"), *known)


def test_several_threads(isa):
    program, inputs, *known = fixed("small")
    torch.set_num_threads(3)
    check(gradients(KERNELS, program, inputs), *known)


def uneven(batch):
    """Inputs of a field whose rows need numbers of steps that differ, and bounds of the steps."""
    network, shapes = chain(3, (32, 32), "tanh", cond=True)
    inputs = make_inputs(network, shapes, batch, 0, torch.float32)
    inputs.y0 = torch.linspace(0.1, 3, batch)[:, None] * flatten(inputs)[0]
    return network, inputs, Control(1e-3, 1e-3, max_step=0.04)


def test_adaptive_steps(isa):
    network, inputs, control = uneven(256)
    tableau = METHODS["dopri5"].tableau
    found = KERNELS.adaptive(network, tableau, control, inputs, [0.0, 0.51, 1.0], "inputs")
    assert found.program.steps >= 25
    ours = [
        flatten(KERNELS.backward(found.program, inputs, found.kept, g, everything(inputs)))
        for g in upstream(found.out)
    ]
    exact = gradients(REFERENCE, found.program, cast(inputs, torch.float64))
    check(ours, exact, gradients(REFERENCE, found.program, inputs))


def replayed(network, inputs, kept):
    """Gradients by the accepted steps of every row, which rests in steps of size 0 at the end."""
    tableau = METHODS["bosh3"].tableau
    assert tableau is not None
    tableau = tableau.advancing
    nodes, sizes = zip(*map(kept.steps, range(len(inputs.y0))), strict=True)
    leaves = [x.clone().requires_grad_() for x in flatten(inputs)]
    inputs, y = rebuild(inputs, leaves), leaves[0]
    for n in range(max(map(len, sizes))):
        h = torch.tensor([x[n] if n < len(x) else 0 for x in sizes], dtype=y.dtype)[:, None]
        t = torch.tensor([x[min(n, len(x) - 1)] for x in nodes], dtype=torch.float64)[:, None]
        k = []
        for c, weights in zip(tableau.c, tableau.a, strict=True):
            x = y + h * sum(w * f for w, f in zip(weights, k, strict=True))
            k.append(evaluate(network, inputs, (t + c * h).to(y.dtype), 0, x))
        y = y + h * sum(w * f for w, f in zip(tableau.b, k, strict=True))
    return [
        torch.autograd.grad(y, leaves, g.to(y.dtype), materialize_grads=True, retain_graph=True)
        for g in upstream(y)
    ]


def test_steps_of_every_row(isa):
    network, inputs, control = uneven(400)
    tableau = METHODS["bosh3"].tableau
    found = KERNELS.adaptive_per_sample(network, tableau, control, inputs, 0.0, 1.0, "inputs")
    assert found.failed is None and found.accepted.min() >= 25
    ours = [
        flatten(KERNELS.backward_per_sample(found.kept, g, everything(inputs)))
        for g in upstream(found.y)
    ]
    exact = replayed(network, cast(inputs, torch.float64), found.kept)
    check(ours, exact, replayed(network, inputs, found.kept))
