"""The command `fmft`: reads the command line, calls `commands` and `demo`, explains errors."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmft_fast import analyze, commands, demo, rollouts
from fmft_fast.commands import SECTIONS, Place
from fmft_fast.envs import ObservationNoise
from fmft_fast.envs.kitchen_script import make_demonstrations
from fmft_fast.errors import ConfigError, FmftError
from fmft_fast.info import info_text, package_info
from fmft_fast.studies import STUDIES, find_study
from fmft_fast.studies.run import run as run_cells
from fmft_fast.tasks import STEPS, TASKS, Task, find_task
from fmft_fast.tasks.robot import RobotTask, data_variable
from fmft_fast.train.config import as_typed, parse_overrides, read_toml, toml_value
from fmft_fast.version import __version__

DESCRIPTION = """\
Pre-train flow-matching models, fine-tune them through their ODE solve, and measure the gain.

Every setting can stand in a TOML file (--config) and on the command line:
  fmft pretrain toy-gmm --steps 2000 --lr 1e-3
  fmft finetune toy-gmm --coupling ot-fixed --coupling_options.size 2048
  fmft demo --pretrain.steps 1000 --finetune.steps 500
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 a fault of the program, 2 a mistake that the message explains,
        130 interrupted.
    """
    words = [_underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    parser = make_parser()
    known, extra = parser.parse_known_args(words)
    if known.command is None:
        parser.print_help()
        return 2
    warnings.showwarning = _show_warning
    try:
        return known.run(known, _overrides(known, extra))
    except (Exception, KeyboardInterrupt) as error:
        if known.debug:
            raise
        code, text = _explain(error)
    print(f"fmft {known.command}: {text}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """Give exit code and message of what ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error) or "interrupted"
    if isinstance(error, (FmftError, OSError)):
        return 2, str(error)
    name = type(error).__name__
    return 1, f"{name}: {error} (a fault of fmft: please report it with the output of --debug)"


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="fmft",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fmft_fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        target = {"demo": "", "info": "", "study": " [NAME]"}.get(name, " TASK")
        sub = subparsers.add_parser(
            name,
            help=text,
            description=text,
            usage=f"fmft {name}{target} [--option VALUE ...]",
            allow_abbrev=False,
        )
        sub.set_defaults(run=run, settings=[], configurable=False)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        return sub

    sub = add("pretrain", run_pretrain, "Pre-train a task's field by flow matching.")
    _add_task(sub)
    _add_run_options(sub, "pretrain")
    sub = add("finetune", run_finetune, "Fine-tune a pre-trained field through its ODE solve.")
    _add_task(sub)
    sub.add_argument(
        "--from",
        dest="start",
        metavar="CHECKPOINT",
        help="pre-trained run, checkpoint or saved policy (default: runs/TASK/pretrain)",
    )
    _add_run_options(sub, "finetune")
    sub = add("evaluate", run_evaluate, "Measure a checkpoint's samples against steps.")
    _add_task(sub)
    sub.set_defaults(configurable=True)
    sub.add_argument(
        "--checkpoint", required=True, help="run, checkpoint or saved policy to measure"
    )
    sub.add_argument("--steps", type=_counts, help="numbers of Euler steps")
    sub.add_argument("--seed", type=int, default=0, help="seed of noise and fresh data")
    sub.add_argument("--out", type=Path, help="folder for results.json")
    text = "robot tasks: noise of observations, such as none,gaussian:0.1,salt-pepper:0.05"
    sub.add_argument("--noise", help=text)
    text = "robot tasks: film so many starts (default 3)"
    sub.add_argument("--video", type=_count, nargs="?", const=3, default=0, help=text)
    sub.add_argument("--quiet", action="store_true", help="show nothing but errors")
    sub = add("analyze", run_analyze, "Compare errors with theory's bound, and measure stiffness.")
    sub.add_argument("task", metavar="TASK", help=f"one of {', '.join(_free_tasks())}")
    for name in ("before", "after"):
        text = f"run or checkpoint {name} fine-tuning"
        sub.add_argument(f"--{name}", required=True, metavar="CHECKPOINT", help=text)
    sub.add_argument("--steps", type=_counts, default=STEPS, help="numbers of Euler steps")
    sub.add_argument("--samples", type=_count, help="noise samples (default 512, or 16)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noise")
    sub.add_argument("--out", type=Path, help="folder (default runs/TASK/analysis)")
    sub.add_argument("--quiet", action="store_true", help="show nothing but errors")
    sub = add("demo", run_demo, "Show the gap and how fine-tuning closes it, on several seeds.")
    sub.add_argument("--task", help=f"one of {', '.join(_free_tasks())} (default toy-gmm)")
    sub.add_argument("--seeds", type=_seeds, help="different numbers (default 0,1,2)")
    sub.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    _add_run_options(sub, *SECTIONS)
    sub = add("study", run_study, "Answer a question by measurements; without NAME list them.")
    sub.add_argument("study", nargs="?", metavar="NAME", help=f"one of {', '.join(STUDIES)}")
    sub.add_argument("--out", type=Path, help="folder (default runs/studies/NAME)")
    sub.add_argument("--resume", action="store_true", help="go on with what that folder holds")
    sub.add_argument("--seeds", type=_seeds, default=(0, 1, 2), help="default 0,1,2")
    text = "demonstrations of a robot task; may be given for several"
    sub.add_argument("--data", action="append", default=[], metavar="TASK=PATH", help=text)
    sub.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    sub.add_argument("--quick", action="store_true", help="smallest sizes, to try it out")
    sub.add_argument("--quiet", action="store_true", help="show nothing but errors")
    sub = add("demonstrate", run_demonstrate, "Write scripted demonstrations of Franka Kitchen.")
    sub.add_argument("task", metavar="TASK", choices=["kitchen"], help="kitchen")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="to write, .npz")
    sub.add_argument("--episodes", type=_count, default=300, help="default 300")
    sub.add_argument("--seed", type=int, default=0, help="default 0")
    sub.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    sub.add_argument("--quiet", action="store_true", help="show nothing but errors")
    sub = add("info", run_info, "Print versions, devices and backends, each with its cure.")
    sub.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _add_task(sub: argparse.ArgumentParser) -> None:
    names = ", ".join(f"{name} ({task.summary})" for name, task in TASKS.items())
    sub.add_argument("task", metavar="TASK", help=names)
    kinds: dict[type, list[str]] = {}
    for name, task in TASKS.items():
        if task.options is not None:
            kinds.setdefault(type(task.options), []).append(name)
    for kind, tasks in kinds.items():
        group = sub.add_argument_group(f"options of {', '.join(tasks)}")
        for item in dataclasses.fields(kind):
            _add_setting(group, item, [f"--{item.name}", f"--{commands.OPTIONS}.{item.name}"])


