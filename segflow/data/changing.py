"""What running a user's functions changes, seen by what they reach before and after; it is no part of what they are.

A slot is an attribute of one object, an entry of one mapping, or a global of one module. One that differs afterwards,
and again when the functions run once more (a counter, a mean), never counts again. One that differs once (what is made
or converted at the first use) counts as it was at first sight. Nothing is told by its name alone.

Between the beginning and the end of one call of segflow nobody edits anything, so that an identity is read once; a
later call takes the same one, unless something is not as the call before left it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Slot = tuple[int, str]  # the id of what holds a value, and the value's name in it


class Seen(NamedTuple):
    """A value in a slot: its type and dtype; words for its content, and for what lies in no slot of its own."""

    holder: Any  # kept, so that its id stays its own
    kind: str
    shallow: str
    word: str
    counted: str | None


class Reached(dict[str, str]):
    """A word or digest for each thing that functions reach; slots: all that was seen on the way."""

    slots: dict[Slot, Seen]


@dataclass
class _Call:
    """The call of segflow that goes on."""

    depth: int = 0
    digests: dict[int, tuple[Any, Any, str]] = field(default_factory=dict)


@dataclass
class _Remembered:
    """An identity; left: what was read when the call before ended; settled: what running changes is known."""

    subject: Callable[[], Any]
    read: Callable[[], Reached] | None
    identity: Reached
    left: dict[str, str] | None = None
    settled: bool = False


_CALL = _Call()
_REMEMBERED: dict[Any, _Remembered] = {}
# Of slots that running changed: what each word counts as, None where no word counts; with a reference to the holder.
_CHANGED: dict[Slot, tuple[Callable[[], Any], dict[str, str | None] | None]] = {}


@contextmanager
def one_call() -> Iterator[None]:
    """Inside, an identity that was read is not read again; calls may lie in one another."""
    _CALL.depth += 1
    try:
        yield
    finally:
        _CALL.depth -= 1
        if _CALL.depth == 0:
            _end()


def _end() -> None:
    _CALL.digests.clear()
    for entry in _REMEMBERED.values():
        if entry.read is not None:
            entry.left, entry.read = dict(entry.read()), None
            entry.identity.slots = {}
    for key in [key for key, entry in _REMEMBERED.items() if entry.subject() is None]:
        del _REMEMBERED[key]
    for slot in [slot for slot, (holder, _) in _CHANGED.items() if holder() is None]:
        del _CHANGED[slot]


def remembered(subject: Any, key: tuple[Any, ...], read: Callable[[], Reached]) -> Reached:
    """What `read` reads of a subject, or has read before, and nobody has edited since; key: of one way to read it."""
    if _CALL.depth == 0:
        return read()
    whole = (id(subject), *key)
    entry = _REMEMBERED.get(whole)
    if entry is not None and entry.subject() is subject:
        if entry.read is not None:
            return entry.identity
        if entry.left == (found := read()):
            entry.read, entry.identity.slots = read, found.slots
            return entry.identity
    else:
        found = read()
    _REMEMBERED[whole] = _Remembered(reference(subject), read, found)
    return found


def settled(identity: Callable[[], Reached], run: Callable[[], Any], again: Callable[[], Any]) -> tuple[Reached, Any]:
    """What functions reach, less what running them changes; and what `run` gave.

    identity: reads it, or has it remembered; run: runs the functions; again: runs some of them once more.
    """
    before, result = identity(), run()
    entry = next((one for one in _REMEMBERED.values() if one.identity is before), None)
    if entry is not None and entry.settled:
        return before, result
    read = identity if entry is None or entry.read is None else entry.read
    after = read()
    if changed := _differences(before.slots, after.slots):
        again()
        last = read()
        for slot in {*changed, *_differences(before.slots, last.slots)}:
            now = after.slots.get(slot) or last.slots[slot]
            _change(slot, before.slots.get(slot), now, last.slots.get(slot))
        after = read()
    if entry is not None:
        entry.identity, entry.settled = after, True
    return after, result


@contextmanager
def running(identity: Callable[[], Reached]) -> Iterator[None]:
    """What the functions of an identity change inside, where they run, is no edit of them, also if they fail."""
    before = identity()
    try:
        yield
    finally:
        after = identity()
        for slot in _differences(before.slots, after.slots):
            _change(slot, before.slots.get(slot), after.slots[slot], after.slots[slot])


def _differences(before: dict[Slot, Seen], after: dict[Slot, Seen]) -> list[Slot]:
    """The slots that hold something else, and those that are new in what was there before."""
    holders = {holder for holder, _ in before}
    return [
        slot
        for slot, now in after.items()
        if (slot in before or slot[0] in holders) and (slot not in before or _differ(before[slot], now))
    ]


def _differ(one: Seen, other: Seen) -> bool:
    return one.shallow != other.shallow and one.word != other.word


def _change(slot: Slot, first: Seen | None, now: Seen, last: Seen | None) -> None:
    """Note a slot that running changed: what it counts as from now on."""
    words = _known_changes(now.holder, slot[1])
    once = last is not None and not _differ(now, last)
    converted = first is not None and last is not None and first.kind != last.kind
    if words is None or last is None or not (once or converted):
        words = None
    else:
        words = {**words, last.word: first.counted if first else None}
    _CHANGED[slot] = (reference(now.holder), words)


def counted(holder: Any, name: str, word: str) -> str | None:
    """The word that a value counts as in what holds it under a name; None where it does not count."""
    words = _known_changes(holder, name)
    return None if words is None else words.get(word, word)


def _known_changes(holder: Any, name: str) -> dict[str, str | None] | None:
    """What is known of a slot; nothing of one whose holder has gone, and left its id to another."""
    reference, words = _CHANGED.get((id(holder), name), (None, None))
    return {} if reference is None or reference() is not holder else words


def digest_once(tensor: Any, state: Any, digest: Callable[[Any], str]) -> str:
    """A tensor's digest, taken once in a call while its state (its version, and where it lies) is the same."""
    if _CALL.depth == 0 or state is None:
        return digest(tensor)
    known = _CALL.digests.get(id(tensor))
    if known is None or known[1] != state:
        known = _CALL.digests[id(tensor)] = (tensor, state, digest(tensor))
    return known[2]


def reference(thing: Any) -> Callable[[], Any]:
    """A function that gives the thing, as long as somebody else holds it; of what has no weak references, always."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing
