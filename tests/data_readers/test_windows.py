"""Every window is the padded slice of one episode."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from real_data import data_folder

from fmft_fast.data import make_windows, read_episodes
from fmft_fast.errors import InputError


def by_hand(obs, action, ends, horizon, n_obs, n_action):
    """Cut windows one by one out of episodes that are padded by hand."""
    rows, start = [], 0
    for index, end in enumerate(ends):
        before, after = n_obs - 1, max(n_action - 1, horizon)

        def pad(x, start=start, end=end, before=before, after=after):
            part = x[start:end]
            return np.concatenate([part[:1]] * before + [part] + [part[-1:]] * after)

        seen, done = pad(obs), pad(action)
        count = max(1, (end - start) + before + (n_action - 1) - horizon + 1)
        for k in range(count):
            rows.append((seen[k : k + n_obs], done[k : k + horizon], index))
        start = end
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_every_window_is_the_padded_slice_of_its_episode(seed):
    rng = np.random.default_rng(seed)
    n_obs, n_action = (int(n) for n in rng.integers(1, 6, 2))
    horizon = n_obs - 1 + n_action + int(rng.integers(0, 8))
    ends = np.cumsum(rng.integers(1, 25, rng.integers(1, 9)))
    # Values tell the step and so the episode; the two arrays differ.
    obs = np.stack([np.arange(ends[-1]), -np.arange(ends[-1])], 1).astype(np.float32)
    action = 1000 + np.arange(ends[-1], dtype=np.float64)[:, None]
    windows = make_windows(obs, action, ends, horizon=horizon, n_obs=n_obs, n_action=n_action)
    expected = by_hand(obs, action, ends, horizon, n_obs, n_action)
    assert len(windows) == len(expected)
    assert windows.obs.dtype == windows.action.dtype == torch.float32
    assert windows.obs.shape[1:] == (n_obs, 2) and windows.action.shape[1:] == (horizon, 1)
    for row, (seen, done, index) in enumerate(expected):
        np.testing.assert_array_equal(windows.obs[row], seen)
        np.testing.assert_array_equal(windows.action[row], done)
        assert windows.episode[row] == index


@pytest.mark.parametrize("seed", range(10))
def test_episodes_never_mix_and_no_step_is_lost(seed):
    rng = np.random.default_rng(100 + seed)
    ends = np.cumsum(rng.integers(1, 30, 12))
    owner = np.repeat(np.arange(12), np.diff(ends, prepend=0)).astype(np.float32)[:, None]
    windows = make_windows(owner, owner, ends, horizon=16, n_obs=2, n_action=8)
    assert (windows.obs == windows.episode[:, None, None]).all()
    assert (windows.action == windows.episode[:, None, None]).all()
    step = np.arange(ends[-1], dtype=np.float32)[:, None]
    windows = make_windows(step, step, ends, horizon=9, n_obs=2, n_action=8)
    # With the least horizon, every step is the newest one seen and the first one executed.
    assert windows.obs[:, -1, 0].tolist() == step[:, 0].tolist()
    assert windows.action[:, 1, 0].tolist() == step[:, 0].tolist()


def test_an_episode_of_one_step_gives_one_window_of_copies():
    windows = make_windows(
        np.array([[5.0, 6.0]]), np.array([[7.0]]), np.array([1]), horizon=4, n_obs=2, n_action=2
    )
    assert windows.obs.tolist() == [[[5, 6], [5, 6]]]
    assert windows.action.tolist() == [[[7], [7], [7], [7]]]


def test_integers_tensors_and_lists_of_ends_serve():
    windows = make_windows(
        torch.arange(4)[:, None], np.arange(4)[:, None], [4], horizon=2, n_obs=1, n_action=1
    )
    assert windows.action[..., 0].tolist() == [[0, 1], [1, 2], [2, 3]]


def test_windows_of_the_real_demonstrations():
    episodes = read_episodes(data_folder("pusht") / "pusht_lowdim.npz")
    obs, action = episodes.columns("keypoint", "state")[:, :20], episodes["action"]
    begin = time.perf_counter()
    windows = make_windows(obs, action, episodes.episode_ends, horizon=16, n_obs=2, n_action=8)
    assert time.perf_counter() - begin < 1.0
    assert windows.obs.shape == (24_208, 2, 20) and windows.action.shape == (24_208, 16, 2)
    counts = torch.bincount(windows.episode)
    assert counts.tolist() == (episodes.lengths - 7).tolist()


def test_arrays_are_not_shared_with_the_windows():
    obs = np.zeros((3, 1), np.float32)
    windows = make_windows(obs, obs, [3], horizon=1, n_obs=1, n_action=1)
    windows.obs.add_(1)
    assert (obs == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "horizon: expected a whole number from 1 on, got 0"),
        ({"n_obs": True}, "n_obs: expected a whole number"),
        ({"n_action": 2.0}, "n_action: expected a whole number"),
        ({"horizon": 8}, "horizon: expected at least n_obs - 1 \\+ n_action = 9, got 8"),
        ({"obs": np.zeros(5)}, "obs: expected shape \\[5, dim\\].*Episodes.columns"),
        ({"obs": np.zeros((5, 2, 2))}, "obs: expected shape"),
        ({"action": np.zeros((4, 2))}, "action: expected shape \\[5, dim\\]"),
        ({"action": np.full((5, 2), np.nan)}, "action: expected finite .* at step 0"),
        ({"action": np.full((5, 2), 1e300)}, "action: expected finite float32"),
        ({"episode_ends": [3, 3, 5]}, "episode_ends: expected numbers that increase"),
        ({"episode_ends": []}, "episode_ends: expected"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    given = {"obs": np.zeros((5, 3)), "action": np.zeros((5, 2)), "episode_ends": [2, 5]}
    sizes = {"horizon": 16, "n_obs": 2, "n_action": 8}
    with pytest.raises(InputError, match=message):
        make_windows(**{**given, **sizes, **change})
