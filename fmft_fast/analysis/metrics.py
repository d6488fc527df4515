"""Distances between samples and data, and shares that say what is wrong with samples.

All take samples as [n, *state] tensors and give Python floats. Lower is better unless said.
A distance between two finite samples of the same law is not zero: compare with data against data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmft_fast.errors import InputError


def off_mode_share(x: Tensor, centres: Tensor, sigma: float, *, radius: float = 3.0) -> float:
    """Give the share of samples farther than `radius * sigma` from every centre.

    For a mixture of isotropic Gaussians in two dimensions the true share is
    exp(-radius^2 / 2), .0111 at radius 3 (a little less where modes overlap).

    Args:
        x: samples, [n, dim].
        centres: [modes, dim].
        sigma: standard deviation of a mode, > 0.
        radius: in units of sigma.

    Example:
        >>> off_mode_share(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.zeros(1, 2), 0.1)
        0.5
    """
    _check_rows(x, centres)
    if not (sigma > 0 and radius > 0):
        raise InputError(f"sigma and radius must be positive, got {sigma} and {radius}")
    return float((torch.cdist(x, centres).amin(1) > radius * sigma).double().mean())


def mode_shares(x: Tensor, centres: Tensor) -> Tensor:
    """Give the share of samples nearest to each centre, [modes], float64."""
    _check_rows(x, centres)
    nearest = torch.cdist(x, centres).argmin(1)
    return torch.bincount(nearest, minlength=len(centres)).double() / len(x)


def total_variation(shares: Tensor, expected: Tensor | None = None) -> float:
    """Give sum |p - q| / 2 in [0, 1]; q is uniform unless given. The balance of modes or classes.

    Example:
        >>> total_variation(torch.tensor([1.0, 0.0]))
        0.5
    """
    shares = shares.double()
    if expected is None:
        expected = torch.full_like(shares, 1 / len(shares))
    return float((shares - expected.to(shares)).abs().sum() / 2)


def energy_distance(a: Tensor, b: Tensor, *, block: int = 2048) -> float:
    """Give 2 E|a - b| - E|a - a'| - E|b - b'| without bias, so a little below 0 at times.

    The means leave the pairs of a row with itself out (U-statistics). Memory is O(block^2).

    Source: Szekely & Rizzo 2013, Energy statistics.

    Example:
        >>> energy_distance(torch.zeros(3, 1), torch.ones(4, 1))
        2.0
    """
    a, b = _two_samples(a, b)
    if min(len(a), len(b)) < 2:
        raise InputError(f"expected at least 2 rows in each sample, got {len(a)} and {len(b)}")
    # Distances do not change with the origin, but their rounding does.
    centre = b.mean(0)
    a, b = a - centre, b - centre
    within = [_distance_sum(x, x, block) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return 2 * _distance_sum(a, b, block) / (len(a) * len(b)) - sum(within)


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """Give the root mean square, over random directions, of the 1-D Wasserstein-2 distance.

    Args:
        a: samples, [n, *state].
        b: as many samples, [n, *state].
        projections: number of directions.
        seed: seed of the directions; compare values of one seed only.

    Raises:
        InputError: the samples differ in number.

    Example:
        >>> round(sliced_wasserstein(torch.zeros(8, 1), torch.full((8, 1), 2.0)), 6)
        2.0
    """
    a, b = _two_samples(a, b)
    if len(a) != len(b):
        raise InputError(f"expected as many samples of each, got {len(a)} and {len(b)}; cut one")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(a)
    total = 0.0
    for piece in directions.split(32, dim=1):
        gap = (a @ piece).sort(dim=0)[0] - (b @ piece).sort(dim=0)[0]
        total += float(gap.square().mean(0).double().sum())
    return (total / projections) ** 0.5


def reconstruction_rms(phi: Tensor, x1: Tensor) -> float:
    """Give the root mean square distance of end points from the data paired with them."""
    if phi.shape != x1.shape:
        raise InputError(f"expected one shape, got {list(phi.shape)} and {list(x1.shape)}")
    return float((phi - x1).flatten(1).square().sum(1).double().mean().sqrt())


def nearest_neighbour_ratio(x: Tensor, train: Tensor, fresh: Tensor) -> float:
    """Tell copies of training data: median distance of x to train over that of fresh data.

    1 means as far from the training data as data never seen; towards 0 the samples are copies.
    Higher is not better: far above 1 the samples have left the data.

    Example:
        >>> train = torch.randn(200, 3)
        >>> nearest_neighbour_ratio(train[:50], train, torch.randn(50, 3))
        0.0
    """
    for other in (train, fresh):
        _check_rows(x.flatten(1), other.flatten(1))
    near = nearest_distance(x, train).median() / nearest_distance(fresh, train).median()
    return float(near)


def nearest_distance(x: Tensor, data: Tensor) -> Tensor:
    """Give each row's distance to the nearest row of data, [n]."""
    x, data = x.flatten(1), data.flatten(1)
    # The exact mode keeps the distance of a copy at 0.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(p, data, compute_mode=exact).amin(1) for p in x.split(1024)])


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Give the unbiased squared MMD with the kernel (x.y / dim + 1)^3 (KID on features).

    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4.
    """
    a, b = (x.double() for x in _two_samples(a, b))
    if min(len(a), len(b)) < 2:
        raise InputError(f"expected at least 2 rows in each sample, got {len(a)} and {len(b)}")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = 0.0
    for x in (a, b):
        k = kernel(x, x)
        within += float((k.sum() - k.trace()) / (len(x) * (len(x) - 1)))
    return within - 2 * float(kernel(a, b).mean())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Give the squared Wasserstein-2 distance of Gaussians fitted to a and b (FID on features).

    Its bias falls with the number of rows: compare values of one sample size only.

    Source: Heusel et al. 2017 (arXiv 1706.08500).
    """
    a, b = (x.double() for x in _two_samples(a, b))
    if min(len(a), len(b)) < 2:
        raise InputError(f"expected at least 2 rows in each sample, got {len(a)} and {len(b)}")
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    # tr (A B)^(1/2) from the symmetric A^(1/2) B A^(1/2), which has the same eigenvalues.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * cross)


def _distance_sum(a: Tensor, b: Tensor, block: int) -> float:
    """Give the sum of |a_i - b_j| over all i, j; for b is a over i != j."""
    total = 0.0
    same = a is b
    norm_a, norm_b = a.square().sum(1), b.square().sum(1)
    for i in range(0, len(a), block):
        for j in range(i if same else 0, len(b), block):
            squared = norm_a[i : i + block, None] + norm_b[j : j + block]
            squared.addmm_(a[i : i + block], b[j : j + block].T, alpha=-2)
            if same and i == j:
                squared.fill_diagonal_(0)
            part = float(squared.clamp_min_(0).sqrt_().sum())
            total += 2 * part if same and i != j else part
    return total


def _two_samples(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.flatten(1), b.flatten(1)
    _check_rows(a, b)
    return a, b


def _check_rows(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise InputError(
            f"expected two samples of the same state, [n, *state] and [m, *state], "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
