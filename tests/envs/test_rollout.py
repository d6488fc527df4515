"""Roll-outs: what a policy sees, what is executed, and where the noise comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_ins import Forward, Line, Lost, Walker

from fmft_fast.envs import ObservationNoise, roll_out
from fmft_fast.errors import InputError, NonFiniteError

PRECISE = {"scale": (1.0, 1.0), "offset": (0.0, 0.0)}


def test_a_policy_sees_the_last_observations_and_the_first_one_repeated():
    policy = Forward(n_obs=3, n_action=2, horizon=4)
    [episode] = roll_out(policy, "line", [0], steps=4, method="heun2", max_steps=5)
    windows = [obs[0].tolist() for obs, *_ in policy.asked]
    assert windows == [
        [[0, 0], [0, 0], [0, 0]],
        [[0, 0], [1, 1], [2, 2]],
        [[2, 2], [3, 3], [4, 4]],
    ]
    assert episode.length == 5 and episode.scores == {"best": 0.5}
    assert {asked[2:] for asked in policy.asked} == {(4, "heun2")}


def test_who_is_done_stops_and_the_others_go_on():
    policy = Forward()
    episodes = roll_out(policy, "line", [8, 0, 3], steps=1)
    assert [episode.start for episode in episodes] == [8, 0, 3]
    assert [episode.length for episode in episodes] == [3, 11, 8]
    assert [len(obs) for obs, *_ in policy.asked] == [3, 2, 2, 1]


def test_the_noise_of_a_start_depends_on_it_and_the_seed_alone():
    def drawn(starts, start, **options):
        policy = Walker()
        roll_out(policy, "line", starts, steps=1, **options)
        return torch.stack([noise[starts.index(start)] for _, noise, *_ in policy.asked])

    alone = drawn([3], 3)
    assert torch.equal(drawn([1, 3, 0], 3), alone)
    assert not torch.equal(drawn([1, 3, 0], 1), alone)
    assert not torch.equal(drawn([3], 3, noise_seed=1), alone)
    assert len(torch.unique(alone)) == alone.numel()


def test_the_noise_is_standard_normal():
    policy = Walker(horizon=300)
    roll_out(policy, "line", list(range(60)), steps=1, max_steps=1)
    noise = policy.asked[0][1].ravel()
    # 18,000 numbers: the standard errors are .0075 and .0053, and of uniform ones in [0, 1) the
    # mean would be .5.
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03 and noise.abs().max() > 3


def test_observation_noise_stays_what_it_was_and_leaves_the_simulator_alone():
    noise = ObservationNoise("gaussian", 0.5, **PRECISE)
    policy = Forward(n_action=1, horizon=2)
    [episode] = roll_out(policy, "line", [0], steps=1, observation_noise=noise)
    assert episode.scores == roll_out(Forward(), "line", [0], steps=1)[0].scores
    windows = torch.cat([obs for obs, *_ in policy.asked])
    assert torch.equal(windows[0, 0], windows[0, 1])
    assert torch.equal(windows[1:, 0], windows[:-1, 1])
    true = torch.arange(len(windows)).unsqueeze(1).expand(-1, 2)
    error = windows[:, 1] - true
    assert error.abs().min() > 0 and len(torch.unique(error)) == error.numel()


def test_observation_noise_does_not_change_what_predictions_start_from():
    drawn = []
    for noise in ("none", ObservationNoise("salt-pepper", 0.3, **PRECISE)):
        policy = Walker()
        roll_out(policy, "line", [0, 1], steps=1, observation_noise=noise)
        drawn.append(policy.asked[0][1])
    assert torch.equal(*drawn)


def test_noise_without_a_scale_needs_a_policy_with_a_normaliser():
    with pytest.raises(InputError, match="expected scale and offset"):
        roll_out(Walker(), "line", [0], steps=1, observation_noise="gaussian:0.1")


def test_actions_that_are_not_finite_are_refused_with_the_start():
    with pytest.raises(NonFiniteError, match=r"start 7, step 0: .*nan"):
        roll_out(Lost(), "line", [0, 7], steps=1)


def test_pictures_are_kept_of_the_starts_that_were_asked_for():
    one, two = roll_out(Forward(), "line", [0, 4], steps=1, record=[4])
    assert one.frames is None and two.frames is not None
    assert two.frames.shape == (two.length + 1, 4, 6, 3) and two.frames.dtype == np.uint8
    assert two.frames[:, 0, 0, 0].tolist() == list(range(two.length + 1))


def test_a_policy_in_training_predicts_in_evaluation_mode_and_trains_on():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config, self.modes = Walker(), Walker().config, []

        def predict_action(self, batch, **options):
            self.modes.append(self.training)
            return self.inner.predict_action(batch, **options)

    policy = Module()
    roll_out(policy, "line", [0], steps=1)
    assert set(policy.modes) == {False} and policy.training
    roll_out(policy.eval(), "line", [0], steps=1)
    assert not policy.training


def test_instances_given_are_used_and_left_open():
    simulators = [Line(), Line(), Line()]
    roll_out(Forward(), simulators, [2, 5], steps=1)
    assert [one.place for one in simulators[:2]] == [11.0, 11.0]
    assert not hasattr(simulators[2], "place")


@pytest.mark.parametrize(
    ("policy", "environment", "starts", "options", "words"),
    [
        (Walker(), "line", [], {}, "starts: expected at least one"),
        (Walker(), "line", [1, 1], {}, r"each once, got \[1, 1\]"),
        (Walker(), "line", [0, -1], {}, "from 0 on, got -1 and 0"),
        (Walker(), "line", [0], {"noise_seed": -1}, "from 0 on, got 0 and -1"),
        (Walker(obs_dim=3), "line", [0], {}, "obs_dim: expected 2 as line has, got a policy of 3"),
        (Walker(), "lines", [0], {}, "no simulator 'lines'; there are .*line"),
        (Walker(), [Line()], [0, 1], {}, "expected 2 simulators, got 1"),
        (Walker(), "line", [0], {"max_steps": 0}, "max_steps: expected at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(policy, environment, starts, options, words):
    with pytest.raises(InputError, match=words):
        roll_out(policy, environment, starts, steps=1, **options)
