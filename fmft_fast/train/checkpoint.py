"""Checkpoints on disk: complete or absent, verified when read, never lost to an interrupted save.

A checkpoint is a folder of four files:

- `model.safetensors`: the weights to use (the averaged ones if the run averages)
- `training.safetensors`: what resuming needs besides: raw weights, optimiser, random states
- `state.json`: step, configuration, description of the field, versions, metrics
- `SHA256SUMS`: digests of the other three (`sha256sum -c SHA256SUMS` checks them, too)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fmft_fast.errors import CheckpointError
from fmft_fast.fields import Residual
from fmft_fast.version import __version__

FORMAT = "fmft-checkpoint"
FORMAT_VERSION = 1
FILES = ("model.safetensors", "training.safetensors", "state.json")
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run.

    Attributes:
        step: optimiser steps done.
        model: the weights to use, by name.
        training: nested state of everything that resuming needs (tensors and plain values).
        config: the run's configuration.
        metrics: the newest evaluation.
        architecture: class and tensors of the model, for readers.
    """

    step: int
    model: Mapping[str, Tensor]
    training: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)


def describe_field(model: nn.Module) -> dict[str, Any]:
    """Name a model's class, its tensors' dtypes and shapes, and the branches beside its field.

    A field whose attribute `recipe` gives plain values can be built again from them alone.
    """
    cls = type(model)
    name = f"{cls.__module__}.{cls.__qualname__}"
    return {
        "class": name,
        "tensors": _describe(model.state_dict()),
        "residuals": recipes(model),
        "recipe": getattr(innermost(model), "recipe", None),
    }


def innermost(model: nn.Module) -> nn.Module:
    """Give the field inside all residuals."""
    while isinstance(model, Residual):
        model = model.base
    return model


def recipes(model: nn.Module) -> list[dict[str, Any] | None]:
    """Give how the branches around a field were built, the innermost first."""
    found: list[dict[str, Any] | None] = []
    while isinstance(model, Residual):
        found.insert(0, model.recipe)
        model = model.base
    return found


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint so that `folder` is at every moment absent, the old one, or the new one.

    Everything is written and synced in a hidden folder beside it, which is then renamed.

    Raises:
        CheckpointError: the disk refused; an earlier checkpoint is untouched.
    """
    folder = Path(folder)
    draft = folder.with_name(f".draft-{folder.name}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write_checkpoint(draft, checkpoint)
        _swap_in(draft, folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"could not write {folder}: {error.strerror or error}; earlier checkpoints are "
            f"untouched; free some space or name another folder, then resume"
        ) from error
    return folder


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint (a checkpoint's folder or a run's folder).

    Raises:
        CheckpointError: it is missing, incomplete, corrupt, or of another format; says which file.
    """
    folder = resolve(path)
    _verify(folder)
    state = _read_state(folder / "state.json")
    tensors = _read_tensors(folder / "training.safetensors")
    model = _read_tensors(folder / "model.safetensors")
    try:
        return Checkpoint(
            step=state["step"],
            model=model,
            training=_unpack(state["training"], tensors),
            config=state["config"],
            metrics=state["metrics"],
            architecture=state["architecture"],
        )
    except KeyError as error:
        raise CheckpointError(
            f"{folder / 'state.json'} lacks {error}; take another checkpoint"
        ) from error


def load_weights(model: nn.Module, path: str | Path) -> Checkpoint:
    """Put a checkpoint's weights into `model`.

    Args:
        model: field of the same architecture; changed in place.
        path: a checkpoint's folder or a run's folder.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: as `load_checkpoint`, or the checkpoint belongs to another model.

    Example:
        >>> import tempfile
        >>> field = nn.Linear(2, 2)
        >>> made = Checkpoint(5, field.state_dict(), architecture=describe_field(field))
        >>> folder = save_checkpoint(Path(tempfile.mkdtemp()) / "step-5", made)
        >>> load_weights(nn.Linear(2, 2), folder).step
        5
    """
    checkpoint = load_checkpoint(path)
    check_field(model, checkpoint, path)
    model.load_state_dict(dict(checkpoint.model))
    return checkpoint


