"""Peers: whether the other ranks are alive, told through the rendezvous store that they share.

Every rank writes a beat now and then and watches its neighbour's; who fails, ends or falls silent is noted under one
key that all ranks read. Keys: who/R, beat/R, arrived/N/R and failed/N for rank R and the N-th stage of work.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

import psutil

from ..errors import RankError

_SILENCE = 30.0  # seconds without a beat after which a rank counts as dead; SEGFLOW_RANK_TIMEOUT sets another bound
_LATE = 60.0  # seconds of waiting for others after which the wait is reported
_ENDED = "has ended, and every rank must take part"


class Who(NamedTuple):
    """A rank's process."""

    rank: int
    pid: int
    host: str
    born: float

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def is_surely_dead(self) -> bool:
        """True if it ran on this host and is not there any more."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() != self.born or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def silence() -> float:
    """Seconds without a sign of life after which a rank counts as dead."""
    return float(os.environ.get("SEGFLOW_RANK_TIMEOUT", _SILENCE))


def _interval() -> float:
    """Seconds between two beats."""
    return min(1.0, silence() / 8)


class Peers:
    """What this rank knows of the others.

    Args:
        store: the rendezvous store (set, get, check).
        index, count: this rank, and how many there are.
        host: names who hosts the store, for errors.
    """

    def __init__(self, store: Any, index: int, count: int, host: str):
        self._store, self._index, self._count, self._host = store, index, count, host
        self._number = 0  # of the stage under way
        self._what = "start"
        self._guarded = False  # inside a stage that must not outlive the others
        self._failed: str | None = None
        self._answered = time.monotonic()  # when the store last answered
        self._stop = threading.Event()
        self._who: dict[int, Who] = {}
        process = psutil.Process()
        own = Who(index, process.pid, socket.gethostname(), process.create_time())
        store.set(f"who/{index}", json.dumps(own))
        store.set(f"beat/{index}", "0")
        self._thread = threading.Thread(target=self._watch, name="segflow-peers", daemon=True)
        self._thread.start()
        atexit.register(self.leave)

    def guard(self, on: bool) -> None:
        """While on, this process ends if another rank failed and it does not notice by itself.

        It may hang in what a sharded model's layers exchange, where nothing can look at the other ranks.
        """
        self._guarded = on

    def arrive(self, what: str) -> bool:
        """Begin a stage together: wait until every rank has arrived; True if the stage before failed on some rank.

        Raises RankError if a rank ends or falls silent meanwhile.
        """
        self._number, self._what, self._failed = self._number + 1, what, None
        self._answered = time.monotonic()
        try:
            return self._arrived(what)
        except RuntimeError as problem:  # the store is gone
            raise self.explain(problem) from problem

    def _arrived(self, what: str) -> bool:
        self._store.set(f"arrived/{self._number}/{self._index}", what)
        missing, begun, told = list(range(self._count)), time.monotonic(), False
        while True:
            missing = [rank for rank in missing if not self._has(f"arrived/{self._number}/{rank}")]
            if not missing:
                break
            self._meet(missing)
            self.require_all(missing)
            if not told and time.monotonic() - begun > _LATE:
                sys.stderr.write(f"segflow: rank {self._index} waits for rank(s) {missing} to call {what} as well.\n")
                told = True
            time.sleep(0.002 if time.monotonic() - begun < 1 else 0.05)
        self._meet(list(range(self._count)))
        stages = {rank: self._get(f"arrived/{self._number}/{rank}") for rank in range(self._count)}
        if set(stages.values()) != {what}:
            self._linger()
            raise RankError(f"the ranks are at different stages: {stages}. Every rank must make the same calls.")
        return self._has(f"failed/{self._number - 1}")

    def post(self, text: str) -> None:
        """Tell the others that this rank failed in the stage under way."""
        try:
            self._blame(self._index, text)
        except RuntimeError:
            return  # the store is gone, and with it whoever could read this

    def require_all(self, waited_for: list[int] | None = None) -> None:
        """Raise RankError if a rank is known to have failed, ended or fallen silent.

        waited_for: the ranks whose processes are looked at; by default all.
        """
        if self._failed is None and time.monotonic() - self._answered > silence():
            self._failed = f"{self._host} does not answer for {silence():.0f} s"
        for rank in range(self._count) if waited_for is None else waited_for:
            if self._failed is None and rank in self._who and self._who[rank].is_surely_dead():
                self._failed = self._noted() or f"{self._who[rank]} has died"  # perhaps of another's failure
        if self._failed is not None:
            self._linger()
            raise RankError(
                f"{self._what}: {self._failed}. What was committed is kept: start all ranks again and they go on there."
            )

    def explain(self, problem: BaseException) -> RankError:
        """The error for a collective that broke: names the rank that is to blame, if it can be found in time."""
        deadline = time.monotonic() + silence() + 5
        while time.monotonic() < deadline:
            try:
                self.require_all()
            except RankError as found:
                return found
            time.sleep(0.05)
        return RankError(f"{self._what}: the connection between the ranks broke ({problem}). Start all ranks again.")

    def leave(self) -> None:
        """Tell the others that this rank takes no part any more."""
        if self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self.leave)
        self._thread.join(1.0)
        try:
            self._store.set(f"ended/{self._index}", "")
        except RuntimeError:
            return

    def _watch(self) -> None:
        """Beat, watch the neighbour, and look for what others noted; a thread."""
        neighbour = (self._index + 1) % self._count
        beats, heard, since, since_failed = 0, "", time.monotonic(), time.monotonic()
        while not self._stop.wait(_interval()):
            try:
                beats += 1
                self._store.set(f"beat/{self._index}", str(beats))
                beat = self._get(f"beat/{neighbour}")
                if beat != heard:
                    heard, since = beat, time.monotonic()
                elif self._has(f"ended/{neighbour}"):
                    self._blame(neighbour, _ENDED)
                elif beat and time.monotonic() - since > silence():
                    self._blame(neighbour, f"does not answer for {silence():.0f} s")
                if self._failed is None and (noted := self._noted()):
                    self._failed, since_failed = noted, time.monotonic()
                if self._failed and self._guarded and time.monotonic() - since_failed > silence() / 2:
                    sys.stderr.write(f"segflow: rank {self._index} ends: {self._what}: {self._failed}.\n")
                    sys.stderr.flush()
                    os._exit(70)
                self._answered = time.monotonic()
            except RuntimeError:  # the store is gone
                if self._stop.wait(1.0):
                    return
                self._failed = self._failed or f"{self._host} has ended"
                return

    def _noted(self) -> str | None:
        """Which other rank failed in this stage and how, if that was noted and the store still answers."""
        try:
            noted = self._get(f"failed/{self._number}")
        except RuntimeError:
            return None
        if not noted:
            return None
        rank, text = json.loads(noted)
        return None if rank == self._index else f"{self._who.get(rank, f'rank {rank}')} {text}"

    def _blame(self, rank: int, text: str) -> None:
        """Note who failed, unless that is known already."""
        if not self._has(f"failed/{self._number}"):
            self._store.set(f"failed/{self._number}", json.dumps([rank, text]))

    def _linger(self) -> None:
        """Let the others read what was noted in the store, if this rank may be its host, before it fails and ends."""
        if self._index == 0:
            time.sleep(2.5 * _interval())

    def _meet(self, ranks: list[int]) -> None:
        """Learn which processes these ranks are, as far as they are there."""
        for rank in ranks:
            if rank not in self._who and (content := self._get(f"who/{rank}")):
                self._who[rank] = Who(*json.loads(content))

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _get(self, key: str) -> str:
        """A key's value, "" if there is none (a plain get would wait for it)."""
        return self._store.get(key).decode() if self._has(key) else ""
