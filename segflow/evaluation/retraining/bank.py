"""A bank of retrained models: the ground truth on disk, made once, resumed after a kill, refused for another recipe.

Axis letters: J jobs, M subsets, K examples or groups, R repetitions, Q queries, P measurements of each query.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...arguments import settle, truth, whole_number, whole_numbers
from ...data.fingerprints import digest
from ...errors import ScoreError
from ...results.same_groups import check_single_examples
from ...results.scores import Scores
from ...results.sealed import as_bytes, read_sealed, write_sealed
from ...results.slope import Slope
from ...runtime.progress import track
from ...runtime.ranks import current
from ...store.comparison import agree, difference
from ...store.files import TensorFile, read_json, write_json, write_tensors
from ..magnitude import slope_of_change
from ..predicted import FEWEST_SUBSETS
from ..subsets import as_subsets
from .pool import Job, JobError
from .seeds import training_seeds
from .training import FunctionTraining, Training, check_is_training, stacked

FORMAT = 2
_NOTE = "bank.json"  # the file that says what the bank is


@dataclass(frozen=True)
class Bank:
    """Measurements after retraining on every subset, several times, in a folder.

    `run` trains what is missing and returns everything. What was trained is committed batch by batch, so a run that
    was killed goes on where it was, and a finished one is read. `repetitions` may grow later. The folder is bound to a
    fingerprint of training, data, subsets and seed; with another one it is refused, and so is every file in it that was
    made with another one.

    Args:
        folder: where the bank is; made if it is not there.
        training: `BatchedTraining`, `FunctionTraining`, or one of your own.
        subsets: [M, K] booleans, which of the training's examples (or groups) each retraining keeps; or for each a list
            of indices, where the training says by `examples` how many there are.
        repetitions: retrainings R of each subset.
        seed: moves all seeds. A training's seed follows from it, from what its subset keeps and from the number of its
            repetition alone: whatever else is trained, these seeds are independent of all others.

    Raises:
        ScoreError: the folder holds a bank of something else, or a damaged file; a training failed; or one diverged,
            which is told at the end, when all others are committed.

    Example:
        >>> import tempfile
        >>> from segflow.evaluation import FunctionTraining
        >>> training = FunctionTraining(lambda kept, seed: [float(kept.sum())], {"sum": "of indices"}, processes=1)
        >>> bank = Bank(tempfile.mkdtemp(), training, np.array([[1, 0, 1], [0, 1, 1]], dtype=bool), repetitions=2)
        >>> bank.run(progress=False)[:, :, 0]
        array([[2., 2.],
               [3., 3.]])
        >>> bank.missing
        []
    """

    folder: str | os.PathLike[str]
    training: Training
    subsets: Any
    repetitions: int = 5
    seed: int = 0
    _path: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_is_training(self.training)
        kept = as_subsets(self.subsets, getattr(self.training, "examples", None), guess=False)
        settle(self, subsets=kept, seed=whole_number("seed", self.seed, ScoreError))
        settle(self, repetitions=whole_number("repetitions", self.repetitions, ScoreError, 1))
        object.__setattr__(self, "_path", Path(self.folder))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the bank's numbers depend on, as it is now."""
        content = {"format": FORMAT, "subsets": _described(self.subsets), "seed": self.seed}
        content["default dtype"] = str(torch.get_default_dtype())
        as_read_back: dict[str, Any] = json.loads(json.dumps(content | {"training": self.training.settings()}))
        return as_read_back

    @property
    def missing(self) -> list[tuple[int, int]]:
        """The (repetition, subset) pairs that are still to be trained."""
        return self._missing(_committed(self._path, self._bound(self.fingerprint)))

    def _missing(self, committed: Mapping[tuple[int, int], np.ndarray]) -> list[tuple[int, int]]:
        pairs = [(r, m) for r in range(self.repetitions) for m in range(len(self.subsets))]
        return [pair for pair in pairs if pair not in committed]

    def run(self, progress: bool | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        """Train what is missing; the measurements of all, [M, repetitions, Q] (or [M, repetitions, P, Q]).

        progress: show a bar. rows: the subsets that are wanted, in the order of the result; by default all.
        """
        progress = None if progress is None else truth("progress", progress, ScoreError)
        if current().count > 1:
            raise ScoreError("a bank is filled by one process. Start it without a launcher, or use `retrain`.")
        last = len(self.subsets) - 1
        wanted = list(range(last + 1) if rows is None else whole_numbers("rows", rows, ScoreError, 0, last))
        if not wanted:
            raise ScoreError("rows: none was given. Expected one subset or more, or None for all.")
        chosen, fingerprint = set(wanted), self.fingerprint
        bank = self._bound(fingerprint)
        committed = _committed(self._path, bank)
        pairs = [(r, m) for r, m in self._missing(committed) if m in chosen]
        if not (self._path / "subsets.safetensors").exists():
            subsets = {"subsets": torch.from_numpy(self.subsets)}
            write_tensors(self._path / "subsets.safetensors", subsets, None, ScoreError)
        if not (self._path / _NOTE).exists():
            write_json(self._path / _NOTE, fingerprint, ScoreError)
        if pairs:
            self._train(pairs, bank, progress)
            committed = _committed(self._path, bank)
        return _collected(committed, wanted, self.repetitions, self._path)

    def _train(self, pairs: list[tuple[int, int]], bank: str, progress: bool | None) -> None:
        """Train what is missing, and commit it batch by batch; those that diverge are told when the others are done."""
        seeds_MR = training_seeds(self.subsets, self.repetitions, self.seed)
        jobs = [(np.flatnonzero(self.subsets[m]), int(seeds_MR[m, r])) for r, m in pairs]
        diverged: list[int] = []
        batches = self.training.batches(jobs)
        for places, measured in track(self._results(pairs, jobs, batches), "retraining", len(batches), progress):
            finite = np.isfinite(measured.reshape(len(places), -1)).all(1)
            diverged += [place for place, whole in zip(places, finite, strict=True) if not whole]
            self._commit([pairs[place] for place in np.array(places)[finite]], measured[finite], bank)
            if len(diverged) == len(places):  # all of the first batch
                break
        if diverged:
            repetition, subset = pairs[diverged[0]]
            raise ScoreError(
                f"{self._path}: {len(diverged)} of {len(pairs)} trainings diverged, the first is subset {subset}, "
                f"repetition {repetition}, seed {jobs[diverged[0]][1]}: a measurement is not finite. Lower the "
                "learning rate. What did not diverge is kept."
            )

    def _results(
        self, pairs: Sequence[tuple[int, int]], jobs: Sequence[Job], batches: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """The places of the jobs of each batch, and their measurements."""
        try:
            if isinstance(self.training, FunctionTraining):  # whose processes stay for all batches
                results = self.training.results(jobs)
                yield from ((places, stacked(list(islice(results, len(places))))) for places in batches)
            else:
                yield from ((places, self._measured([jobs[place] for place in places])) for places in batches)
        except JobError as failure:
            repetition, subset = pairs[failure.place]
            raise failure.of(subset, repetition) from failure.__cause__

    def _measured(self, jobs: Sequence[Job]) -> np.ndarray:
        measured = np.asarray(self.training.run(jobs), dtype=np.float64)
        if len(measured) != len(jobs):
            raise ScoreError(f"bank: {len(measured)} results of {len(jobs)} trainings. Return one for each.")
        return measured

    def _commit(self, pairs: list[tuple[int, int]], measured: np.ndarray, bank: str) -> None:
        if pairs:
            tensors = {"pairs": torch.tensor(pairs), "measured": torch.from_numpy(measured)}
            tensors["bank"] = as_bytes(bank)
            repetition, subset = pairs[0]
            write_sealed(self._path / f"measured-{repetition:03d}-{subset:06d}.safetensors", tensors)

    def slope(self, scores: Scores, measurement: int | None = None) -> Slope:
        """The slope of real changes on those that scores predict, over the subsets that are trained to the end.

        Nothing is trained: subsets of which a repetition is missing do not count. See `slope_of_change`.

        Args:
            scores: over the examples (or groups) that the subsets are about, with a row for each query measured.
            measurement: which row, where the training measures several of each query [P, Q].

        Raises:
            ScoreError: the folder holds something else, fewer than three subsets are complete, the training measures
                several and none was chosen, or the scores do not fit.

        Example:
            >>> import tempfile
            >>> from segflow.evaluation import FunctionTraining
            >>> training = FunctionTraining(lambda kept, seed: [3.0 * kept.sum()], {"sum": "of indices"}, processes=1)
            >>> subsets = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]], dtype=bool)
            >>> bank = Bank(tempfile.mkdtemp(), training, subsets, repetitions=1)
            >>> _ = bank.run(progress=False)
            >>> scores = Scores(torch.tensor([[0.0, -1.0, -2.0]]), ("q",), ("a", "b", "c"), (1, 1, 1))
            >>> bank.slope(scores).value
            3.0
        """
        chosen = None if measurement is None else whole_number("measurement", measurement, ScoreError)
        if (examples := getattr(self.training, "examples", None)) is not None:
            check_single_examples(scores, f"slope: scores for a bank of subsets of {examples} examples")
        committed = _committed(self._path, self._bound(self.fingerprint))
        missing = {m for _, m in self._missing(committed)}
        complete = [m for m in range(len(self.subsets)) if m not in missing]
        if len(complete) < FEWEST_SUBSETS:
            raise ScoreError(
                f"{self._path}: {len(complete)} of {len(self.subsets)} subsets have all {self.repetitions} "
                f"repetitions, expected {FEWEST_SUBSETS} or more. Run the bank, or open it with fewer repetitions."
            )
        measured = _collected(committed, complete, self.repetitions, self._path)
        return slope_of_change(scores, self.subsets[complete], one_measurement(measured, chosen))

    def check(self) -> None:
        """Raise ScoreError if the folder holds a bank of something else."""
        self._bound(self.fingerprint)

    def _bound(self, fingerprint: Mapping[str, Any]) -> str:
        """The digest that each of the bank's files carries; ScoreError if the folder holds another bank."""
        path = self._path / _NOTE
        if not path.exists():
            return _digest(fingerprint)
        on_disk = read_json(path, ScoreError)
        if not agree(on_disk, fingerprint):
            raise ScoreError(
                f"{path}: this bank was made with something else ({difference(on_disk, fingerprint)}). Use "
                "another folder, or delete this one to retrain everything."
            )
        return _digest(on_disk)


def read_bank(folder: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """A bank's subsets [M, K] and its measurements [M, R, Q] or [M, R, P, Q], as far as whole repetitions are there.

    Raises:
        ScoreError: there is no bank, no repetition is whole, or a file is damaged.
    """
    path = Path(folder)
    stored, subsets = read_json(path / _NOTE, ScoreError, {"subsets": str}), read_subsets(path)
    if stored["subsets"] != _described(subsets):
        raise ScoreError(f"{path}: subsets.safetensors does not hold the subsets that bank.json is about. Restore it.")
    committed = _committed(path, _digest(stored))
    repetitions = 0
    while all((repetitions, m) in committed for m in range(len(subsets))):
        repetitions += 1
    return subsets, _collected(committed, range(len(subsets)), max(repetitions, 1), path)


def one_measurement(measured: np.ndarray, chosen: int | None) -> np.ndarray:
    """[M, R, Q]: the measurement chosen of [M, R, P, Q], or the only one; ScoreError if it is not there."""
    rows_MRPQ = measured if measured.ndim == 4 else measured[:, :, None]
    count = rows_MRPQ.shape[2]
    place = 0 if chosen is None and count == 1 else chosen
    if place is None or not 0 <= place < count:
        raise ScoreError(
            f"measurement={chosen}: the training has {count} for each query. Choose one, counted from 0 "
            "(calibrating: scores.calibrated(bank.slope(scores, measurement=0)))."
        )
    of_one: np.ndarray = rows_MRPQ[:, :, place]
    return of_one


def _described(subsets: np.ndarray) -> str:
    return f"{subsets.shape} {digest(subsets)}"


def read_subsets(path: Path) -> np.ndarray:
    """The subsets [M, K] of the bank in a folder; ScoreError if they are missing or damaged."""
    stored = TensorFile(path / "subsets.safetensors", None, ScoreError).tensor("subsets", (None, None))
    if stored.dtype != torch.bool or 0 in stored.shape:
        raise ScoreError(
            f"{path / 'subsets.safetensors'}: {stored.dtype} of shape {tuple(stored.shape)}, expected booleans [M, K]. "
            "Delete the bank to retrain everything."
        )
    subsets: np.ndarray = stored.numpy()
    return subsets


def _digest(fingerprint: Mapping[str, Any]) -> str:
    return digest(json.dumps(fingerprint, sort_keys=True))


def _committed(path: Path, bank: str) -> dict[tuple[int, int], np.ndarray]:
    """Every committed measurement by its (repetition, subset); ScoreError for a file of another bank."""
    committed: dict[tuple[int, int], np.ndarray] = {}
    for file in sorted(path.glob("measured-*.safetensors")):
        tensors = read_sealed(file, {"pairs", "measured", "bank"}, "measurements of a bank", "Bank.run")
        pairs, measured = tensors["pairs"], tensors["measured"]
        whole = pairs.dtype == torch.int64 and pairs.ndim == 2 and pairs.shape[1] == 2 and not (pairs < 0).any()
        real = measured.is_floating_point() and bool(measured.isfinite().all())
        if not whole or not real or measured.ndim < 1 or len(measured) != len(pairs):
            raise ScoreError(
                f"{file}: pairs {tuple(pairs.shape)} {pairs.dtype} and measurements {tuple(measured.shape)} "
                f"{measured.dtype} make no sense. Delete it and run the bank again."
            )
        if tensors["bank"].dtype != torch.uint8 or tensors["bank"].tolist() != as_bytes(bank).tolist():
            raise ScoreError(
                f"{file}: these measurements were made for another bank (other training, data, subsets or seed). "
                "Delete the file, or use another folder."
            )
        committed |= {(r, m): row for (r, m), row in zip(pairs.tolist(), measured.double().numpy(), strict=True)}
    return committed


def _collected(
    committed: Mapping[tuple[int, int], np.ndarray], subsets: Sequence[int], repetitions: int, path: Path
) -> np.ndarray:
    """[subsets, repetitions, ...]: what was committed; ScoreError if some is missing, or of another shape."""
    missing = [(r, m) for r in range(repetitions) for m in subsets if (r, m) not in committed]
    if missing:
        raise ScoreError(
            f"{path}: {len(missing)} of {repetitions * len(subsets)} trainings are missing, the first is repetition "
            f"{missing[0][0]} of subset {missing[0][1]}. Run the bank to its end."
        )
    shapes = sorted({committed[r, m].shape for r in range(repetitions) for m in subsets})
    if len(shapes) > 1:
        raise ScoreError(
            f"{path}: measurements of shapes {shapes}, expected one. Delete the bank to retrain everything, with a "
            "training that measures the same each time."
        )
    return np.stack([np.stack([committed[r, m] for r in range(repetitions)]) for m in subsets])
