"""What a task is, and the registry of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from fmft_fast.errors import ConfigError, InputError
from fmft_fast.train import Checkpoint, FitConfig, load_checkpoint
from fmft_fast.train.config import Settings
from fmft_fast.train.trainer import Evaluate

STEPS = (1, 2, 5, 10, 100)
# Measures with these endings are the ends of the interval of the measure without.
LOW, HIGH = ", low", ", high"
Rows = Tensor | tuple[Tensor, Tensor]
Results = dict[int, dict[str, float]]
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TaskData:
    """The data of a task: `train` [n, *state] and `heldout` [m, *state], which is never trained.

    Where the field takes a condition, there is one for each row.
    """

    train: Tensor
    heldout: Tensor
    train_cond: Tensor | None = None
    heldout_cond: Tensor | None = None

    @property
    def train_rows(self) -> Rows:
        """Give x1, or (x1, cond), as trainers take them."""
        return self.train if self.train_cond is None else (self.train, self.train_cond)

    @property
    def heldout_rows(self) -> Rows:
        """Give the same of the rows held out."""
        return self.heldout if self.heldout_cond is None else (self.heldout, self.heldout_cond)


class Task(Protocol):
    """Data, field, settings, measures and figures of one problem; nothing else knows them.

    A task with options of its own, such as where its data lie, is registered with their defaults;
    `configured` gives it with others.
    """

    name: str
    summary: str
    options: Settings | None = None
    """Keys that the task takes beside those of training."""
    fixed: Sequence[str] = ()
    """Options that only an untrained field takes: a checkpoint's field has its own."""
    free: Sequence[str] = ()
    """Options that a run may change when it is resumed."""
    steps: Sequence[int] = STEPS
    """Numbers of Euler steps measured unless others are asked for."""
    pretrain: Mapping[str, Any]
    """Keys of `fmft_fast.train.PretrainConfig` that differ from its defaults."""
    finetune: Mapping[str, Any]
    """Keys of `fmft_fast.train.FinetuneConfig` that differ from its defaults."""

    def configured(self, options: Mapping[str, Any]) -> Task:
        """Give the task with these options instead of its defaults.

        Raises:
            ConfigError: it takes none of that name, or a value is not understood.
        """
        if options:
            raise ConfigError(f"the task {self.name} takes no options, got {', '.join(options)}")
        return self

    def make_data(self, seed: int, field: nn.Module | None = None) -> TaskData:
        """Give the same data for the same seed, in the units of a field that has its own."""
        ...

    def make_field(self) -> nn.Module:
        """Make an untrained field, from torch's global random state."""
        ...

    def read(self, path: str | Path) -> Checkpoint:
        """Read a checkpoint of this task's field, or a folder that stands for one.

        Raises:
            CheckpointError: nothing is there, or it cannot be read.
        """
        return load_checkpoint(path)

    def field_of(self, checkpoint: Checkpoint) -> nn.Module:
        """Make a field that a checkpoint's weights fit."""
        return self.make_field()

    def watch(self, config: FitConfig) -> Evaluate | None:
        """Give what is measured while training besides the held-out error, or nothing."""
        return None

    def evaluate(self, field: nn.Module, steps: Sequence[int] = STEPS, *, seed: int = 0) -> Results:
        """Measure samples of Euler solves with each number of steps; lower is better unless named.

        Noise and fresh data come from `seed` and are the same for every field.
        """
        ...

    def noise_floor(self, *, seed: int = 0) -> dict[str, float]:
        """Give what real data score against real data at the sample sizes of `evaluate`."""
        ...

    def figures(
        self,
        before: nn.Module,
        after: nn.Module,
        out_dir: str | Path,
        *,
        seed: int = 0,
        results: Mapping[str, Results] | None = None,
        history: Mapping[str, Records] | None = None,
    ) -> list[Path]:
        """Draw what fine-tuning changed; gives the PNG files.

        Args:
            before: pre-trained field.
            after: fine-tuned field.
            out_dir: folder, made if absent.
            seed: seed of the noise shown and, without results, of the evaluation.
            results: {"before": ..., "after": ...} from `evaluate`, computed when absent.
            history: {run: lines of its metrics.jsonl}; no training curves without it.
        """
        ...


TASKS: dict[str, Task] = {}
TaskT = TypeVar("TaskT", bound=Task)


def register(task: TaskT) -> TaskT:
    """Make a task known under its name.

    Raises:
        InputError: another task has that name.
    """
    if task.name in TASKS:
        raise InputError(f"a task called {task.name!r} is registered already; choose another name")
    TASKS[task.name] = task
    return task


def find_task(name: str) -> Task:
    """Give the task of that name.

    Raises:
        InputError: there is none; the message lists those there are.

    Example:
        >>> find_task("toy-gmm").make_data(0).train.shape
        torch.Size([100000, 2])
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; choose one of {', '.join(sorted(TASKS))}")
    return TASKS[name]
