"""What studies of robot policies share: variants of fine-tuning, roll-outs and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fmft_fast.commands import make_config
from fmft_fast.envs import Interval, paired_difference, summarise
from fmft_fast.policies import FlowPolicy
from fmft_fast.report import markdown, settings_key
from fmft_fast.studies.base import Rows, Settings
from fmft_fast.studies.models import Models, Pretrained, finetune, in_ninths
from fmft_fast.tasks import find_task
from fmft_fast.tasks.robot import RobotTask
from fmft_fast.train import FinetuneConfig

# Steps of pre-training, in nine parts of which checkpoints are kept.
PRETRAIN_STEPS = {"pusht": 9000, "kitchen": 9000}
# Push-T's policies are pre-trained with uniform times, but for `FROM_EARLY`.
TIME_POWER = {"pusht": 1.0, "kitchen": 2.0}
LENGTH = "length"  # in units of the study's number of fine-tuning steps
LONGEST = 4
# What the variants have in common, whichever task it is.
COMMON = dict(RobotTask.finetune)
VARIANTS: dict[str, dict[str, Any]] = {
    "independent, FM at .05": {},
    "independent, FM at .05, twice as long": {LENGTH: 2},
    "independent, FM at .05, four times as long": {LENGTH: LONGEST},
    "early times favoured, then four times as long": {LENGTH: LONGEST},
    "independent": {"fm_weight": 0.0},
    "inversion": {"coupling": "inversion", "coupling_options": {"steps": 8}, "fm_weight": 0.0},
    "reflow": {"coupling": "reflow", "fm_weight": 0.0},
    "condition-aware OT": {"coupling": "ot-fixed", "fm_weight": 0.0},
    "independent, FM at .1": {"fm_weight": 0.1},
    "independent, FM at 1": {"fm_weight": 1.0},
    "reflow, N = 1 and 4": {"coupling": "reflow", "fm_weight": 0.0, "solver_steps": (1, 4)},
    "reflow, picked by roll-outs": {
        "coupling": "reflow",
        "fm_weight": 0.0,
        "select": "best",
        "metric": "failure",
    },
    "residual MLP": {"mode": "residual-mlp", "residual_options": {"hidden": [256, 256]}},
    "residual GAV": {"mode": "residual"},
    "joint with GAV": {"mode": "residual", "joint": True},
}
BEFORE = "pre-trained"
# As long as the longest fine-tuning and the pre-training before it.
LONGER = "pre-trained, as long in all"
EARLY = "pre-trained, early times favoured"
NOT_TUNED = (BEFORE, LONGER, EARLY)
# Pre-trained favouring early times, as the task is by default.
FROM_EARLY = (EARLY, "early times favoured, then four times as long")
WATCHED = {"watch_starts": 25, "watch_steps": (1,)}


def robot(name: str, **options: Any) -> RobotTask:
    """Give a robot task that rolls out in this process."""
    task = find_task(name).configured({"workers": 0, **options})
    assert isinstance(task, RobotTask)
    return task


def base_of(settings: Settings) -> Pretrained:
    """Name the policy that a cell starts from."""
    early = settings.get("variant") in FROM_EARLY
    power = 2.0 if early else TIME_POWER[settings["task"]]
    steps = settings["pretrain_steps"]
    if settings.get("variant") == LONGER:
        steps += LONGEST * settings["finetune_steps"]
    return in_ninths(settings["task"], settings["seed"], steps, time_power=power)


def tuned(settings: Settings, models: Models, variant: str) -> FlowPolicy:
    """Give the policy of a variant, fine-tuned from the pre-trained one unless it was before.

    Args:
        settings: of a cell; `task`, `seed`, `pretrain_steps` and `finetune_steps` are read.
        models: the pre-trained policies; fine-tuned ones are kept beside them.
        variant: a name in `VARIANTS` or `NOT_TUNED`.
    """
    field = models.load(base_of(settings))
    if variant in NOT_TUNED:
        return FlowPolicy.of(field)
    changed = dict(VARIANTS[variant])
    steps = settings["finetune_steps"] * changed.pop(LENGTH, 1)
    own = {"seed": settings["seed"], "steps": steps, "eval_every": max(1, steps // 4)}
    keys = {**COMMON, **own, **changed}
    config = make_config("finetune", find_task(settings["task"]), [keys]).to_dict()
    kept = models.folder / settings_key({"base": base_of(settings).name, **config})
    if not kept.exists():
        watch = None
        if changed.get("metric") == "failure":
            watch = robot(settings["task"], **WATCHED).watch(FinetuneConfig())
        policy = FlowPolicy.of(finetune(settings["task"], field, keys, evaluate=watch).model)
        draft = kept.with_name(f".draft-{kept.name}")
        policy.save_pretrained(draft).replace(kept)
    return FlowPolicy.from_pretrained(kept)


def roll_outs(
    settings: Settings, model: nn.Module, *, steps: Sequence[int], **more: Any
) -> dict[str, Any]:
    """Roll a policy out; give its measures as a table of columns, which is short in JSON."""
    task = robot(settings["task"])
    rows = task.roll_out(model, steps, starts=settings["starts"], **more)
    names = [name for name in rows[0] if name not in ("noise_seed", "length")]
    return {name: [_short(row[name]) for row in rows] for name in names}


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def unpacked(rows: Rows, *settings: str) -> list[dict[str, Any]]:
    """Give a row per roll-out, each with these settings of its cell."""
    found = []
    for row in rows:
        columns = row["roll_outs"]
        for values in zip(*columns.values(), strict=True):
            episode = dict(zip(columns, values, strict=True))
            found.append({name: row[name] for name in settings} | episode)
    return found


def score_table(
    rows: Rows, measure: str, by: str, heading: str, *, against: Mapping[str, Any] | None = None
) -> str:
    """Lay out means over starts and seeds, a line per value of `by`, a column per N.

    Args:
        rows: of `unpacked`, with `by` and `seed` among them.
        measure: which measure of the simulator.
        by: setting that tells the lines apart.
        heading: of the first column.
        against: {column's heading: (value of `by`, its N)}: adds the difference of each line at its
            smallest N from that, on the same starts.
    """
    found = summarise(rows, by=(by, "steps"), measures=(measure,))
    values = list(dict.fromkeys(key for key, _ in found))
    steps = sorted({n for _, n in found})
    header = [heading, "seeds", *(f"N = {n}" for n in steps), *(against or {})]
    lines = [header]
    for value in values:
        seeds = {row["seed"] for row in rows if row[by] == value}
        line = [str(value), str(len(seeds)), *(str(found[value, n][measure]) for n in steps)]
        own = _of(rows, by, value, steps[0])
        for other, n in (against or {}).values():
            line.append(
                signed(paired_difference(own, _of(rows, by, other, n), (measure,))[measure])
            )
        lines.append(line)
    return markdown(lines)


def signed(found: Interval) -> str:
    """Show a difference with its interval."""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _of(rows: Rows, by: str, value: Any, n: int) -> list[Mapping[str, Any]]:
    return [row for row in rows if row[by] == value and row["steps"] == n]
