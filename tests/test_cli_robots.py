"""From demonstrations to a fine-tuned and filmed policy by commands, in the real simulators."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from real_data import data_folder
from robot_data import pusht_file, robomimic_file

from fmft_fast import cli
from fmft_fast.envs.kitchen import Kitchen
from fmft_fast.envs.pusht import PushT
from fmft_fast.errors import MissingDependencyError
from fmft_fast.policies import FlowPolicy
from fmft_fast.report import results_table
from fmft_fast.tasks import find_task, robot
from fmft_fast.train import read_metrics
from fmft_fast.train.config import read_toml

POLICY = ["--network_options.width", "16", "--network_options.blocks", "1"]
FEW = ["--batch_size", "8", "--device", "cpu", "--quiet", "--workers", "0", "--starts", "1"]
TINY = [*FEW, "--steps", "3", "--measure", "1"]
PAIRED = ["--coupling", "inversion", "--coupling_options.steps", "2"]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Work in a folder of its own, where nobody has said where demonstrations lie."""
    monkeypatch.chdir(tmp_path)
    for task in ("PUSHT", "KITCHEN", "ROBOMIMIC"):
        monkeypatch.delenv(f"FMFT_{task}_DATA", raising=False)


@pytest.fixture
def short(monkeypatch):
    """End episodes of the real simulator after nine steps."""
    pytest.importorskip("gym_pusht", reason="needs the simulator gym-pusht")
    monkeypatch.setattr(PushT, "max_steps", 9)


def fmft(*words):
    return cli.main([str(word) for word in words])


def results(folder):
    return json.loads(Path(folder, "results.json").read_text())


def pretrain(*words):
    data = pusht_file(Path("demo.npz"))
    return fmft("pretrain", "pusht", "--data", data, *POLICY, *TINY, *words)


def test_three_commands_lead_from_demonstrations_to_a_filmed_policy(short, capsys):
    pytest.importorskip("PIL", reason="needs pillow to film")
    assert pretrain("--n_action", "4") == 0
    assert set(results("runs/pusht/pretrain")["results"]["pre-trained"]["1"]) >= {
        "score",
        "success",
    }
    # The data and the sizes are those of pre-training.
    assert fmft("finetune", "pusht", *TINY, *PAIRED) == 0
    saved = read_toml("runs/pusht/finetune/config.toml")["options"]
    assert (saved["data"], saved["n_action"], saved["starts"]) == ("demo.npz", 4, 1)
    words = ["--steps", "1,4", "--noise", "none,gaussian:0.1", "--video", "1", "--starts", "2"]
    assert fmft(
        "evaluate", "pusht", "--checkpoint", "runs/pusht/finetune", *words, "--workers", "0"
    ) == 0  # fmt: skip
    table = capsys.readouterr().out
    assert "| score" in table and "gaussian:0.1" in table and "N = 4" in table
    found = results("runs/pusht/evaluate")
    assert {(row["steps"], row["noise"], row["start"]) for row in found["roll_outs"]} == {
        (n, noise, start) for n in (1, 4) for noise in ("none", "gaussian:0.1") for start in (0, 1)
    }
    score = found["summary"][0]["score"]
    assert score["low"] <= score["mean"] <= score["high"] and score["n"] == 2
    videos = {file.name for file in Path("runs/pusht/evaluate/videos").iterdir()}
    assert {"none-n1.png", "gaussian-0.1-n4.png", "none-n1-seed0-start0.gif"} < videos
    assert "videos: runs/pusht/evaluate/videos/*.gif" in table and table.count(".gif") == 1
    assert len(videos) == 8 and not any("start1" in name for name in videos)


def test_intervals_stand_behind_what_they_belong_to():
    row = {"score": 0.5, "score, low": 0.4, "score, high": 0.625}
    shown = results_table({"before": {1: row}, "after": {1: {**row, "score": 0.6}}})
    assert shown.splitlines()[2:] == [
        "| score   | before | 0.5 [0.4, 0.625] |",
        "|         | after  | 0.6 [0.4, 0.625] |",
    ]


def test_a_saved_policy_is_tuned_as_the_run_it_comes_from(short):
    assert pretrain("--n_action", "4", "--horizon", "9") == 0
    FlowPolicy.from_pretrained("runs/pusht/pretrain").save_pretrained("saved")
    words = ["--data", "demo.npz", *TINY, *PAIRED]
    assert fmft("finetune", "pusht", "--from", "saved", *words, "--out", "a") == 0
    assert fmft("finetune", "pusht", "--from", "runs/pusht/pretrain", *words, "--out", "b") == 0
    assert results("a")["results"] == results("b")["results"]
    a, b = (read_toml(f"{run}/config.toml")["options"] for run in "ab")
    assert a == b and (a["n_action"], a["horizon"]) == (4, 9)


