"""Disturbed observations: what a policy sees through bad sensors, for robustness curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmft_fast.errors import InputError

KINDS = ("none", "gaussian", "salt-pepper")


@dataclass(frozen=True)
class ObservationNoise:
    """Noise between simulator and policy; the simulator itself goes on undisturbed.

    - gaussian: adds level * scale * standard normal, each number of an observation on its own.
    - salt-pepper: sets each number, with probability level, to offset + scale or offset - scale,
      each as likely as the other.

    By default scale and offset are those of the policy's normaliser. With a min-max normaliser,
    a level of .1 then is a twentieth of the range that the training data have, and salt and pepper
    are the ends of that range; with a mean-std one a level is in standard deviations.

    Attributes:
        kind: "none", "gaussian" or "salt-pepper".
        level: at least 0; for salt-pepper a probability.
        scale: one number for each dimension of an observation, at least 0, in its units; 0 spares
            a dimension of Gaussian noise.
        offset: centre of salt and pepper, one number for each dimension.

    Raises:
        InputError: the kind is unknown, or level, scale or offset make no sense.

    Example:
        >>> noise = ObservationNoise("gaussian", 0.5, scale=(1.0, 0.0))
        >>> noise.apply(torch.ones(1, 2), [torch.Generator().manual_seed(0)])[0, 1]
        tensor(1.)
        >>> print(noise)
        gaussian:0.5
    """

    kind: str = "none"
    level: float = 0.0
    scale: tuple[float, ...] | None = None
    offset: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the values and make tuples of sequences."""
        if self.kind not in KINDS:
            raise InputError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        top = 1.0 if self.kind == "salt-pepper" else math.inf
        if not (0 <= self.level <= top and math.isfinite(self.level)):
            upper = " to 1" if self.kind == "salt-pepper" else " on"
            raise InputError(f"level of {self.kind}: expected from 0{upper}, got {self.level}")
        for name, least in (("scale", 0.0), ("offset", -math.inf)):
            if getattr(self, name) is not None:
                values = tuple(map(float, getattr(self, name)))
                if not all(math.isfinite(value) and value >= least for value in values):
                    kind = "finite numbers" + (" from 0 on" if name == "scale" else "")
                    raise InputError(f"{name}: expected {kind}, got {values}")
                object.__setattr__(self, name, values)

    @classmethod
    def parse(cls, text: str) -> ObservationNoise:
        """Read the form of the command line, KIND:LEVEL or none.

        Raises:
            InputError: the text does not have that form.

        Example:
            >>> ObservationNoise.parse("salt-pepper:0.05").level
            0.05
        """
        kind, colon, level = text.partition(":")
        try:
            # Without its level a noise would be none, and a policy look robust.
            return cls(kind, float(level) if colon or kind != "none" else 0.0)
        except ValueError as error:
            raise InputError(
                f"noise: expected none, gaussian:LEVEL or salt-pepper:LEVEL, got {text!r} ({error})"
            ) from error

    def for_policy(self, policy: Any) -> ObservationNoise:
        """Fill in scale and offset that were not given from `policy.obs_normalizer`.

        Raises:
            InputError: the policy has none.
        """
        if self.kind == "none" or (self.scale is not None and self.offset is not None):
            return self
        normalizer = getattr(policy, "obs_normalizer", None)
        if normalizer is None:
            raise InputError(
                f"noise {self}: expected scale and offset, or a policy with obs_normalizer to take "
                f"them from, got neither"
            )
        scale = normalizer.scale.tolist() if self.scale is None else self.scale
        offset = normalizer.offset.tolist() if self.offset is None else self.offset
        return dataclasses.replace(self, scale=tuple(scale), offset=tuple(offset))

    def apply(self, obs: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Disturb observations.

        The numbers drawn do not depend on the level, so that levels are compared on the same ones.

        Args:
            obs: [n, obs_dim].
            generators: one for each of the n observations, on the CPU.

        Raises:
            InputError: there is no scale yet, or sizes do not fit.
        """
        if self.kind == "none":
            return obs
        if obs.ndim != 2 or len(obs) != len(generators):
            raise InputError(
                f"obs: expected [{len(generators)}, obs_dim], one row for each generator, got "
                f"{list(obs.shape)}"
            )
        scale = self._vector("scale", obs)
        if self.kind == "gaussian":
            drawn = [torch.randn(obs.shape[1], generator=source) for source in generators]
            return obs + self.level * scale * torch.stack(drawn).to(obs)
        centre = self._vector("offset", obs)
        drawn = torch.stack([torch.rand(2, obs.shape[1], generator=g) for g in generators]).to(obs)
        ends = torch.where(drawn[:, 1] < 0.5, centre - scale, centre + scale)
        return torch.where(drawn[:, 0] < self.level, ends, obs)

    def _vector(self, name: str, obs: Tensor) -> Tensor:
        values = getattr(self, name)
        if values is None or len(values) != obs.shape[1]:
            got = "none" if values is None else f"{len(values)}"
            raise InputError(
                f"{name} of noise {self}: expected {obs.shape[1]} numbers, one for each dimension "
                f"of an observation, got {got}; give them, or use for_policy"
            )
        return obs.new_tensor(values)

    def __str__(self) -> str:
        """Give the form of the command line."""
        return self.kind if self.kind == "none" else f"{self.kind}:{self.level:g}"
