"""Progress bars for long work: on a terminal only, on the first process only, and never when asked to be quiet."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def track(items: Iterable[Item], label: str, total: int | None = None, enabled: bool | None = None) -> Iterator[Item]:
    """Yield `items` behind a progress bar on standard error.

    enabled: True shows it always, False never, None only where standard error is a terminal and the
    environment variable `SEGFLOW_QUIET` is not set.
    """
    yield from tqdm(items, desc=label, total=total, **_look(enabled))


class Bars:
    """A bar for the whole call above one for the pass under way, in examples with their rate and the time left."""

    def __init__(self, enabled: bool | None):
        self._enabled = enabled
        self._call: Any = None  # the bar of the call under way

    @contextmanager
    def call(self, label: str) -> Iterator[None]:
        """Show the call's bar; a call within a call has none of its own."""
        if self._call is not None:
            yield
            return
        with self._bar(label, 0, 0) as bar:
            self._call = bar
            try:
                yield
            finally:
                self._call = None

    def expect(self, more: int) -> None:
        """The call will walk this many examples more."""
        if self._call is not None:
            self._call.total = max(self._call.n, self._call.total + more)
            self._call.refresh()

    @contextmanager
    def walk(self, label: str, total: int, expected: bool) -> Iterator[Callable[[int], None]]:
        """Show a pass's bar; the function that is yielded moves it by some examples.

        expected: the examples are among those that the call expects, so its bar moves too.
        """
        with self._bar(label, total, 1) as bar:

            def step(size: int) -> None:
                bar.update(size)
                if expected and self._call is not None:
                    self._call.update(size)

            yield step

    def say(self, line: str) -> None:
        """Write a line beside the bars, if there are any."""
        if is_shown(self._enabled):
            tqdm.write(line, file=_Stderr())

    def _bar(self, label: str, total: int, position: int) -> Any:
        counted = {"unit": " examples", "unit_scale": True}
        return tqdm(desc=label, total=total, position=position, **counted, **_look(self._enabled))


class _Stderr:
    """Standard error as it is now; what cannot be written there (the terminal was closed) is no reason to stop."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stderr) and self._stream is other._stream

    __hash__ = None  # type: ignore[assignment]

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def _look(enabled: bool | None) -> dict[str, Any]:
    return {"file": _Stderr(), "disable": not is_shown(enabled), "leave": False, "dynamic_ncols": True}


def is_shown(enabled: bool | None) -> bool:
    """Whether to show progress: on the first process, always, never, or (None) on a terminal only."""
    if os.environ.get("RANK", "0") != "0":
        return False
    if enabled is not None:
        return enabled
    try:
        return not os.environ.get("SEGFLOW_QUIET") and sys.stderr.isatty()
    except (AttributeError, ValueError):  # no terminal: something that takes text, or a file that was closed
        return False
