"""A flow-matching policy: observations in, a sequence of actions out, all in the data's units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.data import Normalizer
from fmft_fast.errors import CheckpointError, FmftError, InputError
from fmft_fast.flow import flow_matching_loss, integrate
from fmft_fast.ops.finite import all_finite
from fmft_fast.policies.config import NETWORKS, PolicyConfig, make_network
from fmft_fast.policies.saved import read_policy, write_policy
from fmft_fast.train import Checkpoint
from fmft_fast.train.branch import as_saved
from fmft_fast.train.checkpoint import innermost, recipes


class FlowPolicy(nn.Module):
    """Actions given observations, drawn by carrying noise through an ODE.

    The policy is itself the velocity field that the trainers train and `fmft_fast.solve` solves:
    `policy(t, x, cond)` with x [batch, *config.state] a normalised sequence of actions and cond
    [batch, config.cond_dim] the normalised observations; `encode` makes both from data. Everything
    else takes and gives the units of the data.

    Args:
        config: sizes and network.
        obs_normalizer: of single observations, [obs_dim]; by default it changes nothing.
        action_normalizer: of single actions, [action_dim].
        network: a field to use instead of a new one that the config describes.

    Raises:
        ConfigError: the network's options do not fit.
        InputError: a normaliser has another size than the config.

    Source: Chi et al. 2023, Diffusion Policy (arXiv 2303.04137), for horizons and receding-horizon
    control.

    Example:
        >>> config = PolicyConfig(obs_dim=5, action_dim=2, network_options={"width": 32})
        >>> policy = FlowPolicy(config)
        >>> policy.predict_action({"obs": torch.zeros(3, 2, 5)}, steps=4)["action"].shape
        torch.Size([3, 8, 2])
    """

    def __init__(
        self,
        config: PolicyConfig,
        obs_normalizer: Normalizer | None = None,
        action_normalizer: Normalizer | None = None,
        *,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.obs_normalizer = obs_normalizer or Normalizer.identity(config.obs_dim)
        self.action_normalizer = action_normalizer or Normalizer.identity(config.action_dim)
        for name in ("obs", "action"):
            size = getattr(self, f"{name}_normalizer").scale.shape[0]
            if size != getattr(config, f"{name}_dim"):
                raise InputError(
                    f"{name}_normalizer: expected one of {getattr(config, f'{name}_dim')} numbers, "
                    f"got {size}; fit it to the data of this policy"
                )
        self.network = make_network(config) if network is None else network
        self.cond_dim = config.cond_dim
        if len(config.state) == 1:
            self.dim = config.state[0]

    @property
    def recipe(self) -> dict[str, Any]:
        """Give the plain values from which a checkpoint builds the policy again."""
        return {"policy": self.config.to_dict()}

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return dx/dt, of x's shape; see the class for the arguments."""
        return self.network(t, x, cond)

    def encode(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Give (x1, cond), what the trainers take, of windows of data.

        Args:
            obs: [n, n_obs, obs_dim].
            action: [n, horizon, action_dim].
        """
        config = self.config
        _check("action", action, (config.horizon, config.action_dim))
        action = self.action_normalizer.normalise(action)
        return action.reshape(len(action), *config.state), self._condition(obs)

    def compute_loss(
        self, batch: Mapping[str, Tensor], *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Give the flow-matching loss of a batch with independent noise, 0-d.

        Args:
            batch: "obs" [batch, n_obs, obs_dim] and "action" [batch, horizon, action_dim].
            generator: source of noise and times.

        Raises:
            InputError: an entry is missing or has another shape.
        """
        x1, cond = self.encode(_entry(batch, "obs"), _entry(batch, "action"))
        x0 = torch.randn(x1.shape, generator=generator, dtype=x1.dtype).to(x1.device)
        return flow_matching_loss(self, x0, x1, cond=cond, generator=generator)

    def predict_action(
        self,
        batch: Mapping[str, Tensor],
        *,
        steps: int | None = 1,
        method: str = "euler",
        rtol: float | None = None,
        atol: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Draw a sequence of actions for each observation.

        Args:
            batch: "obs" [batch, n_obs, obs_dim], the newest observation last.
            steps: solver steps; None with tolerances.
            method: solver's name.
            rtol: relative tolerance of an adaptive solve.
            atol: absolute tolerance of an adaptive solve.
            noise: [batch, horizon, action_dim]; drawn unless given.
            generator: source of the noise, on the CPU.

        Returns:
            "action" [batch, n_action, action_dim], what to execute now, and "action_pred"
            [batch, horizon, action_dim], the whole sequence.

        Raises:
            InputError: an entry is missing, has another shape, or is not finite.
        """
        config = self.config
        cond = self._condition(_entry(batch, "obs"))
        n = cond.shape[0]
        shape = (n, config.horizon, config.action_dim)
        if noise is None:
            noise = torch.randn(shape, generator=generator)
        elif noise.shape != shape:
            raise InputError(f"noise: expected {list(shape)}, got {list(noise.shape)}")
        x0 = noise.to(cond).reshape(n, *config.state)
        x1 = integrate(
            self.network, x0, steps=steps, method=method, rtol=rtol, atol=atol, cond=cond
        )
        sequence = self.action_normalizer.restore(x1.reshape(shape))
        now = config.n_obs - 1
        return {"action": sequence[:, now : now + config.n_action], "action_pred": sequence}

    def _condition(self, obs: Tensor) -> Tensor:
        """Give the network's condition, [n, cond_dim], of observations [n, n_obs, obs_dim]."""
        _check("obs", obs, (self.config.n_obs, self.config.obs_dim))
        return self.obs_normalizer.normalise(obs).flatten(1)

    @property
    def model(self) -> nn.Module:
        """Give the module that checkpoints keep: the policy, or the residual around it."""
        return self.network if isinstance(innermost(self.network), FlowPolicy) else self

    @classmethod
    def of(cls, model: nn.Module) -> FlowPolicy:
        """Give the policy whose velocity is `model`: a policy, or residuals around one.

        Raises:
            InputError: there is no policy inside.
        """
        inner = innermost(model)
        if not isinstance(inner, cls):
            raise InputError(
                f"expected a FlowPolicy or a Residual around one, got {type(inner).__name__}"
            )
        if inner is model:
            return inner
        parts = inner.config, inner.obs_normalizer, inner.action_normalizer
        return cls(*parts, network=model).train(model.training)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors, the normalisers among the weights.

        A policy that the folder holds already is replaced.

        Raises:
            InputError: its network was built by hand, so that nothing could build it again.
            CheckpointError: the disk refused; what the folder held is untouched.
        """
        self._check_recipe()
        description = {
            "policy": self.config.to_dict(),
            "residuals": recipes(self.model),
            "dtype": str(self.obs_normalizer.scale.dtype).removeprefix("torch."),
        }
        return write_policy(Path(folder), description, self.model.state_dict())

    def _check_recipe(self) -> None:
        """Refuse what `from_pretrained` would not read."""
        base = self.of(innermost(self.model))
        if not isinstance(base.network, NETWORKS[base.config.network][0]):
            raise InputError(
                f"expected a network that the config describes, got one of its own, "
                f"{type(base.network).__name__}; keep its state_dict() instead"
            )
        if None in recipes(self.model):
            raise InputError(
                "expected residuals built by MLEFineTuner, got a residual that was built by hand; "
                "keep its state_dict() instead"
            )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> FlowPolicy:
        """Read what `save_pretrained` wrote, or a training run's folder or checkpoint.

        Returns:
            The policy on the CPU, in evaluation mode.

        Raises:
            CheckpointError: nothing is there, it is corrupt, or it holds no policy.
        """
        checkpoint = read_policy(path)
        policy = cls.like(checkpoint, path)
        policy = policy.to(getattr(torch, checkpoint.config.get("dtype", "float32")))
        return cls.of(as_saved(policy, checkpoint, path)).eval()

    @classmethod
    def like(cls, checkpoint: Checkpoint, path: str | Path = "the checkpoint") -> FlowPolicy:
        """Make an untrained policy that a checkpoint's weights fit; `path` names it in messages.

        Raises:
            CheckpointError: it holds no policy, or one that cannot be built.
        """
        table = (checkpoint.architecture.get("recipe") or {}).get("policy")
        if table is None:
            raise CheckpointError(
                f"{path} holds no policy, expected one that FlowPolicy or a robot task wrote; "
                f"read it with fmft_fast.train.load_model"
            )
        try:
            return cls(PolicyConfig.from_dict(table))
        except (FmftError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot build the policy {table!r} ({error})") from error


def _entry(batch: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in batch:
        raise InputError(f"batch: expected an entry {name!r}, got {', '.join(batch) or 'none'}")
    return batch[name]


def _check(name: str, value: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[1:] != shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name}: expected a tensor [n, {shape[0]}, {shape[1]}], got {got}")
    if not all_finite(value):  # a NaN would otherwise drive a robot
        raise InputError(f"{name}: holds NaN or infinite values; check the sensor or the data")
