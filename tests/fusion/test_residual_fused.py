"""v + GAV solved in one call: the numbers and gradients of single steps, for the branch alone."""

from __future__ import annotations

import pytest
import torch

from fmft_fast import explain, fused, solve
from fmft_fast.fields import GAV, MLP, Residual
from fmft_fast.fusion import Plan, find_plan

ACTIVATIONS = ("tanh", "softsign", "leaky_relu", "asinh", "clipped_cube")
CONSTRUCTIONS = ("collocated", "lmi", "schur-cayley", "schur-cayley-free")
D = 2


def field_of(construction, activation, cond=0, joint=False, center: object = "learned"):
    """A field v + GAV in float64, its branch away from zero but not stiff."""
    torch.manual_seed(0)
    width = None if construction.startswith("schur") else 5
    options = {"construction": construction, "activation": activation, "cond_dim": cond}
    branch = GAV(D, branches=2, width=width, center="condition" if cond else center, **options)
    with torch.no_grad():
        for name, p in branch.named_parameters():
            small = name.endswith(("gain", "diagonal"))
            p.copy_(0.1 + 0.1 * torch.rand_like(p) if small else 0.3 * torch.randn_like(p))
    return Residual(MLP(D, (7,), "silu", cond_dim=cond), branch, joint).double()


def compare(field, cond=None, **options):
    """Assert the same values and gradients in one call and step by step; return them."""
    x0 = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    leaves = [x0, *(p for p in field.parameters() if p.requires_grad)]
    leaves += [] if cond is None else [cond]

    def compute():
        y = solve(field, x0, steps=2, cond=cond, **options).y
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    with fused("require"):
        found = compute()
    with fused("off"):
        torch.testing.assert_close(found, compute(), rtol=1e-11, atol=1e-12)
    return found


@pytest.mark.parametrize("cond", [0, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_values_and_gradients(construction, activation, cond):
    field = field_of(construction, activation, cond)
    given = torch.randn(4, cond, dtype=torch.float64, requires_grad=True) if cond else None
    compare(field, given, method="midpoint")
    assert all(p.grad is None for p in field.base.parameters())


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_joint_training_and_an_adaptive_solve(construction):
    field = field_of(construction, "asinh", joint=True, center=torch.tensor([0.4, -1.0]))
    found = compare(field, method="rk4")
    assert len(found) == 2 + len(list(field.parameters()))
    x0 = torch.randn(4, D, dtype=torch.float64)
    tolerances = {"rtol": 1e-7, "atol": 1e-9}
    with fused("require"):
        one = solve(field, x0, method="dopri5", **tolerances).y
    with fused("off"):
        steps = solve(field, x0, method="dopri5", **tolerances).y
    torch.testing.assert_close(one, steps, rtol=1e-10, atol=1e-11)


def test_a_constant_centre_costs_nothing():
    """The shift of the state folds into the biases: as many layers as without one."""
    x0 = torch.randn(4, D, dtype=torch.float64)
    plans = [
        find_plan(field_of("collocated", "tanh", center=center), x0)
        for center in (None, "learned", torch.tensor([0.4, -1.0]))
    ]
    assert all(isinstance(plan, Plan) for plan in plans)
    assert len({(len(plan.network.layers), plan.flops) for plan in plans}) == 1


def test_changes_of_raw_parameters_in_place_are_seen():
    for construction in CONSTRUCTIONS:
        field = field_of(construction, "softsign")
        x0 = torch.randn(4, D, dtype=torch.float64)
        plan = find_plan(field, x0)
        torch.manual_seed(1)
        before = compare(field)[0]
        with torch.no_grad():
            for p in field.branch.parameters():
                p.add_(0.05)
        torch.manual_seed(1)
        assert not torch.allclose(before, compare(field)[0])
        assert find_plan(field, x0) is plan


def test_kernels_compute_no_gradient_of_a_frozen_base(monkeypatch):
    from fmft_fast.ops.backend import choose_trajectory

    field = field_of("collocated", "tanh")
    x0 = torch.randn(4, D, dtype=torch.float64)
    plan = find_plan(field, x0)
    kernels = choose_trajectory(plan.network, 1, 4, x0)
    asked = []
    backward = type(kernels).backward

    def spy(self, program, inputs, kept, grad, wanted):
        asked.append(list(wanted.parameters))
        return backward(self, program, inputs, kept, grad, wanted)

    monkeypatch.setattr(type(kernels), "backward", spy)
    compare(field)
    base = {id(p) for p in field.base.parameters()}
    own = [id(p) in base for p in plan.bind(None).parameters]
    # The last bias of the base is added up with what the branch subtracts, and belongs to both.
    assert sum(own) == len(base) - 1
    assert asked == [[not frozen for frozen in own]]


def test_the_words_of_a_plan_name_the_activations():
    for activation in ACTIVATIONS:
        text = str(explain(field_of("lmi", activation), torch.randn(4, D, dtype=torch.float64)))
        assert activation in text and "computed once per solve" in text
