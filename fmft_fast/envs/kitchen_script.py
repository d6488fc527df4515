"""Scripted demonstrations for Franka Kitchen, made in the simulator: the human ones are elsewhere.

Each episode does some tasks, drawn at random as is their order, at a speed of its own, by ways
that differ, and with a disturbed hand, of which the file holds what was wanted: so a policy learns
to come back (Laskey et al. 2017, DART, arXiv 1703.09327). What fails is not kept, and is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from fmft_fast.data import Episodes
from fmft_fast.envs.kitchen import TASKS, Kitchen
from fmft_fast.envs.kitchen_arm import Arm, Move, Pose
from fmft_fast.envs.kitchen_skills import SKILLS
from fmft_fast.errors import FmftError, InputError
from fmft_fast.train.logging import progress_bar
from fmft_fast.workers import Job, run_jobs

# Few enough that some hundred episodes show every order of them.
FOUR = "microwave", "kettle", "light switch", "slide cabinet"
CHUNK = 5  # episodes of a job, and of a file while the work is under way
ATTEMPTS = 25  # at an episode; far more than are ever needed
FIRST_START = 1_000_000  # of the simulator; evaluations use the numbers from 0
SPEEDS = 1.0, 1.4  # of all moves of an episode, relative
WANDER_M = 0.03  # of the end of the way through free space, standard deviation
OFFSET_M = 0.003  # of all other places, the same within a task
# The disturbance of an action is a random walk that forgets; its step, and what it keeps.
NOISE, KEPT = 0.06, 0.8

Outcome = dict[str, Any]


def make_demonstrations(
    path: str | Path,
    episodes: int = 300,
    *,
    seed: int = 0,
    tasks: Sequence[str] = FOUR,
    tasks_each: int = 4,
    noise: float = NOISE,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Write scripted demonstrations of Franka Kitchen to an .npz file of `Episodes`.

    Arrays: `obs` [steps, 59] float32 as `Kitchen` gives it, `action` [steps, 9] float32, what was
    wanted, which is what to imitate, `executed` [steps, 9] float32, what was done, which differs by
    the disturbance, `task` [steps] int64, the index in `fmft_fast.envs.kitchen.TASKS` that the hand
    was about, `start` [steps] int64, the simulator's start number (from it, `executed` repeats the
    episode exactly), and `scripted` [steps], true: the label of data that no human made. Beside it,
    the same name ending in .json holds settings and success rates.

    Episode i is the same whatever `episodes` and `workers` are. Finished episodes are kept in a
    folder beside the file while the work is under way: after an interruption, the same call goes
    on from there.

    Args:
        path: of the file, ending in .npz; it must not exist.
        episodes: how many; each does all of its tasks within the 280 steps of an evaluation.
        seed: different seeds give different episodes and starts.
        tasks: from which those of an episode are drawn, of `fmft_fast.envs.kitchen.TASKS`.
        tasks_each: how many an episode does.
        noise: of actions, standard deviation of the disturbance's steps.
        workers: processes; 0 works in this one.
        progress: show a bar, in episodes.

    Returns:
        What the .json file holds: "kind", "settings", "episodes", "steps", "attempts", and
        "tasks", which gives for each task how often it was "tried" and "done", whether or not the
        rest of the episode succeeded.

    Raises:
        InputError: the file exists, its name does not end in .npz, a setting has no meaning, or
            the folder holds unfinished work with other settings.
        MissingDependencyError: the simulator is not installed.
        FmftError: an episode failed at every attempt.

    Example:
        make_demonstrations("kitchen.npz", 300, workers=4)
    """
    path = Path(path)
    settings = {
        "seed": seed,
        "tasks": list(tasks),
        "tasks_each": tasks_each,
        "noise": noise,
    }
    _check(path, episodes, settings)
    Kitchen(tasks).close()  # refuses unknown tasks, and where the simulator is not installed
    parts = _open_parts(path, settings)
    outcomes: list[Outcome] = []
    made: list[Episodes] = []
    chunks = [range(i, min(i + CHUNK, episodes)) for i in range(0, episodes, CHUNK)]
    with progress_bar(episodes, "kitchen", show=progress, unit="episode") as bar:
        _make_parts(parts, chunks, settings, workers, bar)
    for chunk in chunks:
        file = _part(parts, chunk)
        outcomes += json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        with np.load(file) as arrays:
            names = [name for name in arrays.files if name != "episode_ends"]
            made.append(Episodes({n: arrays[n] for n in names}, arrays["episode_ends"]))
    joined = Episodes.from_list([episode for part in made for episode in part])
    report = _report(settings, joined, outcomes)
    text = json.dumps(report, indent=2) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    joined.save(path)
    shutil.rmtree(parts)
    return report


