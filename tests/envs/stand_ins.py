"""A simulator of a point on a line and policies for it; run as a script, a long evaluation."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from fmft_fast.envs import ENVIRONMENTS, evaluate_policy, register


class Line:
    """A point that actions move; done beyond 10. Observation: place and time."""

    name = "line"
    obs_dim, action_dim = 2, 1
    max_steps = 12
    measures = ("best",)
    frame_rate = 5.0

    def reset(self, start):
        self.place, self.time, self.best = float(start), 0, 0.0
        return self._observe()

    def step(self, action):
        time.sleep(float(os.environ.get("LINE_SECONDS", "0")))
        self.place += float(np.clip(action[0], -1, 1))
        self.time += 1
        self.best = max(self.best, self.place / 10)
        return self._observe(), self.place > 10

    def scores(self):
        return {"best": self.best}

    def render(self):
        return np.full((4, 6, 3), self.time, dtype=np.uint8)

    def close(self):
        self.place = None

    def _observe(self):
        return np.array([self.place, self.time], dtype=np.float32)


class Walker:
    """Steps by the first number of its noise, and keeps what it was asked."""

    def __init__(self, n_obs=2, n_action=3, horizon=5, obs_dim=2):
        self.config = SimpleNamespace(
            n_obs=n_obs, n_action=n_action, horizon=horizon, obs_dim=obs_dim, action_dim=1
        )
        self.asked = []

    def predict_action(self, batch, *, steps, method, noise):
        self.asked.append((batch["obs"].clone(), noise.clone(), steps, method))
        first = self.config.n_obs - 1
        return {"action": self.act(noise)[:, first : first + self.config.n_action]}

    def act(self, noise):
        return noise


class Forward(Walker):
    """Goes one step ahead each time."""

    def act(self, noise):
        return torch.ones_like(noise)


class Lost(Walker):
    """Gives NaN where its point stands beyond 5."""

    def predict_action(self, batch, **options):
        found = super().predict_action(batch, **options)
        found["action"][batch["obs"][:, -1, 0] > 5] = torch.nan
        return found


class Reported(Walker):
    """Leaves a file named after its process, for a test that looks for what was left running."""

    def predict_action(self, batch, **options):
        (Path(os.environ["LINE_FOLDER"]) / str(os.getpid())).touch()
        return super().predict_action(batch, **options)


if "line" not in ENVIRONMENTS:
    register("line", Line)

if __name__ == "__main__":
    import stand_ins  # so that workers find the policy's class under that name

    try:
        evaluate_policy(stand_ins.Reported(), "line", starts=500, workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
