"""At which optimizer steps `record` saves a checkpoint. Pure: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ..arguments import plain, whole_number, whole_numbers
from ..errors import TrajectoryError


class CheckpointSchedule:
    """Explicit steps, or so many evenly spaced ones; where the run's length is not known, thinned on the way.

    Args:
        total_steps: of the run, None if that is not known.
        checkpoints: how many, or the steps themselves.

    Raises:
        TrajectoryError: steps or their number make no sense.
    """

    def __init__(self, total_steps: int | None, checkpoints: int | Sequence[int]):
        if total_steps is not None:
            total_steps = whole_number("total_steps", total_steps, TrajectoryError, 1, advice="None: it is not known.")
        self.total_steps = total_steps
        self._wanted: set[int] = set()
        self._count: int | None = None  # how many to end up with, where they are thinned on the way
        self.interval = 1  # between checkpoints, where their number of steps is not known
        if isinstance(plain(checkpoints), Iterable):
            self._wanted = _explicit(checkpoints, total_steps)
            return
        count = whole_number("checkpoints", checkpoints, TrajectoryError, 1, advice="Give how many, or their steps.")
        if total_steps is None:
            self._count = count
        elif total_steps < count:
            raise TrajectoryError(f"total_steps={total_steps}: too few for {count} checkpoints.")
        else:
            self._wanted = set(_evenly(total_steps, count))

    @property
    def expected(self) -> int:
        """How many checkpoints there will be in the end, the last step's among them."""
        if self._count is not None:
            return self._count
        return len(self._wanted | ({self.total_steps} if self.total_steps else set()))

    def due(self, step: int) -> bool:
        """Whether to save a checkpoint after this step."""
        return step in self._wanted or (self._count is not None and step % self.interval == 0)

    def surplus(self, saved: Collection[int]) -> list[int]:
        """The saved steps to drop: every other one, once there are more than twice as many as wanted."""
        if self._count is None or len(saved) <= 2 * self._count:
            return []
        self.interval *= 2
        return [step for step in saved if step % self.interval]

    def surplus_at_end(self, saved: Collection[int], last: int) -> list[int]:
        """The saved steps to drop when training has ended: all but those nearest to evenly spaced ones."""
        if self._count is None:
            return []
        even = _evenly(last, min(self._count, last))
        nearest = {min(saved, key=lambda candidate: abs(candidate - step)) for step in even}
        return [step for step in saved if step not in nearest]

    def unmet(self, last: int) -> str | None:
        """What a run that ended at step `last` did otherwise than announced; None if nothing."""
        if missed := sorted(step for step in self._wanted if step > last):
            return f"checkpoints at {missed} were never reached"
        return f"not at total_steps={self.total_steps}" if last > (self.total_steps or last) else None


def _explicit(checkpoints: object, total_steps: int | None) -> set[int]:
    steps = whole_numbers("checkpoints", checkpoints, TrajectoryError, 1, total_steps, "Give how many, or their steps.")
    if not steps:
        raise TrajectoryError("checkpoints: no steps were given. Expected one or more, or how many.")
    return set(steps)


def _evenly(total: int, count: int) -> list[int]:
    return [round(total * place / count) for place in range(1, count + 1)]
