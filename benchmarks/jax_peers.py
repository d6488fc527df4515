"""The JAX rivals: the torch fields' weights, the same solve, compiled as a whole by jit."""

# jax and diffrax are not installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import torch
from jax import lax

from fmft_fast.fields import Residual

from .cases import Operation, Problem
from .fields import MLP, ResidualGAV, UNet
from .peers import LEARNING_RATE, Call, NotApplicable, stage_times

Weights = dict[str, Any]
Velocity = Callable[[Any, Any, Weights], Any]
State = Callable[[Weights, Any], Any]
UNROLLED = 64  # evaluations; longer solves are scanned, else they compile for minutes


def unrolled(problem: Problem, operation: Operation) -> Call:
    """Explicit Runge-Kutta steps by hand, unrolled where they are few."""
    if problem.case.steps is None:
        raise NotApplicable("steps by hand have no step control")
    field, tableau, h = velocity(problem), problem.case.tableau, 1 / problem.case.steps
    times = stage_times(problem).tolist()

    def add(x: Any, row: Sequence[float], k: list[Any]) -> Any:
        return x + h * sum(w * slope for w, slope in zip(row, k, strict=True) if w) if k else x

    def step(x: Any, row: Any, weights: Weights) -> Any:
        k: list[Any] = []
        for i, a in enumerate(tableau.a):
            k.append(field(row[i], add(x, a, k), weights))
        return add(x, tableau.b, k)

    def solve(weights: Weights, x: Any) -> Any:
        if problem.evaluations > UNROLLED:
            rows = jnp.asarray(times, x.dtype)
            return lax.scan(lambda x, row: (step(x, row, weights), None), x, rows)[0]
        for row in times:
            x = step(x, row, weights)
        return x

    return jax_operation(problem, operation, solve)


def diffrax_recursive(problem: Problem, operation: Operation) -> Call:
    """With its default adjoint, and a checkpoint for every step where they are known."""
    return _diffrax(problem, operation, diffrax.RecursiveCheckpointAdjoint(problem.case.steps))


def diffrax_direct(problem: Problem, operation: Operation) -> Call:
    """With the adjoint that differentiates a bounded loop."""
    if operation == "forward":
        raise NotApplicable("the adjoint does not change the forward solve")
    if problem.case.steps is None:
        raise NotApplicable("its loop would be as long as the largest number of steps")
    return _diffrax(problem, operation, diffrax.DirectAdjoint())


def _diffrax(problem: Problem, operation: Operation, adjoint: diffrax.AbstractAdjoint) -> Call:
    case, field = problem.case, velocity(problem)
    methods = {"euler": diffrax.Euler, "dopri5": diffrax.Dopri5}
    if case.method not in methods:
        raise NotApplicable(f"it has no {case.method}")
    options: dict[str, Any] = {"dt0": None, "max_steps": 4096}
    if case.steps is None:
        options["stepsize_controller"] = diffrax.PIDController(rtol=case.tol, atol=case.tol)
    else:
        options |= {"dt0": 1 / case.steps, "max_steps": case.steps}

    def solve(weights: Weights, x: Any) -> Any:
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: field(t, y, args)),
            methods[case.method](),
            t0=0.0,
            t1=1.0,
            y0=x,
            args=weights,
            saveat=diffrax.SaveAt(t1=True),
            adjoint=adjoint,
            **options,
        )
        assert found.ys is not None
        return found.ys[0]

    return jax_operation(problem, operation, solve)


def jax_operation(problem: Problem, operation: Operation, solve: State) -> Call:
    """The operation around a JAX solve, as one compiled function."""
    if problem.x0.device.type == "cuda" and jax.default_backend() != "gpu":
        raise NotApplicable("this JAX has no GPU")
    names = [name for name, _ in problem.field.named_parameters()]
    weights = {name: _array(p) for name, p in problem.field.named_parameters()}
    x0 = _array(problem.x0)

    def loss(weights: Weights, x: Any) -> tuple[Any, Any]:
        state = solve(weights, x)
        return jnp.mean(jnp.square(state)), state

    if operation == "forward":
        run = jax.jit(solve)
        return lambda: [jax.block_until_ready(run(weights, x0))]
    if operation == "gradient":
        derive = jax.jit(jax.grad(loss, has_aux=True))

        def gradient() -> Sequence[Any]:
            grads, state = jax.block_until_ready(derive(weights, x0))
            return [state, *(grads[name] for name in names)]

        return gradient
    step = jax.jit(lambda *old: _adamw(loss, *old), donate_argnums=(0, 1, 2, 3))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    # Copies, for what is donated is gone.
    kept = [weights, zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros(())]

    def training() -> Sequence[Any]:
        kept[:] = jax.block_until_ready(step(*kept, x0))
        return [kept[0][name] for name in names]

    return training


