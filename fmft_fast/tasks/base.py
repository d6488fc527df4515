"""What a task is, and the registry of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from fmft_fast.errors import InputError

STEPS = (1, 2, 5, 10, 100)
Results = dict[int, dict[str, float]]
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TaskData:
    """The data of a task: `train` [n, *state] and `heldout` [m, *state], which is never trained."""

    train: Tensor
    heldout: Tensor


class Task(Protocol):
    """Data, field, settings, measures and figures of one problem; nothing else knows them."""

    name: str
    summary: str
    pretrain: Mapping[str, Any]
    """Keys of `fmft_fast.train.PretrainConfig` that differ from its defaults."""
    finetune: Mapping[str, Any]
    """Keys of `fmft_fast.train.FinetuneConfig` that differ from its defaults."""

    def make_data(self, seed: int) -> TaskData:
        """Give the same data for the same seed."""
        ...

    def make_field(self) -> nn.Module:
        """Make an untrained field, from torch's global random state."""
        ...

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