def _free_tasks() -> list[str]:
    """Name the tasks that need no data or simulator from elsewhere."""
    return [name for name, task in TASKS.items() if not isinstance(task, RobotTask)]


def _find_free_task(name: str) -> Task:
    """Give a task for a command that knows nothing of policies."""
    task = find_task(name)
    if isinstance(task, RobotTask):
        raise ConfigError(
            f"this command is for {', '.join(_free_tasks())}, got {name}; for policies there are "
            f"fmft evaluate and the studies policy-finetuning, policy-timing and policy-noise"
        )
    return task


def _add_run_options(sub: argparse.ArgumentParser, *sections: str) -> None:
    """Add what every training command takes, and one option for each key of its settings."""
    sub.set_defaults(configurable=True)
    sub.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the run")
    sub.add_argument("--resume", action="store_true", help="continue the run in that folder")
    sub.add_argument("--quiet", action="store_true", help="show nothing but errors")
    sub.add_argument(
        "--measure",
        type=_counts,
        metavar="N,N",
        help=f"numbers of Euler steps measured (default {','.join(map(str, STEPS))})",
    )
    for name in sections:
        group = sub.add_argument_group(
            f"settings of [{name}]", "defaults of the package; a task has its own for some"
        )
        for item in dataclasses.fields(SECTIONS[name]):
            # With one section its keys need no prefix; with two, only the prefixed ones are clear.
            flags = [f"--{name}.{item.name}"]
            if len(sections) == 1:
                flags.insert(0, f"--{item.name}")
            _add_setting(group, item, flags)


