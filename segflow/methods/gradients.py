"""Methods of plain gradients and representations: TracIn, Hydra, products, cosines, similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..training.segments import covered
from .method import final_point, stage_place
from .plan import Plan, Point, Spectral, Term, UnitNorm

if TYPE_CHECKING:
    from ..training.trajectory import Trajectory


@dataclass(frozen=True)
class TracIn:
    """TracIn: gradient products at every checkpoint (Pruthi et al. 2020, arXiv 2002.08484).

    A checkpoint stands for the steps nearest to it, so it weighs the sum of their effective learning rates.
    """

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term for each checkpoint of the stage."""
        stage = stage_place(trajectory, stage)
        return tuple(
            Term(label, stage, point, (operator,), (point,), (1.0,))
            for label, point, operator in _steps_taken(trajectory.stages[stage], stage)
        )


@dataclass(frozen=True)
class Hydra:
    """Hydra in its fast form: no curvature, the final query gradient meets every checkpoint's training gradients.

    Chen et al. 2021, HyDRA, arXiv 2102.02515, with the Hessian terms left out.
    """

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term for each checkpoint of the stage."""
        stage, final = stage_place(trajectory, stage), final_point(trajectory)
        return tuple(
            Term(label, stage, final, (operator,), (point,), (1.0,))
            for label, point, operator in _steps_taken(trajectory.stages[stage], stage)
        )


def _steps_taken(trajectory: Trajectory, stage: int) -> list[tuple[str, Point, Spectral]]:
    """For each checkpoint its label, its point, and multiplication by the learning rates that it stands for."""
    every = range(len(trajectory))
    amounts = covered(trajectory, every, 0, trajectory.total_steps)
    return [
        (
            f"checkpoint at step {trajectory.steps[place]}",
            Point.at(stage, place),
            Spectral(stage, "constant", None, amount, (0.0,) * len(amount)),
        )
        for place, amount in zip(every, amounts, strict=True)
    ]


@dataclass(frozen=True)
class GradientDot:
    """The product of the final query and training gradients (Charpiat et al. 2019); its unit is a squared gradient."""

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        final = final_point(trajectory)
        return (Term("final", stage_place(trajectory, stage), final, (), (final,), (1.0,)),)


@dataclass(frozen=True)
class GradientCosine:
    """The cosine between the final query gradient and a group's summed gradient (Charpiat et al. 2019).

    A cosine does not add up: a group's score is not the sum of its members'.
    """

    additive: ClassVar[bool] = False

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        final = final_point(trajectory)
        place = stage_place(trajectory, stage)
        return (Term("final", place, final, (UnitNorm(),), (final,), (1.0,), normalized=True),)


@dataclass(frozen=True)
class RepresentationSimilarity:
    """The similarity of hidden representations, the inputs of one layer at the end of training (Hanawa et al. 2021).

    Args:
        layer: the module whose input (averaged over positions) is the representation; None: the last tracked one.
        cosine: normalise each example's representation (a group's score is then the sum of its members' cosines);
            otherwise products, over the number of training examples.
    """

    layer: str | None = None
    cosine: bool = True

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        final, place = final_point(trajectory), stage_place(trajectory, stage)
        return (Term("final", place, final, (), (final,), (1.0,), "representation", self.cosine, self.layer),)
