"""How stiff and how curved a flow is: slopes of its field at points, and along its trajectories."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmft_fast.errors import InputError
from fmft_fast.solvers import solve

Field = Callable[[Tensor, Tensor], Tensor]
# Rows that go through the field at a time: enough to hide its overhead, little memory.
ROWS = 16_384
# Beyond this size a power iteration costs less than the whole Jacobian.
EXACT_DIM = 128
TINY = torch.finfo(torch.float64).tiny


class Slopes(NamedTuple):
    """How a field changes with the state, at each of some points.

    Attributes:
        lipschitz: [rows], local Lipschitz constant: the largest singular value of the Jacobian J.
        one_sided: [rows], one-sided Lipschitz constant: the largest eigenvalue of (J + J^T) / 2.
            Neighbours part no faster than exp(one_sided t); below 0 they come together.
    """

    lipschitz: Tensor
    one_sided: Tensor


def slopes(
    field: Field,
    t: Tensor,
    x: Tensor,
    *,
    exact_dim: int = EXACT_DIM,
    iterations: int = 200,
    rtol: float = 1e-4,
) -> Slopes:
    """Give the local Lipschitz constant and the one-sided one at each row.

    Small states get the whole Jacobian; large ones a power iteration by products with J and J^T,
    whose value never exceeds the true one but for rounding and is close once it has settled.

    Args:
        field: `field(t, x)`, each row by itself.
        t: flow times, 0-d or [rows].
        x: states, [rows, *state].
        exact_dim: largest size of a state whose Jacobian is computed.
        iterations: largest number of iterations for larger states.
        rtol: relative change of every row at which an iteration ends.

    Raises:
        InputError: x has no rows.

    Example:
        >>> turn = torch.tensor([[-1.0, 3.0], [-3.0, -1.0]])
        >>> [float(s) for s in slopes(lambda t, x: x @ turn.T, torch.tensor(0.0), torch.ones(1, 2))]
        [3.1622776985168457, -1.0]
    """
    if x.ndim < 2 or not len(x):
        raise InputError(f"x must be [rows, *state] with at least one row, got {list(x.shape)}")
    t = torch.as_tensor(t).to(x).expand(len(x))
    size = x[0].numel()
    exact = size <= exact_dim
    count = max(1, ROWS // size) if exact else ROWS
    parts = []
    for at, rows in zip(t.split(count), x.split(count), strict=True):
        if exact:
            parts.append(_exact_slopes(jacobian(field, at, rows)))
        else:
            parts.append(_iterated_slopes(field, at, rows, iterations, rtol))
    return Slopes(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def jacobian(field: Field, t: Tensor, x: Tensor) -> Tensor:
    """Give the Jacobians with respect to the state, [rows, n, n] for states of n numbers.

    Args:
        field: `field(t, x)`, each row by itself.
        t: flow times, [rows].
        x: states, [rows, *state].
    """
    n = x[0].numel()
    columns = []
    for i in range(n):
        direction = torch.zeros_like(x).flatten(1)
        direction[:, i] = 1
        columns.append(_push(field, t, x, direction.view_as(x)).flatten(1))
    return torch.stack(columns, dim=2)


def acceleration(field: Field, t: Tensor, x: Tensor) -> Tensor:
    """Give d^2 x/dt^2 = du/dt + J u along trajectories of the field, [rows, *state].

    Args:
        field: `field(t, x)`, each row by itself.
        t: flow times, [rows].
        x: states, [rows, *state].

    Example:
        >>> float(acceleration(lambda t, x: t[:, None] * x, torch.ones(1), torch.ones(1, 1)))
        2.0
    """
    with torch.no_grad():
        u = evaluate(field, t, x)
        return torch.func.jvp(field, (t, x), (torch.ones_like(t), u))[1]


@dataclass(frozen=True)
class Stiffness:
    """Slopes and lengths along the trajectories of one field, each a tensor.

    Attributes:
        t: times, [steps + 1].
        lipschitz: local Lipschitz constants, [steps + 1, batch].
        one_sided: one-sided Lipschitz constants, [steps + 1, batch].
        path_ratio: length of each path over its displacement, [batch].
        end: states at the last time, [batch, *state].
    """

    t: Tensor
    lipschitz: Tensor
    one_sided: Tensor
    path_ratio: Tensor
    end: Tensor

    @property
    def peak(self) -> Tensor:
        """Give the largest Lipschitz constant on each path, [batch]."""
        return self.lipschitz.amax(0)

    @property
    def growth(self) -> Tensor:
        """Give the integral of the one-sided constant, [batch].

        An error made at t = 0 is multiplied by exp(growth) at most, as long as it stays small.
        """
        return torch.trapezoid(self.one_sided, self.t.to(self.one_sided), dim=0)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Give median, 95 % quantile, mean and largest value of each number over the batch."""
        numbers = {"peak": self.peak, "growth": self.growth, "path_ratio": self.path_ratio}
        numbers["mean_lipschitz"] = self.lipschitz.mean(0)
        return {name: summary(values) for name, values in numbers.items()}

    def __str__(self) -> str:
        """Give one line a number."""
        texts = {
            "peak": "largest Lipschitz constant on a path",
            "mean_lipschitz": "mean Lipschitz constant on a path",
            "growth": "integral of the one-sided constant",
            "path_ratio": "path length / displacement",
        }
        table = self.to_dict()
        return "\n".join(
            f"{text:38} median {table[key]['median']:.4g}, 95 % {table[key]['q95']:.4g}, "
            f"largest {table[key]['max']:.4g}"
            for key, text in texts.items()
        )


