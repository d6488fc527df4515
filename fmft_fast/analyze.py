"""`fmft analyze`: errors and what theory allows, and stiffness, before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.analysis import ErrorBound, Stiffness, error_bound, exact_path, stiffness
from fmft_fast.commands import Place, load_field, on_cpu
from fmft_fast.errors import MissingDependencyError
from fmft_fast.flow import integrate, sample
from fmft_fast.report import write_json
from fmft_fast.tasks import Task
from fmft_fast.train.checkpoint import resolve, versions

# Small states are cheap: many samples, and many points between two trajectories.
SMALL_DIM = 16
SMALL = {"samples": 512, "segment": 9, "steps": 100}
LARGE = {"samples": 16, "segment": 3, "steps": 25}
PATH_STEPS = 1000
MAP_EXTENT, MAP_POINTS, MAP_STEPS = 3.0, 101, 10
GROWTH = "integral of the one-sided constant"


@dataclass(frozen=True)
class Reference:
    """The field taken for exact, and what has to be said about it."""

    field: nn.Module
    text: str


def run(
    task: Task,
    place: Place,
    *,
    before: str | Path,
    after: str | Path,
    steps: Sequence[int],
    samples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure two checkpoints of a task; write analysis.json and the figures.

    Args:
        task: one with `mixture` has an exact reference; for others the model before fine-tuning,
            accurately solved, takes its place.
        place: folder to write to.
        before: pre-trained run or checkpoint.
        after: fine-tuned run or checkpoint.
        steps: numbers of Euler steps.
        samples: noise samples; by default 512 for small states, 16 for large ones.
        seed: of the noise.

    Raises:
        CheckpointError: a checkpoint cannot be read or is another task's.
    """
    fields, settings = {}, {}
    for name, path in (("before", before), ("after", after)):
        field, checkpoint = load_field(task, path)
        fields[name], settings[name] = on_cpu(field), checkpoint.config
    state = task.make_data(0).heldout.shape[1:]
    size = SMALL if state.numel() <= SMALL_DIM else LARGE
    random = torch.Generator().manual_seed(seed)
    x0 = torch.randn(samples or size["samples"], *state, generator=random)
    reference = find_reference(task, fields["before"], settings["before"])
    place.say(reference.text)

    path = exact_path(reference.field, x0, PATH_STEPS)
    found: dict[str, dict[int, ErrorBound]] = {name: {} for name in fields}
    for name, field in fields.items():
        for n in steps:
            given = path if PATH_STEPS % n == 0 else None
            found[name][n] = error_bound(
                field, reference.field, x0, n, path=given, segment=size["segment"]
            )
            place.say(f"\n{name} fine-tuning, {found[name][n]}")
    slopes = {name: stiffness(f, x0, steps=size["steps"]) for name, f in fields.items()}
    if reference.field is not fields["before"]:
        slopes["exact"] = stiffness(reference.field, x0, steps=size["steps"])
    for name, measured in slopes.items():
        place.say(f"\n{name}, along its own trajectories\n{measured}")

    content = {
        "command": "analyze",
        "task": task.name,
        "checkpoints": {"before": str(resolve(before)), "after": str(resolve(after))},
        "reference": reference.text,
        "seed": seed,
        "bounds": {
            name: {str(n): bound.to_dict() for n, bound in by_steps.items()}
            for name, by_steps in found.items()
        },
        "stiffness": {name: measured.to_dict() for name, measured in slopes.items()},
        "versions": versions(),
    }
    place.say(f"\nnumbers: {write_json(place.out / 'analysis.json', content)}")
    maps = make_maps(fields, reference.field, steps) if state == (2,) else None
    _draw(place, found, slopes, maps)
    return content


def find_reference(task: Task, before: nn.Module, settings: Mapping[str, Any]) -> Reference:
    """Give the exact field where it is known, else the model before fine-tuning."""
    mixture = getattr(task, "mixture", None)
    if mixture is None:
        return Reference(
            before,
            "reference: the model before fine-tuning, solved accurately, since the exact field of "
            "this task is not known; so delta of that model is 0, and its error is that of the "
            "steps alone",
        )
    text = "reference: the exact velocity of the data's mixture, for independent pairs"
    coupling = settings.get("coupling", "independent")
    if coupling != "independent":
        text += (
            f"; the model was pre-trained with {coupling!r} pairs, whose field is another one with "
            "the same ends, so that delta measures this difference as well"
        )
    return Reference(mixture, text)


def make_maps(
    fields: Mapping[str, nn.Module], reference: nn.Module, steps: Sequence[int]
) -> dict[str, dict[str, Tensor]]:
    """Give error, stiffness and growth over a grid of noise in the plane, [g, g] each."""
    line = torch.linspace(-MAP_EXTENT, MAP_EXTENT, MAP_POINTS)
    x0 = torch.cartesian_prod(line, line).flip(1)
    n = min(steps, key=lambda n: abs(n - MAP_STEPS))
    exact = integrate(reference, x0, steps=100, method="rk4")
    maps = {}
    for name, field in fields.items():
        measured = stiffness(field, x0, steps=40)
        numbers = {
            f"error at N = {n}": (sample(field, x0, steps=n) - exact).norm(dim=1),
            "largest Lipschitz constant": measured.peak,
            GROWTH: measured.growth,
        }
        maps[name] = {k: v.view(MAP_POINTS, MAP_POINTS) for k, v in numbers.items()}
    return maps


def _draw(
    place: Place,
    found: Mapping[str, Mapping[int, ErrorBound]],
    slopes: Mapping[str, Stiffness],
    maps: Mapping[str, Mapping[str, Tensor]] | None,
) -> None:
    """Draw the figures; without matplotlib say so, since the numbers are safe already."""
    from fmft_fast.analysis import error_plots

    try:
        files = [
            error_plots.bounds_against_steps(found, place.out / "bounds.png"),
            error_plots.decomposition(found, place.out / "decomposition.png"),
            error_plots.slopes_against_time(slopes, place.out / "slopes.png"),
        ]
        if maps is not None:
            file = place.out / "maps.png"
            files.append(error_plots.noise_maps(maps, MAP_EXTENT, file, signed=(GROWTH,)))
    except MissingDependencyError as error:
        place.say(f"no figures: {error}")
        return
    place.say(f"figures: {', '.join(str(file) for file in files)}")
