"""Retrainings for the tasks: each distinct subset is trained once, whichever series, share or task asks for it.

Axis letters: M subsets, K examples, R repetitions, Q queries.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ...arguments import settle, truth, whole_number
from ...data.fingerprints import digest
from ...errors import ScoreError
from .bank import Bank, one_measurement, read_subsets
from .pool import Job
from .training import Training, check_is_training


class RetrainingOptions(TypedDict, total=False):
    """The options that every task which retrains hands on to `Retrainings`, which has their meaning and defaults."""

    repetitions: int
    seed: int
    measurement: int
    progress: bool | None


@dataclass(frozen=True)
class Retrainings:
    """Measurements after retraining on subsets, kept in banks in one folder.

    A subset that a bank in the folder holds is read from there; the others make a new bank. A training's seed follows
    from `seed`, the subset and the repetition alone, so the numbers do not depend on what was asked for before.

    Args:
        training: what the banks run.
        folder: where they are; tasks that share `training` and `seed` may share it, and train a subset once.
        repetitions: retrainings of each subset.
        seed: moves all seeds.
        measurement: which row, where the training measures several [P, Q].
        progress: show a bar; None: where there is a terminal.

    Raises:
        ScoreError: an option is no whole number, or the training is none.
    """

    training: Training
    folder: str | os.PathLike[str]
    repetitions: int = 3
    seed: int = 0
    measurement: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("repetitions", 1), ("seed", 0), ("measurement", 0)):
            settle(self, **{name: whole_number(name, getattr(self, name), ScoreError, least)})
        if self.progress is not None:
            settle(self, progress=truth("progress", self.progress, ScoreError))
        check_is_training(self.training)

    def measured(self, subsets: np.ndarray, repetitions: int | None = None) -> np.ndarray:
        """[M, R, Q]: each query's measurement after each retraining on each of the subsets [M, K].

        Raises:
            ScoreError: the folder holds retrainings of another recipe or seed, a file is damaged, or one diverged.
        """
        count = self.repetitions if repetitions is None else repetitions
        unique, places = np.unique(subsets, axis=0, return_inverse=True)
        if not unique.any(1).all():
            raise ScoreError(f"a subset keeps none of {unique.shape[1]} examples, so nothing can be trained.")
        keys = [row.tobytes() for row in unique]
        banks = self._banks(count, unique.shape[1])
        held = {row.tobytes(): (bank, m) for bank in banks for m, row in enumerate(bank.subsets)}
        missing = unique[[key not in held for key in keys]]
        if len(missing):
            banks.append(self._bank(Path(self.folder) / f"bank-{digest(missing)[:16]}", missing, count))
            held |= {row.tobytes(): (banks[-1], m) for m, row in enumerate(missing)}
        measured: dict[bytes, np.ndarray] = {}
        for bank in banks:
            wanted = {key: held[key][1] for key in keys if held[key][0] is bank}
            if wanted:
                of_bank = one_measurement(bank.run(self.progress, list(wanted.values())), self.measurement)
                measured |= dict(zip(wanted, of_bank, strict=True))
        in_order: np.ndarray = np.stack([measured[key] for key in keys])[places.reshape(-1)]
        return in_order

    def settings(self, series: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """What a table says of how it was made: these retrainings, and how many runs each series has."""
        options = {name: getattr(self, name) for name in ("repetitions", "seed", "measurement")}
        return options | {"runs": {name: len(runs) for name, runs in series.items()}}

    def nothing_removed(self, examples: int, repetitions: int | None = None) -> np.ndarray:
        """[R, Q]: the measurements of retrainings on everything."""
        whole: np.ndarray = self.measured(np.ones((1, examples), dtype=bool), repetitions)[0]
        return whole

    def _banks(self, repetitions: int, examples: int) -> list[Bank]:
        """The banks in the folder; ScoreError for one of other examples or another recipe."""
        banks = []
        for path in sorted(Path(self.folder).glob("bank-*/bank.json")):
            subsets = read_subsets(path.parent)
            if subsets.shape[1] != examples:
                raise ScoreError(
                    f"{path}: this bank is about {subsets.shape[1]} examples, now there are {examples}. Use another "
                    "folder, or delete this one to retrain everything."
                )
            banks.append(self._bank(path.parent, subsets, repetitions))
            banks[-1].check()
        return banks

    @cached_property
    def _described(self) -> _Described:
        return _Described(self.training, self.training.settings())

    def _bank(self, path: Path, subsets: np.ndarray, repetitions: int) -> Bank:
        return Bank(path, self._described, subsets, repetitions, self.seed)


@dataclass(frozen=True)
class _Described:
    """A training whose settings, which may hash much data, are computed once for all banks."""

    training: Training
    described: Mapping[str, Any]

    def settings(self) -> Mapping[str, Any]:
        return self.described

    def batches(self, jobs: Sequence[Job]) -> list[list[int]]:
        return self.training.batches(jobs)

    def run(self, jobs: Sequence[Job]) -> np.ndarray:
        return self.training.run(jobs)
