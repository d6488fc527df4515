"""A checkpoint is complete or absent, is verified when read, and never costs an earlier one."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess

import pytest
import torch
from torch import nn

from fmft_fast.errors import CheckpointError
from fmft_fast.train.checkpoint import (
    FILES,
    SUMS,
    Checkpoint,
    CheckpointStore,
    describe_field,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)


def make(step=1, model=None):
    model = model or nn.Linear(3, 2)
    training = {"optimizer": {"state": {0: {"step": torch.tensor(4.0), "m": torch.ones(2)}}}}
    return Checkpoint(step, model.state_dict(), training, {"lr": 0.1}, {}, describe_field(model))


def test_nested_state_comes_back_with_types_dtypes_and_keys(tmp_path):
    training = {
        "numbers": {0: 1, 1: 2.5, "none": None, "inf": float("inf"), "flag": True},
        "tuple": (1, [2, "x"]),
        "tensors": [torch.arange(3, dtype=torch.uint8), torch.tensor(1.5, dtype=torch.float64)],
        "half": torch.ones(2, 3, dtype=torch.bfloat16).T,
        "empty": torch.empty(0, 2),
    }
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path / "c", Checkpoint(7, model.state_dict(), training, {"a": [1]}))
    back = load_checkpoint(tmp_path / "c")
    assert (back.step, back.config) == (7, {"a": [1]})
    assert back.training["numbers"] == training["numbers"]
    assert back.training["tuple"] == training["tuple"]
    for ours, theirs in zip(back.training["tensors"], training["tensors"], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert torch.equal(back.training["half"], training["half"])
    assert back.training["empty"].shape == (0, 2)
    assert all(torch.equal(back.model[k], v) for k, v in model.state_dict().items())


def test_tied_weights_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    save_checkpoint(tmp_path / "c", make(model=model))
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    load_weights(other, tmp_path / "c")
    assert torch.equal(other[1].weight, model[0].weight)


@pytest.mark.parametrize("name", [*FILES, SUMS])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_found_and_the_file_named(tmp_path, name, damage):
    folder = save_checkpoint(tmp_path / "c", make())
    data = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "truncated":
        (folder / name).write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        flipped = bytes([data[middle] ^ 1])
        (folder / name).write_bytes(data[:middle] + flipped + data[middle + 1 :])
    blamed = "" if name == SUMS else name
    with pytest.raises(CheckpointError, match=rf"{blamed}.*take another"):
        load_checkpoint(folder)


def test_checksums_are_those_of_sha256sum(tmp_path):
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("sha256sum is not installed")
    folder = save_checkpoint(tmp_path / "c", make())
    assert subprocess.run([tool, "-c", "--quiet", SUMS], cwd=folder).returncode == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 4), r"bias: expected float32 \[4\], got float32 \[2\]"),
        (nn.Linear(3, 2, bias=False), "bias: expected nothing, got float32"),
        (nn.Linear(3, 2).double(), "expected float64"),
        (nn.Sequential(nn.Linear(3, 2)), "0.bias: expected float32.*got nothing"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, other, message):
    save_checkpoint(tmp_path / "c", make())
    with pytest.raises(CheckpointError, match=f"belongs to another model.*{message}"):
        load_weights(other, tmp_path / "c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "state.json cannot be read"),
        (b"[]", "expected format fmft-checkpoint 1, got None"),
        (b'{"format": "fmft-checkpoint", "format_version": 99}', "checkpoint 1, got .* 99"),
        (b'{"format": "fmft-checkpoint", "format_version": 1}', "state.json lacks 'step'"),
    ],
)
def test_intact_files_of_another_format_are_refused(tmp_path, content, message):
    folder = save_checkpoint(tmp_path / "c", make())
    (folder / "state.json").write_bytes(content)
    sums = (folder / SUMS).read_text().splitlines()
    sums[-1] = f"{hashlib.sha256(content).hexdigest()}  state.json"
    (folder / SUMS).write_text("\n".join(sums) + "\n")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_a_checkpoint_of_weights_alone_can_be_loaded_and_refused(tmp_path):
    save_checkpoint(tmp_path / "c", Checkpoint(3, nn.Linear(3, 2).state_dict()))
    assert load_weights(nn.Linear(3, 2), tmp_path / "c").step == 3
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_weights(nn.Linear(3, 4), tmp_path / "c")


def test_path_without_checkpoint_is_explained(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; expected a folder with"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="absent does not exist"):
        load_checkpoint(tmp_path / "absent")


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours may catch it."""


@pytest.mark.parametrize("same_step", [False, True])
def test_a_save_killed_anywhere_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, same_step):
    """Die before each call that touches the disk in turn, until a save gets through."""
    calls = {name: getattr(os, name) for name in ("replace", "fsync", "open")}
    killed = 0
    for deadly in range(100):
        run = tmp_path / str(deadly)
        CheckpointStore(run / "checkpoints").save(make(1), best=True)
        count = [0]

        def mortal(name, count=count, deadly=deadly):
            def call(*arguments, **options):
                count[0] += 1
                if count[0] > deadly:
                    raise Killed
                return calls[name](*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, mortal(name))
            try:
                CheckpointStore(run / "checkpoints").save(make(1 if same_step else 2), best=True)
                survived = True
            except Killed:
                survived, killed = False, killed + 1
        assert load_checkpoint(run / "checkpoints" / "step-000001").step == 1
        store = CheckpointStore(run / "checkpoints")
        last = load_checkpoint(store.get("last")).step
        # The newest checkpoint was the best one when it was saved: nothing older may be it now.
        assert last in (1, 2) and load_checkpoint(store.get("best")).step >= last
        assert not list((run / "checkpoints").glob(".*"))
        if survived:
            break
    assert killed > 5


def test_full_disk_is_reported_and_costs_nothing(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(make(1))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left.*untouched"):
        store.save(make(2))
    assert store.steps() == [1]
    assert load_checkpoint(store.get("last")).step == 1


def test_newest_and_linked_checkpoints_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in range(1, 7):
        store.save(make(step), best=step == 2)
    assert store.steps() == [2, 5, 6]
    assert store.get("best").name == "step-000002"
    assert store.get("last").name == "step-000006"
    assert store.get("final") is None


def test_state_that_cannot_be_written_is_named(tmp_path):
    bad = Checkpoint(1, {}, {"loader": {"worker": object()}})
    with pytest.raises(CheckpointError, match="training.loader.worker: expected tensors.*object"):
        save_checkpoint(tmp_path / "c", bad)
    assert not (tmp_path / "c").exists()
