"""Evaluations: roll-outs of a policy from many starts and settings, in parallel processes."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from fmft_fast.envs.base import Environment, make_environment
from fmft_fast.envs.noise import ObservationNoise
from fmft_fast.envs.rollout import Episode, as_noise, roll_out
from fmft_fast.errors import FmftError, InputError
from fmft_fast.policies import FlowPolicy
from fmft_fast.train.logging import progress_bar
from fmft_fast.workers import Ended, Job, run_jobs

CHUNK = 25  # starts of a job; fixed, so that results do not depend on the number of workers

Row = dict[str, Any]

# Simulators of a worker, kept from job to job: some take a second to make.
_KEPT: dict[str, list[Environment]] = {}


def evaluate_policy(
    policy: Any,
    environment: str,
    *,
    starts: int | Sequence[int] = 50,
    steps: Sequence[int] = (1, 4, 16),
    method: str = "euler",
    noise_seeds: Sequence[int] = (0,),
    observation_noise: Sequence[ObservationNoise | str] = ("none",),
    workers: int = 2,
    max_steps: int | None = None,
    record: int = 0,
    recorded: Callable[[Row, Episode], object] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Roll a policy out from every start, at every combination of the settings.

    Args:
        policy: a policy, or the path of one for `fmft_fast.policies.FlowPolicy.from_pretrained`.
        environment: name of a simulator.
        starts: how many initial states, from number 0 on, or their numbers.
        steps: numbers of solver steps of a prediction.
        method: solver's name.
        noise_seeds: of the noise that predictions start from.
        observation_noise: disturbances of what the policy sees, each in turn.
        workers: processes; 0 works in this one. The rows do not depend on it.
        max_steps: steps of an episode; by default those of the published protocol.
        record: of so many starts, the first ones, pictures are kept for `recorded`.
        recorded: called with each row and its Episode, frames included, as soon as it is there,
            so that pictures need not be kept in memory.
        progress: show a bar, in episodes.

    Returns:
        For each setting and start: "steps", "noise" (text), "noise_seed", "start", "length", and
        the simulator's measures.

    Raises:
        InputError: there are no starts or settings, or one comes twice.
        FmftError: a roll-out failed; says which and why.
    """
    numbers = list(range(starts)) if isinstance(starts, int) else list(starts)
    chunks = [numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)]
    noises = [as_noise(noise) for noise in observation_noise]
    _check_each_once(starts=numbers, steps=steps, noise_seeds=noise_seeds, observation_noise=noises)
    with _saved(policy) as path:
        jobs = []
        for n, noise, noise_seed, chunk in itertools.product(steps, noises, noise_seeds, chunks):
            options = {
                "steps": n,
                "method": method,
                "noise_seed": noise_seed,
                "observation_noise": noise,
                "record": sorted(set(chunk) & set(numbers[:record])),
                "max_steps": max_steps,
            }
            name = f"steps {n}, noise {noise}, noise seed {noise_seed}, starts from {chunk[0]}"
            jobs.append(Job(name, _roll_chunk, (path, environment, chunk, options)))
        rows: dict[str, list[Row]] = {}
        total = len(numbers) * len(jobs) // len(chunks)
        with progress_bar(total, environment, show=progress, unit="episode") as bar:
            with closing(run_jobs(jobs, workers, tick=lambda: bar.update(0))) as ends:
                for ended in ends:
                    if ended.error is not None:
                        raise FmftError(f"{environment}, {ended.job.name}: {ended.error}")
                    rows[ended.job.name] = _rows(ended, recorded)
                    bar.update(len(ended.value))
    return [row for job in jobs for row in rows[job.name]]


def _check_each_once(**settings: Sequence[Any]) -> None:
    for name, values in settings.items():
        texts = [str(value) for value in values]
        if not texts or len(set(texts)) < len(texts):
            raise InputError(f"{name}: expected at least one, each once, got {', '.join(texts)}")


def _rows(ended: Ended, recorded: Callable[[Row, Episode], object] | None) -> list[Row]:
    """Make rows of a chunk's episodes."""
    options, rows = ended.job.arguments[-1], []
    for episode in ended.value:
        row = {
            "steps": options["steps"],
            "noise": str(options["observation_noise"]),
            "noise_seed": options["noise_seed"],
            "start": episode.start,
            "length": episode.length,
            **episode.scores,
        }
        rows.append(row)
        if recorded is not None and episode.frames is not None:
            recorded(row, episode)
    return rows


@contextmanager
def _saved(policy: Any) -> Iterator[Path]:
    """Give a file from which workers read the policy, whatever its size, once each."""
    if isinstance(policy, (str, Path)):
        policy = FlowPolicy.from_pretrained(policy)
    with tempfile.TemporaryDirectory(prefix="fmft-") as folder:
        file = Path(folder) / "policy.pt"
        torch.save(policy, file)
        try:
            yield file
        finally:  # leave nothing behind of work done in this process
            _load.cache_clear()
            while _KEPT:
                for one in _KEPT.popitem()[1]:
                    one.close()


def _roll_chunk(
    path: Path, environment: str, starts: Sequence[int], options: dict[str, Any]
) -> list[Episode]:
    """Do one job, in a worker."""
    policy = _load(path)  # first: its module may register the simulator
    pool = _KEPT.setdefault(environment, [])
    while len(pool) < len(starts):
        pool.append(make_environment(environment))
    return roll_out(policy, pool, starts, **options)


@functools.lru_cache(maxsize=1)
def _load(path: Path) -> Any:
    """Load the policy once per process. Unpickling it is safe: `_saved` wrote the file just now."""
    return torch.load(path, weights_only=False)
