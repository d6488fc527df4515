"""What the commands of `fmft` do: from a task and settings to a folder of results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmft_fast.errors import CheckpointError, ConfigError, ConfigWarning, MissingDependencyError
from fmft_fast.report import results_table, write_json
from fmft_fast.tasks import STEPS, Task
from fmft_fast.train import (
    Checkpoint,
    FinetuneConfig,
    FitConfig,
    FitResult,
    FlowMatchingTrainer,
    MLEFineTuner,
    PretrainConfig,
    read_metrics,
)
from fmft_fast.train.branch import as_saved
from fmft_fast.train.checkpoint import resolve, versions
from fmft_fast.train.config import format_toml, merge, read_toml, section, unknown_key

SECTIONS: dict[str, type[FitConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
TABLES = ("coupling_options", "residual_options", "network_options")
HEADER = ("task", "from", "seeds", "measure")
OPTIONS = "options"


@dataclass(frozen=True)
class Place:
    """Where a run lies and how much it says."""

    out: Path
    resume: bool = False
    quiet: bool = False

    def say(self, text: str) -> None:
        """Print, unless told to be quiet."""
        if not self.quiet:
            print(text, flush=True)


def configure(task: Task, layers: Sequence[Mapping[str, Any]]) -> tuple[Task, list[dict[str, Any]]]:
    """Set a task up from its [options] in files and on the command line.

    Args:
        task: with its default options.
        layers: nested tables, a later one lying over an earlier one. Options may also stand
            outside of any section.

    Returns:
        The task with these options, and the layers without them.

    Raises:
        ConfigError: the task takes no such option, or a value is not understood.
    """
    known = set() if task.options is None else set(task.options.to_dict())
    options: dict[str, Any] = {}
    rest = []
    for layer in layers:
        own = {key: value for key, value in layer.items() if key in known}
        options = merge(options, {**own, **section(layer, OPTIONS, list(layer))})
        rest.append({k: v for k, v in layer.items() if k not in known and k != OPTIONS})
    return task.configured(options), rest


def options_of(start: str | Path, task: Task) -> dict[str, Any]:
    """Give the [options] of the run that a fine-tuning starts from, if it is one of this task.

    With them, the same demonstrations are trained on and the same episodes are held out. A saved
    policy tells its sizes alone.
    """
    start = Path(start)
    for folder in (start, *start.parents[:2]):  # start may be runs/x/checkpoints/step-000500
        file = folder / "config.toml"
        if file.exists():
            return {OPTIONS: read_run_file(file, task).get(OPTIONS, {})}
    if not task.fixed:
        return {}
    recipe = (task.read(start).architecture.get("recipe") or {}).get("policy", {})
    return {OPTIONS: {name: recipe[name] for name in task.fixed if name in recipe}}


def refuse_fixed(task: Task, overrides: Mapping[str, Any]) -> None:
    """Refuse options on the command line that a checkpoint has decided, before they mislead.

    Raises:
        ConfigError: there is one.
    """
    given = {**overrides, **section(overrides, OPTIONS, list(overrides))}
    for name, value in given.items():
        if name in task.fixed:
            raise ConfigError(
                f"{name}: the checkpoint has its own, got {value!r}; drop it, or pre-train with it"
            )


def make_config(name: str, task: Task, layers: Sequence[Mapping[str, Any]]) -> Any:
    """Lay files and overrides over the task's own settings; a later layer wins.

    Args:
        name: "pretrain" or "finetune".
        task: its settings for that section lie at the bottom.
        layers: nested tables, with sections or without.

    Raises:
        ConfigError: a key is unknown or a value is not understood.

    Warns:
        ConfigWarning: options of a layer are dropped, since a later one takes another coupling or
            mode.
    """
    own = getattr(task, name)
    table, known = dict(own), (*SECTIONS, *HEADER)
    for layer in layers:
        keys = section(layer, name, known)
        # Options belong to the coupling or the mode that they were written for.
        if keys.get("coupling", table.get("coupling")) != table.get("coupling"):
            _drop(table, "coupling_options", own, f"coupling = {keys['coupling']}")
        if "mode" in table and keys.get("mode", table["mode"]) != table["mode"]:
            _drop(table, "residual_options", own, f"mode = {keys['mode']}")
        table = merge(table, keys)
    return SECTIONS[name].from_dict(table)


def _drop(table: dict[str, Any], options: str, own: Mapping[str, Any], now: str) -> None:
    """Take options out of a table, with a word about those that are not the task's own."""
    dropped = table.pop(options, {})
    if dropped and dropped != own.get(options):
        message = f"{options} {dropped} of the file are dropped, since {now} was given over it"
        warnings.warn(f"{message}; write the options for that one beside it", ConfigWarning, 3)


