"""GAV: its formula, its start, its cost, its shapes, and that kernels can read it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fmft_fast import explain, fused, solve
from fmft_fast.errors import InputError
from fmft_fast.fields import BRANCH_ACTIVATIONS, GAV, MLP, Residual

GUARANTEED = ("collocated", "lmi", "schur-cayley")
CONSTRUCTIONS = (*GUARANTEED, "schur-cayley-free")
T = torch.tensor(0.3)


def shake(field, scale=0.3):
    """Move every parameter away from its start."""
    with torch.no_grad():
        for p in field.parameters():
            p += scale * torch.randn_like(p)
    return field


def parameters(field):
    """Number of entries of all parameters."""
    return sum(p.numel() for p in field.parameters())


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("metric", ["identity", "learned"])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_the_field_is_the_sum_of_its_terms(construction, metric, rank):
    names = sorted(BRANCH_ACTIVATIONS)
    center = torch.tensor([1.0, -2.0, 0.5])
    field = GAV(
        3,
        len(names),
        construction=construction,
        activation=names,
        metric=metric,
        rank=rank,
        center=center,
    )
    field = shake(field).double()
    x, b = torch.randn(5, 3).double(), center.double()
    a0, right = field.linear()
    if right is not None:
        a0 = a0 @ right - field.least_rate() * torch.eye(3).double()
    expected = (x - b) @ a0.T
    for branch, (a, d, gain) in zip(field.branches, field.weights(), strict=True):
        f, s = BRANCH_ACTIVATIONS[branch.activation].f, branch.offset
        assert (gain > 0).all()
        expected = expected + (f((x - b) @ d.T + s) - f(s)) @ a.T
    torch.testing.assert_close(field(T, x), expected)
    torch.testing.assert_close(field(T, center.double()[None]), torch.zeros(1, 3).double())


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_a_field_starts_near_zero_and_learns(construction):
    field = GAV(8, construction=construction, activation=("tanh", "clipped_cube"))
    x = torch.randn(200, 8)
    delta = field(T, x)
    assert 0 < delta.norm() < 0.1 * x.norm()
    delta.square().sum().backward()
    moved = {n for n, p in field.named_parameters() if p.grad is not None and p.grad.abs().max()}
    assert {"excess_rate", "skew", "damping"} <= moved


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@torch.no_grad()
def test_weight_decay_does_not_make_a_field_larger(construction):
    field, x = GAV(8, construction=construction), torch.randn(200, 8)
    before = field(T, x).norm()
    for _ in range(4):
        for p in field.parameters():
            p *= 0.5
        assert field(T, x).norm() <= 1.1 * before


def test_a_small_field_costs_ten_to_fifteen_percent_more_parameters():
    share = parameters(GAV(2)) / parameters(MLP(2, hidden=(64, 64, 64)))
    assert 0.10 <= share <= 0.15


@pytest.mark.parametrize("branches", [0, 2])
def test_low_rank_makes_the_cost_linear_in_the_dimension(branches):
    costs = [parameters(GAV((3, 8, 8 * k), branches, rank=4)) for k in (1, 2, 3)]
    assert costs[2] - costs[1] == costs[1] - costs[0] > 0


@pytest.mark.parametrize("rank", [None, 3])
def test_images_are_flattened(rank):
    field = shake(GAV((2, 3, 4), width=10, rank=rank))
    x = torch.randn(5, 2, 3, 4)
    flat = field.evaluate(x.flatten(1))
    torch.testing.assert_close(field(T, x), flat.reshape(x.shape))
    with pytest.raises(InputError, match=r"x must be \[batch, 2, 3, 4\], got \[5, 24\]"):
        field(T, x.flatten(1))


def test_the_center_can_follow_the_condition():
    field = shake(GAV(3, center="condition", cond_dim=2))
    cond = torch.randn(4, 2)
    b = cond @ field.center_map.T + field.center
    torch.testing.assert_close(field(T, b, cond), torch.zeros(4, 3))
    shift = torch.randn(4, 3)
    torch.testing.assert_close(field(T, b + shift, cond), field.evaluate(shift))
    with pytest.raises(InputError, match=r"cond must be \[batch, 2\], got none"):
        field(T, b)


def test_a_learned_center_gets_a_gradient():
    field = GAV(3, center="learned")
    field(T, torch.randn(4, 3)).square().sum().backward()
    assert field.center.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be a whole number, at least 1, got 0"),
        ({"dim": ()}, r"got \(\)"),
        ({"dim": (-2, -3)}, "dim must be .* got -2"),
        ({"dim": 2.0}, "dim must be .* got 2.0"),
        ({"dim": True}, "dim must be .* got True"),
        ({"branches": "2"}, "branches must be .* got '2'"),
        ({"branches": -1}, "branches must be a whole number, at least 0, got -1"),
        ({"width": 1.5}, "width must be .* got 1.5"),
        ({"width": 0}, "width must be .* got 0"),
        ({"rank": 0}, "rank must be .* got 0"),
        ({"cond_dim": 1.5}, "cond_dim must be .* got 1.5"),
        ({"rate": "1"}, "rate must be positive and finite, got '1'"),
        ({"construction": "hurwitz"}, "'hurwitz'.*collocated"),
        ({"construction": "schur-cayley", "width": 5}, "width must be 3"),
        ({"activation": ("tanh",)}, r"one per branch \(2\), got 1"),
        ({"activation": "sine"}, "'sine'.*asinh"),
        ({"rate": 0.0}, "rate must be positive"),
        ({"metric": "full"}, "metric must be .*'full'"),
        ({"rank": 4}, r"rank must be in \[1, 3\]"),
        ({"center": "origin"}, "'origin'"),
        ({"center": "condition"}, "cond_dim = 0"),
        ({"center": torch.zeros(2)}, r"center must have 3 entries, got shape \[2\]"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        GAV(**{"dim": 3, **arguments})


def test_sizes_may_be_whole_numbers_of_any_kind():
    field = GAV(np.int64(3), np.int32(1), np.int64(4), rank=np.int64(2), rate=np.float32(0.5))
    assert field.shape == (3,) and type(field.shape[0]) is int
    assert GAV(torch.Size([2, 3])).shape == (2, 3)
    assert field(torch.tensor(0.5), torch.ones(7, 3)).shape == (7, 3)


OPTIONS = {
    "collocated": {},
    "lmi": {"construction": "lmi"},
    "low rank": {"rank": 1},
    "fixed center": {"center": torch.ones(2)},
    "learned center": {"center": "learned"},
    "no offsets": {"offsets": False},
    "schur-cayley": {"construction": "schur-cayley"},
    "schur-cayley-free": {"construction": "schur-cayley-free"},
    "learned metric": {"metric": "learned"},
    **{name: {"activation": name} for name in sorted(BRANCH_ACTIVATIONS)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kernels_read_the_field_alone_and_beside_another(options):
    field, x = shake(GAV(2, **options)), torch.randn(5, 2)
    for f in (field, Residual(MLP(2), field)):
        assert explain(f, x, method="euler").fused, str(explain(f, x, method="euler"))


def test_kernels_read_a_field_whose_center_follows_the_condition():
    field, x = shake(GAV(2, center="condition", cond_dim=3)), torch.randn(5, 2)
    both: nn.Module = Residual(MLP(2, cond_dim=3), field)
    assert explain(both, x, method="euler", cond=torch.randn(5, 3)).fused


@pytest.mark.parametrize("metric", ["identity", "learned"])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_kernels_give_the_gradients_of_all_parameters(construction, metric):
    names = ("tanh", "asinh", "clipped_cube")
    branch = GAV(2, 3, construction=construction, activation=names, metric=metric, rank=1)
    shake(branch, 0.05)
    field, x = Residual(MLP(2, hidden=(8,)), branch).double(), torch.randn(6, 2).double()
    found = []
    for mode in ("require", "off"):
        with fused(mode):
            y = solve(field, x, steps=4, method="rk4").y
        parameters = [p for p in branch.parameters() if p.requires_grad]
        found.append([y, *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
