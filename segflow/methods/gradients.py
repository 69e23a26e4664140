"""Methods of plain gradients and representations: TracIn, Hydra, products, cosines, similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..arguments import settle, truth
from ..errors import MethodError
from ..training.segments import covered
from .method import ceilings, final_plan, final_point, stage_place
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
        return _checkpoint_terms(trajectory, stage, None)


@dataclass(frozen=True)
class Hydra:
    """Hydra in its fast form: no curvature, the final query gradient meets every checkpoint's training gradients.

    Chen et al. 2021, HyDRA, arXiv 2102.02515, with the Hessian terms left out.
    """

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term for each checkpoint of the stage."""
        return _checkpoint_terms(trajectory, stage, final_point(trajectory))


def _checkpoint_terms(trajectory: Trajectory, stage: int, query: Point | None) -> Plan:
    """For each checkpoint a term that multiplies by the learning rates of the steps that it stands for.

    query: where query gradients are taken; None for the checkpoint itself.
    """
    stage = stage_place(trajectory, stage)
    own = trajectory.stages[stage]
    terms = []
    for index, lr_steps in enumerate(covered(own, range(len(own)), 0, own.total_steps)):
        point, nothing = Point.at(stage, index), (0.0,) * len(lr_steps)
        operator = Spectral(
            stage=stage, kind="constant", curvature=None, amount=lr_steps, shift=nothing, ceilings=ceilings(own)
        )
        term = Term(
            label=f"checkpoint at step {own.steps[index]}",
            stage=stage,
            query=point if query is None else query,
            operators=(operator,),
            train=(point,),
            weights=(1.0,),
        )
        terms.append(term)
    return tuple(terms)


@dataclass(frozen=True)
class GradientDot:
    """The product of the final query and training gradients (Charpiat et al. 2019); its unit is a squared gradient."""

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        return final_plan(trajectory, stage)


@dataclass(frozen=True)
class GradientCosine:
    """The cosine between the final query gradient and a group's summed gradient (Charpiat et al. 2019).

    A cosine does not add up: a group's score is not the sum of its members'.
    """

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        return final_plan(trajectory, stage, UnitNorm(), normalized=True)


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

    def __post_init__(self) -> None:
        settle(self, cosine=truth("cosine", self.cosine, MethodError))

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        return final_plan(trajectory, stage, side="representation", normalized=self.cosine, layer=self.layer)
