"""Retraining on subsets, in parallel processes: the ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ...arguments import plain, real_number, truth, whole_number
from ...data.streams import stream
from ...errors import ScoreError
from ...runtime.progress import track
from ...runtime.ranks import current
from ...runtime.workers import WorkerError, cores, each_call
from ..arguments import as_array
from ..subsets import Subsets, as_subsets
from .random_state import all_seeded
from .seeds import training_seeds

Job = tuple[np.ndarray, int]
TrainAndMeasure = Callable[[np.ndarray, int], np.ndarray | Sequence[float]]


def random_subsets(count: int, groups: int, fraction: float = 0.5, seed: int = 0, *, fixed: bool = True) -> np.ndarray:
    """[count, groups] booleans, each row keeping that fraction of the groups at random.

    fixed: every row keeps as many. False: each group is kept by a coin flip of its own, so that sizes vary, which
    `empirical_influence` can tell the mean effect from; a row that keeps none is drawn again.

    Raises:
        ScoreError: the fraction keeps none or all, or there are no subsets.

    Example:
        >>> random_subsets(3, 10).sum(1)
        array([5, 5, 5])
    """
    count, groups = whole_number("count", count, ScoreError, 1), whole_number("groups", groups, ScoreError, 1)
    kept = round(groups * real_number("fraction", fraction, ScoreError))
    if not 0 < kept < groups:
        raise ScoreError(f"fraction={fraction} keeps {kept} of {groups} groups: expected some, but not all.")
    seed = whole_number("seed", seed, ScoreError)
    if not truth("fixed", fixed, ScoreError):
        return _coin_flips(count, groups, fraction, stream(seed, "coin-flip subsets"))
    generator = stream(seed, "random subsets")
    return np.stack([generator.permutation(groups) < kept for _ in range(count)])


def _coin_flips(count: int, groups: int, fraction: float, generator: np.random.Generator) -> np.ndarray:
    kept = np.zeros((count, groups), dtype=bool)
    while (empty := ~kept.any(1)).any():
        kept[empty] = generator.random((int(empty.sum()), groups)) < fraction
    return kept


def retrain(
    train_and_measure: TrainAndMeasure,
    subsets: Subsets,
    *,
    repetitions: int = 1,
    processes: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> np.ndarray:
    """Train on every subset, in parallel processes of one thread each; under a launcher, each rank does its share.

    Args:
        train_and_measure: (indices of the kept examples or groups, seed) -> the measurements [Q]. The global
            generators of Python, NumPy and torch begin at that seed, too. Other processes get the function by value
            (cloudpickle), so it may be a closure, or stand in a notebook or in a script without a main guard.
        subsets: [M, K] booleans, or for each subset a list of the indices that it keeps.
        repetitions: retrainings of each subset, with seeds of their own.
        processes: how many at a time on each rank; None and -1: as many as there are cores for each.
        seed: moves all seeds: those of each seed, subset and repetition are independent of all others.
        progress: show a bar; None: where there is a terminal.

    Returns:
        [M, repetitions, Q] in float64 (of several measurements [P, Q] all P Q, row after row); average over the second
        axis for the linear datamodeling score.

    Raises:
        ScoreError: there is nothing to train; a retraining failed, gave no numbers, other than finite ones, or not as
            many as the others; or the function cannot be sent to other processes.
    """
    repetitions, seed = whole_number("repetitions", repetitions, ScoreError, 1), whole_number("seed", seed, ScoreError)
    processes = checked_processes(processes)
    progress = None if progress is None else truth("progress", progress, ScoreError)
    kept_MK, ranks = as_subsets(subsets), current()
    pairs = [(subset, repetition) for subset in range(len(kept_MK)) for repetition in range(repetitions)]
    seeds_MR = training_seeds(kept_MK, repetitions, seed)
    if not kept_MK.any(1).all():
        raise ScoreError(f"subset {int(np.argmin(kept_MK.any(1)))} keeps nothing, so that nothing can be trained.")
    jobs = [(np.flatnonzero(kept_MK[subset]), int(seeds_MR[subset, repetition])) for subset, repetition in pairs]
    with ranks.together("retrain"):
        own = ranks.share(list(range(len(jobs))))
        try:
            results = each_job(train_and_measure, [jobs[job] for job in own], processes, finite=True)
            by_this_rank = list(track(results, "retraining", total=len(own), enabled=progress))
        except JobError as failure:
            raise failure.of(*pairs[own[failure.place]]) from failure.__cause__
        by_rank = ranks.gather([measured.ravel().tolist() for measured in by_this_rank])
    in_order = [by_rank[number % ranks.count][number // ranks.count] for number in range(len(jobs))]
    sizes = sorted(set(map(len, in_order)))
    if len(sizes) > 1:
        raise ScoreError(f"train_and_measure gave {sizes} measurements. Return as many each time.")
    return np.asarray(in_order, dtype=np.float64).reshape(len(kept_MK), repetitions, -1)


class JobError(ScoreError):
    """A retraining failed. place: which of the jobs; job: what it kept, and its seed; text: what went wrong."""

    def __init__(self, place: int, job: Job, text: str):
        super().__init__(f"a retraining failed: {_described(job)}: {text}")
        self.place, self.job, self.text = place, job, text

    def of(self, subset: int, repetition: int) -> ScoreError:
        """The error that names the subset and the repetition as well."""
        where = f"subset {subset}, repetition {repetition}, {_described(self.job)}"
        return ScoreError(f"a retraining failed: {where}: {self.text}")


def _described(job: Job) -> str:
    return f"{len(job[0])} kept, seed {job[1]}"


def workers_for(processes: int | None) -> int:
    """How many processes are asked for: None or -1 for each core that this rank may use."""
    return cores() if processes in (None, -1) else int(processes)  # type: ignore[arg-type]


def checked_processes(processes: object) -> int | None:
    """A number of processes, -1 and None being one for each core; ScoreError for another number below 1."""
    if processes is None:
        return None
    number = plain(processes)
    if isinstance(number, int | float) and number == -1:
        return None
    return whole_number("processes", processes, ScoreError, 1, advice="None or -1 takes one for each core.")


def each_job(
    train_and_measure: TrainAndMeasure, jobs: Sequence[Job], processes: int | None, finite: bool = False
) -> Iterator[np.ndarray]:
    """The measurements of each job as they are shaped, in parallel where more than one process is asked for.

    finite: whether a measurement that is not finite is an error. Raises JobError.
    """
    try:
        yield from each_call(partial(_measured, train_and_measure, finite), jobs, workers_for(processes))
    except WorkerError as failure:
        raise JobError(failure.place, jobs[failure.place], str(failure)) from failure.__cause__


def _measured(train_and_measure: TrainAndMeasure, finite: bool, kept: np.ndarray, seed: int) -> np.ndarray:
    """An array of what the function gives; made where it ran, as a tensor with a gradient cannot leave its process.

    The global generators begin at the job's seed, so that a function that forgets its seed repeats itself.
    """
    with all_seeded(seed):
        measured = _as_numbers(train_and_measure(kept, seed))
    if finite and not np.isfinite(measured).all():
        raise ScoreError("a measurement is not finite. Did its training diverge? Lower the learning rate.")
    return measured


def _as_numbers(given: Any) -> np.ndarray:
    try:
        if given is None:
            raise TypeError("nothing was returned")
        if isinstance(given, list | tuple):
            given = [row.tolist() if isinstance(row, torch.Tensor | np.ndarray) else row for row in given]
        array = as_array(given)
        if array.dtype.kind == "c":
            raise TypeError("complex numbers, of which the imaginary part would be lost")
        if array.size == 0:
            raise ValueError("no measurement")
        return array.astype(np.float64)
    except (TypeError, ValueError) as problem:
        raise ScoreError(
            f"train_and_measure gave {type(given).__name__}: {problem}. Return numbers [Q], or rows of equal length "
            "[P, Q]."
        ) from problem