def test_a_branch_is_tuned_watched_and_evaluated(short):
    assert pretrain() == 0
    words = ["--watch_starts", "1", "--metric", "failure", "--select", "best", "--eval_every", "1"]
    branch = ["--mode", "residual-mlp", "--residual_options.hidden", "[8]"]
    assert fmft("finetune", "pusht", *TINY, *PAIRED, *branch, *words, "--out", "r") == 0
    seen = [row["failure"] for row in read_metrics("r/metrics.jsonl") if "failure" in row]
    assert len(seen) >= 4 and all(0 <= value <= 1 for value in seen)
    again = ["--checkpoint", "r", "--steps", "1", "--starts", "1", "--workers", "0", "--out", "e"]
    assert fmft("evaluate", "pusht", *again, "--quiet") == 0
    after = results("r")["results"]["after"]["1"]
    assert results("e")["roll_outs"][0]["score"] == pytest.approx(after["score"])


def test_an_interrupted_run_goes_on_with_its_options(short, monkeypatch, capsys):
    pretrain("--out", "whole", "--seed", "3")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(robot.RobotTask, "evaluate", interrupt)
        assert pretrain("--out", "part", "--seed", "3") == 130
    again = ["pretrain", "pusht", "--out", "part", "--resume", "--quiet", "--measure", "1"]
    assert fmft(*again, "--heldout-share", "0.4") == 2
    assert "begun with other options (heldout_share was" in capsys.readouterr().err
    assert fmft(*again) == 0
    assert results("part")["results"] == results("whole")["results"]
    assert read_toml("part/config.toml") == read_toml("whole/config.toml")


def test_options_stand_in_a_file_and_the_command_line_lies_over_it(short):
    file = pusht_file(Path("demo.npz"))
    Path("c.toml").write_text(
        f'task = "pusht"\n[options]\ndata = "{file}"\nhorizon = 12\nn_action = 5\nstarts = 1\n'
        "workers = 0\n[options.network_options]\nwidth = 16\nblocks = 1\n"
        "[pretrain]\nsteps = 2\nbatch_size = 8\n"
    )
    words = ["--config", "c.toml", "--n-action", "3", "--device", "cpu", "--quiet"]
    assert fmft("pretrain", "pusht", *words, "--measure", "1") == 0
    saved = read_toml("runs/pusht/pretrain/config.toml")
    assert (saved["options"]["horizon"], saved["options"]["n_action"]) == (12, 3)
    state = json.loads(Path("runs/pusht/pretrain/checkpoints/last/state.json").read_text())
    recipe = state["architecture"]["recipe"]["policy"]
    assert (recipe["horizon"], recipe["n_action"]) == (12, 3)


def test_demonstrations_of_another_task_are_refused(capsys):
    data = pusht_file(Path("demo.npz"))
    assert fmft("pretrain", "kitchen", "--data", data) == 2
    error = capsys.readouterr().err
    assert "expected demonstrations of kitchen, with an array obs or" in error
    assert "got state, keypoint, action" in error


