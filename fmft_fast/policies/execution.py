"""Receding-horizon control: predict a sequence of actions, execute some of them, predict again."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmft_fast.errors import InputError
from fmft_fast.policies.policy import FlowPolicy


class RecedingHorizon:
    """One robot's controller: an observation in, an action out.

    The first observation of an episode is repeated `n_obs` times. A prediction is made when all
    actions of the last one are executed.

    Args:
        policy: in evaluation mode.
        seed: of the noise; episodes after the first go on in the same stream.
        solver: keyword arguments of `FlowPolicy.predict_action`, such as `steps`.

    Example:
        >>> from fmft_fast.policies import PolicyConfig
        >>> config = PolicyConfig(obs_dim=5, action_dim=2, network_options={"width": 16})
        >>> controller = RecedingHorizon(FlowPolicy(config), steps=1)
        >>> controller.act(torch.zeros(5)).shape
        torch.Size([2])
        >>> controller.left
        7
    """

    def __init__(self, policy: FlowPolicy, *, seed: int = 0, **solver: Any) -> None:
        self.policy, self.solver = policy, solver
        self._random = torch.Generator().manual_seed(seed)
        self._seen: deque[Tensor] = deque(maxlen=policy.config.n_obs)
        self._planned: deque[Tensor] = deque()

    @property
    def left(self) -> int:
        """Actions that will be executed before the next prediction."""
        return len(self._planned)

    def reset(self) -> None:
        """Begin a new episode: forget observations and planned actions."""
        self._seen.clear()
        self._planned.clear()

    def act(self, obs: Tensor | np.ndarray) -> Tensor:
        """Take the newest observation [obs_dim] and give the action to execute, [action_dim].

        Raises:
            InputError: the observation has another shape or is not finite.
        """
        wanted = (self.policy.config.obs_dim,)
        if tuple(obs.shape) != wanted:
            raise InputError(f"obs: expected {list(wanted)}, got {list(obs.shape)}")
        obs = torch.as_tensor(obs).to(self.policy.obs_normalizer.scale)
        if not bool(torch.isfinite(obs).all()):
            raise InputError("obs: holds NaN or infinite values; check the sensor")
        self._seen.extend([obs] if self._seen else [obs] * self.policy.config.n_obs)
        if not self._planned:
            window = torch.stack(tuple(self._seen)).unsqueeze(0)
            found = self.policy.predict_action(
                {"obs": window}, generator=self._random, **self.solver
            )
            self._planned.extend(found["action"][0])
        return self._planned.popleft()