def check_overrides(overrides: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse sections that the command does not read, before they are silently ignored."""
    for name, value in overrides.items():
        if name in HEADER:
            raise ConfigError(f"this command takes no --{name}; see its --help")
        if isinstance(value, Mapping) and name not in (*allowed, *TABLES):
            raise unknown_key(name, (*allowed, *TABLES), "a section of this command")


def read_run_file(path: Path, task: Task) -> dict[str, Any]:
    """Read a configuration file and see that it is for this task."""
    table = read_toml(path)
    if table.get("task", task.name) != task.name:
        raise ConfigError(
            f"{path} is for the task {table['task']!r}, got {task.name!r}; name that task, or "
            f"drop the line task = from the file"
        )
    return table


def read_begun_file(path: Path, task: Task) -> dict[str, Any]:
    """Read the file of a run to go on with: keys younger than it have the package's defaults.

    Those of the task are for new runs, and may have changed since.
    """
    table = read_run_file(path, task)
    begun = {name: cls for name, cls in SECTIONS.items() if name in table}
    return {**table, **{k: {**cls().to_dict(), **table[k]} for k, cls in begun.items()}}


def new_field(task: Task, seed: int) -> nn.Module:
    """Make the task's untrained field, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.make_field()


def load_field(task: Task, path: str | Path) -> tuple[nn.Module, Checkpoint]:
    """Give the model of a task's checkpoint, the field or a residual around it, in its dtype."""
    checkpoint = task.read(path)
    dtype = getattr(torch, checkpoint.config.get("dtype", "float32"))
    with torch.random.fork_rng(devices=[]):
        field = task.field_of(checkpoint)
    return as_saved(field.to(dtype), checkpoint, path), checkpoint


def pretrain(
    task: Task, config: PretrainConfig, place: Place, *, steps: Sequence[int] = STEPS
) -> dict[str, Any]:
    """Pre-train the task's field, measure it, and write results.json."""
    field = new_field(task, config.seed)
    data = task.make_data(config.seed, field)
    trainer = FlowMatchingTrainer(
        field,
        data.train_rows,
        config=config,
        heldout=data.heldout_rows,
        evaluate=task.watch(config),
        out=place.out,
        progress=not place.quiet,
    )
    text = begin(place, task, "pretrain", config)
    result = trainer.run(resume=place.resume)
    (place.out / "config.toml").write_text(text, encoding="utf-8")
    place.say(ending(result, steps))
    measured = {}
    if steps:
        measured["pre-trained"] = task.evaluate(on_cpu(result.model), steps, seed=config.seed)
    return finish(task, place, "pretrain", config, result, measured)


def finetune(
    task: Task,
    config: FinetuneConfig,
    place: Place,
    *,
    start: str | Path,
    steps: Sequence[int] = STEPS,
    figures: bool = True,
) -> dict[str, Any]:
    """Fine-tune a pre-trained field through its solve, measure both, draw what changed."""
    field, _ = load_field(task, start)
    before = on_cpu(copy.deepcopy(field))
    data = task.make_data(config.seed, field)
    tuner = MLEFineTuner(
        field,
        data.train_rows,
        config=config,
        heldout=data.heldout_rows,
        evaluate=task.watch(config),
        out=place.out,
        progress=not place.quiet,
    )
    text = begin(place, task, "finetune", config, start=start)
    result = tuner.run(resume=place.resume)
    (place.out / "config.toml").write_text(text, encoding="utf-8")
    place.say(ending(result, steps))
    after = on_cpu(result.model)
    measured = {
        "before": task.evaluate(before, steps, seed=config.seed),
        "after": task.evaluate(after, steps, seed=config.seed),
    }
    results = finish(task, place, "finetune", config, result, measured)
    if figures:
        logs = {"fine-tuning": read_metrics(place.out / "metrics.jsonl")}
        earlier = Path(start) / "metrics.jsonl"
        if earlier.exists():
            logs = {"pre-training": read_metrics(earlier), **logs}
        draw(task, place, before, after, seed=config.seed, results=measured, history=logs)
    return results


def evaluate(
    task: Task, checkpoint: str | Path, steps: Sequence[int], place: Place | None, *, seed: int = 0
) -> str:
    """Measure a checkpoint's samples; give the table, and write results.json where asked to."""
    field, loaded = load_field(task, checkpoint)
    measured = {"model": task.evaluate(on_cpu(field), steps, seed=seed)}
    floor = task.noise_floor(seed=seed)
    if place is not None:
        content = {
            "command": "evaluate",
            "task": task.name,
            "checkpoint": str(resolve(checkpoint)),
            "step": loaded.step,
            "seed": seed,
            "results": measured,
            "noise_floor": floor,
            "versions": versions(),
        }
        write_json(place.out / "results.json", content)
    return results_table(measured, floor)


def finish(
    task: Task,
    place: Place,
    command: str,
    config: FitConfig,
    result: FitResult,
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """Show the table and write results.json."""
    floor = task.noise_floor(seed=config.seed) if measured else {}
    if measured:
        place.say(f"\n{results_table(measured, floor)}\n")
    content = {
        "command": command,
        "task": task.name,
        "steps_done": result.step,
        "ended": result.reason,
        "selected_step": result.selected_step,
        "results": measured,
        "noise_floor": floor,
        "findings": [vars(finding) for finding in result.findings],
        "config": config.to_dict(),
        "versions": versions(),
    }
    place.say(f"results: {write_json(place.out / 'results.json', content)}")
    return content


def draw(
    task: Task, place: Place, before: nn.Module, after: nn.Module, **arguments: Any
) -> list[Path]:
    """Draw the task's figures; without matplotlib say so, since the numbers are safe already."""
    try:
        files = task.figures(before, after, place.out / "figures", **arguments)
    except MissingDependencyError as error:
        place.say(f"no figures: {error}")
        return []
    place.say(f"figures: {', '.join(str(file) for file in files)}")
    return files


def ending(result: FitResult, steps: Sequence[int]) -> str:
    """Say in plain words how a run ended and what the monitors saw."""
    lines = [f"{result.reason} after {result.step} steps, model of step {result.selected_step}"]
    if result.selected_step == 0:
        lines.append("no evaluation was better than the first: this is the model it began with")
    lines += [f"step {finding.step}: {finding}" for finding in result.findings]
    if not result.findings:
        lines.append("no failure signature was seen")
    if steps:
        lines.append(f"measuring samples with N = {', '.join(map(str, steps))} Euler steps ...")
    return "\n".join(lines)


def begin(
    place: Place, task: Task, name: str, config: FitConfig, *, start: str | Path | None = None
) -> str:
    """Save the settings as config.toml, from which the same command can run again.

    A resumed run keeps the file it has until it has ended well under the new settings. What failed
    before its first checkpoint leaves nothing to resume, and its file is written anew.
    """
    header = {"task": task.name, **({"from": str(start)} if start is not None else {})}
    text = f"{format_toml({**header, **options_table(task)})}\n{config.to_toml(name)}"
    file = place.out / "config.toml"
    if not (file.exists() and (place.out / "checkpoints").exists()):
        place.out.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    elif not place.resume:
        raise CheckpointError(
            f"{place.out} already holds a run; continue it with --resume, or name another folder "
            f"with --out"
        )
    else:
        check_options(task, file)
    return text


def options_table(task: Task) -> dict[str, Any]:
    """Give the task's own options as they stand in a file, in a section of their own."""
    return {} if task.options is None else {OPTIONS: task.options.to_dict()}


def check_options(task: Task, file: Path) -> None:
    """Refuse to go on with a run that was begun with other options than the task has now.

    Raises:
        CheckpointError: they differ from those in the run's file.
    """
    if task.options is None:
        return
    saved = type(task.options).from_dict(read_toml(file).get(OPTIONS, {}))
    changed = task.options.changed_since(saved.to_dict(), free=task.free)
    if changed:
        raise CheckpointError(
            f"{file.parent} was begun with other options ({changed}); resume with the same ones, "
            f"or begin a new run in another folder"
        )


def on_cpu(model: nn.Module) -> nn.Module:
    """Bring a field to where tasks measure: the CPU, in float32."""
    return model.to("cpu", torch.float32)