def check_field(model: nn.Module, checkpoint: Checkpoint, path: str | Path) -> None:
    """Refuse a checkpoint whose tensors are not those of `model`.

    The class may differ (it may have been renamed or wrapped), names, dtypes and shapes may not.
    """
    wanted, found = _describe(model.state_dict()), _describe(checkpoint.model)
    differences = [
        f"{name}: expected {_spell(wanted.get(name))}, got {_spell(found.get(name))}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        theirs, ours = checkpoint.architecture, describe_field(model)
        remedy = "build the field as it was when the checkpoint was written"
        if len(theirs.get("residuals", ())) > len(ours["residuals"]):
            remedy = "it holds a field with a residual: give its field to load_model"
        raise CheckpointError(
            f"{path} belongs to another model ({theirs.get('class', 'unnamed')}, here "
            f"{ours['class']}): {'; '.join(differences[:3])}{more}; {remedy}, or start from "
            f"another checkpoint"
        )


def resolve(path: str | Path) -> Path:
    """Find the checkpoint that `path` means: itself, or a run's `final` or `last` one."""
    path = Path(path)
    links = (path / "checkpoints" / name for name in ("final", "last"))
    # A kill between the two renames of a swap leaves the old checkpoint standing aside.
    candidates = [path, *links, _aside(path)]
    for candidate in candidates:
        if any((candidate / name).exists() for name in (*FILES, SUMS)):
            return candidate
    what = "holds no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{path} {what}; expected a folder with {', '.join(FILES)} or a run's folder with "
        f"checkpoints/last"
    )


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by name and wait until they are on the disk."""
    for name, data in contents.items():
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync(folder)


class CheckpointStore:
    """The checkpoints of one run: `step-NNNNNN` folders and the links `last`, `best`, `final`.

    Args:
        folder: where they lie; made when the first one is saved.
        keep_last: newest checkpoints kept besides those that a link names.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 2) -> None:
        self.folder = Path(folder)
        self.keep_last = keep_last
        self._mend()

    def save(self, checkpoint: Checkpoint, *, best: bool = False) -> Path:
        """Write a checkpoint, move the links, and drop what is no longer kept."""
        saved = save_checkpoint(self.folder / f"step-{checkpoint.step:06d}", checkpoint)
        # In this order: a run resumed from `last` relies on the best one that it remembers.
        for name in ("best", "last") if best else ("last",):
            self.link(name, checkpoint.step)
        self._drop_old()
        return saved

    def link(self, name: str, step: int) -> None:
        """Let the link `name` mean the checkpoint of `step`, atomically."""
        draft = self.folder / f".draft-{name}"
        draft.unlink(missing_ok=True)
        draft.symlink_to(f"step-{step:06d}")
        os.replace(draft, self.folder / name)
        _sync(self.folder)

    def get(self, name: str) -> Path | None:
        """Give the folder of `last`, `best` or `final`, or None where there is none yet."""
        path = self.folder / name
        return path.resolve() if path.is_dir() else None

    def steps(self) -> list[int]:
        """List the steps with a checkpoint, oldest first."""
        return sorted(
            int(path.name[5:])
            for path in self.folder.glob("step-*")
            if re.fullmatch(r"step-\d+", path.name)
        )

    def _drop_old(self) -> None:
        linked = {self.get(name) for name in ("last", "best", "final")}
        for step in self.steps()[: -self.keep_last]:
            path = self.folder / f"step-{step:06d}"
            if path.resolve() not in linked:
                shutil.rmtree(path)

    def _mend(self) -> None:
        """Bring back what a swap left aside when it was killed between its two renames."""
        for aside in self.folder.glob(".aside-*"):
            home = aside.with_name(aside.name.removeprefix(".aside-"))
            if home.exists():
                shutil.rmtree(aside)
            else:
                os.replace(aside, home)
        for draft in self.folder.glob(".draft-*"):
            if draft.is_symlink():
                draft.unlink()
            else:
                shutil.rmtree(draft)


def _describe(weights: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Give dtype and shape of each tensor."""
    return {
        name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
        for name, value in weights.items()
    }


def _spell(tensor: list[Any] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {tensor[1]}"


def _write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    tensors: dict[str, Tensor] = {}
    state = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "config": dict(checkpoint.config),
        "metrics": dict(checkpoint.metrics),
        "architecture": dict(checkpoint.architecture),
        "versions": versions(),
        "training": _pack(dict(checkpoint.training), "training", tensors),
    }
    model = {name: _plain(value) for name, value in checkpoint.model.items()}
    contents = {
        "model.safetensors": safetensors.torch.save(model, {"format": "pt"}),
        "training.safetensors": safetensors.torch.save(tensors),
        "state.json": json.dumps(state, indent=1).encode(),
    }
    sums = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items()]
    contents[SUMS] = "".join(sums).encode()
    write_files(folder, contents)


def _swap_in(draft: Path, folder: Path) -> None:
    """Rename `draft` to `folder`; a folder in its place stands aside until that is done."""
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    try:
        os.replace(draft, folder)
    except OSError:
        if aside.exists():
            os.replace(aside, folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".aside-{folder.name}")


def _sync(folder: Path) -> None:
    """Make the names in a folder durable, not only the contents of its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _verify(folder: Path) -> None:
    """Compare every file with its digest."""
    remedy = "take another checkpoint (see its folder) or write it again"
    missing = [name for name in (*FILES, SUMS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is incomplete: {', '.join(missing)} missing; {remedy}")
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in FILES:
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sums.get(name):
            raise CheckpointError(
                f"{folder / name} is corrupt: its SHA-256 is not the one in {SUMS}; {remedy}"
            )


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; take another one") from error
    found = state if isinstance(state, dict) else {}
    if found.get("format") != FORMAT or found.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format {FORMAT} {FORMAT_VERSION}, got {found.get('format')} "
            f"{found.get('format_version')}; read it with the version of fmft_fast that wrote it "
            f"({found.get('versions', {}).get('fmft_fast', 'unknown')})"
        )
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; take another one") from error


def _plain(value: Tensor) -> Tensor:
    # A clone of its own: tied weights share memory, which safetensors refuses.
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a nested state into JSON, its tensors moved to `tensors` under a path of names."""
    if isinstance(value, Tensor):
        tensors[name] = _plain(value)
        return {"$tensor": name}
    if isinstance(value, Mapping):
        pairs = [[k, _pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        # Pairs, since an optimiser's state has numbers as keys and JSON only knows text.
        return {"$dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"{name}: expected tensors, numbers, text, lists or dicts, got {type(value).__name__}; "
        f"give a plain state_dict()"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["$tuple"])
    return {k: _unpack(v, tensors) for k, v in value["$dict"]}


def versions() -> dict[str, str]:
    """Give the versions that a result depends on."""
    return {
        "fmft_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
