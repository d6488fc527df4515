"""`fmft evaluate` of a robot task: roll a policy out, and write numbers, pictures and videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmft_fast.analysis import plots
from fmft_fast.commands import Place
from fmft_fast.envs import Episode, Interval, ObservationNoise, make_environment, summarise
from fmft_fast.envs.video import contact_sheet, require_pillow, write_gif
from fmft_fast.errors import ConfigError, MissingDependencyError
from fmft_fast.policies import FlowPolicy
from fmft_fast.report import markdown, write_json
from fmft_fast.tasks.robot import RobotTask
from fmft_fast.train.checkpoint import versions

SHEET_PICTURES = 5

Found = dict[tuple[Any, ...], dict[str, Interval]]


def run(
    task: RobotTask,
    checkpoint: str | Path,
    place: Place,
    *,
    steps: Sequence[int],
    noises: Sequence[ObservationNoise],
    video: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Roll a policy out from the task's starts with each number of steps under each noise.

    Writes results.json with every roll-out, figures, and for `video` starts a GIF each and a
    contact sheet.

    Args:
        task: with the options of the evaluation (starts, noise_seeds, workers).
        checkpoint: run, checkpoint, or folder of `FlowPolicy.save_pretrained`.
        place: folder to write to.
        steps: numbers of Euler steps.
        noises: of the observations.
        video: starts, from the first one on, that are filmed.
        seed: added to the seeds of the policy's noise.

    Raises:
        CheckpointError: there is no policy, or it cannot be read.
        ConfigError: noise or films are wanted, and the simulator is not installed or does not fit.

    Warns:
        ConfigWarning: it is not, so that actions are compared with those of demonstrations.
    """
    policy = FlowPolicy.from_pretrained(checkpoint)
    if video:
        require_pillow()
    if video or any(noise.kind != "none" for noise in noises):
        why = task.why_no_roll_outs(policy)
        if why is not None:
            raise ConfigError(f"--noise and --video need roll-outs, got none: {why}; drop them")
    film = _Film(place.out, _frame_rate(task) if video else 0.0)
    compared = task.compare_instead(policy, steps, seed=seed)
    if compared is not None:
        rows = [{"noise": "none", **row} for row in compared]
    else:
        rows = task.roll_out(
            policy,
            steps,
            seed=seed,
            observation_noise=noises,
            record=video,
            recorded=film.add,
            progress=not place.quiet,
        )
    found = summarise(rows, by=("noise", "steps"))
    text = table(found)
    content = {
        "command": "evaluate",
        "task": task.name,
        "checkpoint": str(checkpoint),
        "options": task.options.to_dict(),
        "seed": seed,
        "summary": [
            {"noise": noise, "steps": n, **{name: vars(one) for name, one in measures.items()}}
            for (noise, n), measures in found.items()
        ],
        "roll_outs": rows,
        "versions": versions(),
    }
    place.say(f"\n{text}\n\nresults: {write_json(place.out / 'results.json', content)}")
    try:
        files = [*film.finish(), draw(found, place.out / "quality.png")]
    except MissingDependencyError as error:
        place.say(f"no pictures: {error}")
    else:
        place.say(f"pictures: {', '.join(map(str, files))}")
        if film.stills:
            place.say(f"videos: {film.folder}/*.gif")
    return content


def table(found: Found) -> str:
    """Lay out means with 95 % intervals over the starts: a line per measure and noise."""
    steps = list(dict.fromkeys(n for _, n in found))
    lines = [["measure", "noise", *(f"N = {n}" for n in steps)]]
    for measure in next(iter(found.values())):
        for noise in dict.fromkeys(noise for noise, _ in found):
            lines.append([measure, noise, *(str(found[noise, n][measure]) for n in steps)])
    return markdown(lines)


def draw(found: Found, file: Path) -> Path:
    """Draw each measure against N, a line per noise."""
    panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for (noise, n), measures in found.items():
        for name, one in measures.items():
            line = panels.setdefault(name, {}).setdefault(f"noise: {noise}", [])
            line.append((n, one.low, one.mean, one.high))
    return plots.medians(panels, file, xlabel="Euler steps N", log_y=False)


def _frame_rate(task: RobotTask) -> float:
    environment = make_environment(task.simulator())
    environment.close()
    return environment.frame_rate


class _Film:
    """Writes a GIF of each recorded episode as it comes, and keeps stills for a contact sheet."""

    def __init__(self, folder: Path, frame_rate: float) -> None:
        self.folder, self.frame_rate = folder / "videos", frame_rate
        self.stills: dict[tuple[str, int], list[Episode]] = {}

    def add(self, row: dict[str, Any], episode: Episode) -> None:
        assert episode.frames is not None
        noise, n = row["noise"], row["steps"]
        words = (
            noise.replace(":", "-"),
            f"n{n}",
            f"seed{row['noise_seed']}",
            f"start{row['start']}",
        )
        file = self.folder / f"{'-'.join(words)}.gif"
        write_gif(episode.frames, file, self.frame_rate)
        last = len(episode.frames) - 1
        chosen = [round(i * last / (SHEET_PICTURES - 1)) for i in range(SHEET_PICTURES)]
        still = dataclasses.replace(episode, frames=episode.frames[chosen])
        self.stills.setdefault((noise.replace(":", "-"), n), []).append(still)

    def finish(self) -> list[Path]:
        """Write a contact sheet for each noise and number of steps."""
        return [
            contact_sheet(
                episodes, self.folder / f"{noise}-n{n}.png", pictures=SHEET_PICTURES, columns=1
            )
            for (noise, n), episodes in self.stills.items()
        ]
