"""A bank of retrained models: the ground truth on disk, made once, resumed after a kill, refused for another recipe.

Axis letters: J jobs, M subsets, K examples or groups, R repetitions, Q queries, P measurements of each query.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ...arguments import plain, settle, shown, truth, whole_number, whole_numbers
from ...data.fingerprints import digest
from ...errors import ScoreError
from ...results.sealed import read_sealed, write_sealed
from ...runtime.progress import track
from ...runtime.ranks import current
from ...store.files import TensorFile, read_json, write_json, write_tensors
from ..subsets import as_subsets
from .pool import Job, TrainAndMeasure, run_jobs

FORMAT = 1


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
        fingerprint: JSON that names what the function depends on (data, recipe); a bank is bound to it.
        processes: how many at a time; by default as many as there are cores.
        each: trainings of one process that are committed together.
    """

    train_and_measure: TrainAndMeasure
    fingerprint: Mapping[str, Any]
    processes: int | None = None
    each: int = 4

    def __post_init__(self) -> None:
        settle(self, fingerprint=_plain_json(self.fingerprint), each=whole_number("each", self.each, ScoreError, 1))
        if self.processes is not None:
            advice = "None takes one for each core."
            settle(self, processes=whole_number("processes", self.processes, ScoreError, 1, advice=advice))

    def settings(self) -> dict[str, Any]:
        """The fingerprint that was given."""
        return {"function": dict(self.fingerprint)}

    def batches(self, jobs: Sequence[Job]) -> list[list[int]]:
        """A few jobs for each process."""
        size = self.each * (self.processes or os.cpu_count() or 1)
        return [list(range(begin, min(begin + size, len(jobs)))) for begin in range(0, len(jobs), size)]

    def run(self, jobs: Sequence[Job]) -> np.ndarray:
        """Train and measure in parallel processes: [J, Q] or [J, P, Q].

        Raises:
            ScoreError: the function gives no numbers, or not always of one shape.
        """
        measured = [np.atleast_1d(job) for job in run_jobs(self.train_and_measure, list(jobs), self.processes, False)]
        shapes = sorted({of_job.shape for of_job in measured})
        if len(shapes) > 1 or len(shapes[0]) > 2:
            raise ScoreError(
                f"train_and_measure gave measurements of shapes {shapes}: expected [Q] or [P, Q], the same each time."
            )
        return np.stack(measured)


