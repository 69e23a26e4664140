"""Processes that stand ready to be ranks, so that tests need not start Python again for every job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failed:
    """What a rank's job raised; "died" where its process ended."""

    kind: str
    text: str
    trace: str = ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def forkserver() -> Any:
    """How to start processes quickly: forked from one that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.helpers", "torch._dynamo", __name__])
    return context


class Gang:
    """Up to `size` processes; each job runs on the first n of them, as n ranks of a group of their own over gloo."""

    def __init__(self, size: int = 4):
        self._context = forkserver()
        self._workers: list[Any] = [None] * size

    def run(
        self, count: int, job: Callable[..., Any], *arguments: Any, timeout: float = 90, **environment: str
    ) -> list[Any]:
        """Each rank's result of `job(*arguments)`, or Failed; a rank that hangs is killed, and that is an error."""
        port = free_port()
        for index in range(count):
            self._ready(index)
            self._workers[index][1].send((job, arguments, index, count, port, environment))
        deadline, results = time.monotonic() + timeout, [None] * count
        hung = []
        for index in range(count):
            process, pipe = self._workers[index]
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    hung.append(index)
                    self._end(index)
                    continue
                results[index] = pipe.recv()
                if isinstance(results[index], Failed) and results[index].kind == "RankError":
                    self._end(index)  # its group may be in any state
            except (EOFError, ConnectionError):
                process.join(10)
                results[index] = Failed("died", f"exit code {process.exitcode}")
                self._end(index)
        assert not hung, f"ranks {hung} of {count} still hung after {timeout} s; the others: {results}"
        return results

    def close(self) -> None:
        for index, worker in enumerate(self._workers):
            if worker is not None:
                self._end(index)

    def _ready(self, index: int) -> None:
        if self._workers[index] is None:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers[index] = (process, ours)

    def _end(self, index: int) -> None:
        process, pipe = self._workers[index]
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        pipe.close()
        self._workers[index] = None


def _work(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.fsync = lambda _descriptor: None  # no power is cut here
    import torch
    from torch import distributed

    from segflow.runtime import ranks

    torch.set_num_threads(1)
    while True:
        try:
            job, arguments, index, count, port, environment = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        if count > 1:
            distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=index, world_size=count)
        try:
            result = job(*arguments)
        except BaseException as problem:  # noqa: BLE001 - the parent is told
            result = Failed(type(problem).__name__, str(problem), traceback.format_exc())
        ranks.leave()
        ranks._times_joined = 0  # the next job's ranks may be younger processes
        pipe.send(result)
        if isinstance(result, Failed) and result.kind == "RankError":
            time.sleep(60)  # until it is ended
        if count > 1:
            distributed.destroy_process_group()
        for name in environment:
            os.environ.pop(name)
