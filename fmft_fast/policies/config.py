"""What a policy sees, predicts and executes, and the network that does it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fmft_fast.errors import ConfigError
from fmft_fast.fields import ActionTransformer, ConditionalMLP, ConditionalUnet1d
from fmft_fast.train.config import unknown_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Sizes and network of a policy.

    At every decision a policy sees the last `n_obs` observations, predicts `horizon` actions, the
    first of which belongs to the oldest observation, and executes `n_action` of them from the
    present on.

    Attributes:
        obs_dim: numbers in an observation.
        action_dim: numbers in an action.
        n_obs: observations seen.
        n_action: actions executed before the next decision.
        horizon: actions predicted, at least n_obs - 1 + n_action.
        network: "mlp", "unet" or "transformer".
        network_options: keyword arguments of `fmft_fast.fields.ConditionalMLP`,
            `ConditionalUnet1d` or `ActionTransformer`, beside the sizes, which follow.

    Raises:
        ConfigError: a size is below its minimum or too small for the others, or the network or one
            of its options is unknown.

    Example:
        >>> PolicyConfig(obs_dim=20, action_dim=2).cond_dim
        40
    """

    obs_dim: int
    action_dim: int
    n_obs: int = 2
    n_action: int = 8
    horizon: int = 16
    network: str = "mlp"
    network_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("obs_dim", "action_dim", "n_obs", "n_action", "horizon"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{name}: expected a whole number from 1 on, got {size!r}")
        needed = self.n_obs - 1 + self.n_action
        if self.horizon < needed:
            raise ConfigError(
                f"horizon: expected at least n_obs - 1 + n_action = {needed}, got {self.horizon}; "
                f"raise it, or execute fewer actions"
            )
        if not isinstance(self.network_options, Mapping):
            raise ConfigError(f"network_options: expected a table, got {self.network_options!r}")
        if self.network not in NETWORKS:
            raise unknown_key(self.network, list(NETWORKS), "a network")

    @property
    def cond_dim(self) -> int:
        """Give the size of the flattened observations."""
        return self.n_obs * self.obs_dim

    @property
    def state(self) -> tuple[int, ...]:
        """Give the shape in which the network takes a sequence of actions."""
        sequence = (self.horizon, self.action_dim)
        return (math.prod(sequence),) if self.network == "mlp" else sequence

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> PolicyConfig:
        """Make a configuration from plain values; unknown keys are refused by name."""
        known = [item.name for item in dataclasses.fields(cls)]
        for name in table:
            if name not in known:
                raise unknown_key(name, known, "a key of PolicyConfig")
        for name in ("obs_dim", "action_dim"):
            if name not in table:
                raise ConfigError(f"{name}: expected a whole number, got nothing; add it")
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, ready for JSON."""
        return {**vars(self), "network_options": dict(self.network_options)}


def make_network(config: PolicyConfig) -> nn.Module:
    """Build the untrained velocity field of a policy, from torch's global random state.

    Raises:
        ConfigError: an option is unknown or has a value that the network does not take.
    """
    cls, sizes = NETWORKS[config.network]
    given = sizes(config)
    known = [name for name in inspect.signature(cls).parameters if name not in given]
    for name in config.network_options:
        if name not in known:
            raise unknown_key(name, known, f"an option of the network {config.network}")
    try:
        return cls(**given, **config.network_options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"network_options: expected values that {cls.__name__} takes, got "
            f"{dict(config.network_options)} ({error})"
        ) from error


def _mlp_sizes(config: PolicyConfig) -> dict[str, Any]:
    return {"dim": config.state[0], "cond_dim": config.cond_dim}


def _sequence_sizes(config: PolicyConfig) -> dict[str, Any]:
    return {"state": config.state, "cond_dim": config.cond_dim}


def _transformer_sizes(config: PolicyConfig) -> dict[str, Any]:
    return {**_sequence_sizes(config), "n_obs": config.n_obs}


NETWORKS: dict[str, tuple[type[nn.Module], Callable[[PolicyConfig], dict[str, Any]]]] = {
    "mlp": (ConditionalMLP, _mlp_sizes),
    "unet": (ConditionalUnet1d, _sequence_sizes),
    "transformer": (ActionTransformer, _transformer_sizes),
}
