"""Averaged weights (EMA, SWA) as the model that is explained: their files, and what of each step stays in them.

The average begins as a copy of the model at step t_0, and is updated at steps t_1, t_2, ... t_J. A move of the model at
step k is in every later model, so it stays in the average with the summed weights of the models from step k on: with
decays b_j that is 1 - b_j ... b_J, where j is the first update at or after the step (1 for steps up to t_0, 0 after
t_J), and with equal weights the share of models that came at or after it. So a step's learning rate counts by this
share, in its rate and in its weight decay alike. To first order in the curvature over the steps that are averaged that
is exact: what these steps forget of earlier ones is then the mean of what each model forgot. Beyond it the sum of the
shares overstates directions that are learned while the average runs; docs/TRAINING.md has the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ..arguments import real_number, real_numbers, shown, whole_number
from ..errors import TrajectoryError
from ..runtime.sharding import parallel_prefix
from .checkpoints import Layouts
from .state_files import StateFiles, state_files

_COUNT = "n_averaged"  # the buffer in which torch's AveragedModel counts its updates, the first of which copies


@dataclass(frozen=True)
class AveragedFiles(StateFiles):
    """The files of averaged weights, which stand for a run's last checkpoint.

    last: reads that checkpoint's state; trained: the parameters that training moved, None for all. What the average
    does not hold of the others is the checkpoint's.
    """

    last: Callable[[], Mapping[str, Tensor]] = dict
    trained: frozenset[str] | None = None

    def read(self, sha256: str | None = None) -> dict[str, Tensor]:
        """All tensors under the names that they have in the checkpoint, on the CPU."""
        averaged, last = super().read(sha256), self.last()
        averaged.pop(_COUNT, None)
        prefix = parallel_prefix(averaged, last)
        own = {name.removeprefix(prefix): value for name, value in averaged.items()}
        if self.trained is None:
            return own
        return {name: value for name, value in last.items() if name not in self.trained} | own

    def names(self) -> list[str]:
        """The tensors' names in the checkpoint."""
        return list(self.read())

    def layouts(self) -> Layouts:
        """None: the tensors have to be read."""
        return {}

    def count(self) -> int | None:
        """How many models were averaged, as torch's AveragedModel counts them; None where the file does not say."""
        found = super().read().get(_COUNT)
        return None if found is None else whole_number(f"{self.path}: {_COUNT}", found, TrajectoryError)


def averaged_files(
    path: Path, last: Callable[[], Mapping[str, Tensor]], trained: frozenset[str] | None
) -> AveragedFiles:
    """The files that a path stands for; TrajectoryError where there are none."""
    files = state_files(path, "file of averaged weights")
    return AveragedFiles(files.path, files.parts, files.index, last, trained)


@dataclass(frozen=True)
class Averaging:
    """When a model was averaged, and how much each update left of what was averaged before.

    decays: for each update after the first copy; None: all models have equal weights. start: the step of that copy.
    """

    decays: tuple[float, ...] | None
    start: int
    every: int
    updates: int

    def shares(self, steps: int) -> np.ndarray:
        """What of each step's move stays in the average, [steps]; see the formulas above."""
        after = np.arange(1, self.updates + 1)  # the first update of the average that a step is in, from 1
        kept = 1 - after / (self.updates + 1) if self.decays is None else 1 - np.cumprod(self.decays[::-1])[::-1]
        of_update = np.concatenate([[1.0], kept, [0.0]])
        first = np.ceil((np.arange(1, steps + 1) - self.start) / self.every).astype(int)
        return np.asarray(of_update[first.clip(0, self.updates + 1)])

    def __str__(self) -> str:
        equal = self.decays is None or not self.decays
        how = "equal weights" if equal else f"decay {_span(self.decays or ())}"
        each = "every step" if self.every == 1 else f"every {self.every} steps"
        return f"{self.updates + 1} models with {how}, from step {self.start} on, {each}"


def _span(decays: Sequence[float]) -> str:
    return f"{decays[0]:g}" if len(set(decays)) == 1 else f"{min(decays):g} to {max(decays):g}"


def averaging(steps: int, decay: object, start: object, every: object, counted: int | None) -> Averaging:
    """What the user says of an average over a run of so many steps; TrajectoryError where it makes no sense.

    counted: how many models the file says were averaged, None where it does not.
    """
    advice = "It counts optimizer steps between updates."
    between = whole_number("every", every, TrajectoryError, 1, steps, advice=advice)
    if start is None and (between > 1 or (counted is None and decay is None)):
        lacks = f"every={between} does not say at which steps" if between > 1 else "the file does not say how often"
        raise TrajectoryError(
            f"averaged(): {lacks} the average was updated. Give start=, the step at which it was a copy of the model."
        )
    begin = 0 if counted is None else steps - (counted - 1)
    if start is not None:
        begin = whole_number("start", start, TrajectoryError, 0, steps, "The average began as the model at this step.")
    updates = (steps - begin) // between
    if begin < 0 or (counted is not None and counted != updates + 1):
        made = f"start={start}, every={between} make {updates + 1}" if begin >= 0 else "every=1 makes fewer"
        raise TrajectoryError(
            f"the file says that {counted} models were averaged, but {made} in {steps} steps. Give start=, the step of "
            "the first copy, and every=, the steps between updates; with every=1, start= follows from the count."
        )
    return Averaging(_decays(decay, updates), begin, between, updates)


def _decays(decay: object, updates: int) -> tuple[float, ...] | None:
    """One number for each update."""
    if decay is None:
        return None
    if not isinstance(decay, Sequence | np.ndarray | Tensor) or getattr(decay, "ndim", 1) == 0:
        return (real_number("decay", decay, TrajectoryError, least=0.0, below=1.0),) * updates
    decays = real_numbers("decay", decay, TrajectoryError)
    odd = [one for one in decays if not 0 <= one < 1]
    if odd or len(decays) != updates:
        raise TrajectoryError(
            f"decay={shown(decay)}: expected a number from 0 to below 1, or one for each of the {updates} updates."
        )
    return decays
