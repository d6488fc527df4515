"""The latency of decisions: every peer decides alike, and what happens to one that does not."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch

from benchmarks import gpu_check, latency, table
from benchmarks.peers import NotApplicable
from fmft_fast.policies import PolicyConfig

SIZES = {"obs_dim": 3, "action_dim": 2}
TINY = {
    "mlp": PolicyConfig(**SIZES, network_options={"width": 16}),
    "unet": PolicyConfig(
        **SIZES, network="unet", network_options={"channels": (8, 16), "groups": 2, "embedding": 8}
    ),
}
QUICK = {"calls": 20, "seconds": 0.0}


@pytest.fixture
def eager(monkeypatch):
    """Leave out what has to be compiled, which takes a minute."""
    for name in list(latency.PEERS):
        if name.startswith("torch.compile"):
            monkeypatch.delitem(latency.PEERS, name)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("steps", [1, 4])
def test_peers_decide_alike_and_are_timed(eager, name, steps):
    pytest.importorskip("torchdiffeq", reason="one of the peers")
    rows = {row.peer: row for row in latency.time_policy(name, TINY[name], steps, "cpu", **QUICK)}
    assert set(rows) == set(latency.PEERS)
    for row in rows.values():
        assert row.reason is None and row.error < 1e-5 and row.calls == 20
        assert row.median_us is not None and 0 < row.least_us <= row.median_us <= row.p99_us
        assert row.cpu_us is not None and row.cpu_us > 0


def test_a_policy_is_the_same_on_every_call_and_all_of_its_weights_matter():
    first, second = (latency.make_policy(TINY["mlp"], "cpu") for _ in range(2))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    obs, noise = latency.make_data(first)
    parameters = list(first.network.parameters())
    end = latency.loop(first, 2)(obs, noise).square().sum()
    assert all(grad.any() for grad in torch.autograd.grad(end, parameters))


def test_a_wrong_or_failing_peer_reports_no_time(eager, monkeypatch):
    def one_step_more(policy, steps):
        return latency.plain_loop(policy, steps + 1)

    def fail(policy, steps):
        raise RuntimeError("it broke")

    def refuse(policy, steps):
        raise NotApplicable("for a reason")

    for name, peer in {"other": one_step_more, "fails": fail, "refuses": refuse}.items():
        monkeypatch.setitem(latency.PEERS, name, peer)
    rows = {row.peer: row for row in latency.time_policy("mlp", TINY["mlp"], 2, "cpu", **QUICK)}
    assert rows["other"].reason.startswith("wrong: error ") and rows["other"].median_us is None
    assert rows["fails"].reason == "failed: RuntimeError: it broke"
    assert rows["refuses"].reason == "not applicable: for a reason"
    assert rows["plain loop"].reason is None


def test_calls_take_turns_and_the_first_of_a_turn_is_not_counted():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = latency.take_turns(calls, 3 * latency.TURN, 60.0, "cpu")
    turns = ["".join(group) for _, group in itertools.groupby(order)]
    assert turns == ["a" * (latency.TURN + 1), "b" * (latency.TURN + 1)] * 3
    assert all(found["calls"] == 3 * latency.TURN for found in times.values())
    stopped = latency.take_turns(calls, 10**6, 0.0, "cpu")
    assert {found["calls"] for found in stopped.values()} == {latency.LEAST_CALLS}


def test_the_command_writes_results_and_its_table(eager, monkeypatch, tmp_path, capsys):
    readme, output = tmp_path / "README.md", tmp_path / "deep" / "latency.json"
    readme.write_text(f"before\n{latency.START}\nold\n{latency.END}\nafter\n")
    monkeypatch.setattr(latency, "POLICIES", TINY)
    monkeypatch.setattr(latency, "use_threads", lambda count: None)
    command = ["latency", "--policy", "mlp", "--steps", "1", "2", "--calls", "20"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    latency.main()
    report = json.loads(output.read_text())
    assert report["machine"]["cpu"]["model"] and len(report["rows"]) == 2 * len(latency.PEERS)
    assert report["policies"]["mlp"]["network_options"] == {"width": 16}
    text = latency.readme(report)
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("| us") and lines[0].endswith(" | mlp, 1 step | mlp, 2 steps |")
    assert [line.split(" | ")[0][2:] for line in lines[2 : 2 + len(latency.PEERS)]] == list(
        latency.PEERS
    )
    monkeypatch.setattr(sys, "argv", ["latency", "--table", str(output), "--update", str(readme)])
    latency.main()
    assert readme.read_text() == table.update(
        f"before\n{latency.START}\n{latency.END}\nafter\n", text, latency.START, latency.END
    )


def test_the_committed_results_are_right_and_of_a_quiet_machine():
    path = latency.results.FOLDER / "latency-cpu.json"
    if not path.exists():
        pytest.skip("a source distribution has no results")
    report = json.loads(path.read_text())
    assert not latency.is_busy(report)
    for row in report["rows"]:
        assert row.get("error", 0) < 1e-5
        assert "reason" not in row or row["reason"].startswith("not applicable")


def test_results_of_a_busy_machine_are_marked_as_a_trial():
    row = {"policy": "mlp", "steps": 1, "peer": latency.OURS, "median_us": 9.0}
    row |= {"p99_us": 10.0, "cpu_us": 8.0}
    report = {
        "machine": {
            "class": "amd AVX512",
            "device": "cpu",
            "cpu": {"model": "A CPU"},
            "gpu": None,
            "packages": {"torch": "2.13.0"},
            "date": "2026-01-02T00:00:00Z",
        },
        "settings": {"threads": 1},
        "rows": [{**row, "cores": 1.0}],
    }
    assert "| 9 / 10 |" in latency.readme(report) and "A trial" not in latency.readme(report)
    report["rows"][0]["cores"] = 0.4
    text = latency.readme(report)
    assert "A trial" in text and "us of CPU time" in text and "| 8 |" in text


def test_the_gpu_check_keeps_what_was_found_before_the_limit(monkeypatch, tmp_path):
    def run_limited(command, limit, env=None):
        path = command[command.index("--output") + 1]
        with open(path, "w") as file:
            json.dump({"rows": [1]}, file)
        return {"status": 124, "output": "", "seconds": limit}

    monkeypatch.setattr(gpu_check, "run_limited", run_limited)
    assert gpu_check.time_decisions("cpu", gpu_check.Clock(100)) == {"rows": [1]}
    monkeypatch.setattr(
        gpu_check,
        "run_limited",
        lambda *_: {"status": 1, "output": "Traceback\nRuntimeError: no", "seconds": 1.0},
    )
    found = gpu_check.time_decisions("cpu", gpu_check.Clock(100))
    assert found == {"status": None, "summary": "no latencies: RuntimeError: no"}
    found = gpu_check.time_decisions("cpu", gpu_check.Clock(0))
    assert found == {"status": None, "summary": "no time is left"}
