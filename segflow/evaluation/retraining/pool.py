"""Retraining on subsets, in parallel processes: the ground truth."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...arguments import real_number, truth, whole_number
from ...data.streams import stream
from ...errors import ScoreError
from ...runtime.progress import track
from ...runtime.ranks import current, leave
from ..arguments import as_array
from ..subsets import as_subsets

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
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(groups) < kept for _ in range(count)])


def _coin_flips(count: int, groups: int, fraction: float, generator: np.random.Generator) -> np.ndarray:
    kept = np.zeros((count, groups), dtype=bool)
    while (empty := ~kept.any(1)).any():
        kept[empty] = generator.random((int(empty.sum()), groups)) < fraction
    return kept


def retrain(
    train_and_measure: TrainAndMeasure,
    subsets: np.ndarray,
    *,
    repetitions: int = 1,
    processes: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> np.ndarray:
    """Train on every subset, in parallel processes of one thread each; under a launcher, each rank does its share.

    Args:
        train_and_measure: (indices of the kept examples or groups, seed) -> the measurements [Q]. With more than one
            process it must be importable (a function at the top of a module, or functools.partial of one).
        subsets: [M, K] booleans.
        repetitions: retrainings of each subset, with seeds of their own.
        processes: how many at a time on each rank; by default as many as there are cores for each.
        seed: moves all seeds.
        progress: show a bar; None: where there is a terminal.

    Returns:
        [M, repetitions, Q] in float64; average over the second axis for the linear datamodeling score.

    Raises:
        ScoreError: there is nothing to train, or the function gives no numbers.
    """
    repetitions, seed = whole_number("repetitions", repetitions, ScoreError, 1), whole_number("seed", seed, ScoreError)
    if processes is not None:
        processes = whole_number("processes", processes, ScoreError, 1, advice="None takes one for each core.")
    progress = None if progress is None else truth("progress", progress, ScoreError)
    if len(subsets) < 1:
        raise ScoreError("no subsets were given. Expected at least one, as a row of booleans.")
    jobs = [
        (np.flatnonzero(kept), seed + 1 + number * repetitions + repetition)
        for number, kept in enumerate(as_subsets(subsets))
        for repetition in range(repetitions)
    ]
    ranks = current()
    with ranks.together("retrain"):
        by_this_rank = run_jobs(train_and_measure, ranks.share(jobs), processes, progress)
        by_rank = ranks.gather([measured.ravel().tolist() for measured in by_this_rank])
    in_order = [by_rank[number % ranks.count][number // ranks.count] for number in range(len(jobs))]
    return np.asarray(in_order, dtype=np.float64).reshape(len(subsets), repetitions, -1)


def run_jobs(
    train_and_measure: TrainAndMeasure, jobs: list[Job], processes: int | None, progress: bool | None
) -> list[np.ndarray]:
    """The measurements of each job as they are shaped, in parallel where more than one process is asked for."""
    cores = max(1, (os.cpu_count() or 1) // current().local_count)
    workers = min(processes or cores, len(jobs))
    if workers <= 1:
        with _one_thread():
            return [_measured(train_and_measure, *job) for job in track(jobs, "retraining", enabled=progress)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin_alone) as pool:
        futures = [pool.submit(_measured, train_and_measure, *job) for job in jobs]
        return [future.result() for future in track(futures, "retraining", enabled=progress)]


def _measured(train_and_measure: TrainAndMeasure, kept: np.ndarray, seed: int) -> np.ndarray:
    """An array of what the function gives; made where it ran, as a tensor with a gradient cannot leave its process."""
    given: Any = train_and_measure(kept, seed)
    try:
        if given is None:
            raise TypeError("nothing was returned")
        if isinstance(given, list | tuple):
            given = [row.tolist() if isinstance(row, torch.Tensor | np.ndarray) else row for row in given]
        return as_array(given).astype(np.float64)
    except (TypeError, ValueError) as problem:
        raise ScoreError(
            f"train_and_measure gave {type(given).__name__} for {len(kept)} kept and seed {seed}: {problem}. Return "
            "numbers [Q], or rows of equal length [P, Q]."
        ) from problem


def _begin_alone() -> None:
    """A process of the pool has one thread, and is no rank even if its parent is one."""
    torch.set_num_threads(1)
    leave()


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in the processes, so that sums are rounded alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
