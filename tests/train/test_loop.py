"""`fit` repeats itself, resumes bit for bit, stops well, and says what went wrong."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch
from torch import nn

from fmft_fast.errors import CheckpointError, ConfigError, MissingDependencyError, NonFiniteError
from fmft_fast.train import FitConfig, LoaderBatches, fit, load_checkpoint, read_metrics
from fmft_fast.train.checkpoint import save_checkpoint
from fmft_fast.train.logging import progress_bar
from fmft_fast.train.optim import lr_factor
from fmft_fast.train.progress import load_random_state


def weights(result_or_path):
    if isinstance(result_or_path, (str, Path)):
        return load_checkpoint(result_or_path).model
    return result_or_path.model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def with_changes(**changes):
    return dataclasses.replace(tiny_run.CONFIG, **changes)


def test_learns_and_repeats_bit_for_bit_and_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = tiny_run.train()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(weights(first), weights(tiny_run.train()))
    assert first.history[-1]["heldout"] < 0.5 * first.history[0]["heldout"]
    assert not same(weights(first), weights(tiny_run.train(config=with_changes(seed=1))))


def test_writing_checkpoints_changes_nothing(tmp_path):
    assert same(weights(tiny_run.train()), weights(tiny_run.train(tmp_path)))


def test_killed_with_sigkill_and_resumed_ends_in_the_same_weights(tmp_path):
    whole = tiny_run.train(tmp_path / "whole")
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, tiny_run.__file__, str(out), "0.05"], env=environment)
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "step-000021").exists() and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 0 < load_checkpoint(out).step < tiny_run.CONFIG.steps
    resumed = tiny_run.train(out, resume=True)
    assert resumed.step == tiny_run.CONFIG.steps
    assert same(weights(whole), weights(resumed))
    assert same(weights(tmp_path / "whole"), weights(out))
    assert list(whole.history) == list(resumed.history)
    logged = [
        [(r["kind"], r["step"]) for r in read_metrics(p / "metrics.jsonl")]
        for p in (tmp_path / "whole", out)
    ]
    assert logged[0] == logged[1]


def test_ctrl_c_ends_the_step_saves_and_says_how_to_resume(tmp_path):
    def interrupted(model, batch, random):
        if model.training and len(steps) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(1)
        return tiny_run.loss(model, batch, random)

    steps: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="step 13, saved in .*resume with --resume"):
        tiny_run.train(tmp_path, loss=interrupted)
    assert signal.getsignal(signal.SIGINT) is handler
    assert load_checkpoint(tmp_path).step == 13
    assert same(weights(tiny_run.train()), weights(tiny_run.train(tmp_path, resume=True)))


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_non_finite_numbers_name_the_step_and_keep_the_last_good_checkpoint(tmp_path, what):
    count = [0]

    def broken(model, batch, random):
        count[0] += 1
        value = tiny_run.loss(model, batch, random)
        if count[0] == 16 and what == "loss":
            return value * float("nan")
        # The square root of zero has an infinite slope though its value is fine.
        return value + (0 * model[0].weight.sum()).sqrt() if count[0] == 16 else value

    with pytest.raises(
        NonFiniteError, match=rf"{what} became NaN.* step 16;.*\(step 14\).*lower lr"
    ):
        tiny_run.train(tmp_path, loss=broken)
    kept = load_checkpoint(tmp_path)
    assert kept.step == 14
    assert all(value.isfinite().all() for value in kept.model.values())


def test_best_model_is_selected_and_patience_stops_early(tmp_path):
    values = iter([5.0, 3.0, 4.0, 4.5, 6.0, 7.0, 8.0])
    seen = {}

    def evaluate(model):
        value = next(values)
        seen[value] = {k: v.clone() for k, v in model.state_dict().items()}
        return {"score": value}

    config = with_changes(metric="score", select="best", patience=3)
    result = tiny_run.train(tmp_path, config=config, evaluate=evaluate)
    assert (result.reason, result.step, result.selected_step) == ("early stop", 40, 10)
    assert same(weights(result), seen[3.0])
    assert same(weights(tmp_path), seen[3.0])
    assert result.metrics["score"] == 3.0


def test_best_model_is_selected_without_a_folder_too():
    values = iter([5.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0])
    model = tiny_run.make_model()
    result = tiny_run.train(
        model=model,
        config=with_changes(metric="score", select="best"),
        evaluate=lambda m: {"score": next(values)},
    )
    assert result.selected_step == 0
    assert same(weights(result), tiny_run.make_model().state_dict())


def test_metric_that_is_not_evaluated_is_refused_by_name():
    with pytest.raises(ConfigError, match="metric: expected one of heldout, got 'fid'"):
        tiny_run.train(config=with_changes(metric="fid", select="best"))


def test_a_run_is_never_overwritten_and_resumes_only_under_its_own_configuration(tmp_path):
    tiny_run.train(tmp_path, config=with_changes(steps=20))
    with pytest.raises(CheckpointError, match=r"already holds a run \(step 20\).*--resume"):
        tiny_run.train(tmp_path)
    with pytest.raises(CheckpointError, match="lr was 0.01, now 0.02"):
        tiny_run.train(tmp_path, resume=True, config=with_changes(lr=0.02))
    assert tiny_run.train(tmp_path, resume=True, config=with_changes(steps=30)).step == 30


def test_a_key_that_the_checkpoint_is_too_old_to_name_had_its_default(tmp_path):
    tiny_run.train(tmp_path, config=with_changes(steps=20))
    last = (tmp_path / "checkpoints/last").resolve()
    saved = load_checkpoint(last)
    old = {name: value for name, value in saved.config.items() if name != "weight_decay"}
    save_checkpoint(last, dataclasses.replace(saved, config=old))
    with pytest.raises(CheckpointError, match="weight_decay was 0.0, now 0.5"):
        tiny_run.train(tmp_path, resume=True, config=with_changes(weight_decay=0.5))
    assert tiny_run.train(tmp_path, resume=True, config=with_changes(steps=30)).step == 30


def test_resuming_an_empty_folder_begins_anew(tmp_path):
    assert same(weights(tiny_run.train(tmp_path, resume=True)), weights(tiny_run.train()))


def test_metrics_are_written_as_json_lines(tmp_path):
    tiny_run.train(tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(5, 61, 5))
    assert [r["step"] for r in records if r["kind"] == "eval"] == list(range(0, 61, 10))
    assert all(r["loss"] > 0 and r["lr"] >= 0 for r in records if r["kind"] == "train")


def test_learning_rate_warms_up_and_decays():
    config = FitConfig(steps=100, warmup=10)
    assert [lr_factor(s, config) for s in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert lr_factor(55, config) == pytest.approx(0.5)
    assert lr_factor(100, config) == pytest.approx(0.0)
    constant = FitConfig(steps=100, schedule="constant")
    assert {lr_factor(s, constant) for s in range(101)} == {1.0}


def test_gradients_are_clipped_to_the_configured_norm():
    model = tiny_run.make_model()

    def steep(model, batch, random):
        return 1e6 * tiny_run.loss(model, batch, random)

    tiny_run.train(model=model, loss=steep, config=with_changes(grad_clip=1e-3))
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(norm) == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("final_decay", [0.25, 0.999])
def test_averaged_weights_forget_the_start_and_then_follow_the_final_decay(tmp_path, final_decay):
    raw = []

    def spy(model, batch, random):
        raw.append(model.weight.detach().clone())
        return (model(batch[0]) - 1).square().mean()

    line = nn.Linear(1, 1, bias=False)
    source = LoaderBatches([torch.ones(4, 1)], seed=0)
    config = FitConfig(steps=6, lr=0.1, ema_decay=final_decay, device="cpu")
    fit(line, source, spy, config=config, out=tmp_path, progress=False)
    raw.append(load_checkpoint(tmp_path).training["raw"]["weight"])
    mean = raw[1]
    for weight, growing in zip(raw[2:], (2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15), strict=True):
        mean = torch.lerp(weight, mean, min(final_decay, growing))
    assert torch.allclose(line.weight, mean, rtol=1e-6)
    assert not torch.equal(mean, raw[-1])


def test_model_without_trainable_parameters_is_refused():
    model = tiny_run.make_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="set requires_grad"):
        tiny_run.train(model=model)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99x"])
def test_unknown_device_is_refused(name):
    with pytest.raises(ConfigError, match="device: expected auto, cpu"):
        tiny_run.train(config=with_changes(device=name))


def test_random_streams_of_another_device_are_refused():
    with pytest.raises(CheckpointError, match="resume with device = cuda"):
        load_random_state(torch.Generator(), {"device": "cuda"})


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_where_it_stopped(tmp_path):
    config = with_changes(device="cuda", schedule="constant")
    whole = tiny_run.train(config=config)
    tiny_run.train(tmp_path, config=dataclasses.replace(config, steps=30))
    resumed = tiny_run.train(tmp_path, config=config, resume=True)
    for name, value in weights(whole).items():
        assert value.is_cuda
        torch.testing.assert_close(weights(resumed)[name], value)


def test_a_bar_in_a_file_is_a_few_lines(capsys):
    with progress_bar(20, "work", show=True) as bar:
        for _ in range(20):
            time.sleep(0.06)
            bar.update()
    pictures = [part for part in re.split(r"[\r\n]+", capsys.readouterr().err) if part.strip()]
    assert [picture.split("%")[0].split()[-1] for picture in pictures] == ["0", "100"]


def test_absent_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"fmft-fast\[tensorboard\]"):
        tiny_run.train(tmp_path, config=with_changes(tensorboard=True))


def test_tensorboard_files_hold_what_the_log_holds(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    tiny_run.train(tmp_path, config=with_changes(tensorboard=True))
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    records = read_metrics(tmp_path / "metrics.jsonl")
    for kind, name in (("train", "loss"), ("train", "lr"), ("eval", "heldout")):
        logged = [(r["step"], r[name]) for r in records if r["kind"] == kind]
        written = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
        assert written == [(step, pytest.approx(value)) for step, value in logged]
