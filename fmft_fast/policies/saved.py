"""The folder of a saved policy: `config.json` and `model.safetensors`, which belong together.

The configuration names the SHA-256 of the weights and is put in place before them, so that a save
over an earlier one that is killed half-way is noticed by the next reader.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fmft_fast.errors import CheckpointError
from fmft_fast.train import Checkpoint, load_checkpoint
from fmft_fast.train.checkpoint import write_files

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT, FORMAT_VERSION = "fmft-policy", 1
DIGEST = "weights_sha256"


def write_policy(
    folder: Path, description: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Path:
    """Write a policy, in place of one that the folder may hold already.

    Args:
        folder: made if absent; other files in it are left alone.
        description: "policy", "residuals" and "dtype".
        weights: by name.

    Raises:
        CheckpointError: the disk refused; an earlier policy is untouched.
    """
    plain = {name: value.detach().cpu().clone() for name, value in weights.items()}
    data = safetensors.torch.save(plain, {"format": "pt"})
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **description,
        DIGEST: hashlib.sha256(data).hexdigest(),
    }
    files = {CONFIG: (json.dumps(content, indent=1) + "\n").encode(), WEIGHTS: data}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, {_draft(name): data for name, data in files.items()})
    except OSError as error:
        for name in files:
            (folder / _draft(name)).unlink(missing_ok=True)
        raise CheckpointError(
            f"could not write {folder}: {error.strerror or error}; what it held is untouched; free "
            f"some space or name another folder"
        ) from error
    for name in files:
        os.replace(folder / _draft(name), folder / name)
    return folder


def read_policy(path: str | Path) -> Checkpoint:
    """Read what `write_policy` wrote, or a training run's folder or checkpoint.

    Raises:
        CheckpointError: nothing is there, a file is missing or damaged, or they are of two
            different saves.
    """
    path = Path(path)
    return _read(path) if (path / CONFIG).exists() else load_checkpoint(path)


def _read(folder: Path) -> Checkpoint:
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if (content["format"], content["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"it is {content['format']!r} {content['format_version']!r}")
        recipe = {"policy": content["policy"]}
        architecture = {"recipe": recipe, "residuals": content["residuals"]}
        dtype = content["dtype"]
        if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r}")
        if not isinstance(content["residuals"], list):
            raise ValueError(f"residuals is {content['residuals']!r}")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: expected {FORMAT} {FORMAT_VERSION}, got something else ({error}); "
            f"save the policy again"
        ) from error
    try:
        data = (folder / WEIGHTS).read_bytes()
        weights = safetensors.torch.load(data)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} cannot be read: {error}; save the policy again"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if content.get(DIGEST, found) != found:  # folders of earlier versions name none
        raise CheckpointError(
            f"{folder / WEIGHTS} is not of the same save as {CONFIG}, which names another SHA-256 "
            f"(a save may have been interrupted); save the policy again"
        )
    return Checkpoint(0, weights, config={"dtype": dtype}, architecture=architecture)


def _draft(name: str) -> str:
    return f".draft-{name}"
