"""Journal: bars for people, events for programs, and a summary at the end; only rank 0 writes.

Events are lines of JSON in the store's `events.jsonl`, each with "time" (UTC), "run" (random, one for each Analyzer)
and "event":

    call_started     call (check, fit, score, ...), ranks, method and the call's options
    found            call, kind, unit: the store held it before the call began
    unit             call, kind, unit, seconds, examples (on rank 0), bytes, sha256, peak_memory
    call_finished    call, seconds, made and found (units), peak_memory (bytes, the largest over the ranks)
    call_failed      call, seconds, error
    took_over        holder: a run that died without letting go of the store
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from ..errors import StoreError
from ..runtime.memory import PeakMemory, bytes_in_words
from ..runtime.progress import Bars
from ..runtime.ranks import Ranks
from .files import append_line, inside

Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """What one call did for one kind of unit; peak_memory in bytes, 0 where it was not measured."""

    call: str
    kind: str
    made: int = 0
    found: int = 0
    seconds: float = 0.0
    examples: int = 0
    peak_memory: int = 0


@dataclass(frozen=True)
class Summary:
    """What was done so far, for each call and kind of unit; the row of kind "" is the call as a whole.

    log_ended: why events are not logged any more; empty while they are.
    """

    rows: tuple[Row, ...]
    log_ended: str = ""

    def __str__(self) -> str:
        head = ("call", "kind", "made", "found", "seconds", "examples", "per second", "peak memory")
        lines = [head]
        for row in self.rows:
            rate = f"{row.examples / row.seconds:,.0f}" if row.examples and row.seconds else ""
            memory = bytes_in_words(row.peak_memory) if row.peak_memory else ""
            numbers = (str(row.made), str(row.found), f"{row.seconds:.1f}", f"{row.examples:,}", rate, memory)
            lines.append((row.call, row.kind or "all", *numbers))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, *([f"no events are logged any more ({self.log_ended})"] if self.log_ended else [])])


RESERVED = ("name", "call", "event", "run", "time")  # keys of an event that are not facts about a call


class Journal:
    """What one run does.

    Args:
        path: of the log of events; None for none.
        progress: show bars: True always, False never, None on a terminal only.
    """

    def __init__(self, path: Path | None, ranks: Ranks, progress: bool | None):
        self._path = path if ranks.main else None
        self._ranks, self._bars = ranks, Bars(progress if ranks.main else False)
        self._run = secrets.token_hex(4)
        self._log_ended = ""
        self._calls: list[str] = []
        self._settled: set[str] = set()  # units made or found since the outermost call began
        self._making = 0  # units under way
        self._rows: dict[tuple[str, str], Row] = {}
        self._seen = 0  # examples walked so far
        self._memory = PeakMemory()

    def event(self, event: str, **facts: Any) -> None:
        """Log an event. A log that cannot be written is no reason to stop the work: it ends there."""
        if self._path is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            append_line(
                inside(self._path.parent, self._path.name), {"time": now, "run": self._run, "event": event, **facts}
            )
        except (OSError, StoreError) as problem:
            self._bars.say(f"segflow: no events are logged any more ({problem})")
            self._path, self._log_ended = None, str(problem)

    @contextmanager
    def call(self, name: str, **facts: Any) -> Iterator[None]:
        """A call (check, fit, score, ...) on all ranks; facts go into its first event."""
        if not self._calls:
            self._settled.clear()
        self._calls.append(name)
        before = dict(self._rows)
        self.event("call_started", call=name, **facts)
        begun, seen = time.perf_counter(), self._seen
        try:
            with self._memory.watched() as peak, self._bars.call(name):
                yield
            memory = max(self._ranks.gather(peak()))
        except BaseException as problem:
            first = (str(problem).splitlines() or [""])[0]
            error = f"{type(problem).__name__}: {first}"
            self.event("call_failed", call=name, seconds=_seconds_since(begun), error=error)
            raise
        finally:
            self._calls.pop()
        done = [_done_since(row, before) for row in self._rows.values() if row.call == name and row.kind]
        counts = {"made": sum(row.made for row in done), "found": sum(row.found for row in done)}
        seconds = _seconds_since(begun)
        self._add(name, "", **counts, seconds=seconds, examples=self._seen - seen, peak_memory=memory)
        self.event("call_finished", call=name, seconds=seconds, **counts, peak_memory=memory)
        if not self._calls:
            self._bars.say(_as_line(Row(name, "", **counts, seconds=seconds, peak_memory=memory), done))

    def expect(self, passes: Mapping[str, int]) -> None:
        """How many examples of each kind of pass the call will walk on this rank, what the store holds included."""
        self._bars.expect(sum(passes.values()))

    def found(self, kind: str, unit: str, examples: int = 0) -> None:
        """A unit that the store holds already, and the examples that need not be walked for it."""
        self._bars.expect(-examples)
        if unit not in self._settled:  # else this very call made it, or has found it before
            self._settled.add(unit)
            self._add(self._call, kind, found=1)
            self.event("found", call=self._call, kind=kind, unit=unit)

    @contextmanager
    def unit(self, kind: str, unit: str) -> Iterator[dict[str, Any]]:
        """Time the making of a unit; facts put into the dictionary go into its event."""
        facts: dict[str, Any] = {}
        begun, seen = time.perf_counter(), self._seen
        self._making += 1
        try:
            with self._memory.watched() as peak:
                yield facts
        finally:
            self._making -= 1
        self._settled.add(unit)
        examples, seconds = self._seen - seen, _seconds_since(begun)
        self._add(self._call, kind, made=1, seconds=seconds, examples=examples, peak_memory=peak())
        about = {"seconds": seconds, "examples": examples, "peak_memory": peak()}
        self.event("unit", call=self._call, kind=kind, unit=unit, **about, **facts)

    def walk(self, items: Iterable[Item], label: str, total: int, size: Callable[[Item], int]) -> Iterator[Item]:
        """Yield items behind a bar that counts their sizes, examples, up to `total`; in a unit, the call's bar too."""
        with self._bars.walk(label, total, self._making > 0) as step:
            for item in items:
                yield item
                seen = size(item)
                self._seen += seen
                step(seen)

    def summary(self) -> Summary:
        """What was done so far."""
        return Summary(tuple(self._rows.values()), self._log_ended)

    @property
    def _call(self) -> str:
        return self._calls[-1] if self._calls else ""

    def _add(self, call: str, kind: str, peak_memory: int = 0, **more: Any) -> None:
        row = self._rows.get((call, kind), Row(call, kind))
        sums = {name: getattr(row, name) + value for name, value in more.items()}
        self._rows[call, kind] = replace(row, **sums, peak_memory=max(row.peak_memory, peak_memory))


def _done_since(row: Row, before: Mapping[tuple[str, str], Row]) -> Row:
    """What was done for a row since `before`."""
    past = before.get((row.call, row.kind), Row(row.call, row.kind))
    made, found, seconds = row.made - past.made, row.found - past.found, row.seconds - past.seconds
    return replace(row, made=made, found=found, seconds=seconds, examples=row.examples - past.examples)


def _as_line(whole: Row, kinds: Iterable[Row]) -> str:
    parts = ", ".join(f"{row.kind} {row.seconds:.1f} s" for row in kinds if row.made)
    took = f"{whole.seconds:.1f} s{f' ({parts})' if parts else ''}"
    memory = f"peak memory {bytes_in_words(whole.peak_memory)}"
    return f"segflow {whole.call}: {whole.made} units made, {whole.found} found, {took}, {memory}"


def _seconds_since(begun: float) -> float:
    return round(time.perf_counter() - begun, 4)
