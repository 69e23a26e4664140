"""What a bank or a task retrains with: the protocol, and any training function in a pool of processes.

Axis letters: J jobs, Q queries, P measurements of each query.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...arguments import plain, settle, shown, whole_number
from ...data.changing import running
from ...errors import ScoreError
from .pool import Job, TrainAndMeasure, checked_processes, each_job, workers_for
from .recipe_identity import code_of


class Training(Protocol):
    """What a bank or a task retrains with: `BatchedTraining`, `FunctionTraining`, or a class of your own.

    One that has an `examples` attribute, the number of its examples, is checked to fit the scores it is given with.
    """

    def settings(self) -> Mapping[str, Any]:
        """What the results depend on, as JSON."""

    def batches(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Places of the jobs that are run, and committed to disk, together."""

    def run(self, jobs: Sequence[Job]) -> np.ndarray:
        """The measurements [J, ...] after training on each (indices of what is kept, seed)."""


def check_is_training(training: object) -> None:
    """ScoreError for what is no training, such as a plain function."""
    if not all(callable(getattr(training, name, None)) for name in ("settings", "batches", "run")):
        raise ScoreError(
            f"training: {type(training).__name__}, expected a BatchedTraining, a FunctionTraining, or what has their "
            "methods. Wrap a function in FunctionTraining(function, fingerprint)."
        )


@dataclass(frozen=True)
class FunctionTraining:
    """Any training function, run by `retrain`'s pool of processes.

    Args:
        train_and_measure: as for `retrain`: (indices of the kept examples or groups, seed) -> the measurements [Q], or
            several of each query [P, Q].
        fingerprint: JSON that names what the function depends on (data, recipe). A bank is bound to it, and to what
            the function reaches: its code, closure, defaults, globals and what these hold. Files that it reads,
            environment variables, names made up as it runs (`globals()[...]`, `eval`), where generators stand, the
            order of a dict, and what installed packages do are seen by nobody: name them here.
        processes: how many at a time; None and -1: as many as there are cores.
        each: trainings of one process that are committed together.
    """

    train_and_measure: TrainAndMeasure
    fingerprint: Mapping[str, Any]
    processes: int | None = None
    each: int = 4

    def __post_init__(self) -> None:
        if not callable(self.train_and_measure):
            raise ScoreError(f"train_and_measure={shown(self.train_and_measure)}: expected a function.")
        settle(self, fingerprint=_plain_json(self.fingerprint), each=whole_number("each", self.each, ScoreError, 1))
        settle(self, processes=checked_processes(self.processes))

    def settings(self) -> dict[str, Any]:
        """The fingerprint that was given, and what the function reaches."""
        return {"function": dict(self.fingerprint), "code": dict(code_of({"function": self.train_and_measure})())}

    def batches(self, jobs: Sequence[Job]) -> list[list[int]]:
        """A few jobs for each process."""
        size = self.each * workers_for(self.processes)
        return [list(range(begin, min(begin + size, len(jobs)))) for begin in range(0, len(jobs), size)]

    def run(self, jobs: Sequence[Job]) -> np.ndarray:
        """Train and measure in parallel processes: [J, Q] or [J, P, Q].

        Raises:
            ScoreError: the function gives no numbers, or not always of one shape.
        """
        return stacked(list(self.results(jobs)))

    def results(self, jobs: Sequence[Job]) -> Iterator[np.ndarray]:
        """What `run` gives for each job, one after the other, from processes that stay for all of them."""
        with ExitStack() as stack:
            if workers_for(self.processes) == 1 or len(jobs) == 1:  # in this process
                stack.enter_context(running(code_of({"function": self.train_and_measure})))
            for measured in each_job(self.train_and_measure, jobs, self.processes):
                if measured.ndim > 2:
                    raise ScoreError(
                        f"train_and_measure gave measurements of shapes [{measured.shape}]: expected [Q] or [P, Q]."
                    )
                yield np.atleast_1d(measured)


def stacked(measured: Sequence[np.ndarray]) -> np.ndarray:
    """The measurements of several jobs as one array; ScoreError unless they are of one shape."""
    shapes = sorted({of_job.shape for of_job in measured})
    if len(shapes) > 1:
        raise ScoreError(
            f"train_and_measure gave measurements of shapes {shapes}: expected [Q] or [P, Q], the same each time."
        )
    return np.stack(measured)


def _plain_json(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint as JSON will give it back, its numbers of any kind as plain ones; ScoreError where JSON cannot."""
    try:
        as_read_back: dict[str, Any] = json.loads(json.dumps(dict(fingerprint), default=_plain_number))
    except (TypeError, ValueError) as problem:
        raise ScoreError(
            f"fingerprint={shown(fingerprint)}: expected what JSON can hold ({problem}). Name data and recipe by "
            "numbers and text."
        ) from problem
    return as_read_back


def _plain_number(value: object) -> object:
    number = plain(value)
    if number is value:
        raise TypeError(f"it holds {shown(value)}")
    return number
