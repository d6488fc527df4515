"""Tasks: one file each with data, field, measures, settings and figures."""

from fmft_fast.tasks import digits, kitchen, pusht, robomimic, toy_gmm
from fmft_fast.tasks.base import STEPS, TASKS, Task, TaskData, find_task, register

__all__ = [
    "STEPS",
    "TASKS",
    "Task",
    "TaskData",
    "digits",
    "find_task",
    "kitchen",
    "pusht",
    "register",
    "robomimic",
    "toy_gmm",
]
