"""One exception per stage. Every message says where, what was expected, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral


class SegflowError(Exception):
    """Base of every error that segflow raises on purpose."""


class RankError(SegflowError):
    """Another process of this run failed, died, or was given something else."""


class StoreError(SegflowError):
    """A store's file is missing, damaged, or was made from something else."""


class TaskError(SegflowError):
    """The task's losses are not what the mathematics needs."""


class TrajectoryError(SegflowError):
    """The record of the training run is incomplete, inconsistent, or of another model."""


class LayerError(SegflowError):
    """A layer cannot be tracked, was never reached, or yields non-finite numbers."""


class FactorError(SegflowError):
    """A curvature factor is missing or not finite."""


class MethodError(SegflowError):
    """A method's options make no sense for this trajectory."""


class GroupError(SegflowError):
    """Groups overlap, are empty, or do not fit the dataset."""


class ScoreError(SegflowError):
    """Scores cannot be computed, combined or evaluated as asked."""


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number (and no bool), and at least that."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_choice(option: str, value: object, choices: Iterable[str], error: type[SegflowError]) -> None:
    """Raise `error` unless `value` is one of `choices`; the message lists them."""
    known = sorted(choices)
    if value not in known:
        raise error(f"{option}={value!r} is not known. Choose one of: {', '.join(map(repr, known))}.")
