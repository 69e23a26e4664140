"""Calls of a function in worker processes of one thread each, which end when their parent does."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import cloudpickle
import loky
import psutil
import torch
from threadpoolctl import threadpool_limits

from ..errors import SegflowError
from .ranks import current, leave

# Libraries that are not loaded yet when a worker begins learn here that they have one thread.
_LIBRARIES = ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR", "NUMBA")
_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in _LIBRARIES} | {"VECLIB_MAXIMUM_THREADS": "1"}
_POLL = 1.0  # seconds between two looks at the parent

_pickled: bytes = b""  # of a worker: what it calls
_function: Any = None  # and that, unpickled


class WorkerError(SegflowError):
    """A call failed, or its worker ended. place: which call; the cause is the error that it raised."""

    def __init__(self, text: str, place: int):
        super().__init__(text)
        self.place = place


def cores() -> int:
    """The cores that one rank may use: those of this machine that are allowed, shared among its ranks."""
    return max(1, int(loky.cpu_count()) // current().local_count)


def each_call(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Any]:
    """What a function gives for each tuple of arguments, in order, from one process or several, each of one thread.

    Several processes get the function by value, as cloudpickle does: closures and functions of a notebook or of an
    unguarded script as well.

    Raises:
        WorkerError: a call failed, the function cannot be sent to a worker, or a worker ended.
    """
    workers = min(processes, len(calls))
    yield from _here(function, calls) if workers <= 1 else _in_workers(function, calls, workers)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch and every other library that is loaded have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def _here(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    for place, call in enumerate(calls):
        try:
            with one_thread():
                result = function(*call)
        except (Exception, SystemExit) as problem:
            raise WorkerError(_told(problem), place) from problem
        yield result


def _in_workers(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    place, initargs = 0, (_sendable(function), os.getpid())
    pool = loky.ProcessPoolExecutor(workers, initializer=_begin, initargs=initargs, env=_ONE_THREAD)
    try:
        futures = [pool.submit(_call, call) for call in calls]
        for future in futures:
            yield future.result()
            place += 1
        pool.shutdown()
    except BrokenProcessPool as problem:
        text = f"a worker process ended. Was there too little memory? Give fewer processes. ({problem})"
        raise WorkerError(text, place) from problem
    except (Exception, SystemExit) as problem:
        raise WorkerError(_told(problem), place) from problem
    finally:
        pool.shutdown(kill_workers=True)


def _told(problem: BaseException) -> str:
    """An error as text; our own ones say it all."""
    return str(problem) if isinstance(problem, SegflowError) else f"{type(problem).__name__}: {problem}"


def _sendable(function: Callable[..., Any]) -> bytes:
    try:
        sendable: bytes = cloudpickle.dumps(function)
    except Exception as problem:
        raise WorkerError(
            f"{_innermost(function)!r} cannot be sent to other processes ({type(problem).__name__}: {problem}). Use "
            "processes=1, or make what it holds (a lock, an open file, a generator, a connection) inside the function.",
            0,
        ) from problem
    return sendable


def _innermost(function: Callable[..., Any]) -> Any:
    """The function that a partial of another one is given, as it is the user's."""
    given = [one for one in getattr(function, "args", ()) if callable(one)]
    return given[0] if given else function


def _begin(sent: bytes, parent: int) -> None:
    """A worker has one thread, is no rank even if its parent is one, and ends with its parent."""
    global _pickled  # noqa: PLW0603
    _pickled = sent
    torch.set_num_threads(1)
    leave()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent and psutil.pid_exists(parent):
        time.sleep(_POLL)
    os._exit(1)


def _call(arguments: tuple[Any, ...]) -> Any:
    """Unpickled at the first call, so that an error in it is told as one of the call."""
    global _function  # noqa: PLW0603
    if _function is None:
        _function = pickle.loads(_pickled)  # noqa: S301  # what this process's own parent sent
    with one_thread():
        try:
            return _function(*arguments)
        except (Exception, SystemExit) as problem:
            if _returns(problem):
                raise
            raise RuntimeError(f"{type(problem).__name__}: {problem}") from None


def _returns(problem: BaseException) -> bool:
    """Whether an error arrives in the parent as it is."""
    try:
        return type(pickle.loads(cloudpickle.dumps(problem))) is type(problem)  # noqa: S301
    except Exception:  # noqa: BLE001
        return False