def _add_setting(group: Any, item: dataclasses.Field, flags: Sequence[str]) -> None:
    """Add a key as an option; all but the first of its spellings stay out of the help.

    What is typed for a text is quoted, so that a file called 2024 is no number.
    """
    spell = toml_value if item.type in ("str", "str | None") else str
    for flag in flags:
        group.add_argument(
            flag,
            dest="settings",
            action="append",
            metavar="VALUE",
            type=lambda text, flag=flag: f"{flag}={spell(text)}",
            help=_help(item) if flag == flags[0] else argparse.SUPPRESS,
        )


def _help(item: dataclasses.Field) -> str:
    """Describe a key, its default spelled as it would be typed."""
    default = {} if item.default is dataclasses.MISSING else item.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    default = str(default).lower() if default is None or default is False else default
    choices = item.metadata["choices"]
    extra = f"; one of {', '.join(as_typed(choices))}" if choices else ""
    return f"{item.metadata['text']} (default {default}{extra})".replace("%", "%%")


def _underscored(word: str) -> str:
    """Let --solver-steps mean --solver_steps; values keep their dashes."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _overrides(known: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """Collect the settings on the command line; unknown ones are refused where they are used."""
    overrides = parse_overrides([*known.settings, *extra])
    if overrides and not known.configurable:
        raise ConfigError(
            f"this command takes no settings, got {' '.join([*known.settings, *extra])}; see "
            f"fmft {known.command} --help"
        )
    return overrides


def _numbers(text: str, lowest: int) -> tuple[int, ...]:
    """Read different whole numbers."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < lowest or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(
            f"expected different numbers from {lowest} on, such as 1,2,5, got {text!r}"
        )
    return numbers


def _counts(text: str) -> tuple[int, ...]:
    return _numbers(text, 1)


def _count(text: str) -> int:
    number, *more = _counts(text)
    if more:
        raise argparse.ArgumentTypeError(f"expected one number from 1 on, got {text!r}")
    return number


def _seeds(text: str) -> tuple[int, ...]:
    return _numbers(text, 0)


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning ({category.__name__}): {message}", file=sys.stderr)


def _place(known: argparse.Namespace, default: str) -> Place:
    out = known.out if known.out is not None else Path("runs") / default
    return Place(out, known.resume, known.quiet)


def _file(known: argparse.Namespace, place: Place) -> Path | None:
    """Name the file that sets this run up: its own when it is resumed, else --config."""
    saved = place.out / "config.toml"
    if not (known.resume and saved.exists()):
        return known.config
    if known.config is not None:
        raise ConfigError(
            f"--resume goes on with {saved}, got --config {known.config} as well; drop one"
        )
    return saved


def _set_up(
    known: argparse.Namespace, place: Place, overrides: dict[str, Any]
) -> tuple[Task, list[dict[str, Any]]]:
    """Give the task with its options, and the tables of settings, a later one over an earlier."""
    file, task = _file(known, place), find_task(known.task)
    read = commands.read_run_file if file == known.config else commands.read_begun_file
    table = {} if file is None else read(file, task)
    below = {}
    if known.command == "finetune":
        known.start = known.start or table.get("from") or Path("runs") / task.name / "pretrain"
        commands.refuse_fixed(task, overrides)
        below = commands.options_of(known.start, task)
    return commands.configure(task, [below, table, overrides])


