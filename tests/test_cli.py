"""`fmft` does what its help says, explains mistakes in one line, and leaves files to build on."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_task
import torch
from tiny_task import ShiftedTask, TinyTask

from fmft_fast import cli, commands, demo
from fmft_fast.fields import MLP
from fmft_fast.tasks import TASKS, register
from fmft_fast.train import load_checkpoint, load_weights, read_metrics
from fmft_fast.train.checkpoint import save_checkpoint
from fmft_fast.train.config import read_toml
from fmft_fast.workers import run_jobs

TINY = ["--steps", "20", "--batch_size", "32", "--eval_every", "10", "--device", "cpu"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """Register the task, and work in a folder of its own."""
    task = register(TinyTask())
    monkeypatch.chdir(tmp_path)
    yield task
    del TASKS["tiny"]


def fmft(*words):
    return cli.main([str(word) for word in words])


def test_pretrain_finetune_evaluate_follow_each_other(capsys):
    assert fmft("pretrain", "tiny", *TINY, "--measure", "1,2") == 0
    out = capsys.readouterr().out
    assert "| off_mode_share" in out and "N = 2" in out and "real data" in out
    assert "next: fmft finetune tiny --from runs/tiny/pretrain" in out
    assert fmft("finetune", "tiny", *TINY, "--measure=1,2") == 0
    results = json.loads(Path("runs/tiny/finetune/results.json").read_text())
    assert set(results["results"]) == {"before", "after"}
    assert set(results["results"]["after"]) == {"1", "2"}
    given = json.loads(Path("runs/tiny/finetune/figures/given.json").read_text())
    assert given == [["after", "before"], ["fine-tuning", "pre-training"]]
    assert (
        fmft(
            "evaluate",
            "tiny",
            "--checkpoint",
            "runs/tiny/finetune",
            "--steps",
            "1,2",
            "--out",
            "eval",
        )
        == 0
    )
    again = json.loads(Path("eval/results.json").read_text())
    assert again["results"]["model"] == results["results"]["after"]


def test_the_saved_configuration_repeats_the_run(capsys):
    fmft("pretrain", "tiny", *TINY, "--seed", "3", "--quiet", "--measure", "1")
    assert (
        fmft(
            "pretrain",
            "tiny",
            "--config",
            "runs/tiny/pretrain/config.toml",
            "--out",
            "again",
            "--quiet",
            "--measure",
            "1",
        )
        == 0
    )
    fields = [MLP(1, hidden=(8,)) for _ in range(2)]
    for field, run in zip(fields, ("runs/tiny/pretrain", "again"), strict=True):
        load_weights(field, run)
    assert torch.equal(*(torch.cat([p.flatten() for p in f.parameters()]) for f in fields))
    assert read_toml("again/config.toml")["pretrain"]["seed"] == 3
    assert capsys.readouterr().out == ""


def test_overrides_lie_over_the_file_which_lies_over_the_task(tiny):
    Path("c.toml").write_text(
        'lr = 0.5\nseed = 4\n[finetune]\nlr = 0.25\ncoupling = "inversion"\n[pretrain]\nsteps = 9\n'
    )
    file = commands.read_run_file(Path("c.toml"), tiny)
    made = commands.make_config("finetune", tiny, [file, {"batch_size": 7}])
    assert (made.lr, made.seed, made.batch_size, made.solver_steps) == (0.25, 4, 7, (2,))
    assert made.coupling_options == {}, "options of the task's coupling do not fit another one"
    made = commands.make_config("pretrain", tiny, [file, {"pretrain": {"lr": 1.0}}])
    assert (made.lr, made.steps) == (1.0, 9)


def test_options_of_a_file_are_not_dropped_without_a_word(tiny, capsys):
    Path("c.toml").write_text(
        '[finetune]\nmode = "residual"\ncoupling = "inversion"\n'
        "[finetune.residual_options]\nwidth = 4\n[finetune.coupling_options]\nsteps = 3\n"
    )
    words = ("finetune", "tiny", "--config", "c.toml", "--from", "gone")
    assert fmft(*words, "--lr", "1") == 2
    assert "ConfigWarning" not in capsys.readouterr().err
    assert fmft(*words, "--mode", "residual-mlp", "--coupling", "ot-fixed") == 2
    said = capsys.readouterr().err
    assert (
        "residual_options {'width': 4} of the file are dropped, since mode = residual-mlp" in said
    )
    assert "coupling_options {'steps': 3} of the file are dropped, since coupling" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "tinny"], "unknown task 'tinny'; choose one of"),
        (["pretrain", "tiny", "--stepz", "3"], "got 'stepz'; did you mean 'steps'"),
        (["pretrain", "tiny", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["pretrain", "tiny", "--finetune.lr", "3"], "got 'finetune'; known"),
        (["pretrain", "tiny", "--config", "no.toml"], "cannot read the configuration no.toml"),
        (["pretrain", "tiny", "--coupling", "best"], "unknown coupling 'best'"),
        (["pretrain", "tiny", "--coupling_options.foo", "1"], "no option 'foo'"),
        (["finetune", "tiny"], "runs/tiny/pretrain does not exist"),
        (["evaluate", "tiny", "--checkpoint", "gone"], "gone does not exist"),
        (["evaluate", "tiny", "--checkpoint", "gone", "--lr", "1"], "takes no setting lr"),
        (["demo", "--task", "tiny", "--seed", "1"], "write --seeds 1"),
        (["demo", "--task", "tiny", "--pretrain.seed", "1"], "write --seeds 1"),
        (["demo", "--task", "tinny"], "unknown task 'tinny'"),
    ],
)
def test_mistakes_are_explained_in_one_line_with_exit_code_2(capsys, words, message):
    assert fmft(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.startswith(f"fmft {words[0]}: ")


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--seeds", "1,1"],
        ["demo", "--seeds=-1"],
        ["pretrain", "tiny", "--measure", "0"],
        ["evaluate", "tiny", "--checkpoint", "x", "--steps", "2,0"],
    ],
)
def test_numbers_that_cannot_be_served_are_refused_before_any_work(capsys, words):
    with pytest.raises(SystemExit) as ended:
        fmft(*words)
    assert ended.value.code == 2
    assert "expected different numbers from" in capsys.readouterr().err


def test_models_of_double_precision_go_through_all_commands():
    for command in ("pretrain", "finetune"):
        assert fmft(command, "tiny", *TINY, "--dtype", "float64", "--quiet", "--measure", "1") == 0
    assert fmft("finetune", "tiny", *TINY, "--out", "single", "--quiet", "--measure", "1") == 0
    runs = ("runs/tiny/pretrain", "runs/tiny/finetune", "single")
    for run in runs:
        assert fmft("evaluate", "tiny", "--checkpoint", run, "--steps", "1") == 0


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="did you mean 'steps'"):
        fmft("pretrain", "tiny", "--stepz", "3", "--debug")


def test_faults_of_ours_have_exit_code_1_and_ask_for_a_report(capsys, monkeypatch):
    monkeypatch.setattr(TinyTask, "make_data", lambda self, seed, field=None: 1 / 0)
    assert fmft("pretrain", "tiny") == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_run_is_resumed_and_never_overwritten(capsys):
    short = ["--steps", "10", "--eval_every", "5", "--schedule", "constant", "--quiet"]
    more = ["--steps", "20", "--measure", "1", "--quiet"]
    assert fmft("pretrain", "tiny", *short, "--out", "a", "--measure", "1") == 0
    assert fmft("pretrain", "tiny", *short, "--out", "a") == 2
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err
    before = Path("a/config.toml").read_text()
    assert fmft("pretrain", "tiny", "--resume", "--out", "a", "--lr", "9", *more) == 2
    assert "lr was 0.005, now 9.0" in capsys.readouterr().err
    assert Path("a/config.toml").read_text() == before
    assert fmft("pretrain", "tiny", "--resume", "--out", "a", *more) == 0
    assert read_metrics("a/metrics.jsonl")[-1]["step"] == 20


def test_a_run_that_failed_before_its_first_checkpoint_is_begun_anew(capsys):
    short = ["--steps", "10", "--eval_every", "5", "--measure", "1", "--quiet", "--out", "b"]
    assert fmft("pretrain", "tiny", *short, "--metric", "score", "--select", "best") == 2
    assert "got 'score'" in capsys.readouterr().err
    assert fmft("pretrain", "tiny", *short) == 0
    assert "score" not in Path("b/config.toml").read_text()


def test_a_run_older_than_a_key_goes_on_with_the_default_of_the_key():
    words = ["pretrain", "tiny", "--out", "a", "--measure", "1", "--quiet", "--steps"]
    assert fmft(*words, "10", "--lr", "0.001") == 0  # the package's; the task's own is 0.005
    file = Path("a/config.toml")
    file.write_text(file.read_text().replace("lr = 0.001\n", ""))
    last = Path("a/checkpoints/last").resolve()
    saved = load_checkpoint(last)
    old = {name: value for name, value in saved.config.items() if name != "lr"}
    save_checkpoint(last, dataclasses.replace(saved, config=old))
    assert fmft(*words, "20", "--resume") == 0
    assert "\nlr = 0.001\n" in file.read_text()


def test_warnings_are_one_line(capsys):
    fmft("pretrain", "tiny", *TINY, "--quiet", "--measure", "1")
    fmft("finetune", "tiny", *TINY, "--quiet", "--coupling", "independent", "--measure", "1")
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines and lines[0].startswith("warning (CouplingWarning): independent pairs pull")


def test_help_version_and_info(capsys):
    assert fmft() == 2
    for words in (["--version"], ["pretrain", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as ended:
            fmft(*words)
        assert ended.value.code == 0
    assert fmft("info") == 0
    text = capsys.readouterr().out
    assert "paired:independent,ot-minibatch,ot-fixed" in "".join(text.split())
    assert "(default none)" in text and "(default None)" not in text
    assert "--finetune.solver_steps" in text and "torch" in text and "reference" in text


@pytest.mark.parametrize("module", ["fmft_fast", "fmft_fast.cli"])
def test_the_command_line_runs_as_a_module(module):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", module, "evaluate", "no-task", "--checkpoint", "x"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "unknown task 'no-task'" in ended.stderr


def test_demo_with_more_workers_than_seeds_waits_for_the_pretrained_model():
    words = ["--pretrain.steps", "8", "--finetune.steps", "8", "--seeds", "4", "--workers", "3"]
    child = start_demo(*words)
    _, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert json.loads(Path("d/results.json").read_text())["seeds"] == [4]
    assert error.count("demo:") < 4, "a bar in a file is a few lines"


@pytest.mark.parametrize("dashed", ["--batch-size=8", "--pretrain.batch-size=8"])
def test_dashes_and_sections_in_keys(dashed):
    assert fmft("pretrain", "tiny", *TINY, dashed, "--quiet", "--measure", "1") == 0
    assert read_toml("runs/tiny/pretrain/config.toml")["pretrain"]["batch_size"] == 8


def test_targets_compare_few_steps_after_with_many_before():
    def measured(share, distance):
        names = {"off_mode_share": share, "energy_distance": distance, "sliced_w2": distance}
        return {n: dict(names) for n in (2, 10, 100)}

    reached = [t.reached for t in demo.targets(measured(0.2, 1.0), measured(0.1, 1.0))]
    assert reached == [True] * 6
    missed = [t.reached for t in demo.targets(measured(0.2, 1.0), measured(0.2, 1.1))]
    assert missed == [False] * 6
    assert demo.targets({1: {"other": 1.0}}, {1: {"other": 1.0}}) == []


def test_demo_folders_are_never_reused_unless_resumed():
    assert demo.choose_place(None, False, True).out == Path("runs/demo")
    for name in ("demo", "demo-2"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.toml").write_text("")
    assert demo.choose_place(None, False, True).out == Path("runs/demo-3")
    assert demo.choose_place(None, True, True).out == Path("runs/demo-2")
    assert demo.choose_place(Path("runs/demo"), True, True).out == Path("runs/demo")
    with pytest.raises(Exception, match="already holds a demo; add --resume"):
        demo.choose_place(Path("runs/demo"), False, True)


def test_demo_keeps_the_options_of_its_task(monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "shifted", ShiftedTask())

    def run_here(jobs, workers, tick=None):
        """Work in this process, with what another one would get."""
        return run_jobs(pickle.loads(pickle.dumps(jobs)), 0)

    monkeypatch.setattr(demo, "run_jobs", run_here)
    sizes = [f"--{name}.steps=3" for name in ("pretrain", "finetune")]
    words = ["demo", *sizes, "--out", "d", "--seeds", "0", "--measure", "1", "--quiet"]
    assert fmft(*words, "--task", "shifted", "--shift", "3") == 0
    for folder in ("d", "d/seed-0/pretrain", "d/seed-0/finetune"):
        assert read_toml(f"{folder}/config.toml")["options"] == {"shift": 3.0}
    heldout = read_metrics("d/seed-0/pretrain/metrics.jsonl")[0]["heldout"]
    assert heldout > 6, "the data lie about 3, where an untrained field is far off"
    assert fmft(*words, "--resume", "--options.shift", "4") == 2
    assert "d was begun with other options (shift was 3.0, now 4.0)" in capsys.readouterr().err
    assert fmft(*words, "--resume") == 0


DEMO = [
    *("--pretrain.eval_every", "50", "--finetune.eval_every", "50", "--finetune.batch_size", "16"),
    *("--pretrain.batch_size", "16", "--finetune.coupling", "ot-minibatch", "--seeds", "0,1"),
    *("--pretrain.coupling", "independent", "--measure", "2,10,100", "--out", "d"),
    *("--pretrain.checkpoint_every", "20", "--finetune.checkpoint_every", "20"),
]


def start_demo(*words):
    return start("demo", "--task", "tiny", *DEMO, *words)


def start(*words):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, tiny_task.__file__, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_demo_is_interrupted_resumed_and_sums_up():
    first = start_demo("--pretrain.steps", "2000", "--finetune.steps", "40")
    log = Path("d/seed-0/pretrain/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "fmft demo --resume --out d" in error and "Traceback" not in error
    stopped = read_metrics(log)[-1]
    assert stopped["event"] == "interrupted" and 0 < stopped["step"] < 2000

    # Task, seeds and measures are those of the folder, as the message promised.
    resume = ("demo", "--resume", "--out", "d")
    second = start(*resume, "--pretrain.steps", str(stopped["step"] + 20))
    out, error = second.communicate(timeout=240)
    assert second.returncode == 0, error
    assert "Medians over seeds 0, 1" in out and "of 6 targets reached" in out and "Pictures" in out
    content = json.loads(Path("d/results.json").read_text())
    assert set(content["medians"]) == {"before", "after"} and content["seeds"] == [0, 1]
    assert Path("d/seed-0/finetune/figures/given.json").exists()
    assert not Path("d/seed-1/finetune/figures").exists()
    assert "| measure" in Path("d/results.md").read_text()

    settings = Path("d/config.toml").read_text()
    third = start(*resume, "--finetune.lr", "0.5")
    _, error = third.communicate(timeout=60)
    assert third.returncode == 2 and "seed 0: finetune is finished already" in error
    assert "lr was 0.0005, now 0.5" in error
    assert Path("d/config.toml").read_text() == settings
