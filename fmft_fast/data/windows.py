"""Windows over episodes: what a policy with a horizon is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmft_fast.data.episodes import check_ends
from fmft_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows cut from episodes, in order.

    Attributes:
        obs: [n, n_obs, obs_dim] float32, raw units, the oldest observation first.
        action: [n, horizon, action_dim] float32, raw units; action 0 belongs to observation 0, so
            that action n_obs - 1 is the one taken at the newest observation.
        episode: [n] int64, the episode of each window.
    """

    obs: Tensor
    action: Tensor
    episode: Tensor

    def __len__(self) -> int:
        """Give the number of windows."""
        return len(self.obs)


def make_windows(
    obs: np.ndarray | Tensor,
    action: np.ndarray | Tensor,
    episode_ends: np.ndarray,
    *,
    horizon: int,
    n_obs: int,
    n_action: int,
) -> Windows:
    """Cut every window of `horizon` steps out of every episode; none reaches into another.

    The first window of an episode starts n_obs - 1 steps before it and the last one ends
    n_action - 1 steps after it, so that the first observation is once the newest one seen, and the
    last action is executed. Steps outside are filled by repeating the episode's first or last. An
    episode too short for that gives its first window alone.

    Args:
        obs: [steps, obs_dim].
        action: [steps, action_dim].
        episode_ends: [episodes], see `Episodes`.
        horizon: actions in a window.
        n_obs: observations in a window.
        n_action: actions that are executed before the next decision.

    Raises:
        InputError: shapes or lengths disagree, a number is not finite in float32, or a size is
            below 1 or does not fit into the horizon.

    Source:
        Chi et al. 2023, Diffusion Policy (arXiv:2303.04137), section 3.1 and its padding.

    Example:
        >>> step = np.arange(5.0)[:, None]
        >>> windows = make_windows(step, step, [5], horizon=4, n_obs=2, n_action=2)
        >>> windows.obs[..., 0].int().tolist()
        [[0, 0], [0, 1], [1, 2], [2, 3]]
        >>> windows.action[..., 0].int().tolist()
        [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 4]]
    """
    _check_sizes(horizon, n_obs, n_action)
    ends = check_ends(episode_ends)
    seen = _check_rows("obs", obs, ends)
    done = _check_rows("action", action, ends)
    lengths = np.diff(ends, prepend=0)
    counts = np.maximum(lengths + (n_obs - 1) + (n_action - 1) - horizon + 1, 1)
    episode = np.repeat(np.arange(len(ends)), counts)
    # Place of a window among those of its episode, then its first step.
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first, last = (ends - lengths)[episode], ends[episode] - 1
    start = first + place - (n_obs - 1)
    steps = np.clip(start[:, None] + np.arange(horizon), first[:, None], last[:, None])
    index = torch.from_numpy(steps)
    return Windows(seen[index[:, :n_obs]], done[index], torch.from_numpy(episode))


def _check_sizes(horizon: int, n_obs: int, n_action: int) -> None:
    for name, size in (("horizon", horizon), ("n_obs", n_obs), ("n_action", n_action)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{name}: expected a whole number from 1 on, got {size!r}; raise it")
    if horizon < n_obs - 1 + n_action:
        raise InputError(
            f"horizon: expected at least n_obs - 1 + n_action = {n_obs - 1 + n_action}, got "
            f"{horizon}; raise it, or execute fewer actions"
        )


def _check_rows(name: str, values: Any, ends: np.ndarray) -> Tensor:
    """Give finite float32 rows [steps, dim]."""
    rows = torch.as_tensor(values)
    if rows.ndim != 2 or len(rows) != ends[-1]:
        raise InputError(
            f"{name}: expected shape [{ends[-1]}, dim], one row for every step, got "
            f"{list(rows.shape)}; flatten each step (Episodes.columns does)"
        )
    rows = rows.to(torch.float32)
    if not bool(torch.isfinite(rows).all()):
        step = int((~torch.isfinite(rows)).any(1).nonzero()[0])
        raise InputError(
            f"{name}: expected finite float32 numbers, got NaN or infinity at step {step}; "
            f"repair that episode or leave it out"
        )
    return rows
