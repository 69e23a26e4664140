"""The benchmark of passes: its table, its verdicts, and its exit status; what it measures is not judged here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
TITLES = ("covariance pass", "corrected-eigenvalue pass", "groups of 64", "singletons", "query products")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, called with one thread."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["mlp.py", "--threads", "1", "--examples", "64", "--queries", "2"])
    yield importlib.import_module("mlp")
    for name in ("mlp", "setting", "result_files"):
        del sys.modules[name]


def _measured(benchmark: ModuleType, **seconds: float) -> dict[str, Any]:
    """What a worker prints: every figure took one second unless told otherwise, products half of it, an epoch one."""
    names = {row.figure for row in benchmark.ROWS} | {row.minus for row in benchmark.ROWS if row.minus}
    defaults = {name: 0.5 if name.endswith("product") else 1.0 for name in names}
    return {name: [[[value, value]], [[1.0, 1.0]]] for name, value in (defaults | seconds).items()}


@pytest.mark.parametrize(
    ("covariance", "status", "verdict"), [(1.0, 0, "ok"), (2.6, 3, "over (process and wall time)")]
)
def test_a_missed_bound_has_an_exit_status_of_its_own(
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    covariance: float,
    status: int,
    verdict: str,
) -> None:
    monkeypatch.setattr(benchmark, "in_own_process", lambda *_: _measured(benchmark, covariance=covariance))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    assert benchmark.main() == status
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("covariance pass")]
    assert row.endswith(f"2.5  {verdict}")


def test_a_workers_crash_is_no_missed_bound(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = subprocess.CompletedProcess([], 3, stdout="", stderr="the worker's traceback")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: crashed)
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit, match="the worker's traceback") as stopped:
        benchmark.main()
    assert isinstance(stopped.value.code, str)  # which the interpreter prints, and exits with 1


def test_every_figure_of_the_table_is_measured(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        figures = benchmark.worker(1, 64, 2, 1, peer=False)
    finally:
        torch.set_num_threads(threads)
    benchmark.report(1, figures)
    printed = capsys.readouterr().out
    assert all(title in printed for title in TITLES)
    assert set(figures) == set(_measured(benchmark))


def test_rows_are_saved_by_title_for_each_thread_count(benchmark: ModuleType) -> None:
    once = {name: benchmark.Figure.from_lists(lists) for name, lists in _measured(benchmark).items()}
    slow = _measured(benchmark, covariance=2.0)
    twice = {name: benchmark.Figure.from_lists(lists) for name, lists in slow.items()}
    rows = benchmark.saved_rows({1: once, 2: twice})
    assert len(rows) == len(benchmark.ROWS)
    assert rows["covariance pass"] == [1.0, 2.0]
    assert rows["groups of 64, all: the rest"] == [0.5, 0.5]


@pytest.mark.slow
def test_the_benchmark_prints_its_table_at_toy_size() -> None:
    size = ["--threads", "1", "--examples", "256", "--queries", "4", "--repetitions", "1"]
    done = subprocess.run([sys.executable, str(FOLDER / "mlp.py"), *size], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr  # 3: a bound did not hold, as it may at this size
    assert all(title in done.stdout for title in TITLES)