def run_pretrain(known: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """`fmft pretrain TASK`."""
    place = _place(known, f"{find_task(known.task).name}/pretrain")
    task, layers = _set_up(known, place, overrides)
    commands.check_overrides(layers[-1], ["pretrain"])
    config = commands.make_config("pretrain", task, layers)
    commands.pretrain(task, config, place, steps=known.measure or task.steps)
    place.say(f"next: fmft finetune {task.name} --from {place.out}")
    return 0


def run_finetune(known: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """`fmft finetune TASK`."""
    place = _place(known, f"{find_task(known.task).name}/finetune")
    task, layers = _set_up(known, place, overrides)
    commands.check_overrides(layers[-1], ["finetune"])
    config = commands.make_config("finetune", task, layers)
    steps = known.measure or task.steps
    commands.finetune(task, config, place, start=known.start, steps=steps)
    return 0


def run_evaluate(known: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """`fmft evaluate TASK`."""
    task = find_task(known.task)
    commands.refuse_fixed(task, overrides)
    task, (left,) = commands.configure(task, [overrides])
    if left:
        raise ConfigError(f"this command takes no setting {', '.join(left)}; see its --help")
    steps = known.steps or task.steps
    if isinstance(task, RobotTask):
        place = Place(known.out or Path("runs") / task.name / "evaluate", quiet=known.quiet)
        noises = [ObservationNoise.parse(text) for text in (known.noise or "none").split(",")]
        options = {"steps": steps, "noises": noises, "video": known.video, "seed": known.seed}
        rollouts.run(task, known.checkpoint, place, **options)
        return 0
    if known.noise is not None or known.video:
        raise ConfigError(f"--noise and --video are for robot tasks, got {task.name}; drop them")
    place = Place(known.out) if known.out is not None else None
    print(commands.evaluate(task, known.checkpoint, steps, place, seed=known.seed))
    return 0


def run_analyze(known: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """`fmft analyze TASK`."""
    task = _find_free_task(known.task)
    place = Place(known.out or Path("runs") / task.name / "analysis", quiet=known.quiet)
    analyze.run(
        task,
        place,
        before=known.before,
        after=known.after,
        steps=known.steps,
        samples=known.samples,
        seed=known.seed,
    )
    return 0


def run_demo(known: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """`fmft demo`."""
    commands.check_overrides(overrides, [*SECTIONS, commands.OPTIONS])
    for table in (overrides, *(overrides.get(name, {}) for name in SECTIONS)):
        if "seed" in table:
            raise ConfigError(f"the demo takes several seeds; write --seeds {table['seed']}")
    place = demo.choose_place(known.out, known.resume, known.quiet)
    file = _file(known, place)
    header = {} if file is None else read_toml(file)
    known.task = _find_free_task(known.task or header.get("task", "toy-gmm")).name
    task, layers = _set_up(known, place, overrides)
    demo.run(
        task,
        place,
        seeds=known.seeds or tuple(header.get("seeds", (0, 1, 2))),
        workers=known.workers,
        pretrain=commands.make_config("pretrain", task, layers),
        finetune=commands.make_config("finetune", task, layers),
        steps=known.measure or tuple(header.get("measure", STEPS)),
    )
    return 0


def run_study(known: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """`fmft study [NAME]`."""
    if known.study is None:
        width = max(map(len, STUDIES))
        print("\n".join(f"{name:<{width}}  {s.question}" for name, s in STUDIES.items()))
        return 0
    study = find_study(known.study)
    for given in known.data:
        # The processes that measure inherit the environment.
        task, _, path = given.partition("=")
        if not path:
            raise ConfigError(f"data: expected TASK=PATH, got {given!r}; name task and path")
        os.environ[data_variable(task)] = path
    place = _place(known, f"studies/{study.name}{'-quick' if known.quick else ''}")
    run_cells(study, place, seeds=known.seeds, workers=known.workers, quick=known.quick)
    return 0


def run_demonstrate(known: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """`fmft demonstrate kitchen`."""
    made = make_demonstrations(
        known.out,
        known.episodes,
        seed=known.seed,
        workers=known.workers,
        progress=not known.quiet,
    )
    if not known.quiet:
        tasks = (f"{name} {own['done']} of {own['tried']}" for name, own in made["tasks"].items())
        print(f"{known.out}: {made['episodes']} episodes, {made['steps']} steps, scripted")
        print(f"done, failed attempts included: {', '.join(tasks)}")
        print(f"next: fmft pretrain {known.task} --data {known.out}")
    return 0


def run_info(known: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """`fmft info`."""
    print(json.dumps(package_info(), indent=1) if known.json else info_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
