"""`fmft demo`: the main job on several seeds in parallel, judged against what it should reach."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fmft_fast import commands
from fmft_fast.commands import Place
from fmft_fast.errors import ConfigError, FmftError
from fmft_fast.report import (
    markdown,
    median_results,
    number,
    read_results,
    results_table,
    write_json,
)
from fmft_fast.tasks import Task
from fmft_fast.train import FinetuneConfig, PretrainConfig, read_metrics
from fmft_fast.train.checkpoint import versions
from fmft_fast.train.config import changes, format_toml
from fmft_fast.train.logging import progress_bar
from fmft_fast.workers import Ended, Job, run_jobs

Medians = Mapping[int, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Target:
    """A claim of the form value <= bound (or < bound), and whether the run reached it."""

    claim: str
    value: float
    bound: float
    strict: bool = False

    @property
    def reached(self) -> bool:
        """Whether the value keeps the bound."""
        return self.value < self.bound if self.strict else self.value <= self.bound


def targets(before: Medians, after: Medians) -> list[Target]:
    """Compare what can be compared: N = 2 with N = 100, N = 10 with half, distances with before."""
    found = []
    measures = next(iter(before.values()))
    share = "off_mode_share"
    if share in measures and {2, 10, 100} <= set(before):
        claim = "off-mode share: fine-tuned with N = 2 below pre-trained with N = 100"
        found.append(Target(claim, after[2][share], before[100][share], strict=True))
        claim = "off-mode share: fine-tuned with N = 10 at most half of pre-trained with N = 10"
        found.append(Target(claim, after[10][share], before[10][share] / 2))
    for measure in ("energy_distance", "sliced_w2"):
        for n in (2, 10):
            if measure in measures and n in before:
                claim = f"{measure.replace('_', ' ')} with N = {n}: not worse than before"
                found.append(Target(claim, after[n][measure], before[n][measure]))
    return found


def choose_place(out: Path | None, resume: bool, quiet: bool) -> Place:
    """Give the folder: the one named, or the newest to resume, or the next free runs/demo-K."""
    if out is not None:
        if (out / "config.toml").exists() and not resume:
            raise ConfigError(f"{out} already holds a demo; add --resume, or name another --out")
        return Place(out, resume, quiet)
    names = (Path("runs") / ("demo" if k == 1 else f"demo-{k}") for k in range(1, 10_000))
    taken: Path | None = None
    for free in names:
        if not (free / "config.toml").exists():
            return Place(taken if resume and taken else free, resume, quiet)
        taken = free
    raise ConfigError("runs/ is full of demos; name a folder with --out")


def run(
    task: Task,
    place: Place,
    *,
    seeds: Sequence[int],
    workers: int,
    pretrain: PretrainConfig,
    finetune: FinetuneConfig,
    steps: Sequence[int],
) -> dict[str, Any]:
    """Pre-train, measure, fine-tune, measure again, for every seed; then sum up.

    Raises:
        FmftError: a stage failed; the others of that moment have been saved.
        KeyboardInterrupt: stopped on request; says how to resume.
    """
    started = time.perf_counter()
    jobs = [
        _Job(task, seed, place.out / f"seed-{seed}", pretrain, finetune, tuple(steps))
        for seed in seeds
    ]
    for job in jobs:
        job.check_finished()
    place.out.mkdir(parents=True, exist_ok=True)
    header = {"task": task.name, "seeds": list(seeds), "measure": list(steps)}
    settings = f"{pretrain.to_toml('pretrain')}\n{finetune.to_toml('finetune')}"
    text = f"{format_toml({**header, **commands.options_table(task)})}\n{settings}"
    file = place.out / "config.toml"
    if file.exists():
        commands.check_options(task, file)
    else:
        file.write_text(text, encoding="utf-8")
    place.say(
        f"{task.name}: {task.summary}.\nPre-training {pretrain.steps} steps, fine-tuning "
        f"{finetune.steps} steps, seeds {', '.join(map(str, seeds))}, in {place.out}"
    )
    _run_jobs(jobs, workers, place)
    file.write_text(text, encoding="utf-8")
    content = _sum_up(task, place, jobs, started)
    place.say(_plain_words(content, jobs[0]))
    return content


@dataclasses.dataclass(frozen=True)
class _Job:
    """One seed's work in two stages, each of which goes on from what lies in `folder`."""

    task: Task
    seed: int
    folder: Path
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    steps: tuple[int, ...]

    def results(self, stage: str) -> Path:
        return self.folder / stage / "results.json"

    @property
    def pretrained(self) -> bool:
        return self.results("pretrain").exists()

    def check_finished(self) -> None:
        """Refuse other settings than those of a finished stage, which will not run again."""
        for stage, config in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            if not self.results(stage).exists():
                continue
            content = json.loads(self.results(stage).read_text(encoding="utf-8"))
            measured = [int(n) for n in content["results"].get("after", ())]
            steps = list(self.steps) if stage == "finetune" else []
            changed = dataclasses.replace(config, seed=self.seed).changed_since(content["config"])
            changed = changed or changes({"measure": measured}, {"measure": steps})
            if changed:
                raise ConfigError(
                    f"seed {self.seed}: {stage} is finished already with other settings "
                    f"({changed}); resume with the same ones, or begin a demo in another folder"
                )

    def work(self, stage: str, figures: bool) -> None:
        task, place = self.task, Place(self.folder / stage, resume=True, quiet=True)
        if stage == "pretrain":
            # Measured below, together with the fine-tuned model: the measures cost more than it.
            config = dataclasses.replace(self.pretrain, seed=self.seed)
            commands.pretrain(task, config, place, steps=())
        else:
            config = dataclasses.replace(self.finetune, seed=self.seed)
            start = self.folder / "pretrain"
            commands.finetune(task, config, place, start=start, steps=self.steps, figures=figures)

    def steps_done(self) -> tuple[int, str]:
        """Give steps done of both stages, and what is being done."""
        done, doing = 0, "waiting"
        for stage, total in (("pretrain", self.pretrain.steps), ("finetune", self.finetune.steps)):
            if self.results(stage).exists():
                done, doing = done + total, "done" if stage == "finetune" else "waiting"
                continue
            log = self.folder / stage / "metrics.jsonl"
            records = read_metrics(log) if log.exists() else []
            if records:
                done += min(total, records[-1]["step"])
                doing = stage if records[-1]["step"] < total else "measuring"
        return done, doing


