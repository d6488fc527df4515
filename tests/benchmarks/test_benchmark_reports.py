"""Results, their table, the gate and the GPU check's bookkeeping, on made-up numbers."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from benchmarks import gate, gpu_check, plots, results, scaling, table
from benchmarks.peers import BASELINE, PEERS
from benchmarks.results import Report, Row

ROOT = Path(__file__).parents[2]


def row(case, operation, peer, ms=None, reason=None, threads=1):
    if ms is None:
        return Row(case, operation, peer, threads, reason)
    return Row(
        *(case, operation, peer, threads, None, 1e-7, 1e-6, None, ms, 0.9 * ms, 1.1 * ms, 50, 1.0),
        *(2_000_000, 16, 10.0, 0.125, 0.25),
    )


def make_report(ours=1.0, machine_class="amd AVX512", date="2026-01-02T00:00:00Z"):
    machine = {
        "class": machine_class,
        "device": "cpu",
        "cpu": {"model": "A CPU"},
        "gpu": None,
        "packages": {"torch": "2.13.0", "jax": None},
        "commit": "abc",
        "date": date,
    }
    rows = [
        row("small", "gradient", BASELINE, 8.0),
        row("small", "gradient", "plain loop", 6.0),
        row("small", "gradient", "torchode", reason="wrong: value error 1.0e-01"),
        row("small", "gradient", "jax", reason="not installed: No module named 'jax'"),
        row("small", "gradient", "fmft_fast.odeint", ours),
        row("small", "gradient", "fmft_fast.solve", 2 * ours),
        row("dopri5", "gradient", BASELINE, 12.0),
        row("dopri5", "gradient", "fmft_fast.odeint", 3.0),
    ]
    return Report(machine, {"command": "x"}, {"1": {"gemm": 8e10, "copy": 1e10}}, rows)


def test_json_gives_back_what_was_written(tmp_path):
    report = make_report()
    report.write(tmp_path / "deep" / "cpu.json")
    assert results.read(tmp_path / "deep" / "cpu.json") == report
    assert report.speedup("small", "gradient", "fmft_fast.odeint") == 8
    assert report.speedup("small", "gradient", "torchode") is None


def test_results_of_another_version_are_refused(tmp_path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="expected results with schema 2, got None"):
        results.read(old)


def test_reports_of_several_threads_become_one():
    one, two = make_report(), make_report()
    two.rates["2"] = two.rates.pop("1")
    both = results.merge([one, two])
    assert set(both.rates) == {"1", "2"} and len(both.rows) == 2 * len(one.rows)


def test_the_summary_marks_the_best_and_what_is_missing():
    lines = table.summary(make_report()).splitlines()
    assert lines[0] == "| forward + backward, ms | small | dopri5 | error, small | peak MB, small |"
    assert "| fmft_fast.odeint | **1** | **3** | 1e-06 | 2 |" in lines
    assert "| plain loop | 6 | - | 1e-06 | 2 |" in lines
    assert lines[-1] == f"| best of fmft_fast against {BASELINE} | 8x | 4x |  |  |"
    assert not any("jax" in line for line in lines)  # no time at all
    full = table.full(make_report())
    assert "| small | gradient | torchode | 1 | wrong: value error 1.0e-01 |" in full
    assert "| small | gradient | jax | 1 | not installed" in full


def test_results_of_a_busy_machine_are_marked_as_a_trial():
    report = make_report()
    assert not report.busy and "A trial" not in table.readme(report)
    starved = [dataclasses.replace(row, cores=0.4) for row in report.rows]
    report = dataclasses.replace(report, rows=starved)
    assert report.busy and "A trial" in table.readme(report) and "A trial" in table.full(report)


def test_the_table_in_a_text_is_replaced():
    text = f"before\n{table.START}\nold\n{table.END}\nafter\n"
    assert table.update(text, "new") == f"before\n{table.START}\n\nnew\n\n{table.END}\nafter\n"
    assert table.update(table.update(text, "x"), "new") == table.update(text, "new")
    with pytest.raises(ValueError, match="expected the markers"):
        table.update("no markers", "new")


def test_the_readme_has_the_table_of_the_committed_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if not (results.FOLDER / "cpu.json").exists():
        pytest.skip("a source distribution has no results")
    report = results.read(results.FOLDER / "cpu.json")
    assert readme == table.update(readme, table.readme(report)), (
        "run python -m benchmarks.table benchmarks/results/cpu.json --update README.md"
    )


@pytest.mark.parametrize(("loss", "fails"), [(0.29, False), (0.31, True), (-1.0, False)])
def test_the_gate_allows_a_loss_of_30_percent(loss, fails):
    expected = gate.ratios(make_report().rows)
    got = {key: ratio * (1 - loss) for key, ratio in expected.items()}
    assert bool(gate.losses(got, expected)) == fails
    assert len(expected) == 5


def test_the_gate_names_case_expected_and_got():
    expected = gate.ratios(make_report(ours=1.0).rows)
    found = gate.losses(gate.ratios(make_report(ours=2.0).rows), expected)
    assert str(found[0]) == (
        f"small gradient: fmft_fast.odeint against {BASELINE}: expected 8.00 times as fast "
        "(at least 5.60), got 4.00"
    )


def test_without_committed_results_only_torchdiffeq_is_a_measure():
    assert not gate.losses(gate.ratios(make_report(ours=4.2).rows), None)
    slow = gate.losses(gate.ratios(make_report(ours=5.0).rows), None)
    assert [(loss.ours, loss.other) for loss in slow] == [("fmft_fast.solve", BASELINE)]


def test_the_gate_takes_the_newest_results_of_its_class(tmp_path):
    make_report(machine_class="intel AVX2").write(tmp_path / "a.json")
    make_report(date="2026-01-01T00:00:00Z").write(tmp_path / "b.json")
    make_report(ours=0.5).write(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "e.json").write_text("{}")
    found = gate.committed("amd AVX512", tmp_path)
    assert found is not None and found.rows == make_report(ours=0.5).rows
    assert gate.committed("arm NEON", tmp_path) is None
    trial = make_report(machine_class="arm NEON")
    trial.rows[:] = [dataclasses.replace(row, cores=0.4) for row in trial.rows]
    trial.write(tmp_path / "f.json")
    assert gate.committed("arm NEON", tmp_path) is None


@pytest.mark.parametrize(
    ("first", "second", "status"), [(1.1, None, 0), (2.0, 1.1, 0), (2.0, 2.0, 1), (2.0, 1.5, 1)]
)
def test_the_gate_measures_again_before_it_fails(
    monkeypatch, capsys, first, second, status, tmp_path
):
    monkeypatch.setattr(gate.machine, "machine_class", lambda device: "amd AVX512")
    make_report(ours=1.0).write(tmp_path / "cpu.json")
    measured = []

    def time_rows(timed, seconds, device):
        measured.append(timed)
        return make_report(ours=first if len(measured) == 1 else second).rows

    monkeypatch.setattr(gate, "time_rows", time_rows)
    assert gate.judge("cpu", 0.1, tmp_path) == status
    assert len(measured) == (1 if second is None else 2)
    if second is not None:
        assert measured[1] == (("small", "gradient"),)
    assert ("FAILED small gradient" in capsys.readouterr().out) == bool(status)


def test_the_gate_says_that_it_knows_no_such_machine(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gate, "time_rows", lambda *_: make_report().rows)
    assert gate.judge("cpu", 0.1, tmp_path) == 0
    assert "No committed results for" in capsys.readouterr().out


def test_the_gate_fails_when_a_solver_of_ours_is_wrong(monkeypatch, capsys, tmp_path):
    rows = [row("small", "gradient", "fmft_fast.solve", reason="wrong: gradient error 1.0e+00")]
    monkeypatch.setattr(gate, "time_rows", lambda *_: rows)
    assert gate.judge("cpu", 0.1, tmp_path) == 1
    assert "small gradient: fmft_fast.solve: wrong" in capsys.readouterr().out


def test_pictures_are_drawn(tmp_path):
    plots.speedups(make_report(), tmp_path / "bars.png")
    point = {"value": 64, "ms": {BASELINE: 2.0}, "roofline_ms": 0.1}
    report = {
        "axes": {axis: [point, {**point, "value": 256}] for axis in scaling.AXES},
        "peers": [BASELINE],
        "base": "small",
        "machine": {"class": "amd AVX512"},
    }
    plots.scaling(report, tmp_path / "lines.png")
    for name in ("bars.png", "lines.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_every_axis_of_the_scaling_grows_64_times_and_alone():
    for axis, grow in scaling.AXES.items():
        small, large = grow(1), grow(64)
        assert small == scaling.BASE
        assert scaling.VALUES[axis](large) == 64 * scaling.VALUES[axis](small)
        for other in set(scaling.AXES) - {axis}:
            growth = 64 if (axis, other) == ("depth", "depth") else 1
            assert scaling.VALUES[other](large) == growth * scaling.VALUES[other](small)


def test_the_gpu_check_times_what_matters_most_first():
    order = gpu_check.in_order(list(PEERS))
    assert sorted(order) == sorted(PEERS)
    assert order[: len(gpu_check.ORDER)] == list(gpu_check.ORDER)
    assert {*gpu_check.OURS, *gpu_check.RIVALS} <= set(PEERS)


def test_what_was_reached_is_told_by_precision(monkeypatch):
    ms = {"highest": 0.1, "high": 0.07, "medium": 0.05}

    def time_peer(peer, cases, seconds, device, limit, *words):
        precision = words[words.index("--precision") + 1]
        factor = 1 if peer in gpu_check.OURS else 10
        rows = [row(case, "gradient", peer, factor * ms[precision]) for case in cases]
        return Report({}, {}, {}, rows)

    monkeypatch.setattr(gpu_check, "time_peer", time_peer)
    rounded = gpu_check.by_precision(0.1, gpu_check.Clock(100))
    rows = [
        row("p1", "gradient", "fmft_fast.odeint", ms["highest"]),
        row("p1", "gradient", "fmft_fast.solve", reason="wrong"),
        row("p1", "gradient", BASELINE, 7.0),
    ]
    found = gpu_check.marks(Report({}, {}, {}, rows), rounded)
    assert found == {
        "p1, bf16: at most 60 us": pytest.approx(50),
        "p1, as float32: at most 110 us": pytest.approx(100),
        "p1, torchdiffeq over ours: at least 60": pytest.approx(70),
        "p1, best rival over ours: at least 8": None,
        "wide: at most 850 us": None,
        "wide, best rival over ours: at least 1.3": None,
        "wide, rounded to TF32: at most 850 us": pytest.approx(70),
        "wide, rounded to TF32, best rival over ours: at least 1.3": pytest.approx(10),
    }


def test_a_command_is_stopped_at_its_limit():
    code = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('found so far')"
    found = gpu_check.run_limited([sys.executable, "-c", code], 2)
    assert found["status"] == 124 and found["output"] == "found so far\n" and found["seconds"] < 20
    assert gpu_check.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 20)["status"] == 3


def test_peers_that_do_not_end_get_a_row_with_the_reason(monkeypatch):
    def time_peer(peer, cases, seconds, device, limit):
        if peer == BASELINE:
            return make_report()
        return None

    monkeypatch.setattr(gpu_check, "time_peer", time_peer)
    suite = gpu_check.time_suite(
        ["small"], [BASELINE, "plain loop"], 0.1, "cpu", gpu_check.Clock(100), peer_limit=7
    )
    row = suite.find("small", "training", "plain loop")
    assert row is not None and row.reason == "no result within 7 s"
    assert suite.find("small", "gradient", BASELINE) is not None
    assert suite.find("small", "forward", BASELINE) is not None  # missing in what it wrote


def test_no_peer_starts_when_the_time_is_used_up(monkeypatch):
    monkeypatch.setattr(gpu_check, "time_peer", None)
    suite = gpu_check.time_suite(["small"], [BASELINE], 0.1, "cpu", gpu_check.Clock(0))
    assert {row.reason for row in suite.rows} == {"no result within 0 s"}


def test_a_missing_sanitizer_is_said_and_does_not_fail(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    found = gpu_check.sanitize("memcheck", gpu_check.Clock(10))
    assert found == {"status": None, "summary": "compute-sanitizer is not installed"}
