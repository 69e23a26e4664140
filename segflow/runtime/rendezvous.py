"""The rendezvous store, in which all ranks read and write: how they tell each other what no collective can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Rendezvous:
    """Texts by key, the same on every rank.

    Every method raises RuntimeError once the store is gone. It is not asked again then, as torch prints each failure.
    store: torch's (set, get, check).
    """

    def __init__(self, store: Any):
        self._store = store
        self._gone: RuntimeError | None = None

    def set(self, key: str, text: str) -> None:
        """Leave a text under a key."""
        self._ask(lambda: self._store.set(key, text))

    def get(self, key: str) -> str:
        """The text under a key, "" if there is none; unlike torch's own `get` it does not wait for one."""
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else "")

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        if self._gone is not None:
            raise self._gone
        try:
            return question()
        except RuntimeError as problem:
            self._gone = problem
            raise
