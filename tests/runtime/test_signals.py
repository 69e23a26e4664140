"""Signals that arrive around a commit are neither lost, nor doubled, nor do they leave a handler behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from segflow.runtime import signals
from segflow.runtime.signals import Terminated, orderly, shielded


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Each test begins with Python's own handlers: one started in the background inherits that SIGINT is ignored."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


STORM = """
import os, sys, time
for number in (2, 15) * 150:
    os.kill(int(sys.argv[1]), number)
    sys.stdin.buffer.read(1)  # the system merges signals of one kind, so each waits until the last was handled
    time.sleep(0.001)
"""


def _send(*numbers: int) -> None:
    for number in numbers:
        signal.raise_signal(number)


@pytest.mark.parametrize("order", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_two_signals_in_one_commit_are_both_delivered_and_termination_wins(order: tuple[int, int]) -> None:
    calls: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        calls.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    with pytest.raises(Terminated), orderly(), shielded():
        _send(*order)
    assert calls == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is interrupt
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_sent_many_times_in_nested_shields_is_delivered_once_at_the_outermost_end() -> None:
    calls: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: calls.append(number))
    with shielded():
        with shielded():
            _send(signal.SIGINT, signal.SIGINT)
        _send(signal.SIGINT)
        assert calls == []
    assert calls == [signal.SIGINT]


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
@pytest.mark.parametrize("instead", [ValueError, None])
def test_a_signal_whose_exception_is_lost_on_the_way_still_ends_the_work(
    number: int, end: type[BaseException], instead: type[Exception] | None
) -> None:
    def swallow() -> None:  # as C code does that takes any exception for its own
        with contextlib.suppress(BaseException):
            _send(number)
        if instead:
            raise instead

    with pytest.raises(end), orderly():
        swallow()


def test_an_error_without_a_signal_is_itself() -> None:
    with pytest.raises(ValueError, match="mine"), orderly():
        raise ValueError("mine")


def test_a_commit_that_fails_still_delivers() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, shielded():
        _send(signal.SIGINT)
        raise OSError("disk")
    assert isinstance(caught.value.__context__, OSError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(number, signal.SIG_IGN)
    with orderly(), monkeypatch.context() as patched:
        patched.setattr(signals.signal, "raise_signal", None)  # nothing is delivered
        with shielded():
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_IGN
    assert signal.getsignal(number) is signal.SIG_IGN


def test_another_thread_changes_no_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with orderly(), shielded():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_signals_at_random_moments_of_many_commits_are_all_counted() -> None:
    counts = {signal.SIGINT: 0, signal.SIGTERM: 0}

    def count(number: int, _frame: object) -> None:
        counts[signal.Signals(number)] += 1
        assert sender.stdin is not None
        os.write(sender.stdin.fileno(), b"x")

    command = [sys.executable, "-c", "input()" + STORM, str(os.getpid())]
    sender = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
    for number in counts:
        signal.signal(number, count)
    assert sender.stdin is not None
    sender.stdin.write(b"begin\n")
    deadline = time.monotonic() + 60
    while sender.poll() is None and time.monotonic() < deadline:
        with shielded():
            pass
    sender.stdin.close()
    assert sender.wait(timeout=30) == 0
    assert counts == {signal.SIGINT: 150, signal.SIGTERM: 150}
    assert signal.getsignal(signal.SIGINT) is count and signal.getsignal(signal.SIGTERM) is count
