"""The methods that SOURCE is compared with, each a plan of terms over the same engine and store."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from .errors import MethodError, check_choice
from .methods import check_batch, final_point, stage_place
from .plans import Curvature, IterativeInverse, Plan, Point, ProjectedInverse, Projection, Spectral, Term, UnitNorm
from .segments import covered
from .trajectory import Trajectory

_KINDS = ("ekfac", "kfac", "diagonal", "identity")


@dataclass(frozen=True)
class InfluenceFunction:
    """Influence function at the end of training: (curvature + damping)^-1 (Grosse et al. 2023, arXiv 2308.03296).

    Args:
        damping: added to the eigenvalues (the objective's weight decay, for the exact inverse Hessian of a
            regularised objective), or "heuristic": 0.1 times each layer's mean eigenvalue.
        curvature: "ekfac", "kfac", "diagonal" or "identity" (of a stage's own objective, at the final parameters).
        fisher_batch: of "ekfac" and "diagonal", as for `Source`.
    """

    damping: float | str = "heuristic"
    curvature: str = "ekfac"
    fisher_batch: int = 1

    def __post_init__(self) -> None:
        check_batch(self.fisher_batch)
        if self.fisher_batch > 1 and self.curvature in ("kfac", "identity"):
            raise MethodError(
                f"fisher_batch={self.fisher_batch}: curvature={self.curvature!r} squares no gradients, so there is "
                "nothing to batch. Leave it at 1, or take 'ekfac' or 'diagonal'."
            )
        check_choice("curvature", self.curvature, _KINDS, MethodError)
        _check_damping(self.damping)

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        stage, final = stage_place(trajectory, stage), final_point(trajectory)
        groups = trajectory.stages[stage].learning_rates.shape[1]
        nothing, damping = (0.0,) * groups, _amount(self.damping)
        if self.curvature == "identity":
            inverse = 1 / (1 + (0.1 if damping is None else damping))
            operator = Spectral(stage, "constant", None, (inverse,) * groups, nothing)
        else:
            curvature = Curvature(stage, (final,), (1.0,), self.curvature, batch=self.fisher_batch)
            operator = Spectral(stage, "damped_inverse", curvature, (damping,) * groups, nothing)
        return (Term("final", stage, final, (operator,), (final,), (1.0,)),)


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


@dataclass(frozen=True)
class TRAK:
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

    dimension: int | None = 512
    damping: float | str = 0.0
    seed: int = 0
    fisher_batch: int = 1

    def __post_init__(self) -> None:
        check_batch(self.fisher_batch)
        _check_damping(self.damping)
        _check_dimension(self.dimension)

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        return _projected_plan(trajectory, stage, self, "output")


@dataclass(frozen=True)
class ProjectedFisher:
    """Influence with an empirical Fisher in a random projection, as in GGDA (Ley et al. 2024, arXiv 2410.09940).

    Args:
        dimension: of the projection; None projects nothing (small models).
        damping: added to the Fisher's eigenvalues; "heuristic" 0.1 times their mean.
        seed: of the projection.
        fisher_batch: the *batched* empirical Fisher: outer products of so many examples' summed gradients, over their
            number, so that their count falls by it. Random batches of b examples with mean gradient m add
            (b - 1) m m^T, little near convergence; the scores' provenance tells the relative error on some examples.
    """

    dimension: int | None = 512
    damping: float | str = "heuristic"
    seed: int = 0
    fisher_batch: int = 1

    def __post_init__(self) -> None:
        check_batch(self.fisher_batch)
        _check_damping(self.damping)
        _check_dimension(self.dimension)

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        return _projected_plan(trajectory, stage, self, "train")


def _projected_plan(trajectory: Trajectory, stage: int, of: TRAK | ProjectedFisher, features: str) -> Plan:
    final, place = final_point(trajectory), stage_place(trajectory, stage)
    projection = Projection(of.dimension, of.seed)
    operator = ProjectedInverse(place, final, projection, features, _amount(of.damping), of.fisher_batch)
    return (Term("final", place, final, (operator,), (final,), (1.0,)),)


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
        counts = (self.steps, self.sample_size, self.repetitions)
        if not all(isinstance(count, Integral) for count in counts) or min(counts) < 1:
            raise MethodError(
                f"steps={self.steps}, sample_size={self.sample_size}, repetitions={self.repetitions}: "
                "expected whole numbers, at least 1."
            )
        if isinstance(self.damping, str) or (self.scale is not None and not self.scale > 0):
            raise MethodError(f"damping={self.damping!r}, scale={self.scale!r}: expected numbers, the scale above 0.")
        _check_damping(self.damping)

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """One term at the last checkpoint."""
        final, place = final_point(trajectory), stage_place(trajectory, stage)
        operator = IterativeInverse(
            place, final, self.damping, self.steps, self.sample_size, self.repetitions, self.seed, self.scale
        )
        return (Term("final", place, final, (operator,), (final,), (1.0,)),)


def _amount(damping: float | str) -> float | None:
    return None if isinstance(damping, str) else float(damping)


def _check_damping(damping: float | str) -> None:
    if isinstance(damping, str):
        check_choice("damping", damping, ("heuristic",), MethodError)
    elif not 0 <= damping < float("inf"):
        raise MethodError(f"damping={damping}: expected a finite number >= 0, or 'heuristic'.")


def _check_dimension(dimension: int | None) -> None:
    if dimension is not None and (not isinstance(dimension, Integral) or dimension < 1):
        raise MethodError(f"dimension={dimension}: expected at least 1, or None to project nothing.")
