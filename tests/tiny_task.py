"""A task that takes a second; run as a script, it is `fmft` with that task."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch

from fmft_fast import cli
from fmft_fast.fields import MLP
from fmft_fast.flow import sample
from fmft_fast.tasks import Task, TaskData, register
from fmft_fast.train.config import Settings, key


class TinyTask(Task):
    """Two points on a line with a little noise: every command ends within a second."""

    name = "tiny"
    summary = "two narrow modes on a line"
    pretrain = {"lr": 5e-3, "log_every": 5, "checkpoint_every": 5}
    finetune = {
        "coupling": "ot-fixed",
        "coupling_options": {"size": 64},
        "solver_steps": (2,),
        "log_every": 5,
        "checkpoint_every": 5,
    }

    def make_data(self, seed, field=None):
        """Give 200 rows for training and 50 held out."""
        random = torch.Generator().manual_seed(seed)
        x = torch.randint(2, (250, 1), generator=random) * 4.0 - 2
        x = x + 0.1 * torch.randn(x.shape, generator=random)
        return TaskData(x[:200], x[200:])

    def make_field(self):
        """Give a small net."""
        return MLP(1, hidden=(8,))

    def evaluate(self, field, steps=(1, 2), *, seed=0):
        """Give the distance of the mean from 0 under the measures' names of the real task."""
        x = {n: sample(field, 64, steps=n, seed=seed) for n in steps}
        return {
            n: {
                "off_mode_share": float((value.abs() < 1).double().mean()),
                "energy_distance": float(value.mean().abs()),
                "sliced_w2": float(value.std()),
            }
            for n, value in x.items()
        }

    def noise_floor(self, *, seed=0):
        """Give zeros."""
        return {"off_mode_share": 0.0, "energy_distance": 0.0, "sliced_w2": 0.0}

    def figures(self, before, after, out_dir, *, seed=0, results=None, history=None):
        """Write what was given instead of a picture."""
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "given.json").write_text(
            json.dumps([sorted(results or ()), sorted(history or ())])
        )
        return [out_dir / "given.json"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftOptions(Settings):
    """Where the modes lie."""

    shift: float = key(0.0, "added to the data")


class ShiftedTask(TinyTask):
    """The same with an option."""

    name = "shifted"
    options = ShiftOptions()

    def configured(self, options):
        """Give the task with another shift."""
        made = copy.copy(self)
        made.options = ShiftOptions.from_dict({**self.options.to_dict(), **options})
        return made

    def make_data(self, seed, field=None):
        """Give the data moved by the option."""
        data = super().make_data(seed)
        return TaskData(data.train + self.options.shift, data.heldout + self.options.shift)


# Workers of the demo are spawned: they run this script again under the second name.
if __name__ in ("__main__", "__mp_main__"):
    register(TinyTask())
if __name__ == "__main__":
    sys.exit(cli.main())