def stiffness(field: Field, x0: Tensor, *, steps: int = 100, method: str = "rk4") -> Stiffness:
    """Measure a field along its own trajectories from t = 0 to t = 1, in float64.

    The constants are taken at the ends of the steps: between them they may be larger, so that
    `peak` is a lower estimate of the true maximum; take more steps to see what it misses.

    Args:
        field: `field(t, x)`, each row by itself; t is 0-d in the solve and [rows] elsewhere.
        x0: noise, [batch, *state].
        steps: number of steps of the solve.
        method: its method.

    Example:
        >>> found = stiffness(lambda t, x: -3 * x, torch.ones(2, 1), steps=50)
        >>> round(float(found.peak[0]), 6), round(float(found.growth[0]), 6)
        (3.0, -3.0)
    """
    field, x0 = in_double(field), x0.detach().double()
    solution = solve(field, x0, method=method, steps=steps, gradient="none", save="all")
    count, batch = solution.y.shape[:2]
    t = solution.t.to(x0.device)
    rows = slopes(field, t.repeat_interleave(batch), solution.y.flatten(0, 1))
    lipschitz, one_sided = (part.view(count, batch) for part in rows)
    return Stiffness(t, lipschitz, one_sided, path_ratios(solution.y), solution.y[-1])


def path_ratio(trajectory: Tensor) -> float:
    """Give mean path length / mean displacement: 1 for straight lines, more for curved ones.

    Args:
        trajectory: states along the solve, [steps + 1, batch, *state].

    Raises:
        InputError: there is no step, or the shape is another.

    Example:
        >>> path_ratio(torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1))
        1.0
    """
    length, displacement = _lengths(trajectory)
    return float(length.mean() / displacement.mean().clamp_min(TINY))


def path_ratios(trajectory: Tensor) -> Tensor:
    """Give path length / displacement of each sample, [batch], float64; see `path_ratio`."""
    length, displacement = _lengths(trajectory)
    return length / displacement.clamp_min(TINY)


def summary(values: Tensor) -> dict[str, float]:
    """Give mean, median, 95 % quantile and largest value of numbers [batch].

    Both quantiles are values that occurred (the lower of two), so that infinite ones do no harm.
    """
    values = values.double()
    return {
        "mean": float(values.mean()),
        "median": float(values.median()),
        "q95": float(values.quantile(0.95, interpolation="lower")),
        "max": float(values.max()),
    }


def in_double(field: Any) -> Any:
    """Give a copy of a module in float64 and without dropout; a function comes back as it is."""
    if isinstance(field, nn.Module):
        return copy.deepcopy(field).double().eval().requires_grad_(False)
    return field


def evaluate(field: Field, t: Tensor, x: Tensor) -> Tensor:
    """Give the field at rows of states, each at its own time; refuse what is not row by row."""
    u = field(t, x)
    if u.shape != x.shape:
        raise InputError(
            f"the field must take times [{len(t)}] and give {list(x.shape)}, got "
            f"{list(u.shape)}; let it broadcast t with t.unsqueeze(-1)"
        )
    return u


def _lengths(trajectory: Tensor) -> tuple[Tensor, Tensor]:
    """Give path length and displacement of each sample, both [batch]."""
    if trajectory.ndim < 3 or len(trajectory) < 2:
        raise InputError(
            f"expected a trajectory [steps + 1, batch, *state], got {list(trajectory.shape)}; "
            f'solve with save="all"'
        )
    states = trajectory.flatten(2).double()
    return states.diff(dim=0).norm(dim=2).sum(0), (states[-1] - states[0]).norm(dim=1)


def _push(field: Field, t: Tensor, x: Tensor, direction: Tensor) -> Tensor:
    """Give J direction at every row."""
    return torch.func.jvp(lambda x: evaluate(field, t, x), (x,), (direction,))[1]


def _exact_slopes(j: Tensor) -> Slopes:
    return Slopes(
        torch.linalg.matrix_norm(j, ord=2),
        torch.linalg.eigvalsh((j + j.mT) / 2)[:, -1],
    )


@torch.no_grad()
def _iterated_slopes(field: Field, t: Tensor, x: Tensor, iterations: int, rtol: float) -> Slopes:
    """Iterate with J^T J for the norm; then with J + J^T, shifted so that all of it is >= 0."""
    pull = torch.func.vjp(lambda x: field(t, x), x)[1]
    start = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x)

    def iterate(apply: Callable[[Tensor], Tensor]) -> Tensor:
        """Give the largest eigenvalue of a symmetric operator >= 0 at each row, [rows]."""
        v, value = _unit(start), x.new_zeros(len(x))
        for _ in range(iterations):
            image = apply(v)
            last, value = value, (v * image).flatten(1).sum(1)
            if bool((value - last).abs().le(rtol * value.abs()).all()):  # sync: whether to go on
                break
            v = _unit(image)
        return value

    norm = iterate(lambda v: pull(_push(field, t, x, v))[0]).clamp_min(0).sqrt()
    shift = _along(norm, x)

    def shifted(v: Tensor) -> Tensor:
        return (_push(field, t, x, v) + pull(v)[0]) / 2 + shift * v

    return Slopes(norm, iterate(shifted) - norm)


def _unit(v: Tensor) -> Tensor:
    return v / _along(v.flatten(1).norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny), v)


def _along(values: Tensor, x: Tensor) -> Tensor:
    """Reshape [rows] so that it multiplies x [rows, *state]."""
    return values.view(-1, *[1] * (x.ndim - 1))
