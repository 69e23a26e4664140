"""What the steps of a run did, told of each parameter group: the part of a trajectory that needs no files."""

from __future__ import annotations

from .motion import Motion, Steps
from .optimizers import SECOND_MOMENTS
from .sampling import nearest_bounds


class Stepped:
    """A run's steps.

    steps: how many had been taken at each checkpoint; used: every step's numbers; kinds, decoupled: of each parameter
    group the optimizer's name, and whether weight decay bypasses P.
    """

    steps: tuple[int, ...]
    used: Steps
    kinds: tuple[str, ...]
    decoupled: tuple[bool, ...]
    _motion: Motion

    @property
    def total_steps(self) -> int:
        """Optimizer steps from the start to the last checkpoint."""
        return self.steps[-1]

    @property
    def has_moments(self) -> tuple[bool, ...]:
        """For each parameter group, whether its steps are divided by the root of second moments (Adam, AdamW, ...)."""
        return tuple(kind in SECOND_MOMENTS for kind in self.kinds)

    @property
    def preconditioned(self) -> bool:
        """True if some parameter group's steps are divided by the root of second moments."""
        return any(self.has_moments)

    @property
    def coupled(self) -> tuple[bool, ...]:
        """For each parameter group, whether weight decay passes through P, as Adam's does, and not AdamW's."""
        return tuple(has and not decoupled for has, decoupled in zip(self.has_moments, self.decoupled, strict=True))

    def decay_steps(self, start: int, end: int) -> tuple[float, ...]:
        """What the steps in (start, end] moved the parameters by for each unit of themselves: weight decay, summed.

        One number for each parameter group, in units of P where weight decay is `coupled`.
        """
        return tuple(self._motion.decays[start:end].sum(0).tolist())

    @property
    def ceilings(self) -> tuple[float, ...]:
        """For each parameter group, by how much its rate may grow where its data was not in every batch, at least 1.

        That is the learning rates of all steps in which it was in training over those of the steps that carried a
        gradient.
        """
        return self._motion.ceilings

    def clip_squares(self, index: int) -> tuple[float, ...]:
        """For each parameter group the mean squared clip factor around checkpoint `index`, of Adagrad up to it."""
        bounds = nearest_bounds(self.steps, 0, self.total_steps)
        near = range(bounds[index], bounds[index + 1])
        return tuple(
            self.used.mean_squared_factor(group, range(self.steps[index]) if kind == "Adagrad" else near)
            for group, kind in enumerate(self.kinds)
        )

    def moves_until(self, index: int) -> tuple[float, ...]:
        """For each parameter group how many steps up to checkpoint `index` carried a gradient to it."""
        return tuple((self.used.carried[: self.steps[index]] > 0).sum(0).astype(float).tolist())