def record_attempt(
    env: Kitchen, start: int, tasks: Sequence[str], rng: np.random.Generator, noise: float = NOISE
) -> tuple[dict[str, np.ndarray], Outcome]:
    """Try to do tasks in their order, and give the arrays of the episode and how it went.

    Args:
        env: with which it is tried.
        start: number of the start.
        tasks: of `TASKS`, different ones.
        rng: draws speed, ways and disturbances.
        noise: see `make_demonstrations`.

    Returns:
        The arrays that `make_demonstrations` describes, and "tasks", "done" (those of them that
        were completed) and "steps".
    """
    obs, speed, wave = env.reset(start), rng.uniform(*SPEEDS), np.zeros(9)
    arm, data = Arm(env.sim.model, env.sim.data), env.sim.data
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
    for task in tasks:
        posture = np.array(SKILLS[task].posture)
        for move, goal in _way(arm, data, task, rng):
            wave = KEPT * wave + noise * np.append(rng.normal(size=7), (0.0, 0.0))
            wanted = arm.act(dataclasses.replace(move, speed=speed * move.speed), goal, posture)
            # The simulator gets what the file will hold, to the last bit.
            done = np.clip(wanted + move.calm * wave, -1.0, 1.0).astype(np.float32)
            rows.append((obs, wanted.astype(np.float32), done, TASKS.index(task)))
            obs, _ = env.step(done)
    arrays = {
        "obs": np.stack([row[0] for row in rows]),
        "action": np.stack([row[1] for row in rows]),
        "executed": np.stack([row[2] for row in rows]),
        "task": np.array([row[3] for row in rows], dtype=np.int64),
        "start": np.full(len(rows), start, dtype=np.int64),
        "scripted": np.ones(len(rows), dtype=bool),
    }
    done = [task for task in tasks if task in env.completed]
    return arrays, {"tasks": list(tasks), "done": done, "steps": len(rows)}


def _way(arm: Arm, data: Any, task: str, rng: np.random.Generator) -> Iterator[tuple[Move, Pose]]:
    """Give move and goal for each step of a task, until it is over."""
    offset = OFFSET_M * rng.normal(size=3)
    for index, move in enumerate(SKILLS[task].moves(data)):
        shift = WANDER_M * rng.normal(size=3) if index == 0 else offset
        for _ in range(move.steps):
            if move.done is not None and move.done(data):
                break
            goal = (move.goal if isinstance(move.goal, Pose) else move.goal(data)).moved(shift)
            yield move, goal
            if np.linalg.norm(goal.place - arm.place) < move.near:
                break


def _make_parts(
    parts: Path, chunks: Sequence[range], settings: dict[str, Any], workers: int, bar: Any
) -> None:
    """Make what is not there yet."""
    missing = [chunk for chunk in chunks if not _part(parts, chunk).exists()]
    bar.update(sum(len(chunk) for chunk in chunks if chunk not in missing))
    jobs = [Job(f"episodes {c[0]} to {c[-1]}", _make_part, (parts, c, settings)) for c in missing]
    with closing(run_jobs(jobs, workers, tick=lambda: bar.update(0))) as ends:
        for ended in ends:
            if ended.error is not None:
                raise FmftError(f"kitchen, {ended.job.name}: {ended.error}")
            bar.update(len(ended.job.arguments[1]))


