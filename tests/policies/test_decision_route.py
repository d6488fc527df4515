"""Which way a decision takes: kernels of whole solves, or single steps where those are sooner."""

from __future__ import annotations

import pytest
import torch

from fmft_fast import fused
from fmft_fast.policies import FlowPolicy, PolicyConfig, policy
from fmft_fast.solvers.whole_solve import fusion_mode


@pytest.fixture
def modes(monkeypatch):
    """What the fusion mode was in each solve of a policy."""
    seen, integrate = [], policy.integrate

    def watched(*args, **kwargs):
        seen.append(fusion_mode())
        return integrate(*args, **kwargs)

    monkeypatch.setattr(policy, "integrate", watched)
    return seen


@pytest.fixture
def make(monkeypatch):
    """Make a policy that counts as large, or not."""

    def make(large=True):
        monkeypatch.setattr(policy, "LARGE", 0 if large else 10**9)
        torch.manual_seed(0)
        config = PolicyConfig(obs_dim=3, action_dim=2, network_options={"width": 16})
        return FlowPolicy(config).eval()

    return make


@pytest.mark.parametrize(
    ("large", "batch", "settings", "mode"),
    [
        (True, 1, {"steps": 1}, "off"),
        (True, 1, {"steps": policy.FEW - 1}, "off"),
        (True, 1, {"steps": policy.FEW}, "auto"),
        (True, 1, {"steps": 2, "method": "rk4"}, "auto"),  # 8 evaluations
        (True, 2, {"steps": 1}, "auto"),
        (False, 1, {"steps": 1}, "auto"),
        (True, 1, {"steps": None, "method": "dopri5", "rtol": 1e-3}, "auto"),
    ],
)
def test_a_decision_alone_of_few_evaluations_takes_single_steps(
    modes, make, large, batch, settings, mode
):
    make(large).predict_action({"obs": torch.zeros(batch, 2, 3)}, **settings)
    assert modes == [mode] and fusion_mode() == "auto"


def test_what_the_caller_asks_for_stays(modes, make):
    with fused("require"):
        make().predict_action({"obs": torch.zeros(1, 2, 3)}, steps=1)
    assert modes == ["require"]


def test_both_ways_give_the_same_actions(make):
    large, obs, noise = make(), torch.randn(1, 2, 3), torch.randn(1, 16, 2)
    with fused("require"):
        kernels = large.predict_action({"obs": obs}, steps=4, noise=noise)
    steps = large.predict_action({"obs": obs}, steps=4, noise=noise)
    for name in ("action", "action_pred"):
        torch.testing.assert_close(kernels[name], steps[name], rtol=1e-5, atol=1e-6)
