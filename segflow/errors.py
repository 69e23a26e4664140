"""One kind of error for each room of the package, in the order of the rooms.

Every message says where it happened, what was expected, what was found, and what to do. Two checks of options that all
rooms share stand at the end.
"""

from __future__ import annotations

from collections.abc import Iterable


class SegflowError(Exception):
    """Base of every error that segflow raises on purpose."""


class RankError(SegflowError):
    """Another process of this run failed, died, or was given something else. Raised by `runtime`."""


class StoreError(SegflowError):
    """A file of a store is missing, damaged, or was made from something else. Raised by `store`."""


class TaskError(SegflowError):
    """A task, a property or a dataset is not what the mathematics needs. Raised by `tasks`, `properties` and `data`."""


class JoinError(TaskError):
    """Examples cannot be joined into one batch, although each may be well by itself. Raised by `data`."""


class TrajectoryError(SegflowError):
    """The record of the training run is incomplete, inconsistent, or of another model. Raised by `training`."""


class LayerError(SegflowError):
    """A layer cannot be tracked, was never reached, or yields non-finite numbers. Raised by `model`."""


class FactorError(SegflowError):
    """A curvature factor is missing or not finite. Raised by `curvature`."""


class MethodError(SegflowError):
    """A method's options make no sense, by themselves or for this trajectory. Raised by `methods`."""


class GroupError(SegflowError):
    """Groups overlap, are empty, or do not fit the dataset. Raised by `groups`."""


class ScoreError(SegflowError):
    """Scores cannot be computed, combined, judged or shown as asked. Raised by the rooms from `scoring` on."""


def check_choice(option: str, value: object, choices: Iterable[str], error: type[SegflowError]) -> None:
    """Raise `error` unless the option's value is one of `choices`; the message lists them."""
    known = sorted(choices)
    if not isinstance(value, str) or value not in known:
        raise error(f"{option}={value!r} is not known. Choose one of: {', '.join(map(repr, known))}.")
