"""Sampling: carry noise through the ODE without gradients, in batches, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fmft_fast.errors import InputError
from fmft_fast.solvers import fused, solve
from fmft_fast.solvers.whole_solve import final_state


def sample(
    field,
    x0: Tensor | int,
    *,
    steps: int | Tensor | None = None,
    method: str = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    cond: Tensor | None = None,
    state: Sequence[int] | None = None,
    seed: int = 0,
    batch: int = 8192,
    backend: str = "auto",
) -> Tensor:
    """Draw samples: solve dx/dt = field(t, x) from t = 0 to t = 1.

    Args:
        field: `field(t, x)` or, with cond, `field(t, x, cond)`.
        x0: noise, [n, *state], or the number n of samples to draw noise for.
        steps: number of steps or the grid of times; not with tolerances.
        method: solver's name.
        rtol: relative tolerance of an adaptive solve.
        atol: absolute tolerance of an adaptive solve.
        cond: conditions, [n, ...].
        state: shape of one state, needed when x0 is a number; a field with `dim` needs none.
        seed: seed of the noise when x0 is a number.
        batch: rows solved at a time.
        backend: see `fmft_fast.solve`.

    Returns:
        The samples, [n, *state], without gradient.

    Raises:
        InputError: n, state or batch do not make sense.

    Example:
        >>> sample(lambda t, x: 3 - x, 5, state=(2,), steps=100).shape
        torch.Size([5, 2])
    """
    if isinstance(x0, int):
        x0 = _noise(field, x0, state, seed)
    return integrate(
        field,
        x0,
        steps=steps,
        method=method,
        rtol=rtol,
        atol=atol,
        cond=cond,
        batch=batch,
        backend=backend,
    )


def integrate(
    field,
    x: Tensor,
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    steps: int | Tensor | None = None,
    method: str = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    cond: Tensor | None = None,
    batch: int = 8192,
    backend: str = "auto",
) -> Tensor:
    """Carry x, [n, *state], from t0 to t1 in batches, without gradient; either may be the later."""
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    n = x.shape[0]
    if cond is not None and cond.shape[0] != n:
        raise InputError(f"expected {n} conditions, one per row, got {len(cond)}")

    fixed = type(steps) is int and steps > 0 and type(t0) is type(t1) is float
    in_one_call = fixed and rtol is atol is None and not torch.compiler.is_compiling()

    def end(x: Tensor, cond: Tensor | None) -> Tensor:
        single_steps = nullcontext()
        if in_one_call:
            assert isinstance(steps, int)
            found = final_state(field, x, (t0, t1), steps, method, backend, cond)
            if found is not None:
                return found
            single_steps = fused("off")
        with single_steps:
            return solve(
                field,
                x,
                t0,
                t1,
                method=method,
                steps=steps,
                rtol=rtol,
                atol=atol,
                gradient="none",
                backend=backend,
                cond=cond,
            ).y

    with torch.no_grad():
        if 0 < n <= batch:
            return end(x, cond)
        parts = [slice(i, i + batch) for i in range(0, n, batch)]
        ends = [end(x[rows], None if cond is None else cond[rows]) for rows in parts]
        return torch.cat(ends) if ends else x.clone()


def _noise(field, n: int, state: Sequence[int] | None, seed: int) -> Tensor:
    """Draw n rows of noise on the CPU, so that every device sees the same, and move them."""
    if state is None:
        if not hasattr(field, "dim"):
            raise InputError("this field does not tell its state's shape: pass state=(...) or x0")
        state = (field.dim,)
    if n < 1:
        raise InputError(f"the number of samples must be at least 1, got {n}")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, *state, generator=generator)
    like = next(field.parameters(), noise) if isinstance(field, torch.nn.Module) else noise
    return noise.to(like)
