"""Models that cells share: pre-trained once, kept as checkpoints; and fine-tuning in a cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fmft_fast import commands
from fmft_fast.commands import Place, make_config
from fmft_fast.report import settings_key
from fmft_fast.tasks import find_task
from fmft_fast.train import FitResult, MLEFineTuner
from fmft_fast.train.trainer import Evaluate


@dataclass(frozen=True)
class Pretrained:
    """A task's field after pre-training.

    Attributes:
        task: name of the task.
        seed: of data, field and training.
        settings: keys of `PretrainConfig` that differ from the task's.
    """

    task: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Give a name that is the same for the same model only."""
        return settings_key({"task": self.task, "seed": self.seed, **self.settings})


def in_ninths(task: str, seed: int, steps: int, **more: Any) -> Pretrained:
    """Want a model with a checkpoint after every ninth of its steps, which are made to divide.

    Further settings are those of `PretrainConfig`.

    Example:
        >>> in_ninths("toy-gmm", 0, 3000).settings["steps"]
        2997
    """
    ninth = steps // 9
    often = {"checkpoint_every": ninth, "eval_every": ninth, "keep_last": 9}
    return Pretrained(task, seed, {"steps": 9 * ninth, **often, **more})


@dataclass(frozen=True)
class Models:
    """The pre-trained models of a study, in folders under `folder`."""

    folder: Path

    def made(self, wanted: Pretrained) -> bool:
        """Tell whether its training has finished."""
        return (self.folder / wanted.name / "results.json").exists()

    def make(self, wanted: Pretrained) -> None:
        """Train it, or go on where its training was interrupted."""
        task = find_task(wanted.task)
        layer = {"device": "cpu", "seed": wanted.seed, **wanted.settings}
        config = make_config("pretrain", task, [layer])
        place = Place(self.folder / wanted.name, resume=True, quiet=True)
        commands.pretrain(task, config, place, steps=())

    def load(self, wanted: Pretrained, *, step: int | None = None) -> nn.Module:
        """Give the field as it was at the end, or at a step of which a checkpoint was kept.

        Raises:
            CheckpointError: there is no such checkpoint.
        """
        path = self.folder / wanted.name
        if step is not None:
            path = path / "checkpoints" / f"step-{step:06d}"
        return commands.load_field(find_task(wanted.task), path)[0].eval()


def finetune(
    task: str,
    field: nn.Module,
    settings: Mapping[str, Any],
    *,
    evaluate: Evaluate | None = None,
) -> FitResult:
    """Fine-tune a field, in place, with the task's settings but for those given.

    Args:
        task: name of the task.
        field: pre-trained field.
        settings: keys of `FinetuneConfig`.
        evaluate: see `MLEFineTuner`.
    """
    problem = find_task(task)
    config = make_config("finetune", problem, [{"device": "cpu", **settings}])
    data = problem.make_data(config.seed, field)
    return MLEFineTuner(
        field,
        data.train_rows,
        config=config,
        heldout=data.heldout_rows,
        evaluate=evaluate,
        progress=False,
    ).run()
