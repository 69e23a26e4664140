"""Long work is visible: events for programs, bars for people, a summary; signals stop it cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import segflow as sf
from segflow.runtime.ranks import Ranks
from segflow.runtime.signals import orderly, shielded
from segflow.store.journal import Journal

from ..support.events import read_events
from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N = 21


def _work(journal: Journal) -> None:
    with journal.call("fit", batch_size=4):
        journal.expect({"covariance": 30})
        journal.found("covariance", "covariance/step-1", 10)
        with journal.unit("covariance", "covariance/step-2") as facts:
            for _ in journal.walk([5, 5, 10], "covariance, step 2", 20, lambda size: size):
                pass
            facts["bytes"] = 7


def test_events_and_summary_say_what_was_done(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl", Ranks(), False)
    _work(journal)
    with pytest.raises(KeyError), journal.call("score"):
        raise KeyError("why\nand more")
    events = read_events(tmp_path / "events.jsonl")
    kinds = ["call_started", "found", "unit", "call_finished", "call_started", "call_failed"]
    assert [event["event"] for event in events] == kinds
    assert len({event["run"] for event in events}) == 1 and all(event["time"].endswith("+00:00") for event in events)
    unit = events[2]
    assert (unit["call"], unit["kind"], unit["examples"], unit["bytes"]) == ("fit", "covariance", 20, 7)
    assert unit["peak_memory"] > 1 << 20 and 0 <= unit["seconds"] <= events[3]["seconds"]
    assert events[0]["batch_size"] == 4 and events[5]["error"].startswith("KeyError: 'why")
    rows = {(row.call, row.kind): row for row in journal.summary().rows}
    row = rows["fit", "covariance"]
    assert (row.made, row.found, row.examples) == (1, 1, 20) and ("score", "") not in rows
    assert "covariance" in str(journal.summary()) and "MB" in str(journal.summary())


def test_the_memory_of_a_unit_is_seen(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl", Ranks(), False)
    with journal.call("fit"):
        for size in (1, 300 << 20):
            with journal.unit("covariance", str(size)):
                held = bytearray(b"x") * size
                time.sleep(0.3)
                del held
    small, large = (
        event["peak_memory"] for event in read_events(tmp_path / "events.jsonl") if event["event"] == "unit"
    )
    assert large - small > 200 << 20


def test_a_torn_line_is_skipped_and_the_next_writer_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "whole"}\n{"event": "to')
    Journal(path, Ranks(), False).event("next")
    assert [event["event"] for event in read_events(path)] == ["whole", "next"]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").mkdir()
    _work(Journal(tmp_path / "events.jsonl", Ranks(), True))
    assert capsys.readouterr().err.count("no events are logged any more") == 1


def test_a_log_that_leads_out_of_the_store_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "events.jsonl").symlink_to(tmp_path / "victim")
    journal = Journal(tmp_path / "store" / "events.jsonl", Ranks(), False)
    _work(journal)
    assert (tmp_path / "victim").read_text() == ""
    assert "leads out of" in journal.summary().log_ended and "no events are logged" in str(journal.summary())


def test_only_the_first_rank_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _work(Journal(tmp_path / "events.jsonl", Ranks(1, 1), True))
    assert not (tmp_path / "events.jsonl").exists()
    assert capsys.readouterr().err == ""


def test_a_calls_line_and_event_count_that_call_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path / "events.jsonl", Ranks(), True)
    _work(journal)
    with journal.call("fit"), journal.call("check"):
        journal.found("covariance", "covariance/step-2")
    with journal.call("fit"):
        journal.found("covariance", "covariance/step-2")
        journal.found("covariance", "covariance/step-2")
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "segflow" in line]
    assert [line.partition(" found")[0] for line in lines] == [
        "segflow fit: 1 units made, 1",
        "segflow fit: 0 units made, 0",  # the call within it has no line of its own
        "segflow fit: 0 units made, 1",
    ]
    ends = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "call_finished"]
    assert [(end["made"], end["found"]) for end in ends] == [(1, 1), (0, 1), (0, 0), (0, 1)]
    whole = next(row for row in journal.summary().rows if (row.call, row.kind) == ("fit", ""))
    assert (whole.made, whole.found) == (1, 2)


def test_bars_show_rate_and_time_left_of_pass_and_call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _work(Journal(None, Ranks(), True))
    shown = capsys.readouterr().err
    assert "covariance, step 2:" in shown and "fit:" in shown and "examples/s" in shown and "0.00/20.0" in shown
    assert "segflow fit: 1 units made, 1 found" in shown and "peak memory" in shown
    monkeypatch.setenv("RANK", "1")
    _work(Journal(None, Ranks(), True))
    assert capsys.readouterr().err == ""


def test_walking_costs_little() -> None:
    journal = Journal(None, Ranks(), False)
    begun = time.perf_counter()
    with journal.call("fit"):
        assert sum(1 for _ in journal.walk(range(100_000), "x", 100_000, lambda _: 1)) == 100_000
    assert time.perf_counter() - begun < 3


def test_an_analyzer_logs_and_sums_up_its_work(tmp_path: Path) -> None:
    model = mlp()
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=sf.Source(segments=1))
    analyzer.fit(vectors(N))
    analyzer.fit(vectors(N))
    analyzer.score(sf.Groups.random(N, 5), vectors(N), vectors(3))
    events = read_events(tmp_path / "store" / "events.jsonl")
    made = [event["unit"] for event in events if event["event"] == "unit" and event["call"] == "fit"]
    assert made == [
        *(f"covariance/step-{step}" for step in (10, 20)),
        "eigenbasis/steps-10-20-w515fa117",
        *(f"eigenvalues/steps-10-20-w515fa117/step-{step}" for step in (10, 20)),
    ]
    found = [event["unit"] for event in events if event["event"] == "found"]
    assert found == made[2:]  # by the second fit; the first does not find what it made itself
    rows = {(row.call, row.kind): row for row in analyzer.summary().rows}
    assert rows["fit", "covariance"].examples == 2 * N and rows["score", "groups"].made == 2


# Signals

SCRIPT = """
import os, signal, sys, time
from segflow.runtime.signals import orderly, shielded
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
with orderly():
    try:
        with shielded():
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
            print("held back", flush=True)
        time.sleep(10)
        print("not reached", flush=True)
    finally:
        print("put back", flush=True)
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", -signal.SIGINT)])
def test_a_signal_waits_for_the_commit_and_then_ends_cleanly(name: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "held back\nput back\n"
    assert done.returncode == status


def test_a_handler_of_the_programs_own_is_respected() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: calls.append(number))
    try:
        with orderly(), shielded():
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == []
        assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    with orderly():
        pass
    assert signal.getsignal(signal.SIGTERM) is before


