"""Evaluations: rows for every setting and start, whatever the number of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_ins
from stand_ins import Forward, Lost, Walker

from fmft_fast.envs import ObservationNoise, evaluate, evaluate_policy
from fmft_fast.errors import FmftError, InputError

NOISE = ObservationNoise("gaussian", 0.1, scale=(1.0, 1.0), offset=(0.0, 0.0))


def test_two_workers_give_the_rows_of_none():
    settings = {
        "starts": 30,
        "steps": (1, 2),
        "noise_seeds": (0, 1),
        "observation_noise": ("none", NOISE),
        "progress": False,
    }
    rows = evaluate_policy(Walker(), "line", workers=0, **settings)
    assert evaluate_policy(Walker(), "line", workers=2, **settings) == rows
    keys = [tuple(row[k] for k in ("steps", "noise", "noise_seed", "start")) for row in rows]
    assert keys == [
        (steps, noise, seed, start)
        for steps in (1, 2)
        for noise in ("none", "gaussian:0.1")
        for seed in (0, 1)
        for start in range(30)
    ]
    assert len({row["best"] for row in rows}) > 30


def test_rows_hold_plain_values():
    [row] = evaluate_policy(Forward(), "line", starts=[4], steps=(3,), workers=0, progress=False)
    assert row == {
        "steps": 3,
        "noise": "none",
        "noise_seed": 0,
        "start": 4,
        "length": 7,
        "best": 1.1,
    }


def test_what_is_recorded_comes_with_its_row():
    came = []
    evaluate_policy(
        Forward(),
        "line",
        starts=[5, 3, 9],
        steps=(1, 2),
        workers=0,
        record=2,
        recorded=lambda row, episode: came.append((row["steps"], row["start"], episode)),
        progress=False,
    )
    assert [key[:2] for key in came] == [(1, 5), (1, 3), (2, 5), (2, 3)]
    assert all(len(episode.frames) == episode.length + 1 for *_, episode in came)


def test_a_failure_says_which_setting_and_start():
    with pytest.raises(FmftError, match=r"line, steps 1, noise none, .* start 6, step 0"):
        evaluate_policy(Lost(), "line", starts=[1, 6], steps=(1,), workers=0, progress=False)


def test_nothing_is_kept_of_work_in_this_process():
    evaluate_policy(Forward(), "line", starts=1, steps=(1,), workers=0, progress=False)
    assert not evaluate._KEPT and evaluate._load.cache_info().currsize == 0


def test_the_bar_counts_episodes(capfd):
    evaluate_policy(Forward(), "line", starts=30, steps=(1, 2), workers=0)
    assert "60/60" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"starts": 0}, "starts: expected at least one"),
        ({"steps": (1, 1)}, "steps: expected at least one, each once, got 1, 1"),
        ({"noise_seeds": ()}, "noise_seeds: expected at least one"),
        ({"observation_noise": ("none", "none")}, "observation_noise: .*none, none"),
        ({"observation_noise": ("fog:1",)}, "gaussian:LEVEL"),
        ({"workers": -1}, "at least 0 workers"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        evaluate_policy(Forward(), "line", progress=False, **settings)


def test_ctrl_c_ends_the_workers_too(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LINE_SECONDS": "0.05",
        "LINE_FOLDER": str(tmp_path),
        "TMPDIR": str(tmp_path / "drafts"),
    }
    (tmp_path / "drafts").mkdir()
    child = subprocess.Popen(
        [sys.executable, stand_ins.__file__], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while len(workers := [file for file in tmp_path.iterdir() if file.name.isdigit()]) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=300)
    assert child.returncode == 130 and "Traceback" not in error, error
    assert not any(Path(f"/proc/{file.name}").exists() for file in workers)
    assert not list((tmp_path / "drafts").glob("fmft-*"))


def test_no_simulator_is_imported_before_it_is_asked_for():
    packages = {"gym_pusht", "gymnasium", "pygame", "shapely", "mujoco", "robosuite", "PIL"}
    code = f"import sys, fmft_fast.envs; sys.exit(str({packages} & set(sys.modules) or ''))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr.strip() == ""