@pytest.mark.parametrize("name", ["2024", "2026-11-21", "1e3", "a,b", "true", 'say "5".npz'])
def test_a_file_may_be_called_like_a_number(name, capsys):
    for option in ("--data", "--options.data"):
        assert fmft("pretrain", "pusht", option, name) == 2
        assert f"{name}: expected a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "pusht"], "write --data PATH, or set FMFT_PUSHT_DATA"),
        (["pretrain", "kitchen", "--data", "gone.npz"], "gone.npz: expected a file"),
        (["pretrain", "pusht", "--horizn", "3"], "got 'horizn'"),
        (["pretrain", "pusht", "--network", "nlp"], "network: expected one of"),
        (["pretrain", "pusht", "--noise_seeds=-1"], "noise_seeds: expected at least 0"),
        (["pretrain", "toy-gmm", "--data", "x"], "got 'data'"),
        (["finetune", "pusht", "--horizon", "8"], "horizon: the checkpoint has its own"),
        (["finetune", "pusht", "--data", "x"], "runs/pusht/pretrain does not exist"),
        (["evaluate", "pusht", "--checkpoint", "gone"], "gone does not exist"),
        (["evaluate", "pusht", "--checkpoint", "x", "--n_obs", "1"], "n_obs: the checkpoint has"),
        (["evaluate", "pusht", "--checkpoint", "x", "--lr", "1"], "takes no setting lr"),
        (["evaluate", "pusht", "--checkpoint", "x", "--noise", "pink:1"], "got 'pink:1'"),
        (["evaluate", "toy-gmm", "--checkpoint", "x", "--video"], "are for robot tasks"),
        (
            ["analyze", "pusht", "--before", "x", "--after", "x"],
            "this command is for digits, toy-gmm, got pusht",
        ),
        (["demo", "--task", "kitchen"], "this command is for digits, toy-gmm, got kitchen"),
        (["study", "policy-noise", "--data", "chess=x"], "name of a robot task, got 'chess'"),
        (["study", "policy-noise", "--data", "pusht"], "expected TASK=PATH, got 'pusht'"),
        (["demonstrate", "kitchen", "--out", "k.npy"], "ending in .npz"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else None,
)
def test_mistakes_are_explained(capsys, words, message):
    if words[0] == "demonstrate":
        pytest.importorskip("gymnasium_robotics", reason="needs gymnasium-robotics")
    assert fmft(*words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(Path().iterdir()), "nothing is left behind"


def test_robomimic_trains_and_compares_actions_without_its_simulator(capsys, monkeypatch):
    pytest.importorskip("h5py", reason="needs h5py to write a file of robomimic")

    def missing(name):
        raise MissingDependencyError("robosuite is not installed")

    monkeypatch.setattr(robot, "make_environment", missing)
    data = ["--data", robomimic_file(Path("low_dim.hdf5"))]
    assert fmft("pretrain", "robomimic", *data, *POLICY, *TINY) == 0
    assert "no roll-outs: robosuite is not installed" in capsys.readouterr().err
    found = results("runs/robomimic/pretrain")["results"]["pre-trained"]["1"]
    words = ["--checkpoint", "runs/robomimic/pretrain", "--steps", "1", *data]
    assert fmft("evaluate", "robomimic", *words) == 0
    said = capsys.readouterr()
    assert "| action_error | none" in said.out and "no roll-outs" in said.err
    again = results("runs/robomimic/evaluate")["summary"][0]["action_error"]["mean"]
    assert again == pytest.approx(found["action_error"], rel=1e-5)
    assert fmft("evaluate", "robomimic", *words, "--noise", "gaussian:1") == 2
    assert "--noise and --video need roll-outs, got none: robosuite" in capsys.readouterr().err


def test_kitchen_is_demonstrated_learned_and_evaluated(monkeypatch, capsys):
    pytest.importorskip("gymnasium_robotics", reason="needs the simulator gymnasium-robotics")
    easy = functools.partial(cli.make_demonstrations, tasks=["light switch"], tasks_each=1)
    monkeypatch.setattr(cli, "make_demonstrations", easy)
    words = ["--out", "kitchen.npz", "--episodes", "2", "--workers", "0"]
    assert fmft("demonstrate", "kitchen", *words) == 0
    assert "next: fmft pretrain kitchen --data kitchen.npz" in capsys.readouterr().out
    monkeypatch.setattr(Kitchen, "max_steps", 5)
    assert fmft("pretrain", "kitchen", "--data", "kitchen.npz", *POLICY, *TINY) == 0
    words = ["--checkpoint", "runs/kitchen/pretrain", "--steps", "1", "--starts", "1"]
    assert fmft("evaluate", "kitchen", *words, "--workers", "0", "--quiet") == 0
    (row,) = results("runs/kitchen/evaluate")["roll_outs"]
    assert row["length"] == 5 and {"p1", "p2", "p3", "p4", "tasks"} < set(row)


def test_the_human_demonstrations_train(short):
    folder = data_folder("pusht") / "pusht_cchi_v7_replay.zarr"
    assert fmft("pretrain", "pusht", "--data", folder, *POLICY, *TINY, "--out", "human") == 0
    task = find_task("pusht").configured({"data": str(folder)})
    assert len(task.make_data(0).train) > 20_000


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate", "demonstrate", "study"])
def test_help_names_the_options_of_robot_tasks(command, capsys):
    with pytest.raises(SystemExit) as ended:
        fmft(command, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    wanted = {"demonstrate": "--episodes", "study": "--data TASK=PATH"}.get(command, "--n_action")
    assert wanted in text
