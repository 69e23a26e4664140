"""Methods that invert a second moment of gradients in a random projection: TRAK and the projected Fisher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..arguments import settle
from .method import batch_of_fisher, damping_amount, damping_option, final_plan, final_point, stage_place
from .plan import Plan, ProjectedInverse, Projection

if TYPE_CHECKING:
    from ..training.trajectory import Trajectory


@dataclass(frozen=True)
class _Projected:
    """Methods that invert a second moment of projected gradients: of the loss named `features`."""

    dimension: int | None = 512
    damping: float | str = "heuristic"
    seed: int = 0
    fisher_batch: int = 1
    features: ClassVar[str]

    def __post_init__(self) -> None:
        settle(self, damping=damping_option(self.damping), fisher_batch=batch_of_fisher(self.fisher_batch))
        settle(self, **vars(Projection(self.dimension, self.seed)))

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        operator = ProjectedInverse(
            stage=stage_place(trajectory, stage),
            point=final_point(trajectory),
            projection=Projection(self.dimension, self.seed),
            features=self.features,
            damping=damping_amount(self.damping),
            batch=self.fisher_batch,
        )
        return final_plan(trajectory, stage, operator)


@dataclass(frozen=True)
class TRAK(_Projected):
    """TRAK at the end of training (Park et al. 2023, arXiv 2303.14186); several runs give its ensemble.

    Features are projected gradients of the task's output function (`Task.compute_output`, a margin for
    `tasks.Classification`); training gradients enter weighted by the loss's slope in that output, as they are the
    loss's own gradients. An ensemble averages whole scores, the paper features and weights apart.

    Args:
        dimension: of the projection, random rank-one probes for each layer; None projects nothing (small models).
        damping: added to the kernel's eigenvalues; "heuristic" 0.1 times their mean. The paper's is 0.
        seed: of the projection.
        fisher_batch: as for `ProjectedFisher`.
    """

    damping: float | str = 0.0
    features: ClassVar[str] = "output"


@dataclass(frozen=True)
class ProjectedFisher(_Projected):
    """Influence with an empirical Fisher in a random projection, as in GGDA (Ley et al. 2024, arXiv 2410.09940).

    Args:
        dimension: of the projection; None projects nothing (small models).
        damping: added to the Fisher's eigenvalues; "heuristic" 0.1 times their mean.
        seed: of the projection.
        fisher_batch: the *batched* empirical Fisher: outer products of so many examples' summed gradients, over their
            number, so that their count falls by it. Random batches of b examples with mean gradient m add
            (b - 1) m m^T, little near convergence; the scores' provenance tells the relative error on some examples.
    """

    features: ClassVar[str] = "train"