def _make_part(parts: Path, chunk: range, settings: dict[str, Any]) -> None:
    """Make the episodes of one chunk, in a worker."""
    made, outcomes = [], []
    for index in chunk:
        episode, tries = _make_episode(index, settings)
        made.append(episode)
        outcomes += tries
    file = _part(parts, chunk)
    file.with_suffix(".json").write_text(json.dumps(outcomes), encoding="utf-8")
    Episodes.from_list(made).save(file)  # last, and whole at once: it says that the part is there


def _make_episode(
    index: int, settings: dict[str, Any]
) -> tuple[dict[str, np.ndarray], list[Outcome]]:
    """Try until an episode succeeds; gives it and how all tries went."""
    env, outcomes = _simulator(), []
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([settings["seed"], index, attempt])
        start = FIRST_START + int(rng.integers(1 << 31))
        order = rng.permutation(len(settings["tasks"]))[: settings["tasks_each"]]
        tasks = [settings["tasks"][i] for i in order]
        arrays, outcome = record_attempt(env, start, tasks, rng, settings["noise"])
        kept = outcome["done"] == tasks and outcome["steps"] <= env.max_steps
        outcomes.append({**outcome, "kept": kept})
        if kept:
            return arrays, outcomes
    raise FmftError(
        f"episode {index} failed {ATTEMPTS} times, the last time after {outcomes[-1]['done']} of "
        f"{outcomes[-1]['tasks']} in {outcomes[-1]['steps']} steps; take less noise or fewer tasks"
    )


@functools.cache
def _simulator() -> Kitchen:
    """Give this process's simulator; it counts all tasks, so that all are seen when done."""
    return Kitchen()


def _report(
    settings: dict[str, Any], episodes: Episodes, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    tried = [task for outcome in outcomes for task in outcome["tasks"]]
    done = [task for outcome in outcomes for task in outcome["done"]]
    return {
        "kind": "scripted demonstrations of FrankaKitchen-v1",
        "settings": settings,
        "episodes": episodes.count,
        "steps": episodes.steps,
        "attempts": len(outcomes),
        "tasks": {
            task: {"tried": tried.count(task), "done": done.count(task)}
            for task in settings["tasks"]
        },
    }


def _check(path: Path, episodes: int, settings: dict[str, Any]) -> None:
    """Refuse what cannot be made."""
    if path.suffix != ".npz":
        raise InputError(f"path: expected a name ending in .npz, got {path.name!r}; add it")
    if path.exists():
        raise InputError(f"{path} exists already; delete it or choose another name")
    if episodes < 1:
        raise InputError(f"episodes: expected at least 1, got {episodes}")
    if not 1 <= settings["tasks_each"] <= len(settings["tasks"]):
        raise InputError(
            f"tasks_each: expected from 1 to the {len(settings['tasks'])} tasks that are given, "
            f"got {settings['tasks_each']}"
        )
    if not 0 <= settings["noise"] < 1:
        raise InputError(
            f"noise: expected a number in [0, 1), got {settings['noise']}; try {NOISE}"
        )


def _open_parts(path: Path, settings: dict[str, Any]) -> Path:
    """Give the folder of unfinished work, and see that it belongs to these settings."""
    parts = path.with_name(f"{path.stem}.parts")
    note, text = parts / "settings.json", json.dumps(settings)
    if not note.exists():
        parts.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(".draft")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, note)
    elif note.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{parts} holds unfinished work with other settings; delete it or choose another name"
        )
    return parts


def _part(parts: Path, chunk: range) -> Path:
    return parts / f"{chunk[0]:06d}-{chunk[-1]:06d}.npz"
