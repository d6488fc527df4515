"""The certificate of GAV: it holds for random and extreme parameters, or an error names one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fmft_fast import solve
from fmft_fast.errors import CertificateError, InputError, NonFiniteError
from fmft_fast.fields import BRANCH_ACTIVATIONS, GAV, MLP, Residual
from fmft_fast.fields.certificate import contractivity_radius
from fmft_fast.fields.contraction import quasi_triangular, skew
from fmft_fast.ops.cayley import cayley
from fmft_fast.solvers import METHODS, Tableau

GUARANTEED = ("collocated", "lmi", "schur-cayley")
EVERY = tuple(BRANCH_ACTIVATIONS)
T = torch.tensor(0.3)


def drawn(seed, construction, dtype=torch.float64, scale=1.0, **options):
    """A field with random size and parameters."""
    torch.manual_seed(seed)
    n = int(torch.randint(1, 6, ()))
    names = [EVERY[i] for i in torch.randint(len(EVERY), (int(torch.randint(1, 4, ())),))]
    options = {
        "metric": ("identity", "learned")[seed % 2],
        "rank": (None, 1)[seed // 2 % 2],
    } | options
    field = GAV(n, len(names), construction=construction, activation=names, **options).to(dtype)
    with torch.no_grad():
        for p in field.parameters():
            p += scale * torch.rand(()) * torch.randn_like(p)
    return field


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("construction", GUARANTEED)
def test_the_guarantee_holds_for_random_parameters(construction, dtype):
    for seed in range(150):
        field = drawn(seed, construction, dtype)
        found = field.verify(5 * torch.randn(20, field.dim, dtype=dtype))
        assert found.holds and found.rate > 0, f"seed {seed}: {found}"


EXTREMES = {
    "skew": lambda p: 1e6 * torch.randn_like(p),
    "excess_rate": lambda p: torch.full_like(p, -1e3),
    "gain": lambda p: torch.full_like(p, 1e4),
    "gain underflows": lambda p: torch.full_like(p, -1e4),
    "directions": lambda p: 1e4 * torch.randn_like(p),
    "offset": lambda p: 1e4 * torch.randn_like(p),
    "outputs": lambda p: 1e3 * torch.randn_like(p),
    "triangle": lambda p: 1e3 * torch.randn_like(p),
    "rotation": lambda p: 1e6 * torch.randn_like(p),
    "damping": lambda p: 1e3 * torch.randn_like(p),
    "metric_turn": lambda p: 1e6 * torch.randn_like(p),
    "metric_stretch": lambda p: 1e2 * torch.randn_like(p),
}


def extreme(seed, construction, names, dtype):
    """A field of which some parameters are extreme, and whether it has them."""
    field, touched = drawn(seed, construction, dtype, 0.3, rate=(1e-3, 1e-6)[seed % 2]), False
    with torch.no_grad():
        for name, p in field.named_parameters():
            for wanted in names:
                if name.endswith(wanted.split()[0]):
                    p.copy_(EXTREMES[wanted](p))
                    touched = True
    return field, touched


@pytest.mark.parametrize("construction", GUARANTEED)
def test_extreme_parameters_keep_the_guarantee_or_are_named(construction):
    held = dict.fromkeys((torch.float32, torch.float64), 0)
    rng = np.random.default_rng(0)
    for seed in range(120):
        names = rng.choice(sorted(EXTREMES), size=rng.integers(1, 3), replace=False)
        for dtype in held:
            field, _ = extreme(seed, construction, names, dtype)
            x = 3 * torch.randn(10, field.dim, dtype=dtype)
            assert torch.isfinite(field(T.to(dtype), x)).all(), f"seed {seed}, {names}"
            try:
                found = field.verify(x)
            except CertificateError as error:
                assert "largest parameter is" in str(error)
                assert any(name in str(error) for name, _ in field.named_parameters())
                continue
            assert found.holds and found.rate > 0, f"seed {seed}, {names}: {found}"
            held[dtype] += 1
    # In float64 nearly all can be shown; the rest are products beyond 1e10 against a rate of 1e-6.
    assert held[torch.float64] >= 90 and held[torch.float64] >= held[torch.float32] >= 30, held


@pytest.mark.parametrize("construction", GUARANTEED)
def test_a_skew_part_of_a_million_keeps_the_guarantee(construction):
    for seed in range(100):
        field, _ = extreme(2 * seed, construction, ["skew", "excess_rate"], torch.float64)
        found = field.verify(torch.randn(8, field.dim).double())
        assert found.holds and found.rate > 9e-4, f"seed {seed}: {found}"


@pytest.mark.parametrize("construction", GUARANTEED)
def test_two_points_approach_each_other_in_the_metric(construction):
    for seed in range(60):
        field = drawn(seed, construction)
        certificate = field.certificate()
        x, y = 4 * torch.randn(2, 64, field.dim).double()
        p = certificate.metric
        p = torch.eye(field.dim).double() if p is None else p
        t = T.double()
        pulled = ((x - y) @ p * (field(t, x) - field(t, y))).sum(1)
        bound = certificate.norm(x - y).square()
        assert (pulled <= -certificate.rate * bound * (1 - 1e-9)).all()
        speed = certificate.norm(field(t, x) - field(t, y))
        assert (speed <= certificate.lipschitz * bound.sqrt() * (1 + 1e-9)).all()


def test_the_jacobian_is_that_of_the_field():
    for seed, construction in enumerate((*GUARANTEED, "schur-cayley-free")):
        field = drawn(seed, construction, center="learned")
        x = torch.randn(4, field.dim).double()
        whole = torch.autograd.functional.jacobian(lambda x, f=field: f(T, x), x)
        expected = torch.stack([whole[i, :, i] for i in range(4)])
        torch.testing.assert_close(field.jacobian(x), expected)


def test_images_and_conditions_have_certificates():
    field = GAV((1, 3, 3), rank=2, center="condition", cond_dim=2, activation=("asinh", "tanh"))
    found = field.verify(torch.randn(6, 1, 3, 3), torch.randn(6, 2))
    assert found.holds and "holds" in str(found)


def test_a_violated_certificate_is_seen():
    field = drawn(3, "collocated")
    certificate = field.certificate()
    weak = type(certificate)(1.0 + 2 * certificate.lipschitz, certificate.metric, 1.0, 0.1, 0.0)
    field.certificate = lambda: weak
    found = field.verify(torch.randn(5, field.dim).double())
    assert not found.holds and "VIOLATED" in str(found)


def test_a_parameter_that_is_not_finite_is_named():
    field = GAV(2)
    with torch.no_grad():
        field.branches[1].gain[3] = math.nan
    with pytest.raises(CertificateError, match="branches.1.gain has NaN"):
        field.certificate()


def test_a_center_that_is_not_finite_is_named():
    field = GAV(2, center=torch.tensor([0.0, math.nan]))
    with pytest.raises(CertificateError, match="center has NaN"):
        field.certificate()


def test_samples_that_show_nothing_are_refused():
    field = GAV(2)
    with pytest.raises(InputError, match="one at least, got 0"):
        field.verify(torch.zeros(0, 2))
    for entry in (math.nan, math.inf):
        with pytest.raises(InputError, match="got 3 with Jacobians that are not finite"):
            field.verify(torch.full((3, 2), entry))


def test_a_deviation_beyond_float64_is_infinite_and_negative_sizes_are_refused():
    certificate = GAV(2).certificate()
    for bound in ("initial", "disturbance", "input_noise"):
        assert certificate.deviation(1.0, base=1e4, **{bound: 1e-3}) == math.inf
        with pytest.raises(InputError, match=f"{bound} must be at least 0, got -5"):
            certificate.deviation(1.0, **{bound: -5})
    assert certificate.deviation(1.0, base=1e4) == 0
    with pytest.raises(InputError, match="time must be at least 0, got -1"):
        certificate.deviation(-1.0, initial=1.0)
    with pytest.raises(InputError, match="base must be a number, got nan"):
        certificate.deviation(1.0, initial=1.0, base=math.nan)


def test_the_rate_holds_for_the_metric_that_is_given():
    torch.manual_seed(185)
    field = GAV(3, 1, 4, metric="learned", rank=2)
    with torch.no_grad():
        field.metric_turn.copy_(3 * torch.randn(3, 3))
        field.metric_stretch.copy_(3 * torch.randn(3))
        field.skew.copy_(100 * torch.randn(3, 2))
        field.skew_partner.copy_(torch.randn(3, 2))
    certificate = field.certificate()
    p = certificate.metric
    assert torch.equal(p, p.T)
    root = torch.linalg.cholesky(p).T
    j = root @ field.jacobian(torch.randn(1, 3))[0] @ torch.linalg.inv(root)
    assert torch.linalg.eigvalsh((j + j.T) / 2)[-1] <= -certificate.rate + certificate.rounding


def test_hurwitz_matrices_alone_guarantee_nothing():
    """A = [[1, -5], [5, -2]] is Hurwitz, but the Jacobian of A tanh(x) - x / 10 is not."""
    field = GAV(2, 1, construction="schur-cayley-free", rate=0.1, offsets=False).double()
    (branch,) = field.branches
    with torch.no_grad():
        field.damping.zero_()
        field.excess_rate.fill_(-1e3)
        branch.directions.copy_(torch.eye(2))
        # A turned by 45 degrees is [[-1/2, u], [-s^2 u, -1/2]].
        branch.rotation[0, 1] = math.tan(math.pi / 8)
        branch.diagonal.fill_((math.log(math.expm1(0.5 - 1e-4)) + 5) / 10)
        branch.triangle[0, 1], branch.triangle[1, 0] = -6.5, math.sqrt(3.5 / 6.5)
    a = branch.hurwitz()
    torch.testing.assert_close(a, torch.tensor([[1.0, -5.0], [5.0, -2.0]]).double())
    assert torch.linalg.eigvals(a).real.max() < 0
    jacobian = field.jacobian(torch.tensor([[0.0, 20.0]]).double())
    assert torch.linalg.eigvals(jacobian).real.max() == pytest.approx(0.9, abs=1e-3)
    with pytest.raises(CertificateError, match="guarantees nothing"):
        field.certificate()


def test_the_cayley_map_of_any_skew_matrix_is_orthogonal():
    for seed in range(200):
        torch.manual_seed(seed)
        n, size = 1 + seed % 7, 10.0 ** torch.randint(-8, 9, ())
        k = skew(size * torch.randn(n, n).double())
        q = cayley(k)
        error = (q.T @ q - torch.eye(n)).abs().max()
        assert error <= 1e-14 * n * (1 + float(k.norm())), f"seed {seed}: {error}"


@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_a_cayley_map_that_fails_says_why(entry):
    k = torch.zeros(3, 3)
    k[0, 1], k[1, 0] = entry, -entry
    with pytest.raises(NonFiniteError, match="it has NaN or infinite entries"):
        cayley(k)
    with pytest.raises(NonFiniteError, match="next to which the identity is rounded"):
        cayley(skew(1e20 * torch.randn(3, 3).double()))


def test_quasi_triangular_matrices_are_hurwitz():
    for seed in range(200):
        torch.manual_seed(seed)
        n = 1 + seed % 6
        t = quasi_triangular(10 * torch.randn(n, n).double(), 0.01 + torch.rand(n).double())
        assert torch.linalg.eigvals(t).real.max() < 0
        assert torch.tril(t, -2).abs().max() == 0


POSITIVE = ("euler", "heun2", "bosh3", "rk4")


def stage_factor(tableau: Tableau, z):
    """y1 / y0 of a step on k_i = z_i Y_i (a scalar, but another one in every stage)."""
    table, k = tableau.advancing, []
    for i, row in enumerate(table.a):
        k.append(z[i] * (1 + sum(a * k[j] for j, a in enumerate(row))))
    return np.abs(1 + sum(b * k[i] for i, b in enumerate(table.b)))


@pytest.mark.parametrize("name", POSITIVE)
def test_the_contractivity_radius_is_safe_and_not_far_from_sharp(name):
    tableau = METHODS[name].tableau
    assert tableau is not None
    r, rng = contractivity_radius(tableau), np.random.default_rng(0)
    angles = rng.uniform(0, 2 * np.pi, (tableau.advancing.stages, 200_000))
    z = -1 + np.exp(1j * angles)
    assert stage_factor(tableau, r * z).max() <= 1 + 1e-12
    assert stage_factor(tableau, 1.3 * r * z).max() > 1


def test_methods_without_positive_weights_are_refused():
    certificate = GAV(2).certificate()
    for name in ("midpoint", "dopri5"):
        with pytest.raises(InputError, match=f"{name} has a weight b that is not positive"):
            certificate.largest_step(name)
    with pytest.raises(InputError, match="Runge-Kutta"):
        certificate.largest_step("explicit_adams")
    assert certificate.largest_step("implicit_midpoint") == math.inf


@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize("construction", GUARANTEED)
def test_steps_up_to_the_largest_one_contract(construction, method, step_by_step):
    for seed in range(20):
        field = drawn(seed, construction)
        certificate = field.certificate()
        h = 0.999 * certificate.largest_step(method)
        x = 3 * torch.randn(100, field.dim).double()
        ends = solve(field, x, t1=h, steps=1, method=method, gradient="none").y
        before = certificate.norm(x[:50] - x[50:])
        assert (certificate.norm(ends[:50] - ends[50:]) < before).all(), f"seed {seed}"


def test_the_euler_step_is_sharp_without_a_skew_part():
    field = GAV(3, activation="leaky_relu", offsets=False).double()
    with torch.no_grad():
        field.damping.copy_(torch.randn(3, 3))
    x, h = torch.randn(500, 3).double(), field.certificate().euler_step
    longest = torch.linalg.eigh(field.jacobian(x)[0]).eigenvectors[:, :1].T
    pairs = torch.cat([longest, -longest]) * 1e-3

    @torch.no_grad()
    def ratio(step):
        y = pairs + step * field(T, pairs)
        return float((y[0] - y[1]).norm() / (pairs[0] - pairs[1]).norm())

    assert ratio(0.999 * h) < 1 < ratio(1.1 * h)


@torch.no_grad()
def test_noise_moves_a_solution_no_further_than_the_certificate_says():
    """Initial noise, a disturbance of the right-hand side and noisy inputs, each simulated."""
    for seed in range(9):
        field = drawn(seed, GUARANTEED[seed % 3], scale=0.3)
        certificate, steps = field.certificate(), 120
        h = min(0.2 * certificate.euler_step, 0.02)
        x = torch.randn(64, field.dim).double()
        directions = torch.randn(2, 64, field.dim).double()
        for kind in ("initial", "disturbance", "input_noise"):
            noise = 0.3 * torch.nn.functional.normalize(directions[0], dim=1)
            y, z = x + (noise if kind == "initial" else 0), x
            for k in range(steps):
                turned = directions[0] * math.cos(k / 20) + directions[1] * math.sin(k / 20)
                noise = 0.3 * torch.nn.functional.normalize(turned, dim=1)
                given = y + noise if kind == "input_noise" else y
                dy, dz = field(T, torch.cat([given, z])).chunk(2)
                y, z = y + h * (dy + (noise if kind == "disturbance" else 0)), z + h * dz
            bound = certificate.deviation(steps * h, **{kind: 0.3})
            # Euler with such small steps follows the flow to within a few percent.
            assert (y - z).norm(dim=1).max() <= 1.03 * bound, f"seed {seed}, {kind}"


def growth_of(field, t, states):
    """One-sided Lipschitz constant of a field at states."""
    jacobian = torch.vmap(torch.func.jacrev(lambda x: field(t, x[None])[0]))(states)
    return float(torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2).max())


def test_beside_a_base_field_the_bound_takes_its_growth():
    base, field = MLP(2).double(), GAV(2).double()
    with torch.no_grad():
        field.excess_rate.fill_(0.7)
    certificate, both = field.certificate(), Residual(base, field)
    x = torch.randn(200, 2).double()
    y, grid = x + 0.01 * torch.randn(200, 2).double(), torch.linspace(0, 1, 51).double()
    path = solve(both, torch.cat([x, y]), steps=grid, method="rk4", save="all").y.detach()
    growth = max(growth_of(base, t, states) for t, states in zip(grid, path, strict=True))
    start = float((x - y).norm(dim=1).max())
    apart = float((path[-1, :200] - path[-1, 200:]).norm(dim=1).max())
    bound = certificate.deviation(1.0, initial=start, base=growth)
    assert apart <= bound < certificate.deviation(1.0, initial=start, base=growth + 1.0)
    assert bound == pytest.approx(math.exp(growth - certificate.rate) * start)
