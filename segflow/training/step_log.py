"""The log of a recorded run's steps: a line of JSON for each, on disk when the step is done.

    {"step": 1, "learning_rate": [0.1], ..., "codes": [11], "clip_factors": [0.5], "histories": {"groups": [0], "of":
    {...}}}

A line holds what changed since the line before. The optimizer's numbers have an entry for each of its parameter groups;
`codes` (see MOVED and the like) and `clip_factors` (or one number for all) have one for each history, a set of
parameters whose steps were all alike: `histories` tells each one's parameter group, and each parameter's history.

Axes: T steps, G parameter groups.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import TrajectoryError
from ..store.files import LineFile, read_lines, write_file
from ..store.json_form import COUNT, fitting, parse_json
from .gradient_watch import Factor
from .histories import Histories
from .motion import step_counts

# What a code says of a step, added up: the optimizer moved the parameter; the gradient was the data's; the parameter
# was in training, but not reached by the step's batch; the optimizer had no state of it before.
MOVED, CARRIED, LEFT_OUT, FRESH = 1, 2, 4, 8
NUMBERS = ("learning_rate", "momentum", "beta1", "dampening", "weight_decay")
_ROW = {
    "step": COUNT,
    **{f"{name}?": [float] for name in NUMBERS},
    "codes?": [range(16)],
    "clip_factors?": (float, None, [(float, None)]),
    "histories?": {"groups": [COUNT], "of": {str: COUNT}},
}  # what a line may hold
Numbers = tuple[tuple[float, ...], ...]  # for each of the optimizers' parameter groups, in this order


class Round(NamedTuple):
    """One round: the numbers that the optimizers used, and each parameter's code and clip factor, by place.

    Where the numbers are those of the round before, they are the same object.
    """

    numbers: Numbers
    codes: list[int]
    factors: list[Factor]


class StepLog:
    """Writes the log, or on ranks that write nothing (path None) only keeps the steps' count.

    step: how many steps there were before, where a log is continued.
    """

    def __init__(self, path: Path | None, step: int = 0) -> None:
        self.step = step
        self._file = None if path is None else LineFile(path, TrajectoryError)
        self._histories, self._names = Histories(), list[str]()
        self._numbers: Numbers | None = None  # those of the step before, as its codes and its factor, the same for all
        self._codes: list[int] = []
        self._factor: float | None = None
        self._written: dict[str, Any] = {}  # what the lines so far say
        self._pending: deque[tuple[dict[str, Any], list[_Number]]] = deque()

    def follow(self, names: Sequence[str], groups: Sequence[int]) -> None:
        """Log the steps of these parameters from now on; groups: the parameter group of each."""
        self._names, self._codes, self._histories = list(names), [], Histories()
        self._histories.add(groups)
        self._written.pop("histories", None)

    def append(self, round_: Round) -> None:
        """Log a round as one step."""
        self.step += 1
        numbers, codes, factors = round_
        first = factors[0]
        alike = codes == self._codes and _same(factors)
        if alike and numbers is self._numbers and not self._pending and self._put_factor(first):
            return
        row: dict[str, Any] = {"step": self.step}
        if numbers is not self._numbers:
            row |= self._changed(dict(zip(NUMBERS, map(list, zip(*numbers, strict=True)), strict=True)))
            self._numbers = numbers
        if not alike:
            factors = self._tell_apart(row, codes, factors)
            self._codes = codes
        self._pending.append((row, [_Number(first)] if alike else [_Number(factor) for factor in factors]))
        self._write(delayed=1)

    def _put_factor(self, factor: Factor) -> bool:
        """Write the line of a step in which only the clip factor, shared by all, may have changed; False if it cannot.

        Most steps are such ones, so this is written for speed.
        """
        if isinstance(factor, Tensor):
            if factor.device.type != "cpu":
                return False
            factor = factor.item()
            if not math.isfinite(factor):
                return False
        if factor == self._factor:
            self._put(f'{{"step": {self.step}}}')
        else:
            self._factor = self._written["clip_factors"] = factor
            self._put(f'{{"step": {self.step}, "clip_factors": {factor!r}}}')
        return True

    def _tell_apart(self, row: dict[str, Any], codes: list[int], factors: list[Factor]) -> list[Factor]:
        """Each history's factor, and its code in the row; parameters that differ are given histories of their own."""
        keys = [(code, id(f) if isinstance(f, Tensor) else f) for code, f in zip(codes, factors, strict=True)]
        by_key = dict(zip(keys, factors, strict=True))
        states = self._histories.states(keys)
        row |= self._changed({"codes": [code for code, _ in states]})
        if len(self._histories.groups) != len(self._written.get("histories", {}).get("groups", ())):
            of = dict(zip(self._names, self._histories.of, strict=True))
            row["histories"] = self._written["histories"] = {"groups": list(self._histories.groups), "of": of}
        return [by_key[state] for state in states]

    def _changed(self, values: dict[str, Any]) -> dict[str, Any]:
        changed = {k: value for k, value in values.items() if k not in self._written or self._written[k] != value}
        self._written |= changed
        return changed

    def _write(self, delayed: int = 0) -> None:
        """Write the pending lines; of numbers that a device still computes, all but the last `delayed` lines."""
        while self._pending:
            row, factors = self._pending[0]
            if len(self._pending) <= delayed and any(factor.on_device for factor in factors):
                return
            self._pending.popleft()
            values = [factor.value() for factor in factors]
            alike = len(set(values)) == 1
            self._factor = values[0] if alike else None
            row |= self._changed({"clip_factors": values[0] if alike else values})
            self._put(json.dumps(row))

    def _put(self, line: str) -> None:
        if self._file is not None:
            self._file.append(line)

    def flush(self) -> None:
        """Write all lines, also those whose numbers a device still computes."""
        self._write()

    def close(self) -> None:
        """Write all lines, and let go of the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def _same(factors: list[Factor]) -> bool:
    """Whether all factors are one object, so that they need not be read."""
    first = factors[0]
    for factor in factors:  # faster than a comprehension, in every step  # noqa: SIM110
        if factor is not first:
            return False
    return True


class _Number:
    """A factor on its way to the CPU, without waiting for its device."""

    def __init__(self, factor: Factor) -> None:
        self.on_device = isinstance(factor, Tensor) and factor.device.type != "cpu"
        self._factor, self._event = factor, None
        if isinstance(factor, Tensor) and self.on_device:
            self._factor = factor.to("cpu", non_blocking=True)
            self._event = torch.Event(factor.device.type)
            self._event.record()

    def value(self) -> float | None:
        """The number; None if it is not finite."""
        if self._event is not None:
            self._event.synchronize()
        number = self._factor.item() if isinstance(self._factor, Tensor) else self._factor
        return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Logged:
    """What a log says, all [T, G], G being sets of parameters whose steps were all alike.

    group_of: the index of each parameter's set. numbers: by the names in NUMBERS. optimizer_groups: the optimizer's own
    parameter group of each set, in the end.
    """

    group_of: Mapping[str, int]
    numbers: Mapping[str, np.ndarray]
    codes: np.ndarray
    clip_factors: np.ndarray
    optimizer_groups: tuple[int, ...]

    def __len__(self) -> int:
        """T."""
        return len(self.codes)

    def flags(self, code: int) -> np.ndarray:
        """Where a code is among those of a step, [T, G]."""
        return (self.codes & code) > 0

    def until(self, steps: int) -> Logged:
        """The first so many steps."""
        numbers = {name: values[:steps] for name, values in self.numbers.items()}
        return Logged(self.group_of, numbers, self.codes[:steps], self.clip_factors[:steps], self.optimizer_groups)


def read_steps(path: Path, sha256: str | None, apart: Mapping[str, Any] | None = None) -> Logged:
    """A log as far as its lines are whole; TrajectoryError where it is damaged.

    sha256: of the file, if it is complete. apart: something of each parameter, where it is not None; parameters in
    which it differs are told apart.
    """
    rows = list(_rows(path, sha256))
    try:
        return _logged(rows, apart or {})
    except (KeyError, IndexError, ValueError, StopIteration) as problem:
        raise TrajectoryError(
            f"{path}: damaged, its lines do not fit each other ({type(problem).__name__}: {problem}). Restore it, or "
            "record again."
        ) from problem


def _logged(rows: list[dict[str, Any]], apart: Mapping[str, Any]) -> Logged:
    if not rows:
        return Logged({}, dict.fromkeys(NUMBERS, np.zeros((0, 0))), np.zeros((0, 0), int), np.zeros((0, 0)), ())
    starts = [place for place, row in enumerate(rows) if "histories" in row]
    epochs = [rows[start]["histories"] for start in starts]
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch["of"]))
    paths = {name: tuple(epoch["of"].get(name) for epoch in epochs) for name in names}
    kinds = {name: (paths[name], apart.get(name)) for name in names}
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds.values()))}
    states = _filled(rows)
    blocks = [
        _block(states[start:end], epoch, [path[number] for path, _ in places])
        for number, (start, end, epoch) in enumerate(zip(starts, [*starts[1:], len(rows)], epochs, strict=True))
    ]
    columns = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    last = [
        next(e["groups"][h] for e, h in zip(epochs[::-1], path[::-1], strict=True) if h is not None)
        for path, _ in places
    ]
    numbers = {name: columns[name] for name in NUMBERS}
    group_of = {name: places[kinds[name]] for name in names}
    return Logged(group_of, numbers, columns["codes"].astype(np.uint8), columns["clip_factors"], tuple(last))


def _rows(path: Path, sha256: str | None) -> Iterator[dict[str, Any]]:
    """The log's lines; where it may have been cut short by a kill (no sha256), up to the last whole one."""
    lines = read_lines(path, sha256, TrajectoryError)
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line, _ROW)
            if row["step"] != number:
                raise ValueError(f"step {row['step']} in line {number}")
            for histories in [row["histories"]] if "histories" in row else []:
                fitting(histories["of"], {str: range(len(histories["groups"]))}, "histories.of")
        except ValueError as problem:
            if sha256 is None and number == len(lines):
                return
            raise TrajectoryError(
                f"{path}: line {number} is damaged ({type(problem).__name__}: {problem}). Restore it, or record again."
            ) from problem
        yield row