@dataclass(frozen=True)
class Bank:
    """Measurements after retraining on every subset, several times, in a folder.

    `run` trains what is missing and returns everything. What was trained is committed batch by batch, so a run that
    was killed goes on where it was, and a finished one is read. `repetitions` may grow later. The folder is bound to a
    fingerprint of training, data, subsets and seed; with another one it is refused.

    Args:
        folder: where the bank is; made if it is not there.
        training: `BatchedTraining`, `FunctionTraining`, or one of your own.
        subsets: [M, K] booleans, which of the training's examples (or groups) each retraining keeps.
        repetitions: retrainings R of each subset; number r of subset m has the seed `seed + 1 + r * M + m`.
        seed: moves all seeds.
        seeds: [M], for each subset a first seed of its own: number r of subset m then has the seed `seeds[m] + r`,
            whatever the other subsets are.

    Raises:
        ScoreError: the folder holds a bank of something else, or a damaged file, or a training diverged.

    Example:
        >>> import tempfile
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
    subsets: np.ndarray
    repetitions: int = 5
    seed: int = 0
    seeds: Sequence[int] | None = None
    _path: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kept = as_subsets(self.subsets)
        if kept.ndim != 2 or len(kept) < 1:
            raise ScoreError(f"bank: subsets {kept.shape}: expected [M, K] booleans with at least one row.")
        settle(self, subsets=kept, seed=whole_number("seed", self.seed, ScoreError))
        settle(self, repetitions=whole_number("repetitions", self.repetitions, ScoreError, 1))
        if self.seeds is not None:
            settle(self, seeds=whole_numbers("seeds", self.seeds, ScoreError))
            if len(self.seeds) != len(kept):
                raise ScoreError(f"bank: {len(self.seeds)} seeds for {len(kept)} subsets. Give one for each, or none.")
        check_is_training(self.training)
        object.__setattr__(self, "_path", Path(self.folder))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the bank's numbers depend on."""
        kept = self.subsets
        content = {"format": FORMAT, "subsets": _described(kept), "seed": self.seed}
        if self.seeds is not None:
            content["seeds"] = digest(list(self.seeds))
        as_read_back: dict[str, Any] = json.loads(json.dumps(content | {"training": self.training.settings()}))
        return as_read_back

    @property
    def missing(self) -> list[tuple[int, int]]:
        """The (repetition, subset) pairs that are still to be trained."""
        committed = _committed(self._path) if self._is_bound() else {}
        pairs = [(r, m) for r in range(self.repetitions) for m in range(len(self.subsets))]
        return [pair for pair in pairs if pair not in committed]

    def run(self, progress: bool | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        """Train what is missing; the measurements of all, [M, repetitions, Q] (or [M, repetitions, P, Q]).

        progress: show a bar. rows: the subsets that are wanted, in the order of the result; by default all.
        """
        progress = None if progress is None else truth("progress", progress, ScoreError)
        if current().count > 1:
            raise ScoreError("a bank is filled by one process. Start it without a launcher, or use `retrain`.")
        if not self._is_bound():
            subsets = {"subsets": torch.from_numpy(self.subsets)}
            write_tensors(self._path / "subsets.safetensors", subsets, None, ScoreError)
            write_json(self._path / "bank.json", self.fingerprint, ScoreError)
        last = len(self.subsets) - 1
        wanted = list(range(last + 1) if rows is None else whole_numbers("rows", rows, ScoreError, 0, last))
        chosen = set(wanted)
        pairs = [(r, m) for r, m in self.missing if m in chosen]
        jobs = [(np.flatnonzero(self.subsets[m]), self._seed(r, m)) for r, m in pairs]
        for places in track(self.training.batches(jobs), "retraining", enabled=progress):
            self._commit([pairs[place] for place in places], self.training.run([jobs[place] for place in places]))
        return _collected(_committed(self._path), wanted, self.repetitions, self._path)

    def _seed(self, repetition: int, subset: int) -> int:
        if self.seeds is not None:
            return self.seeds[subset] + repetition
        return self.seed + 1 + repetition * len(self.subsets) + subset

    def _commit(self, pairs: list[tuple[int, int]], measured: np.ndarray) -> None:
        if len(measured) != len(pairs):
            raise ScoreError(f"bank: {len(measured)} results of {len(pairs)} trainings. Return one for each.")
        diverged = ~np.isfinite(measured.reshape(len(pairs), -1)).all(1)
        if diverged.any():
            repetition, subset = pairs[int(np.argmax(diverged))]
            raise ScoreError(
                f"{self._path}: subset {subset}, repetition {repetition}: a measurement is not finite. "
                "Did its training diverge? Lower the learning rate."
            )
        tensors = {"pairs": torch.tensor(pairs), "measured": torch.from_numpy(np.asarray(measured, dtype=np.float64))}
        repetition, subset = pairs[0]
        write_sealed(self._path / f"measured-{repetition:03d}-{subset:06d}.safetensors", tensors)

    def check(self) -> None:
        """Raise ScoreError if the folder holds a bank of something else."""
        self._is_bound()

    def _is_bound(self) -> bool:
        """Whether the folder holds this bank already; ScoreError if it holds another one."""
        path = self._path / "bank.json"
        if not path.exists():
            return False
        on_disk, now = _flat(read_json(path, ScoreError)), _flat(self.fingerprint)
        for key in sorted(on_disk.keys() | now.keys()):
            if on_disk.get(key) != now.get(key):
                raise ScoreError(
                    f"{path}: this bank was made with {key} = {on_disk.get(key)!r}, now it is {now.get(key)!r}. "
                    "Use another folder, or delete this one to retrain everything."
                )
        return True


def read_bank(folder: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """A bank's subsets [M, K] and its measurements [M, R, Q] or [M, R, P, Q], as far as whole repetitions are there.

    Raises:
        ScoreError: there is no bank, no repetition is whole, or a file is damaged.
    """
    path = Path(folder)
    stored, subsets = read_json(path / "bank.json", ScoreError, {"subsets": str}), read_subsets(path)
    if stored["subsets"] != _described(subsets):
        raise ScoreError(f"{path}: subsets.safetensors does not hold the subsets that bank.json is about. Restore it.")
    committed = _committed(path)
    repetitions = 0
    while all((repetitions, m) in committed for m in range(len(subsets))):
        repetitions += 1
    return subsets, _collected(committed, range(len(subsets)), max(repetitions, 1), path)


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


def _committed(path: Path) -> dict[tuple[int, int], np.ndarray]:
    """Every committed measurement by its (repetition, subset)."""
    committed: dict[tuple[int, int], np.ndarray] = {}
    for file in sorted(path.glob("measured-*.safetensors")):
        tensors = read_sealed(file, {"pairs", "measured"}, "measurements of a bank", "Bank.run")
        pairs, measured = tensors["pairs"], tensors["measured"]
        whole = pairs.dtype == torch.int64 and pairs.ndim == 2 and pairs.shape[1] == 2 and not (pairs < 0).any()
        real = measured.is_floating_point() and bool(measured.isfinite().all())
        if not whole or not real or measured.ndim < 1 or len(measured) != len(pairs):
            raise ScoreError(
                f"{file}: pairs {tuple(pairs.shape)} {pairs.dtype} and measurements {tuple(measured.shape)} "
                f"{measured.dtype} make no sense. Delete it and run the bank again."
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


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted names."""
    if isinstance(content, Mapping | list) and content:
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        return {k: v for key, inner in items for k, v in _flat(inner, f"{prefix}{'.' * bool(prefix)}{key}").items()}
    return {prefix: content}
