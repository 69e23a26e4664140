"""Progress bars for long work: on a terminal only, on the first process only, and never when asked to be quiet."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def track(items: Iterable[Item], label: str, total: int | None = None, enabled: bool | None = None) -> Iterator[Item]:
    """Yield `items` behind a progress bar on standard error.

    enabled: True shows it always, False never, None only where standard error is a terminal and the
    environment variable `SEGFLOW_QUIET` is not set.
    """
    yield from tqdm(items, desc=label, total=total, disable=_disabled(enabled), leave=False, dynamic_ncols=True)


class Bars:
    """A bar for the whole stage above one for the pass under way, in examples with their rate and the time left."""

    def __init__(self, enabled: bool | None):
        self._disable = _disabled(enabled)
        self._stage: Any = None

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Show the stage's bar; a stage within a stage has none of its own."""
        if self._stage is not None:
            yield
            return
        with self._bar(label, 0, 0) as bar:
            self._stage = bar
            try:
                yield
            finally:
                self._stage = None

    def expect(self, more: int) -> None:
        """The stage will walk so many examples more."""
        if self._stage is not None:
            self._stage.total = max(self._stage.n, self._stage.total + more)
            self._stage.refresh()

    @contextmanager
    def walk(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a pass's bar; the function that is yielded moves it, and the stage's, by some examples."""
        with self._bar(label, total, 1) as bar:

            def step(size: int) -> None:
                bar.update(size)
                if self._stage is not None and self._stage.total:
                    self._stage.update(size)

            yield step

    def say(self, line: str) -> None:
        """Write a line beside the bars, if there are any."""
        if not self._bar_is_off():
            tqdm.write(line, file=sys.stderr)

    def _bar(self, label: str, total: int, position: int) -> Any:
        return tqdm(
            desc=label,
            total=total,
            position=position,
            unit=" examples",
            unit_scale=True,
            disable=self._disable,
            leave=False,
            dynamic_ncols=True,
        )

    def _bar_is_off(self) -> bool:
        return bool(self._disable) or (self._disable is None and not sys.stderr.isatty())


def _disabled(enabled: bool | None) -> bool | None:
    """tqdm's `disable`: None lets it look for a terminal."""
    if os.environ.get("RANK", "0") != "0" or (enabled is None and os.environ.get("SEGFLOW_QUIET")):
        return True
    return None if enabled is None else not enabled
