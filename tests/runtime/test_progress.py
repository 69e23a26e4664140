"""Bars go to a terminal of the first process, and a terminal that is gone stops no work."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import TextIO

import pytest

from segflow.runtime.progress import Bars, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Words:
    """Takes text, as some loggers do, and has none of a file's other methods."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _use(enabled: bool | None) -> None:
    bars = Bars(enabled)
    with bars.call("fit"):
        bars.expect(3)
        with bars.walk("covariance", 3, True) as step:
            for _ in track(range(3), "reading", enabled=enabled):
                step(1)
        bars.say("said")


def _shown(stream: TextIO, enabled: bool | None) -> str:
    with contextlib.redirect_stderr(stream):
        _use(enabled)
    return stream.getvalue() if isinstance(stream, io.StringIO) and not stream.closed else ""


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SEGFLOW_QUIET", raising=False)


def test_bars_are_shown_on_a_terminal_or_when_asked_for() -> None:
    for stream, enabled in ((Terminal(), None), (io.StringIO(), True)):
        shown = _shown(stream, enabled)
        assert all(word in shown for word in ("fit:", "covariance:", "reading:", "said\n"))
    assert _shown(io.StringIO(), None) == "" and _shown(Terminal(), False) == ""


def test_quiet_and_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGFLOW_QUIET", "1")
    assert _shown(Terminal(), None) == ""
    monkeypatch.setenv("RANK", "1")
    assert _shown(Terminal(), True) == ""


def _gone() -> Iterator[TextIO]:
    closed = io.StringIO()
    closed.close()
    yield closed
    reader, writer = os.pipe()
    os.close(reader)
    yield os.fdopen(writer, "w", buffering=1)
    near, far = os.openpty()
    os.close(near)
    yield os.fdopen(far, "w", buffering=1)


@pytest.mark.parametrize("enabled", [None, True])
def test_a_terminal_that_is_gone_stops_no_work(enabled: bool | None) -> None:
    for stream in _gone():
        _shown(stream, enabled)
        with contextlib.suppress(OSError):
            stream.close()


def test_a_standard_error_that_only_takes_text_is_no_terminal() -> None:
    with contextlib.redirect_stderr(Words()):  # type: ignore[type-var]
        _use(None)


def test_the_calls_bar_counts_what_it_expects_only(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars(True)
    with bars.call("score"):
        bars.expect(10)
        with bars.walk("queries", 50, False) as step:
            step(50)
        with bars.walk("groups", 10, True) as step:
            step(4)
        bars.expect(-1)
    shown = capsys.readouterr().err
    assert "4.00/9.00" in shown and "50.0/10" not in shown and "54" not in shown
