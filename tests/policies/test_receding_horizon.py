"""Receding-horizon control: what the policy sees, when it is asked, and what is executed."""

from __future__ import annotations

import pytest
import torch

from fmft_fast.errors import InputError
from fmft_fast.policies import FlowPolicy, PolicyConfig, RecedingHorizon


class Asked(FlowPolicy):
    """Keeps what it was asked."""

    def predict_action(self, batch, **options):
        self.seen.append(batch["obs"].clone())
        self.options = options
        return super().predict_action(batch, **options)


def make(n_obs=2, n_action=3):
    torch.manual_seed(0)
    config = PolicyConfig(
        obs_dim=2, action_dim=1, n_obs=n_obs, n_action=n_action, horizon=n_obs + n_action,
        network_options={"width": 8, "blocks": 1},
    )  # fmt: skip
    policy = Asked(config).eval()
    policy.seen = []
    return policy


def place(k):
    return torch.tensor([float(k), 0.5])


def test_it_predicts_when_all_actions_are_done_and_sees_the_newest_observations():
    policy = make()
    controller = RecedingHorizon(policy, steps=2, method="midpoint")
    left = []
    for k in range(7):
        assert controller.act(place(k)).shape == (1,)
        left.append(controller.left)
    assert left == [2, 1, 0, 2, 1, 0, 2]
    windows = [window[0, :, 0].tolist() for window in policy.seen]
    assert windows == [[0, 0], [2, 3], [5, 6]], "the first observation is repeated"
    assert {"steps": 2, "method": "midpoint"}.items() <= policy.options.items()


def test_actions_are_those_predicted_in_their_order():
    policy = make(n_obs=1)
    controller = RecedingHorizon(policy, seed=4, steps=3)
    done = [controller.act(place(k)) for k in range(6)]
    random, wanted = torch.Generator().manual_seed(4), []
    for k in (0, 3):
        window = place(k).reshape(1, 1, 2)
        found = policy.predict_action({"obs": window}, steps=3, generator=random)
        wanted += list(found["action"][0])
    assert torch.equal(torch.stack(done), torch.stack(wanted))


def test_a_new_episode_forgets_the_last_one_and_goes_on_in_the_stream_of_noise():
    policy = make()
    controller = RecedingHorizon(policy)
    first = controller.act(place(7))
    controller.reset()
    assert controller.left == 0
    second = controller.act(place(7))
    assert policy.seen[-1][0, :, 0].tolist() == [7, 7]
    assert not torch.equal(first, second), "episodes do not repeat their noise"
    again = RecedingHorizon(policy)
    assert torch.equal(first, again.act(place(7)))


def test_observations_of_a_robot_may_be_arrays():
    one, other = RecedingHorizon(make()), RecedingHorizon(make())
    assert torch.equal(one.act(place(3).double().numpy()), other.act(place(3)))


@pytest.mark.parametrize("after", [0, 1], ids=["when predicting", "between predictions"])
def test_a_bad_observation_is_refused_at_once_and_leaves_no_trace(after):
    policy = make()
    controller = RecedingHorizon(policy)
    for k in range(after):
        controller.act(place(k))
    for bad, message in (
        (torch.tensor([torch.nan, 0.0]), "obs: holds NaN or infinite"),
        (torch.zeros(3), r"obs: expected \[2\], got \[3\]"),
        (torch.zeros(1, 2), r"obs: expected \[2\], got \[1, 2\]"),
    ):
        with pytest.raises(InputError, match=message):
            controller.act(bad)
    for k in range(after, 4):
        controller.act(place(k))
    assert [w[0, :, 0].tolist() for w in policy.seen] == [[0, 0], [2, 3]]
