"""The residual field: a sum, its base frozen, in every place where a field is used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fmft_fast import fused, odeint, solve
from fmft_fast.errors import FmftError, InputError, InputTypeError
from fmft_fast.fields import MLP, Residual
from fmft_fast.flow import sample
from fmft_fast.train.optim import Average


def make(*, joint=False, cond_dim=0, branch_cond=0, dtype=torch.float32):
    torch.manual_seed(0)
    base = MLP(2, hidden=(16, 16), cond_dim=cond_dim)
    branch = MLP(2, hidden=(8,), activation="tanh", cond_dim=branch_cond)
    return Residual(base, branch, joint=joint).to(dtype)


def trained(field):
    return {name.split(".")[0] for name, p in field.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.rand(5)], ids=["one time", "times"])
def test_it_is_the_sum_of_its_parts(t):
    field, x = make(), torch.randn(5, 2)
    assert torch.equal(field(t, x), field.base(t, x) + field.branch(t, x))
    assert all(map(torch.equal, field.parts(t, x), (field.base(t, x), field.branch(t, x))))


@pytest.mark.parametrize("branch_cond", [0, 3])
def test_a_branch_without_a_condition_is_not_given_one(branch_cond):
    field = make(cond_dim=3, branch_cond=branch_cond)
    t, x, cond = torch.tensor(0.3), torch.randn(5, 2), torch.randn(5, 3)
    told = (cond,) if branch_cond else ()
    torch.testing.assert_close(
        field(t, x, cond), field.base(t, x, cond) + field.branch(t, x, *told)
    )


@pytest.mark.parametrize("branch_cond", [2, 5])
@pytest.mark.parametrize("mode", ["off", "require"])
def test_a_branch_can_be_shown_the_velocity_before_the_condition(branch_cond, mode):
    base, branch = MLP(2, cond_dim=3), MLP(2, hidden=(8,), cond_dim=branch_cond)
    field = Residual(base, branch, show_velocity=True).double()
    t, x, cond = torch.tensor(0.0), torch.randn(5, 2).double(), torch.randn(5, 3).double()
    v = base(t, x, cond)
    told = torch.cat([v, cond], 1) if branch_cond == 5 else v
    want = v + branch(t, x, told)
    torch.testing.assert_close(field(t, x, cond), want)
    with fused(mode):
        y = solve(field, x, steps=1, cond=cond).y
    torch.testing.assert_close(y, x + want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("joint", [False, True])
def test_only_a_joint_residual_trains_its_base(joint):
    field = make(joint=joint)
    assert trained(field) == ({"base", "branch"} if joint else {"branch"})
    solve(field, torch.randn(8, 2), steps=3).y.square().sum().backward()
    got = {name.split(".")[0] for name, p in field.named_parameters() if p.grad is not None}
    assert got == trained(field)


class Moody(nn.Module):
    """A base with dropout and running statistics, whose evaluation must not change."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.last = nn.Linear(8, 2)

    def forward(self, t, x):
        return self.last(self.net(x))


@pytest.mark.parametrize("joint", [False, True])
def test_a_frozen_base_stays_in_evaluation_while_the_branch_trains(joint):
    field = Residual(Moody(), Moody(), joint=joint).train()
    assert field.branch.training and field.base.net[2].training is joint
    before = {k: v.clone() for k, v in field.base.state_dict().items()}
    field.base(torch.tensor(0.0), torch.randn(32, 2))
    same = [torch.equal(v, before[k]) for k, v in field.base.state_dict().items()]
    assert all(same) is not joint
    assert not field.eval().branch.training


def test_a_state_dict_makes_the_round_trip():
    field, other = make(), make()
    with torch.no_grad():
        for p in field.parameters():
            p.add_(1)
    other.load_state_dict(field.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(field(torch.tensor(0.5), x), other(torch.tensor(0.5), x))
    assert {name.split(".")[0] for name in field.state_dict()} == {"base", "branch"}
    with pytest.raises(RuntimeError, match="base.linears"):
        MLP(2, hidden=(16, 16)).load_state_dict(field.state_dict())


def test_a_copy_is_frozen_alike_and_stands_alone():
    field = make().train()
    twin = copy.deepcopy(field).train()
    assert trained(twin) == {"branch"} and not twin.base.training
    with torch.no_grad():
        next(twin.branch.parameters()).add_(1)
    x = torch.randn(4, 2)
    assert not torch.equal(field(torch.tensor(0.5), x), twin(torch.tensor(0.5), x))


def test_averaging_moves_the_branch_and_leaves_the_base():
    field = make()
    average = Average(field, 0.9)
    base = {k: v.clone() for k, v in field.base.state_dict().items()}
    for step in range(3):
        with torch.no_grad():
            for p in field.branch.parameters():
                p.add_(1)
        average.set_rate(step)
        average.update()
        average.count += 1
    averaged = average.module
    assert all(torch.equal(v, base[k]) for k, v in averaged.base.state_dict().items())
    p, mean = next(field.branch.parameters()), next(averaged.branch.parameters())
    assert 0 < float((p - mean).detach().mean()) < 2


@pytest.mark.parametrize("joint", [False, True])
def test_the_fused_solve_equals_the_plain_one_with_its_gradients(joint):
    field = make(joint=joint, dtype=torch.float64)
    x0 = torch.randn(16, 2, dtype=torch.float64)
    found = {}
    for mode in ("off", "require"):
        x, y = x0.clone().requires_grad_(), make(joint=joint).double()
        y.load_state_dict(field.state_dict())
        with fused(mode):
            solve(y, x, method="euler", steps=5).y.square().sum().backward()
        grads = [p.grad for p in y.parameters() if p.grad is not None]
        found[mode] = [x.grad, *grads]
    assert len(found["off"]) == (11 if joint else 5)
    torch.testing.assert_close(found["require"], found["off"], rtol=1e-10, atol=1e-12)


def test_odeint_takes_it_as_any_field():
    field = make()
    t = torch.linspace(0, 1, 5)
    x = torch.randn(6, 2)
    y = odeint(field, x, t, method="euler")
    for k in range(4):
        torch.testing.assert_close(y[k + 1], y[k] + 0.25 * field(t[k], y[k]))


def test_it_tells_the_sizes_of_its_base_to_those_who_sample():
    assert sample(make(), 4, steps=2).shape == (4, 2)
    field = make(cond_dim=3)
    assert (field.dim, field.cond_dim) == (2, 3)
    assert not hasattr(Residual(Moody(), Moody()), "dim")


def test_torch_compile_takes_it_whole():
    field, t, x = make().eval(), torch.tensor(0.5), torch.randn(4, 2)
    compiled = torch.compile(field, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(t, x), field(t, x))


def test_what_does_not_fit_is_refused():
    field = Residual(MLP(2), Pad())
    with pytest.raises(InputError, match=r"same shape, got \[4, 2\] and \[4, 3\] for x \[4, 2\]"):
        field(torch.tensor(0.0), torch.zeros(4, 2))
    with pytest.raises(InputTypeError, match="branch to be an nn.Module.*got function"):
        Residual(MLP(2), lambda t, x: x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(FmftError, match="base and branch to give the same shape"):
        solve(field, torch.zeros(4, 2), steps=2)


class Pad(nn.Module):
    """A branch of the wrong width."""

    def forward(self, t, x):
        return torch.zeros(len(x), 3)