def _adamw(loss: Any, weights: Weights, m: Weights, v: Weights, n: Any, x: Any) -> tuple:
    grads, _ = jax.grad(loss, has_aux=True)(weights, x)
    n = n + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
    weights = jax.tree.map(
        lambda w, m, v: (
            w - LEARNING_RATE * (m / (1 - 0.9**n)) / (jnp.sqrt(v / (1 - 0.999**n)) + 1e-8)
        ),
        weights,
        m,
        v,
    )
    return weights, m, v, n


def velocity(problem: Problem) -> Velocity:
    """The field as a function (t, x, weights), the weights by torch's names."""
    field = problem.field
    if isinstance(field, UNet):
        return _unet
    if isinstance(field, ResidualGAV):
        return _gav
    if isinstance(field, Residual):
        return _residual
    assert isinstance(field, MLP)
    act = jax.nn.silu if problem.case.field == "policy" else jax.nn.selu
    cond = None if problem.cond is None else _array(problem.cond)
    return lambda t, x, weights: _mlp(t, x, weights, act, cond)


def _array(x: torch.Tensor) -> Any:
    # A copy: the memory of a tensor that torch goes on to change must not be shared.
    return jnp.array(x.detach().cpu().numpy(), copy=True)


def _mlp(t: Any, x: Any, w: Weights, act: Any, cond: Any = None, prefix: str = "") -> Any:
    time = jnp.broadcast_to(jnp.asarray(t, x.dtype), (x.shape[0], 1))
    z = jnp.concatenate([x, time] if cond is None else [x, cond, time], 1)
    keys = [name for name in w if name.startswith(f"{prefix}net.") and name.endswith("weight")]
    for i in range(len(keys)):
        layer = f"{prefix}net.{2 * i}"
        z = z @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
        if i + 1 < len(keys):
            z = act(z)
    return z


def _gav(t: Any, x: Any, w: Weights) -> Any:
    out = _mlp(t, x, w, jax.nn.selu, prefix="mlp.") + x @ w["a0.weight"].T
    for i, f in enumerate((jnp.tanh, lambda z: jax.nn.leaky_relu(z, 0.1), jax.nn.elu)):
        out = out + f(x @ w[f"d.{i}.weight"].T) @ w[f"a.{i}.weight"].T
    return out


def _residual(t: Any, x: Any, w: Weights) -> Any:
    r, k = w["branch.damping"], w["branch.skew"]
    rate = 1e-3 + jax.nn.softplus(10 * w["branch.excess_rate"] - 5)
    out = _mlp(t, x, w, jax.nn.selu, prefix="base.") + x @ (k - k.T - r @ r.T).T - rate * x
    for i, f in enumerate((jnp.tanh, jax.nn.leaky_relu, jnp.arcsinh)):
        gain, offset, d = (w[f"branch.branches.{i}.{n}"] for n in ("gain", "offset", "directions"))
        a = -(d * (jax.nn.softplus(10 * gain - 5) * d.shape[1] / len(d))[:, None]).T
        out = out + (f(x @ d.T + offset) - f(offset)) @ a.T
    return out


def _unet(t: Any, x: Any, w: Weights) -> Any:
    def conv(x: Any, name: str, stride: int = 1) -> Any:
        out = lax.conv_general_dilated(x, w[f"{name}.weight"], (stride, stride), ((1, 1), (1, 1)))
        return out + w[f"{name}.bias"][:, None, None]

    def normed(x: Any, name: str) -> Any:
        groups = x.reshape(x.shape[0], 4, -1)
        mean = groups.mean(2, keepdims=True)
        scale = lax.rsqrt(groups.var(2, keepdims=True) + 1e-5)
        out = ((groups - mean) * scale).reshape(x.shape)
        out = out * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
        return jax.nn.silu(out)

    time = jnp.broadcast_to(jnp.asarray(t, x.dtype), (x.shape[0], 1, *x.shape[2:]))
    high = normed(conv(jnp.concatenate((x, time), 1), "enter"), "norm1")
    low = normed(conv(high, "down", 2), "norm2")
    low = low + normed(conv(low, "middle"), "norm3")
    low = low.repeat(2, 2).repeat(2, 3)
    return conv(normed(conv(jnp.concatenate((high, low), 1), "up"), "norm4"), "leave")
