"""Discrete optimal transport: costs as squared distances of features, exact assignments, groups."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fmft_fast.errors import MissingDependencyError


def optimal_permutation(a: Tensor, b: Tensor) -> Tensor:
    """Give p, [n], such that sum_i |a_i - b_p(i)|^2 is least; a and b are [n, dim].

    SciPy's assignment is the faster one up to 512 rows, POT's network simplex beyond; either
    serves alone when the other is absent.

    Raises:
        MissingDependencyError: neither is installed.
    """
    cost = torch.cdist(a.double(), b.double()).square().cpu().numpy()
    first, second = (_assign_scipy, _assign_pot) if len(a) <= 512 else (_assign_pot, _assign_scipy)
    try:
        order = first(cost)
    except ImportError:
        try:
            order = second(cost)
        except ImportError as error:
            raise MissingDependencyError(
                "optimal-transport pairings need scipy or POT: pip install 'fmft-fast[train]'"
            ) from error
    return torch.as_tensor(order, device=a.device)


def _assign_scipy(cost):
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cost)[1]


def _assign_pot(cost):
    import ot

    mass = ot.unif(len(cost))
    # A vertex of the polytope of uniform plans is a permutation, and the simplex ends in one.
    plan, log = ot.emd(mass, mass, cost, numItermax=max(1_000_000, 2500 * len(cost)), log=True)
    order = plan.argmax(axis=1)
    if log["warning"] is not None or len(set(order.tolist())) != len(cost):
        return _assign_scipy(cost)
    return order


def features(x: Tensor, cond: Tensor | None, weight: float) -> Tensor:
    """Give rows whose squared distance is the cost: [n, dim] or [n, dim + cond_dim]."""
    x = x.flatten(1)
    if cond is None:
        return x
    return torch.cat([x, math.sqrt(weight) * cond.reshape(len(cond), -1).to(x)], dim=1)


def split_weight(cond: Tensor | None, weight: float) -> tuple[Tensor | None, Tensor | None]:
    """Give (group codes, None) for labels or an infinite weight, else (None, cond)."""
    if cond is None or (cond.is_floating_point() and math.isfinite(weight)):
        return None, cond
    return cond.reshape(len(cond), -1).unique(dim=0, return_inverse=True)[1], None


def chunks(target: Tensor, size: int = 4096) -> Iterator[tuple[slice, Tensor]]:
    """Walk over rows in pieces, each with its place."""
    for start in range(0, len(target), size):
        yield slice(start, start + size), target[start : start + size]


def first_of_missing_groups(codes: Tensor, rows: Tensor) -> Tensor:
    """Give one row of every group that `rows` does not touch."""
    missing = [code for code in codes.unique() if not bool((codes[rows] == code).any())]
    firsts = [(codes == code).nonzero()[0] for code in missing]
    return torch.cat(firsts) if firsts else rows[:0]
