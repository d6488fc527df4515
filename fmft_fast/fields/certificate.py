"""What is guaranteed of a contracting field, computed from the weights that it really uses.

Derived weights are rounded to their dtype, so a construction alone proves nothing about them. Here
the linear matrix inequality of the construction is solved anew, in float64, for the weights as they
are; what rounding took away is missing from the rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmft_fast.errors import InputError
from fmft_fast.solvers import Tableau, find_method


@dataclass(frozen=True, eq=False)
class Certificate:
    """Guarantees of a field delta, for all states at once.

    Attributes:
        rate: c > 0 with P J + J^T P <= -2 c P, per unit of flow time.
        metric: P [k, k], which stands for P x I where k is less than the size of a state; None for
            the identity. Norms below are (x^T P x)^1/2.
        lipschitz: bound of the norm of the Jacobian J.
        euler_step: explicit Euler brings any two states nearer for every smaller step.
        rounding: bound of the float64 rounding of this computation, which `rate` already respects.

    Example:
        >>> from fmft_fast.fields import GAV
        >>> certificate = GAV(2).certificate()
        >>> 0.001 <= certificate.rate <= certificate.lipschitz
        True
    """

    rate: float
    metric: Tensor | None
    lipschitz: float
    euler_step: float
    rounding: float

    @property
    def rk4_step(self) -> float:
        """As `euler_step`, for the method "rk4"."""
        return self.largest_step("rk4")

    @property
    def stretch(self) -> float:
        """Largest ratio of a Euclidean norm before and after a way through the norm of P."""
        return 1.0 if self.metric is None else math.sqrt(float(torch.linalg.cond(self.metric)))

    def largest_step(self, method: str) -> float:
        """The step below which a method brings any two states nearer, in the norm of P.

        Args:
            method: name of a Runge-Kutta method with positive weights b.

        Raises:
            InputError: no such theory for the method (see `contractivity_radius`).
        """
        tableau = find_method(method).tableau
        if tableau is None:
            raise InputError(f"largest_step expects a Runge-Kutta method, got {method!r}")
        return contractivity_radius(tableau) * self.euler_step

    def norm(self, x: Tensor) -> Tensor:
        """(x^T P x)^1/2 of states [*, size]: [*]."""
        if self.metric is None:
            return x.double().norm(dim=-1)
        rows = x.double().unflatten(-1, (len(self.metric), -1))
        return torch.einsum("...im,ij,...jm->...", rows, self.metric.to(x.device), rows).sqrt()

    def deviation(
        self,
        time: float,
        *,
        initial: float = 0.0,
        disturbance: float = 0.0,
        input_noise: float = 0.0,
        base: float = 0.0,
    ) -> float:
        """Bound of the Euclidean distance of two solutions of x' = v(t, x) + delta(x).

        Args:
            time: duration, in units of flow time.
            initial: distance of the two starts.
            disturbance: bound of a term added to one of the right-hand sides.
            input_noise: bound of an error of the state that one delta (not v) is given.
            base: one-sided Lipschitz constant of v in the norm of P; 0 without v.

        Raises:
            InputError: the time, a distance or a bound is negative, or something is NaN.

        Source: Gronwall's lemma for logarithmic norms, Hairer, Norsett, Wanner, "Solving Ordinary
            Differential Equations I", theorem I.10.6.
        """
        sizes = {"time": time, "initial": initial, "disturbance": disturbance}
        for name, size in (sizes | {"input_noise": input_noise}).items():
            if not size >= 0:
                raise InputError(f"{name} must be at least 0, got {size}")
        if math.isnan(base):
            raise InputError(f"base must be a number, got {base}")
        growth, forced = base - self.rate, disturbance + self.lipschitz * input_noise
        try:
            grown = math.exp(growth * time)
            integral = time if growth == 0 else math.expm1(growth * time) / growth
        except OverflowError:
            grown = integral = math.inf
        # A term that is absent adds nothing, also where its factor is infinite.
        parts = [factor * size for factor, size in ((grown, initial), (integral, forced)) if size]
        return self.stretch * sum(parts)

    def __str__(self) -> str:
        """Say what is guaranteed."""
        norm = "the Euclidean norm"
        if self.metric is not None:
            norm = f"the norm of P (condition {self.stretch**2:.3g})"
        return (
            f"contracts at the rate {self.rate:.4g} in {norm}; Jacobian at most "
            f"{self.lipschitz:.4g}; explicit Euler contracts for steps below "
            f"{self.euler_step:.4g}, rk4 below {self.rk4_step:.4g}"
        )


@dataclass(frozen=True)
class Verification:
    """What was measured at samples, next to what is guaranteed.

    Attributes:
        largest: largest eigenvalue of the symmetrised Jacobian in the norm of P.
        norm: largest norm of the Jacobian.
        rate: c of the certificate; `largest` may not exceed -c.
        lipschitz: of the certificate; `norm` may not exceed it.
        rounding: tolerance of both comparisons.
    """

    largest: float
    norm: float
    rate: float
    lipschitz: float
    rounding: float

    @property
    def holds(self) -> bool:
        """Whether the samples respect the certificate."""
        above = max(self.largest + self.rate, self.norm - self.lipschitz)
        return above <= self.rounding

    def __str__(self) -> str:
        """Compare."""
        return (
            f"{'holds' if self.holds else 'VIOLATED'}: largest eigenvalue {self.largest:.4g} "
            f"(guaranteed below {-self.rate:.4g}), Jacobian {self.norm:.4g} "
            f"(guaranteed below {self.lipschitz:.4g})"
        )


def contractivity_radius(tableau: Tableau) -> float:
    """The r for which a method is r-circle contractive; infinite for algebraically stable methods.

    If explicit Euler does not move any two states apart for steps up to tau, the method does not
    for steps up to r tau: r = -1 / lambda_min(B^-1/2 M B^-1/2) with B = diag(b) > 0 and
    M = B A + A^T B - b b^T.

    Raises:
        InputError: a weight b is zero or negative, where no r > 0 exists.

    Source: Dahlquist, Jeltsch, "Generalized disks of contractivity for explicit and implicit
        Runge-Kutta methods", TRITA-NA-7906 (1979).

    Example:
        >>> from fmft_fast.solvers import METHODS
        >>> contractivity_radius(METHODS["euler"].tableau)
        1.0
    """
    table = tableau.advancing
    b = np.array(table.b)
    if (b <= 0).any():
        raise InputError(
            f"{table.name} has a weight b that is not positive, so that no step keeps contraction "
            'for certain; use a method with positive weights, such as "euler", "heun2" or "rk4"'
        )
    a = np.zeros((len(b), len(b)))
    for i, row in enumerate(table.a):
        a[i, : len(row)] = row
    m = b[:, None] * a + a.T * b - np.outer(b, b)
    least = np.linalg.eigvalsh(m / np.sqrt(np.outer(b, b)))[0]
    return math.inf if least >= -1e-14 else float(-1 / least)


class Sector(NamedTuple):
    """A branch A f(D y), where the slopes of f lie in [0, slope].

    Attributes:
        a: [n, m].
        d: [m, n].
        gain: [m] multipliers Lambda.
        slope: of f.
    """

    a: Tensor
    d: Tensor
    gain: Tensor
    slope: float


class Bounds(NamedTuple):
    """What holds for every Jacobian J = Q - S with S symmetric, in coordinates where P = I.

    Attributes:
        rate: the largest eigenvalue of (J + J^T) / 2 is at most -rate.
        least, most: least <= S <= most.
        turning: bound of |Q|.
        untied: bound of the symmetric part of Q.
        rounding: bound of the rounding of these numbers, which they already respect.
    """

    rate: float
    least: float
    most: float
    turning: float
    untied: float
    rounding: float


def certify(a0: Tensor, sectors: list[Sector], metric: Tensor | None = None) -> Certificate:
    """The certificate of y' = A_0 y + sum_j A_j f_j(D_j y); its rate is not positive if none holds.

    Args:
        a0: [n, n] float64, as are the tensors of the sectors.
        sectors: the branches.
        metric: P [n, n], or None for the identity.
    """
    found = bounds(a0, sectors, metric)
    lipschitz, step = found.turning + found.most, 0.0
    if found.rate > 0:
        step = max(2 * found.rate / lipschitz**2, euler_step(found))
    return Certificate(found.rate, metric, lipschitz, step, found.rounding)


def bounds(a0: Tensor, sectors: list[Sector], metric: Tensor | None = None) -> Bounds:
    """Bounds of all Jacobians of y' = A_0 y + sum_j A_j f_j(D_j y).

    With S_j = A_j + D_j^T Lambda_j and slopes 0 <= G_j <= L_j (in coordinates where P = I),

        J = A_0 - sum D^T Lambda G D + sum S G D,
        sym J <= sym A_0 + sum (L / 4) S Lambda^-1 S^T            (completing the square),

    from which the rate follows. Arguments as of `certify`.
    """
    n, eps, condition = len(a0), torch.finfo(torch.float64).eps, 1.0
    if metric is not None:
        half, inverse, condition = roots(metric)
        a0 = half @ a0 @ inverse
        sectors = [Sector(half @ a, d @ inverse, gain, slope) for a, d, gain, slope in sectors]
    sym, skew = (a0 + a0.T) / 2, (a0 - a0.T) / 2
    # Columns of S Lambda^-1/2 L^1/2 and of Lambda^1/2 L^1/2 D, of all branches side by side.
    free, tied = [a0.new_zeros(n, 1)], [a0.new_zeros(1, n)]
    for a, d, gain, slope in sectors:
        s, root = a + (d * gain[:, None]).T, gain.sqrt()
        free.append(torch.where(s == 0, 0.0, s / root) * math.sqrt(slope))
        tied.append(d * (root * math.sqrt(slope))[:, None])
    e, f = torch.cat(free, 1), torch.cat(tied, 0)
    size = float(a0.norm() + (e.norm() + f.norm()) ** 2)
    rounding = 4 * eps * (n + e.shape[1]) * condition * size
    if not math.isfinite(rounding):
        return Bounds(-math.inf, 0.0, math.inf, math.inf, math.inf, rounding)
    rate = -float(torch.linalg.eigvalsh(sym + e @ e.T / 4)[-1]) - rounding
    least = float(torch.linalg.eigvalsh(-sym)[0]) - rounding
    most = spectral(f.T @ f - sym) + rounding
    untied = spectral(e) * spectral(f) + rounding
    return Bounds(rate, least, most, spectral(skew) + untied, untied, rounding)


def euler_step(found: Bounds) -> float:
    """A step up to which explicit Euler does not move two states apart.

    For J = Q - S and any theta > 0, J^T J <= (1 + theta) S^2 + (1 + 1 / theta) q^2 with q = |Q|; so
    |I + h J| <= 1 follows from h ((1 + theta) s^2 + (1 + 1 / theta) q^2) <= 2 (s - untied) at
    s = least and s = most. With q = 0 this is the well-known 2 / most, far above 2 c / |J|^2.
    """
    theta, tiny = np.logspace(-9, 9, 721), np.finfo(float).tiny
    steps = []
    for s in (found.least, found.most):
        squares = (1 + theta) * s * s + (1 + 1 / theta) * found.turning**2
        steps.append(2 * (s - found.untied) / np.maximum(squares, tiny))
    return float(np.minimum(*steps).max())


def spectral(matrix: Tensor) -> float:
    """Largest singular value."""
    return float(torch.linalg.matrix_norm(matrix, 2))


def roots(metric: Tensor) -> tuple[Tensor, Tensor, float]:
    """P^1/2, P^-1/2 and the condition of P."""
    values, vectors = torch.linalg.eigh(metric)
    half = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    return half, inverse, float(values[-1] / values[0])


def measure(jacobian: Tensor, certificate: Certificate) -> Verification:
    """Compare Jacobians [batch, n, n] in float64 with a certificate.

    Raises:
        InputError: there is no Jacobian, or one is not finite.
    """
    if not len(jacobian) or not torch.isfinite(jacobian).all():
        got = "with Jacobians that are not finite" if len(jacobian) else "of them"
        raise InputError(f"expected finite samples, one at least, got {len(jacobian)} {got}")
    j, p, n, condition = jacobian, certificate.metric, jacobian.shape[-1], 1.0
    if p is not None:
        one = torch.eye(n // len(p), dtype=p.dtype, device=p.device)
        half, inverse, condition = roots(torch.kron(p, one).to(jacobian.device))
        j = half @ jacobian @ inverse
    largest = float(torch.linalg.eigvalsh((j + j.mT) / 2)[..., -1].max())
    norm = float(torch.linalg.matrix_norm(j, 2).max())
    eps = torch.finfo(torch.float64).eps
    rounding = 4 * eps * n * condition * norm + certificate.rounding
    return Verification(largest, norm, certificate.rate, certificate.lipschitz, rounding)
