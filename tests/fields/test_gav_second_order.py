"""The residual with a velocity: its equations, its certificate, and its place beside a field."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from fmft_fast import explain, solve
from fmft_fast.errors import CertificateError, InputError
from fmft_fast.fields import BRANCH_ACTIVATIONS, MLP, Augmented, Residual, SecondOrderGAV
from fmft_fast.fields.certificate import Bounds
from fmft_fast.fields.second_order import heavy_ball

EVERY = tuple(BRANCH_ACTIVATIONS)
T = torch.tensor(0.3)


def drawn(seed, dtype=torch.float64, scale=0.5, **options):
    """A field with random size and parameters."""
    torch.manual_seed(seed)
    n = int(torch.randint(1, 5, ()))
    names = [EVERY[i] for i in torch.randint(len(EVERY), (2,))]
    options = {"rank": (None, 1)[seed % 2], "width": 8} | options
    field = SecondOrderGAV(n, activation=names, **options).to(dtype)
    with torch.no_grad():
        for p in field.parameters():
            p += scale * torch.rand(()) * torch.randn_like(p)
    return field


def test_the_equations_are_those_of_a_mass_with_friction_in_a_potential():
    field = drawn(1)
    n = field.force.dim
    z = torch.randn(5, 2 * n).double()
    x, w = z[:, :n].requires_grad_(), z[:, n:]
    expected = torch.cat([w, field.force(T, x) - field.friction() * w], 1)
    torch.testing.assert_close(field(T, z), expected)
    # A force that is a gradient has a symmetric Jacobian.
    jacobian = field.force.jacobian(x)
    torch.testing.assert_close(jacobian, jacobian.mT)


def test_the_jacobian_is_that_of_the_field():
    field = drawn(2)
    z = torch.randn(4, 2 * field.force.dim).double()
    whole = torch.autograd.functional.jacobian(lambda z: field(T, z), z)
    torch.testing.assert_close(field.jacobian(z), torch.stack([whole[i, :, i] for i in range(4)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_guarantee_holds_for_random_parameters(dtype):
    for seed in range(100):
        field = drawn(seed, dtype)
        found = field.verify(4 * torch.randn(16, 2 * field.force.dim, dtype=dtype))
        assert found.holds and found.rate > 0, f"seed {seed}: {found}"


def test_extreme_parameters_keep_the_guarantee_or_are_named():
    extremes = {"gain": 1e2, "directions": 1e3, "damping": 1e3, "excess_friction": 1e3}
    held = 0
    for seed in range(120):
        field = drawn(seed, rate=(1e-3, 1e-6)[seed % 2])
        chosen = list(extremes)[seed % 4]
        with torch.no_grad():
            for name, p in field.named_parameters():
                if name.endswith(chosen):
                    p.mul_(extremes[chosen])
        try:
            found = field.verify(torch.randn(6, 2 * field.force.dim).double())
        except CertificateError as error:
            assert chosen != "excess_friction", f"seed {seed}: no friction hides a rate"
            assert any(name in str(error) for name, _ in field.named_parameters())
            continue
        assert found.holds and found.rate > 0, f"seed {seed}, {chosen}: {found}"
        held += 1
    assert held >= 115


@pytest.mark.parametrize("raw", [1.0, 10.0, 1e3, 1e4])
def test_a_large_friction_leaves_the_rate_that_it_divides(raw):
    torch.manual_seed(0)
    field = SecondOrderGAV(2).double()
    with torch.no_grad():
        field.excess_friction.fill_(raw)
    found, friction = field.certificate(), float(field.friction().detach())
    slow = field.force.certificate().rate / friction
    assert found.rate == pytest.approx(slow, rel=0.05) and found.stretch < 10
    assert found.euler_step == pytest.approx(2 / friction, rel=0.1)
    assert field.verify(torch.randn(50, 4)).holds


def test_the_rate_is_the_best_one_whatever_the_scale():
    rng = np.random.default_rng(0)
    with localcontext() as context:
        context.prec = 60
        for _ in range(200):
            most = 10 ** rng.uniform(-6, 6)
            least = most * 10 ** rng.uniform(-9, 0)
            friction = math.sqrt(most) * (1 + 10 ** rng.uniform(-4, 6))
            best = best_rate(Decimal(least), Decimal(most), Decimal(friction))
            found = heavy_ball(Bounds(least, least, most, 0.0, 0.0, 0.0), friction)
            assert 0.99 * best < found.rate <= best
            assert_contracts(found, (least, most), friction)


def best_rate(least, most, friction):
    """What the circle criterion allows, by bisection of rate (friction - rate)."""
    low, high = Decimal(0), min(least, friction**2 / 4)
    for _ in range(150):
        q = (low + high) / 2
        fits = 4 * q + ((most - q).sqrt() - (least - q).sqrt()) ** 2 <= friction**2
        low, high = (q, high) if fits else (low, q)
    return float(2 * low / (friction + (friction**2 - 4 * low).sqrt()))


def assert_contracts(found, ends, friction):
    """P J + J^T P <= -2 rate P and (I + h J)^T P (I + h J) <= P, for P to the last digit."""
    p = np.array([[Decimal(x) for x in row] for row in found.metric.tolist()])
    one = np.array([[Decimal(1), Decimal(0)], [Decimal(0), Decimal(1)]])
    for h in ends:
        j = np.array([[Decimal(0), Decimal(1)], [-Decimal(h), -Decimal(friction)]])
        step = one + Decimal(found.euler_step) * j
        for m in (-(p @ j + j.T @ p) - 2 * Decimal(found.rate) * p, p - step.T @ p @ step):
            assert m[0, 0] >= 0 and m[1, 1] >= 0 and m[0, 0] * m[1, 1] >= m[0, 1] * m[1, 0]


@pytest.mark.parametrize(("name", "size"), [("excess_friction", 1e14), ("force.damping", 1e8)])
def test_a_metric_beyond_float64_is_refused_with_the_name_of_a_parameter(name, size):
    field = SecondOrderGAV(2).double()
    with torch.no_grad():
        parameter = field.get_parameter(name)
        parameter.copy_(size * (torch.eye(2) if parameter.ndim else torch.ones(())))
    with pytest.raises(CertificateError, match=f"largest parameter is {name}"):
        field.verify(torch.zeros(1, 4))


@pytest.mark.parametrize("most", [1.5, 10.0, 1e3])
def test_friction_has_to_exceed_the_difference_of_the_roots(most):
    """A common metric of all Hessians in [1, most] exists from exactly there on."""
    least = math.sqrt(most) - 1
    hessian = Bounds(1.0, 1.0, most, 0.0, 0.0, 0.0)
    assert heavy_ball(hessian, 0.99 * least).rate < 0 < heavy_ball(hessian, 1.01 * least).rate


def test_the_rate_of_a_linear_oscillator_is_found():
    """With one Hessian h the best rate is half the friction, short of the critical 2 h^1/2."""
    found = heavy_ball(Bounds(4.0, 4.0, 4.0, 0.0, 0.0, 0.0), 2.0)
    assert found.rate == pytest.approx(1.0, rel=1e-2) and found.rate <= 1.0


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_steps_up_to_the_largest_one_contract(method, step_by_step):
    for seed in range(15):
        field = drawn(seed)
        certificate = field.certificate()
        h = 0.999 * certificate.largest_step(method)
        z = 3 * torch.randn(100, 2 * field.force.dim).double()
        ends = solve(field, z, t1=h, steps=1, method=method, gradient="none").y
        before = certificate.norm(z[:50] - z[50:])
        assert (certificate.norm(ends[:50] - ends[50:]) < before).all(), f"seed {seed}"


@torch.no_grad()
def test_noise_moves_a_solution_no_further_than_the_certificate_says(step_by_step):
    for seed in range(4):
        field = drawn(seed)
        certificate = field.certificate()
        z = torch.randn(64, 2 * field.force.dim).double()
        push = 0.3 * torch.nn.functional.normalize(torch.randn_like(z), dim=1)
        both = torch.cat([z + push, z])
        ends = solve(field, both, t1=2.0, steps=100, method="rk4", gradient="none").y
        apart = (ends[:64] - ends[64:]).norm(dim=1).max()
        assert apart <= certificate.deviation(2.0, initial=0.3) * (1 + 1e-6), f"seed {seed}"

        def pushed(t, z, field=field, push=push):
            return field(t, z) + push

        ends = [
            solve(f, z, t1=2.0, steps=100, method="rk4", gradient="none").y for f in (pushed, field)
        ]
        apart = (ends[0] - ends[1]).norm(dim=1).max()
        assert apart <= certificate.deviation(2.0, disturbance=0.3) * (1 + 1e-6), f"seed {seed}"


def test_beside_a_field_it_starts_close_to_it_and_is_fused():
    base, branch = MLP(2), SecondOrderGAV(2)
    both, x = Residual(Augmented(base, 2), branch), torch.randn(50, 2)
    z = solve(both, Augmented.start(x), steps=20, method="rk4").y
    alone = solve(base, x, steps=20, method="rk4").y
    moved = (Augmented(base, 2).position(z) - alone).norm() / (alone - x).norm()
    assert 0 < moved < 0.1
    assert explain(both, Augmented.start(x), method="euler").fused
    z.square().sum().backward()
    assert branch.force.branches[0].gain.grad.abs().max() > 0
    assert branch.excess_friction.grad.abs() > 0


def test_shapes_and_conditions_reach_the_potential():
    field = SecondOrderGAV((1, 2, 3), rank=2, center="condition", cond_dim=2)
    z, cond = torch.randn(5, 2, 2, 3), torch.randn(5, 2)
    dz = field(T, z, cond)
    torch.testing.assert_close(dz[:, :1], z[:, 1:])
    expected = field.force(T, z[:, :1], cond) - field.friction() * z[:, 1:]
    torch.testing.assert_close(dz[:, 1:], expected)
    assert field.verify(z, cond).holds
    with pytest.raises(InputError, match=r"z must be \[batch, 2, 2, 3\], got \[5, 1, 2, 3\]"):
        field(T, z[:, :1], cond)
