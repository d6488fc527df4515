"""Roll-outs of a policy in a simulator: one episode per start, and evaluations of many."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmft_fast.envs.base import Environment, make_environment
from fmft_fast.envs.noise import ObservationNoise
from fmft_fast.errors import InputError, NonFiniteError

ACTION_STREAM, OBSERVATION_STREAM = 0, 1


@dataclass(frozen=True)
class Episode:
    """What came of one start.

    Attributes:
        start: number of the initial state.
        scores: the simulator's measures at the end.
        length: steps done.
        frames: pictures of the initial state and after each step, uint8 [length + 1, height,
            width, 3], or None if not recorded.
    """

    start: int
    scores: dict[str, float]
    length: int
    frames: np.ndarray | None = None


def roll_out(
    policy: Any,
    environment: str | Sequence[Environment],
    starts: Sequence[int],
    *,
    steps: int | None,
    method: str = "euler",
    noise_seed: int = 0,
    observation_noise: ObservationNoise | str | None = None,
    record: Sequence[int] = (),
    max_steps: int | None = None,
) -> list[Episode]:
    """Run one episode per start, all in lockstep, so that the policy predicts for all at once.

    A policy sees the last n_obs observations, the first one repeated at the beginning, and its
    n_action actions are executed before it is asked again. The noise that it starts from is
    standard normal, drawn from a stream that depends on noise_seed and the start alone. (What runs
    beside a start can still change its result in the last bits: a network's sums depend on the
    size of the batch.)

    Args:
        policy: anything with `config` and `predict_action` as `fmft_fast.policies.FlowPolicy`.
        environment: name of a simulator, or at least as many instances as starts, of one kind.
        starts: numbers of initial states.
        steps: solver steps of a prediction.
        method: solver's name.
        noise_seed: of the noise that predictions start from and of the observation noise.
        observation_noise: between simulator and policy; as text, see `ObservationNoise.parse`.
            What is not given of its scale is taken from the policy's normaliser.
        record: starts whose pictures are kept.
        max_steps: steps of an episode; by default those of the published protocol.

    Returns:
        Episodes in the order of `starts`.

    Raises:
        InputError: the policy's sizes are not the simulator's, or starts or sizes make no sense.
        NonFiniteError: the policy gave an action that is NaN or infinite; names the start.
    """
    if not starts or len(set(starts)) < len(starts):
        raise InputError(f"starts: expected at least one, each once, got {list(starts)}")
    if min(*starts, noise_seed) < 0:
        raise InputError(
            f"expected starts and noise_seed from 0 on, got {min(starts)} and {noise_seed}"
        )
    if isinstance(environment, str):
        environments = [make_environment(environment) for _ in starts]
        try:
            return roll_out(
                policy,
                environments,
                starts,
                steps=steps,
                method=method,
                noise_seed=noise_seed,
                observation_noise=observation_noise,
                record=record,
                max_steps=max_steps,
            )
        finally:
            for one in environments:
                one.close()
    _check_sizes(policy.config, environment, starts)
    limit = environment[0].max_steps if max_steps is None else max_steps
    if limit < 1:
        raise InputError(f"max_steps: expected at least 1, got {limit}")
    noise = as_noise(observation_noise).for_policy(policy)
    runs = [
        _Run(one, start, noise_seed, noise, policy.config, start in record, limit)
        for one, start in zip(environment, starts, strict=False)
    ]
    with _evaluation_mode(policy):
        while live := [run for run in runs if not run.done]:
            device = _device(policy)
            found = policy.predict_action(
                {"obs": torch.stack([run.window() for run in live]).to(device)},
                steps=steps,
                method=method,
                noise=torch.stack([run.draw_noise() for run in live]).to(device),
            )
            actions = found["action"].detach().to("cpu", torch.float64).numpy()
            for run, own in zip(live, actions, strict=True):
                run.follow(own)
    return [run.episode() for run in runs]


class _Run:
    """One start on its way: its simulator, its streams of noise and what its policy has seen."""

    def __init__(
        self,
        environment: Environment,
        start: int,
        noise_seed: int,
        observation_noise: ObservationNoise,
        config: Any,
        record: bool,
        limit: int,
    ) -> None:
        self.environment, self.start, self.limit = environment, start, limit
        self.length, self.done = 0, False
        self._noise_shape = (config.horizon, config.action_dim)
        self._action_noise = _stream(noise_seed, start, ACTION_STREAM)
        self._sensor = _stream(noise_seed, start, OBSERVATION_STREAM)
        self._observation_noise = observation_noise
        self._frames: list[np.ndarray] | None = [] if record else None
        first = self._observe(environment.reset(start))
        self._seen: deque[Tensor] = deque([first] * config.n_obs, maxlen=config.n_obs)

    def window(self) -> Tensor:
        return torch.stack(tuple(self._seen))

    def draw_noise(self) -> Tensor:
        return torch.randn(self._noise_shape, generator=self._action_noise)

    def follow(self, actions: np.ndarray) -> None:
        """Execute actions, [n_action, action_dim], up to the end of the episode."""
        if not np.isfinite(actions).all():
            raise NonFiniteError(
                f"start {self.start}, step {self.length}: the policy gave an action that is not "
                f"finite, {actions.tolist()}; look at its weights and normalisers"
            )
        for action in actions:
            obs, reached = self.environment.step(action)
            self.length += 1
            self._seen.append(self._observe(obs))
            self.done = reached or self.length >= self.limit
            if self.done:
                return

    def episode(self) -> Episode:
        frames = None if self._frames is None else np.stack(self._frames)
        return Episode(self.start, self.environment.scores(), self.length, frames)

    def _observe(self, obs: np.ndarray) -> Tensor:
        """Give what the policy sees of an observation: drawn once, also where it is seen twice."""
        if self._frames is not None:
            self._frames.append(self.environment.render())
        seen = torch.as_tensor(obs, dtype=torch.float32)
        return self._observation_noise.apply(seen.unsqueeze(0), [self._sensor])[0]


def as_noise(noise: ObservationNoise | str | None) -> ObservationNoise:
    """Read what callers may give for observation noise."""
    return noise if isinstance(noise, ObservationNoise) else ObservationNoise.parse(noise or "none")


def _stream(noise_seed: int, start: int, stream: int) -> torch.Generator:
    """Give a source of noise that no other start, seed or use shares."""
    state = np.random.SeedSequence((noise_seed, start, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _device(policy: Any) -> torch.device:
    tensors = policy.parameters() if isinstance(policy, torch.nn.Module) else iter(())
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _evaluation_mode(policy: Any) -> Iterator[None]:
    """Turn dropout and its like off for the time of a roll-out."""
    training = isinstance(policy, torch.nn.Module) and policy.training
    if training:
        policy.eval()
    try:
        yield
    finally:
        if training:
            policy.train()


def _check_sizes(config: Any, environments: Sequence[Environment], starts: Sequence[int]) -> None:
    if len(environments) < len(starts):
        raise InputError(f"expected {len(starts)} simulators, got {len(environments)}")
    for name in ("obs_dim", "action_dim"):
        theirs, own = getattr(environments[0], name), getattr(config, name)
        if theirs != own:
            raise InputError(
                f"{name}: expected {theirs} as {environments[0].name} has, got a policy of {own}; "
                f"train it on data of this simulator"
            )
