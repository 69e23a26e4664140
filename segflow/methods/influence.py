"""Influence functions at the end of training: with fitted curvature, and by LiSSA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..arguments import settle
from ..errors import MethodError, check_choice
from .method import batch_of_fisher, damping_amount, damping_option, final_plan, final_point, stage_place
from .operators import HEURISTIC_SHARE
from .plan import Curvature, IterativeInverse, Plan, Point, Spectral

if TYPE_CHECKING:
    from ..training.trajectory import Trajectory

_KINDS = ("ekfac", "kfac", "diagonal", "identity")


@dataclass(frozen=True)
class InfluenceFunction:
    """Influence function at the end of training: (curvature + damping)^-1 (Grosse et al. 2023, arXiv 2308.03296).

    Args:
        damping: added to the eigenvalues (the objective's weight decay, for the exact inverse Hessian of a
            regularised objective), or "heuristic": 0.1 times each layer's mean eigenvalue.
        curvature: of a stage's own objective at the final parameters: "ekfac", "kfac", "diagonal" or "identity".
        fisher_batch: of "ekfac" and "diagonal", as for `Source`.
    """

    damping: float | str = "heuristic"
    curvature: str = "ekfac"
    fisher_batch: int = 1
    sizes: ClassVar[str] = "they follow the damping, and can be many times off; take ranks, or Scores.calibrated(bank)"

    def __post_init__(self) -> None:
        settle(self, damping=damping_option(self.damping), fisher_batch=batch_of_fisher(self.fisher_batch))
        if self.fisher_batch > 1 and self.curvature in ("kfac", "identity"):
            raise MethodError(
                f"fisher_batch={self.fisher_batch}: curvature={self.curvature!r} squares no gradients, so there is "
                "nothing to batch. Leave it at 1, or take 'ekfac' or 'diagonal'."
            )
        check_choice("curvature", self.curvature, _KINDS, MethodError)

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        stage, final = stage_place(trajectory, stage), final_point(trajectory)
        groups = trajectory.stages[stage].learning_rates.shape[1]
        nothing, damping = (0.0,) * groups, damping_amount(self.damping)
        if self.curvature == "identity":
            inverse = (1 / (1 + (HEURISTIC_SHARE if damping is None else damping)),) * groups
            operator = Spectral(stage=stage, kind="constant", curvature=None, amount=inverse, shift=nothing)
        else:
            curvature = Curvature(stage, (final,), (1.0,), kind=self.curvature, batch=self.fisher_batch)
            operator = Spectral(
                stage=stage, kind="damped_inverse", curvature=curvature, amount=(damping,) * groups, shift=nothing
            )
        return final_plan(trajectory, stage, operator)


@dataclass(frozen=True)
class LiSSA:
    """Influence function with the exact Hessian, inverted by LiSSA (Agarwal et al. 2017; Koh and Liang 2017).

    v <- q + v - (H_batch + damping) v / scale, in the limit scale * (H + damping)^-1 q.

    Args:
        damping: added to the Hessian; it must outweigh negative eigenvalues.
        steps: iterations; sample_size: examples of each Hessian product.
        repetitions: independent estimates that are averaged.
        scale: at least half of the largest eigenvalue (of a batch's Hessian plus damping); None estimates it.
        seed: of the batches.
    """

    damping: float = 0.01
    steps: int = 100
    sample_size: int = 256
    repetitions: int = 1
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        inverse = IterativeInverse(stage=0, point=Point.at(0, 0), **vars(self))
        settle(self, **{name: getattr(inverse, name) for name in vars(self)})

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        place, final = stage_place(trajectory, stage), final_point(trajectory)
        return final_plan(trajectory, stage, IterativeInverse(stage=place, point=final, **vars(self)))
