"""Signals: a run that is asked to stop abandons its unit cleanly, and never in the middle of a commit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(SystemExit):
    """SIGTERM arrived: the process ends with status 143 after everything was put back."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


_ENDS: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_DEFAULTS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def orderly() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated and SIGINT KeyboardInterrupt, at the latest when the block ends.

    Such an exception may be lost on its way: torch turns one that meets it in a conversion into a ValueError, and
    Python drops one that is raised in a finalizer. A handler of the program's own is left alone, and so is a signal
    that is ignored (SIGINT under nohup or cron); main thread only.
    """
    if not _in_main_thread():
        yield
        return
    arrived: list[type[BaseException]] = []

    def end(number: int, _frame: FrameType | None) -> None:
        arrived.append(_ENDS[number])
        raise _ENDS[number]

    with ExitStack() as after:
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is default:
                after.callback(_put_back, number, default)
                signal.signal(number, end)
        try:
            yield
        except Exception as problem:
            if arrived:
                raise arrived[-1] from problem
            raise
        if arrived:
            raise arrived[-1]


@contextmanager
def shielded() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block, a short commit, has ended; main thread only.

    Both are delivered if both arrived, each once; SIGTERM last, so that its exception is the one that goes on. One that
    is ignored stays ignored.
    """
    if not _in_main_thread():
        yield
        return
    waiting: dict[int, FrameType | None] = {}
    with ExitStack() as after:  # last in, first out, and each whatever the others raise
        for number in reversed(_SIGNALS):
            after.callback(_deliver, number, waiting)
        for number in reversed(_SIGNALS):
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):  # None: it was not set from Python and cannot be put back
                after.callback(_put_back, number, handler)
                signal.signal(number, waiting.__setitem__)
        yield


def _put_back(number: int, handler: Any) -> None:
    try:
        signal.signal(number, handler)
    except BaseException:  # of the other signal's handler, which runs before anything is put back
        signal.signal(number, handler)
        raise


def _deliver(number: int, waiting: Container[int]) -> None:
    if number in waiting:
        signal.raise_signal(number)
