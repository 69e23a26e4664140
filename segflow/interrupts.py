"""Signals: a run that is asked to stop abandons its unit cleanly, and never in the middle of a commit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(SystemExit):
    """SIGTERM arrived: the process ends with status 143 after everything was put back."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def orderly() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated, unless the program has a handler of its own; main thread only."""
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def shielded() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block, a short commit, has ended; main thread only."""
    if not _in_main_thread():
        yield
        return
    waiting: dict[int, FrameType | None] = {}
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in handlers.items():
        if handler is not None:  # None: it was not set from Python and cannot be put back
            signal.signal(number, waiting.__setitem__)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
