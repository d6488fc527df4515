"""The certificates of contracting fields against activations whose slopes an adversary chooses."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fmft_fast.fields import BRANCH_ACTIVATIONS, GAV
from fmft_fast.fields.second_order import SecondOrderGAV

ACTIVATIONS = tuple(BRANCH_ACTIVATIONS)
CONSTRUCTIONS = ("collocated", "lmi", "schur-cayley")
SLACK = 1e-9  # of a norm of 1


@torch.no_grad()
def worst_jacobians(field, root, back, rounds=4):
    """Jacobians with slopes anywhere in the sectors, some of them pushed uphill, where P = I."""
    a0, sectors, _ = field.exact()
    a = torch.cat([s.a for s in sectors], 1)
    d = torch.cat([s.d for s in sectors], 0)
    most = torch.cat([torch.full((s.a.shape[1],), s.slope, dtype=a.dtype) for s in sectors])
    slopes = torch.rand(24, len(most), dtype=a.dtype) * most
    slopes[0], slopes[1] = 0, most
    slopes[2:12] = (slopes[2:12] > most / 2) * most
    found = []
    for _ in range(rounds):
        j = root @ (a0 + (a * slopes[:, None, :]) @ d) @ back
        found.append(j)
        # At the eigenvector v of the largest eigenvalue every slope has a worse end of its sector.
        v = torch.linalg.eigh((j + j.mT) / 2)[1][..., -1]
        slopes = ((v @ root @ a) * (v @ back.mT @ d.mT) > 0) * most
    return torch.cat(found)


def assert_held(jacobians, certificate):
    """Rate, bound of the Jacobian, and the steps of two methods."""
    size = max(1.0, certificate.lipschitz)
    sym = torch.linalg.eigvalsh((jacobians + jacobians.mT) / 2)
    assert float(sym[..., -1].max()) <= -certificate.rate + SLACK * size
    assert float(torch.linalg.matrix_norm(jacobians, 2).max()) <= certificate.lipschitz + SLACK
    one = torch.eye(jacobians.shape[-1], dtype=jacobians.dtype)
    euler = one + certificate.euler_step * jacobians
    z = certificate.rk4_step * jacobians
    rk4 = one + z @ (one + z @ (one + z @ (one + z / 4) / 3) / 2)
    for step in (euler, rk4):
        assert float(torch.linalg.matrix_norm(step, 2).max()) <= 1 + SLACK


def scattered(field, draw):
    """Parameters of very different sizes."""
    with torch.no_grad():
        for p in field.parameters():
            p.copy_(torch.randn_like(p) * draw.choice((1e-3, 0.1, 1.0, 3.0)))
    return field


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_no_choice_of_slopes_breaks_a_certificate(construction):
    draw = random.Random(construction)
    for seed in range(40):
        torch.manual_seed(seed)
        n, count = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3))
        options = {} if construction == "schur-cayley" else {"width": draw.choice((1, 2, n))}
        field = GAV(
            n,
            count,
            construction=construction,
            activation=[draw.choice(ACTIVATIONS) for _ in range(count)],
            rate=draw.choice((1e-6, 1e-3, 1.0, 100.0)),
            metric=draw.choice(("identity", "learned")),
            rank=draw.choice((None, 1)),
            **options,
        ).double()
        certificate = scattered(field, draw).certificate()
        root = back = torch.eye(n, dtype=torch.float64)
        if certificate.metric is not None:
            root = torch.linalg.cholesky(certificate.metric).mT
            back = torch.linalg.inv(root)
        assert_held(worst_jacobians(field, root, back), certificate)


def test_no_choice_of_slopes_breaks_a_certificate_of_second_order():
    draw = random.Random(0)
    for seed in range(40):
        torch.manual_seed(seed)
        n, count = draw.choice((1, 2, 3)), draw.choice((1, 2))
        names = [draw.choice(ACTIVATIONS) for _ in range(count)]
        field = SecondOrderGAV(n, count, draw.choice((1, n)), activation=names).double()
        certificate = scattered(field, draw).certificate()
        one = torch.eye(n, dtype=torch.float64)
        h = worst_jacobians(field.force, one, one)
        ones = one.expand_as(h)
        friction = float(field.friction().detach())
        j = torch.cat([0 * h, ones], 2), torch.cat([h, -friction * ones], 2)
        root = torch.linalg.cholesky(torch.kron(certificate.metric, one)).mT
        assert_held(root @ torch.cat(j, 1) @ torch.linalg.inv(root), certificate)


@pytest.mark.parametrize("seed", range(6))
def test_disturbances_along_the_error_stay_below_the_bound(seed):
    """The worst disturbances, that push two solutions apart at every moment, in v + delta."""
    torch.manual_seed(seed)
    metric = ("identity", "learned")[seed % 2]
    names = ("tanh", "clipped_cube")
    field = GAV(3, 2, 5, construction=CONSTRUCTIONS[seed % 2], metric=metric, activation=names)
    with torch.no_grad():
        for p in field.double().parameters():
            p += 0.5 * torch.randn_like(p)
    certificate, growth, size = field.certificate(), 1.0, 0.3
    p = torch.eye(3, dtype=torch.float64) if certificate.metric is None else certificate.metric
    x = 2 * torch.randn(32, 3, dtype=torch.float64)
    y = x + 1e-3 * torch.randn_like(x)
    start, steps = (y - x).norm(dim=1), 200
    with torch.no_grad():
        for _ in range(steps):
            push = (y - x) @ p
            push = size * push / push.norm(dim=1, keepdim=True)
            x = x + (growth * x + field(None, x)) / steps
            y = y + (growth * y + field(None, y) + push) / steps
    for first, last in zip(start.tolist(), (y - x).norm(dim=1).tolist(), strict=True):
        bound = certificate.deviation(1.0, initial=first, disturbance=size, base=growth)
        assert math.isfinite(bound) and last <= bound * (1 + 5 / steps)  # the error of Euler
        assert last > 0.02 * bound  # a bound of another size would say nothing
