"""What a simulator has to offer for roll-outs, and the simulators known by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Protocol

import numpy as np

from fmft_fast.errors import InputError


class Environment(Protocol):
    """One instance of a simulator that runs one episode at a time.

    Attributes:
        name: under which `make_environment` gives it.
        obs_dim: numbers in an observation.
        action_dim: numbers in an action.
        max_steps: after which an episode of the published protocol ends.
        measures: names of what `scores` gives; of all, higher is better.
        frame_rate: steps per second of simulated time.
    """

    name: str
    obs_dim: int
    action_dim: int
    max_steps: int
    measures: tuple[str, ...]
    frame_rate: float

    def reset(self, start: int) -> np.ndarray:
        """Begin an episode at initial state number `start` and give its observation.

        The same number gives the same state in every process and on every machine.

        Returns:
            float32, [obs_dim].
        """
        ...

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Do an action, [action_dim], clipped to the action space.

        Returns:
            The next observation, float32 [obs_dim], and whether the task is done for good. Where
            it is not, the caller ends the episode after `max_steps`.
        """
        ...

    def scores(self) -> dict[str, float]:
        """Give the measures of the episode so far."""
        ...

    def render(self) -> np.ndarray:
        """Draw the present state, uint8 [height, width, 3], with no screen needed."""
        ...

    def close(self) -> None:
        """Free what the simulator holds; it is not used again."""
        ...


ENVIRONMENTS: dict[str, Callable[..., Environment]] = {}


def register(name: str, make: Callable[..., Environment]) -> None:
    """Make a simulator known under a name.

    Worker processes import `fmft_fast.envs` only, so a simulator of your own is known to them if
    importing the module of the policy registers it, too.

    Args:
        name: not yet taken.
        make: gives a new instance; imports the simulator no earlier than that. It is called with
            what follows a colon in the name asked for, and without arguments where there is none.

    Raises:
        InputError: another simulator has that name.
    """
    if name in ENVIRONMENTS:
        raise InputError(f"a simulator {name!r} is registered already; choose another name")
    ENVIRONMENTS[name] = make


def make_environment(name: str) -> Environment:
    """Give a new instance of the simulator of that name.

    Args:
        name: registered; of simulators for several tasks, a colon and the task may follow.

    Raises:
        InputError: there is none, or it has no tasks to choose from.
        MissingDependencyError: its package is not installed; the message names the extra.

    Example:
        >>> make_environment("chess")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fmft_fast.errors.InputError: no simulator 'chess'; there are ...
    """
    registered, _, task = name.partition(":")
    if registered not in ENVIRONMENTS:
        raise InputError(f"no simulator {name!r}; there are {', '.join(sorted(ENVIRONMENTS))}")
    make = ENVIRONMENTS[registered]
    if task and not inspect.signature(make).parameters:
        raise InputError(f"{registered!r} simulates one task, got {name!r}; write {registered!r}")
    return make(task) if task else make()
