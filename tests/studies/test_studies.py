"""A study goes on where it was stopped, loses nothing to a cell that fails, and adds up rightly."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from math import comb
from pathlib import Path

import pytest
import tiny_study
from robot_data import pusht_file
from tiny_study import TINY

from fmft_fast import cli
from fmft_fast.commands import Place
from fmft_fast.errors import ConfigError, FmftError, InputError, MissingDependencyError
from fmft_fast.studies import STUDIES, Study, find_study, register
from fmft_fast.studies.estimates import estimate, estimates, table
from fmft_fast.studies.models import Pretrained
from fmft_fast.studies.run import make_cells, rows_of, run
from fmft_fast.tasks import TASKS, find_task

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def study(folder="d", *, resume=False, workers=0, seeds=(0, 1, 2)):
    return run(TINY, Place(Path(folder), resume, quiet=True), seeds=seeds, workers=workers)


def measured(folder):
    return rows_of(json.loads(Path(folder, "results.json").read_text()))


def test_a_study_writes_numbers_table_and_figures():
    content = study()
    assert [row["value"] for row in measured("d")] == [10, 11, 12, 20, 21, 22]
    assert Path("d/drawn.txt").read_text() == "6"
    text = Path("d/table.md").read_text()
    assert "How much is a sum?" in text and "fmft study tiny" in text
    assert "| 1    | 11 [10, 12] |" in text and "| 2    | 21 [20, 22] |" in text
    assert content["seeds"] == [0, 1, 2] and content["machine"]["class"] and content["versions"]
    assert json.loads(Path("d/results.json").read_text())["cells"] == content["cells"]


def test_only_what_is_missing_is_measured_again():
    first = study()
    with pytest.raises(ConfigError, match="already holds a study; add --resume"):
        study()
    next(Path("d/cells").glob("2-1-*")).unlink()
    again = study(resume=True)
    assert len(os.listdir("d/calls")) == 7 and again["cells_measured_now"] == 1
    strip = [{k: v for k, v in cell.items() if k != "seconds"} for cell in first["cells"]]
    assert [{k: v for k, v in cell.items() if k != "seconds"} for cell in again["cells"]] == strip
    assert len(study(resume=True, seeds=(0, 1, 2, 3))["cells"]) == 8
    assert len(os.listdir("d/calls")) == 9


def test_a_cell_that_was_changed_by_hand_is_not_believed():
    study()
    file = next(Path("d/cells").glob("2-1-*"))
    file.write_text(file.read_text().replace('"seed": 1', '"seed": 5'))
    with pytest.raises(ConfigError, match="holds other settings than its name says"):
        study(resume=True)


def test_cells_that_fail_are_named_and_the_others_kept(monkeypatch):
    monkeypatch.setenv("TINY_1-0", "raise")
    monkeypatch.setenv("TINY_2-2", "exit")
    with pytest.raises(FmftError) as caught:
        study(workers=2)
    message = str(caught.value)
    assert "2 of 6 cells failed" in message
    assert "size 1, seed 0: ZeroDivisionError" in message and "tiny_study.py" in message
    assert "size 2, seed 2: its process ended with exit code 7" in message
    assert len(list(Path("d/cells").glob("*.json"))) == 4 and not Path("d/results.json").exists()
    for name in ("TINY_1-0", "TINY_2-2"):
        monkeypatch.delenv(name)
    assert study(resume=True)["cells_measured_now"] == 2


def test_a_model_that_fails_is_no_cell():
    def models(settings):
        return [Pretrained("toy-gmm", 0, {"stepps": settings["size"]})]

    broken = dataclasses.replace(TINY, models=models)
    with pytest.raises(FmftError, match="2 of 2 cells failed") as caught:
        run(broken, Place(Path("d"), quiet=True), seeds=(0,), workers=0)
    message = str(caught.value)
    assert message.count("got 'stepps'; did you mean 'steps'") == 2
    assert message.count("which failed") == 2


def test_what_robot_studies_need_is_looked_for_before_any_work(monkeypatch, capsys):
    words = ["study", "policy-finetuning", "--quick", "--seeds", "0", "--out", "q"]
    data = pusht_file(Path("pusht.npz"))
    monkeypatch.delenv("FMFT_PUSHT_DATA", raising=False)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "the demonstrations of pusht, got none; write --data pusht=PATH, or set FMFT_" in error
    monkeypatch.setenv("FMFT_PUSHT_DATA", "")  # restored afterwards, whatever --data sets
    assert cli.main([*words, "--data", "pusht=gone.npz"]) == 2
    assert "gone.npz: expected a file" in capsys.readouterr().err

    def missing(name):
        raise MissingDependencyError(f"{name} needs gym-pusht")

    monkeypatch.setattr("fmft_fast.studies.run.make_environment", missing)
    assert cli.main([*words, "--data", f"pusht={data}"]) == 2
    assert "pusht needs gym-pusht" in capsys.readouterr().err
    assert not Path("q").exists()


@pytest.mark.parametrize(
    ("trouble", "message"),
    [("nan", "None for what could not be measured"), ("clash", "size is a setting and a measure")],
)
def test_what_cannot_be_kept_is_refused(monkeypatch, trouble, message):
    monkeypatch.setenv("TINY_1-0", trouble)
    with pytest.raises(FmftError, match=message):
        study()


def test_what_could_not_be_measured_is_left_out_of_the_medians(monkeypatch):
    monkeypatch.setenv("TINY_1-0", "none")
    study()
    assert "| 1    | 11.5 [11, 12] |" in Path("d/table.md").read_text()


def test_ctrl_c_stops_and_resuming_gives_the_same():
    words = ["study", "tiny", "--out", "d", "--seeds", "0,1,2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TINY_SECONDS": "0.3"}
    child = subprocess.Popen(
        [sys.executable, tiny_study.__file__, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(Path("d/cells").glob("*.json")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=300)
    assert child.returncode == 130, error
    assert "go on with: fmft study tiny --resume --out d" in error and "Traceback" not in error
    kept = len(list(Path("d/cells").glob("*.json")))
    assert 0 < kept < 6
    assert study(resume=True)["cells_measured_now"] == 6 - kept
    study("whole")
    assert measured("d") == measured("whole")


def test_cells_are_different_and_plain():
    def twice(seeds, *, quick):
        return [{"seed": 0}, {"seed": 0}]

    def odd(seeds, *, quick):
        return [{"seed": (0, 1)}]

    for cells, message in ((twice, "the same settings"), (odd, "that JSON keeps")):
        with pytest.raises(InputError, match=message):
            broken = Study("broken", "", cells, TINY.measure, TINY.table, TINY.figures)
            make_cells(broken, Path(), (0,), quick=False)


def test_registry_and_command_line(capsys):
    with pytest.raises(InputError, match="'checkpoint-timing' is registered already"):
        register(STUDIES["checkpoint-timing"])
    with pytest.raises(InputError, match=r"unknown study 'one'; choose one of .*checkpoint-timing"):
        find_study("one")
    assert cli.main(["study", "one"]) == 2
    assert "unknown study 'one'; choose one of" in capsys.readouterr().err
    assert cli.main(["study"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert all(line.rstrip().endswith("?") for line in lines)


def test_the_interval_of_the_median_is_that_of_the_binomial_law():
    found = estimate([5.0, 1.0, 2.0])
    assert (found.median, found.low, found.high, found.count) == (2.0, 1.0, 5.0, 3)
    assert str(estimate([0.25])) == "0.25" and str(found) == "2 [1, 5]"
    # The resampled median is at most the k-th of n values when over half the draws are.
    n = 25
    at_most = [
        sum(comb(n, j) * (k / n) ** j * (1 - k / n) ** (n - j) for j in range(n // 2 + 1, n + 1))
        for k in range(n + 1)
    ]
    low = next(k for k in range(n + 1) if at_most[k] >= 0.025)
    high = next(k for k in range(n + 1) if at_most[k] >= 0.975)
    found = estimate([float(k) for k in range(1, n + 1)], resamples=20_000)
    assert (found.low, found.high) == (low, high) == (8, 18)
    with pytest.raises(InputError, match="expected values and a level"):
        estimate([])


def test_medians_are_taken_over_all_settings_but_those_named():
    rows = [{"n": n, "seed": s, "error": float(n * s)} for n in (1, 2) for s in (1, 2, 6)]
    assert {k: v.median for k, v in estimates(rows, ["n"], "error").items()} == {(1,): 2, (2,): 4}
    rows.append({"n": 3, "seed": 0, "error": None})
    lines = table(rows, {"n": "n"}, {"error": "e"}).splitlines()
    assert lines[2:] == ["| 1 | 2 [1, 6]  |", "| 2 | 4 [2, 12] |", "| 3 | -         |"]


@pytest.mark.parametrize("name", list(STUDIES))
def test_every_study_runs_at_its_smallest(name, monkeypatch):
    if name.startswith("policy-"):
        pytest.importorskip("gym_pusht", reason="gym-pusht is not installed")
        small = {"data": str(pusht_file(Path("pusht.npz"))), "network_options": {"width": 16}}
        monkeypatch.setitem(TASKS, "pusht", find_task("pusht").configured(small))
    content = run(find_study(name), Place(Path("q"), quiet=True), seeds=(0,), workers=0, quick=True)
    assert content["quick"] and Path("q/table.md").exists()
    pictures = list(Path("q").glob("*.png"))
    assert pictures and all(picture.stat().st_size > 5000 for picture in pictures)


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "benchmarks/results/studies").glob("*")), ids=lambda path: path.name
)
def test_what_is_committed_is_what_was_measured(folder):
    content = json.loads((folder / "results.json").read_text())
    assert content["study"] == folder.name and not content["quick"]
    text = (folder / "README.md").read_text()
    assert find_study(folder.name).table(rows_of(content)) in text
    assert all(f"({picture.name})" in text for picture in folder.glob("*.png"))
