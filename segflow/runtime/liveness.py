"""Liveness: which rank failed, as noted in the rendezvous store that all ranks share.

A rank that fails says so there; one whose process on this machine died, or that ended before the others, is found by
those that wait for it. The process group's timeout ends a hang, and the launcher looks after the processes.
Keys: process/R, ended/R, arrived/N/R and failed/N for rank R and the N-th call.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict

from ..errors import RankError
from .process import ProcessIdentity
from .rendezvous import Rendezvous

_TIMEOUT = 7200.0  # seconds that one rank may keep the others waiting; SEGFLOW_RANK_TIMEOUT sets another bound
_LATE = 60.0  # seconds of waiting for others to arrive after which the wait is reported
_FOUND_OUT = 3.0  # seconds in which it shows which rank broke a connection
_READ = 1.0  # seconds that rank 0, which may host the store, leaves the others to read what was noted


def rank_timeout() -> float:
    """Seconds that one rank may keep the others waiting."""
    return float(os.environ.get("SEGFLOW_RANK_TIMEOUT", _TIMEOUT))


class Peers:
    """What rank `index` of `count` knows of the others, told through the store."""

    def __init__(self, store: Rendezvous, index: int, count: int):
        self._store, self._index, self._count = store, index, count
        self._number, self._call = 0, "start"  # of the call under way
        self._processes: dict[int, ProcessIdentity] = {}
        self._store.set(f"process/{index}", json.dumps(asdict(ProcessIdentity.own())))
        atexit.register(self.leave)

    def arrive(self, call: str) -> bool:
        """Begin a call together: wait until every rank has arrived; True if the call before failed on some rank.

        Raises RankError if a rank fails, ends or dies meanwhile, does not come in time, or makes another call.
        """
        self._number, self._call = self._number + 1, call
        try:
            self._store.set(f"arrived/{self._number}/{self._index}", call)
            self._wait_for_all()
            calls = {rank: self._store.get(f"arrived/{self._number}/{rank}") for rank in range(self._count)}
            if set(calls.values()) == {call}:
                return bool(self._store.get(f"failed/{self._number - 1}"))
        except RuntimeError as problem:  # the store is gone
            raise self.explain(problem) from problem
        self._let_others_read()
        raise RankError(f"the ranks are at different calls: {calls}. Every rank must make the same calls.")

    def post(self, text: str) -> None:
        """Tell the others that this rank failed in the call under way."""
        self._blame(self._index, text)
        self._let_others_read()

    def require_all(self) -> None:
        """Raise RankError, naming the rank, if one is known to have failed, ended or died in this call."""
        failure = self._noted()
        for rank, process in self._processes.items():
            if not failure and process.is_surely_dead():
                failure = self._blame(rank, "has died")
        if failure:
            self._let_others_read()
            raise RankError(
                f"{self._call}: {failure}. What was committed is kept: start all ranks again and they go on there."
            )

    def explain(self, problem: BaseException) -> RankError:
        """The error for a collective that broke: names the rank that is to blame, if that shows in time."""
        deadline = time.monotonic() + _FOUND_OUT
        while time.monotonic() < deadline:
            try:
                self.require_all()
            except RankError as failure:
                return failure
            time.sleep(0.05)
        self.post("lost its connection to the other ranks")
        return RankError(
            f"{self._call}: the connection between the ranks broke ({problem}): a rank on another machine died, or one "
            f"kept the others waiting for {rank_timeout():,.0f} s (SEGFLOW_RANK_TIMEOUT). Start all ranks again."
        )

    def leave(self) -> None:
        """Tell the others that this rank takes no part any more."""
        atexit.unregister(self.leave)
        with suppress(RuntimeError):  # the store is gone, and with it whoever could read this
            self._store.set(f"ended/{self._index}", "ended")

    def _wait_for_all(self) -> None:
        """Wait until every rank has arrived at this call, and learn which processes they are."""
        missing, begun, reported = list(range(self._count)), time.monotonic(), False
        while missing := [rank for rank in missing if not self._store.get(f"arrived/{self._number}/{rank}")]:
            waited = time.monotonic() - begun
            if waited > 1:
                self._meet()
                self._blame_missing(missing, waited)
                self.require_all()
            if waited > _LATE and not reported:
                sys.stderr.write(f"segflow: rank {self._index} waits for rank(s) {missing} to call {self._call}.\n")
                reported = True
            time.sleep(0.002 if waited < 1 else 0.05)
        self._meet()
        self.require_all()

    def _meet(self) -> None:
        for rank in range(self._count):
            if rank not in self._processes and (content := self._store.get(f"process/{rank}")):
                self._processes[rank] = ProcessIdentity(**json.loads(content))

    def _blame_missing(self, missing: list[int], waited: float) -> None:
        for rank in missing:
            if self._store.get(f"ended/{rank}"):
                self._blame(rank, "has ended, and every rank must take part")
            elif waited > rank_timeout():
                self._blame(rank, f"did not call {self._call} within {rank_timeout():,.0f} s")

    def _blame(self, rank: int, text: str) -> str:
        """Note who failed, unless a failure was noted already; returns what is noted."""
        if not (noted := self._noted()):
            with suppress(RuntimeError):  # the store is gone
                self._store.set(f"failed/{self._number}", json.dumps([rank, text]))
        return noted or self._named(rank, text)

    def _noted(self) -> str:
        """Which rank failed in this call and how; empty if none was noted, or the store is gone."""
        with suppress(RuntimeError):
            if noted := self._store.get(f"failed/{self._number}"):
                return self._named(*json.loads(noted))
        return ""

    def _named(self, rank: int, text: str) -> str:
        process = self._processes.get(rank)
        return f"rank {rank} {'' if process is None else f'({process}) '}{text}"

    def _let_others_read(self) -> None:
        """Leave the others time to read what was noted in the store, if this rank may host it, before it fails."""
        if self._index == 0:
            time.sleep(_READ)