def _run_jobs(jobs: Sequence[_Job], workers: int, place: Place) -> None:
    """Keep up to `workers` processes at work until every stage has its results."""
    total = sum(job.pretrain.steps + job.finetune.steps for job in jobs)
    with progress_bar(total, "demo", show=not place.quiet, unit="step") as bar:
        ends = run_jobs(_stages(jobs), max(1, workers), tick=lambda: _show(bar, jobs))
        try:
            with closing(ends):
                for ended in ends:
                    _check_ended(ended, place)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; go on with: fmft demo --resume --out {place.out}"
            ) from None


def _check_ended(ended: Ended, place: Place) -> None:
    if ended.error is not None:
        raise FmftError(
            f"{ended.job.name} failed: {ended.error}; what is finished lies in {place.out}; go on "
            f"with --resume"
        )


def _stages(jobs: Sequence[_Job]) -> list[Job]:
    """Give what is left to do; fine-tuning waits for its seed's pre-training."""
    left = []
    for stage, before in (("pretrain", None), ("finetune", "pretrain")):
        for job in jobs:
            if job.results(stage).exists():
                continue
            needs = () if before is None or job.pretrained else (f"seed {job.seed}: {before}",)
            arguments = (stage, job is jobs[0])
            left.append(Job(f"seed {job.seed}: {stage}", job.work, arguments, needs))
    return left


def _show(bar: tqdm, jobs: Sequence[_Job]) -> None:
    done = [job.steps_done() for job in jobs]
    stages = [f"seed {job.seed} {doing}" for job, (_, doing) in zip(jobs, done, strict=True)]
    bar.set_postfix_str(", ".join(stages), refresh=False)
    bar.update(sum(count for count, _ in done) - bar.n)


def _sum_up(task: Task, place: Place, jobs: Sequence[_Job], started: float) -> dict[str, Any]:
    """Write results.json and results.md: medians over seeds against the targets."""
    parts = [json.loads(job.results("finetune").read_text(encoding="utf-8")) for job in jobs]
    medians = {
        name: median_results([read_results(part["results"][name]) for part in parts])
        for name in ("before", "after")
    }
    floor = {
        key: sorted(part["noise_floor"][key] for part in parts)[len(parts) // 2]
        for key in parts[0]["noise_floor"]
    }
    judged = targets(medians["before"], medians["after"])
    table = results_table(medians, floor)
    rows = [
        [t.claim, number(t.value), number(t.bound), "reached" if t.reached else "MISSED"]
        for t in judged
    ]
    verdict = markdown([["target", "value", "bound", ""], *rows]) if rows else ""
    text = (
        f"Medians over seeds {', '.join(str(job.seed) for job in jobs)}\n\n{table}\n\n{verdict}\n"
    )
    (place.out / "results.md").write_text(text, encoding="utf-8")
    place.say(f"\n{text}")
    content = {
        "command": "demo",
        "task": task.name,
        "seeds": [job.seed for job in jobs],
        "medians": medians,
        "noise_floor": floor,
        "targets": [{**vars(t), "reached": t.reached} for t in judged],
        "seconds": round(time.perf_counter() - started, 1),
        "resumed": place.resume,
        "by_seed": {str(job.seed): part for job, part in zip(jobs, parts, strict=True)},
        "versions": versions(),
    }
    write_json(place.out / "results.json", content)
    return content


def _plain_words(content: Mapping[str, Any], first: _Job) -> str:
    """Say what improved, what did not, and where everything lies."""
    reached = sum(target["reached"] for target in content["targets"])
    seconds = f"{content['seconds']:.0f} s{' since it was resumed' if content['resumed'] else ''}"
    lines = [f"{reached} of {len(content['targets'])} targets reached, {seconds}."]
    medians, steps = content["medians"], first.steps
    few, most = 2 if 2 in steps else min(steps), max(steps)
    lines.append(f"With {few} Euler steps (in brackets: pre-trained, with {most} steps):")
    for measure, old in medians["before"][few].items():
        new, best = medians["after"][few][measure], medians["before"][most][measure]
        lines.append(
            f"- {measure.replace('_', ' ')} {'fell' if new < old else 'rose'} from {number(old)} "
            f"to {number(new)} ({number(best)})"
        )
    out = first.folder.parent
    lines.append(f"Numbers: {out / 'results.json'}, {out / 'results.md'}")
    figures = first.folder / "finetune" / "figures"
    if figures.exists():
        lines.append(f"Pictures: {figures}/ ({', '.join(p.name for p in figures.glob('*.png'))})")
    return "\n".join(lines)