FITTING = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[2:] == ["ignoring"] else signal.default_int_handler)
import segflow as sf
from tests.support.helpers import *
class Slow:
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        import time; time.sleep(0.01); return self.data[i]
root, model = Path(sys.argv[1]), mlp()
trajectory = trajectory_of(root / "run", perturbed_states(model, 2), 21)
analyzer = analyzer_of(model, trajectory, root / "store", method=sf.InfluenceFunction())
print("fitting", flush=True)
analyzer.fit(Slow(vectors(21)), batch_size=2)
"""


def _fitting(folder: Path, *how: str) -> tuple[subprocess.Popen[str], Path]:
    """A process in the middle of a fit, and its log."""
    (folder / "script.py").write_text(FITTING)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "script.py"), str(folder), *how]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events = folder / "store" / "events.jsonl"
    deadline = time.monotonic() + 60
    while not (events.exists() and "call_started" in events.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process, events


def test_a_fit_that_ignores_interrupts_goes_on(tmp_path: Path) -> None:
    process, events = _fitting(tmp_path, "ignoring")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert [event["event"] for event in read_events(events)][-1] == "call_finished"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_fit_that_is_asked_to_stop_lets_go_of_its_store(tmp_path: Path, number: int, status: int) -> None:
    process, events = _fitting(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert not (tmp_path / "store" / "holder.json").exists()
    assert not list((tmp_path / "store").rglob("*.partial"))
    assert [event["event"] for event in read_events(events)][-1] == "call_failed"


def test_events_are_json_lines(tmp_path: Path) -> None:
    _work(Journal(tmp_path / "events.jsonl", Ranks(), False))
    lines: list[Any] = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert all(isinstance(line, dict) for line in lines)
