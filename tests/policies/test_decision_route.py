"""Decisions run in one kernel call, as single steps would, and with the weights of the moment."""

from __future__ import annotations

import pytest
import torch

from fmft_fast import fused
from fmft_fast.policies import FlowPolicy, PolicyConfig
from fmft_fast.solvers.whole_solve import Mode


def make_policy(dtype=torch.float32):
    torch.manual_seed(0)
    options = {"width": 72, "blocks": 2}
    policy = FlowPolicy(PolicyConfig(obs_dim=3, action_dim=2, network_options=options))
    for outer in policy.network.get_submodule("outer").children():
        torch.nn.init.xavier_normal_(outer.get_parameter("weight"))
    return policy.to(dtype).eval()


def decide(policy, batch=1, mode: Mode = "auto", **settings):
    """The actions for fixed observations and noise."""
    g = torch.Generator().manual_seed(1)
    like = next(policy.parameters())
    obs, noise = (torch.randn(batch, *s, generator=g).to(like) for s in ((2, 3), (16, 2)))
    with fused(mode):
        return policy.predict_action({"obs": obs}, noise=noise, **settings)["action_pred"]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(
    "settings", [{"steps": 1}, {"steps": 7}, {"steps": 2, "method": "rk4"}], ids=str
)
def test_a_decision_is_one_call_with_the_actions_of_single_steps(batch, settings):
    exact = decide(make_policy(torch.float64), batch, "off", **settings)
    policy = make_policy()
    found = decide(policy, batch, **settings)
    assert torch.equal(found, decide(policy, batch, "require", **settings))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def add_to_data(p):
    p.data.add_(0.25)


def write_through_numpy(p):
    p.detach().numpy()[...] += 0.25


def write_through_a_view(p):
    torch.as_strided(p.detach(), (p.numel(),), (1,)).add_(0.25)


def take_new_memory(p):
    p.data = p.data + 0.25


@pytest.mark.parametrize(
    "change", [add_to_data, write_through_numpy, write_through_a_view, take_new_memory]
)
def test_every_change_of_a_weight_shows_in_the_next_decision(change):
    """Also those that torch does not count; tables of time are kept while nothing has changed."""
    policy = make_policy()
    for name, p in policy.network.state_dict(keep_vars=True).items():
        before = decide(policy, steps=2)
        change(p)
        found = decide(policy, steps=2)
        assert not torch.equal(found, before), name
        torch.testing.assert_close(found, decide(policy, mode="off", steps=2), rtol=1e-4, atol=1e-5)
        p.data.sub_(0.25)