def _filled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with what it does not say taken from the row before."""
    filled, state = [], dict[str, Any]()
    for row in rows:
        state = {**state, **row}
        filled.append(state)
    return filled


def _block(rows: Sequence[dict[str, Any]], epoch: Mapping[str, Any], histories: Sequence[int | None]) -> dict[str, Any]:
    """Columns [T, G] of rows with the same histories; zeros for sets that are not among them (None)."""
    here = [(place, history) for place, history in enumerate(histories) if history is not None]
    places, chosen = [place for place, _ in here], [history for _, history in here]
    groups = [epoch["groups"][history] for history in chosen]
    block = {}
    for key in (*NUMBERS, "codes", "clip_factors"):
        width = len(epoch["groups"])
        values = np.array([row[key] if isinstance(row[key], list) else [row[key]] * width for row in rows], dtype=float)
        block[key] = np.full((len(rows), len(histories)), 1.0 if key == "clip_factors" else 0.0)
        block[key][:, places] = values[:, groups if key in NUMBERS else chosen]
    return block


def counts_before_and_after(log: Logged, taken_before: Mapping[str, int]) -> np.ndarray:
    """How many steps each set of parameters had taken at the beginning and after each step, [T + 1, G]."""
    first = np.zeros(len(log.optimizer_groups))
    for name, group in log.group_of.items():
        first[group] = taken_before.get(name, 0)
    return np.concatenate([first[None], step_counts(log.flags(MOVED), log.flags(FRESH), first)])


def cut_steps(path: Path, step: int) -> None:
    """Keep the first `step` lines of a log."""
    lines = read_lines(path, None, TrajectoryError)
    write_file(path, "".join(f"{line}\n" for line in lines[:step]).encode(), TrajectoryError)
