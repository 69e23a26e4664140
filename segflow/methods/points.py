"""Where a plan looks: at parameters, at the optimizer's P over checkpoints, at a curvature, at its layers' shares."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import real_number, settle, truth, whole_number
from ..errors import MethodError, check_choice
from ..training.segments import Weight
from .plan_numbers import all_of, checked_amounts, checked_weights, indexed_weights

Weights = tuple[tuple[int, float], ...]  # (index of a checkpoint within its stage, weight); the weights sum to 1


@dataclass(frozen=True)
class Point:
    """Parameters at which something is evaluated: a stage's checkpoint, or the weighted mean of several.

    Args:
        stage: its place in the run, counted from 0.
        weights: (index of a checkpoint within the stage, its weight); none is below 0, and they are 1 in all.

    Example:
        >>> Point.at(0, 3) == Point(0, ((3, 1.0),))
        True
    """

    stage: int
    weights: Weights

    def __post_init__(self) -> None:
        stage = whole_number("stage", self.stage, MethodError, advice="It is a stage's place, counted from 0.")
        pairs = indexed_weights(f"Point(stage={stage})", self.weights)
        if any(isinstance(weight, tuple) for _, weight in pairs):
            raise MethodError(
                f"Point(stage={stage}): weights {self.weights}: expected one number for each checkpoint, for a point "
                "is one set of parameters. Weights for each parameter group belong into a Term or a Curvature."
            )
        settle(self, stage=stage, weights=pairs)

    @classmethod
    def at(cls, stage: int, checkpoint: int) -> Point:
        """One checkpoint."""
        return cls(stage, ((checkpoint, 1.0),))


@dataclass(frozen=True)
class Preconditioner:
    """The optimizer's P over checkpoints of a stage: one over the weighted mean of sqrt(second moment) + eps.

    weights: (index of a checkpoint, its weight, or one for each parameter group of the stage).
    moved: whether P moved the parameters of each group, which must then have second moments at one of the checkpoints;
        where they were not moved and have none, P is 1. Empty: all were moved.
    """

    stage: int
    weights: tuple[tuple[int, Weight], ...]
    moved: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        stage = whole_number("stage", self.stage, MethodError, advice="It is a stage's place, counted from 0.")
        where = f"Preconditioner(stage={stage})"
        moved = tuple(truth(f"{where}: moved", one, MethodError) for one in self.moved)
        settle(self, stage=stage, weights=indexed_weights(where, self.weights), moved=moved)


@dataclass(frozen=True)
class Curvature:
    """The curvature of a stage's objective, averaged over points with weights that sum to 1.

    Args:
        weights: of each point one number, or one for each parameter group of the stage.
        kind: "ekfac", "kfac" or "diagonal".
        scaled: P, for the curvature of P^1/2 H P^1/2 instead of H; "ekfac" and "kfac" take the rank-one part of P.
        batch: second moments are those of so many examples' summed gradients, over `batch`; 1 for "kfac", which has
            none.
    """

    stage: int
    points: tuple[Point, ...]
    weights: tuple[Weight, ...]
    kind: str = "ekfac"
    scaled: Preconditioner | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        stage = whole_number("stage", self.stage, MethodError, advice="It is a stage's place, counted from 0.")
        where = f"Curvature(stage={stage})"
        check_choice(f"{where}: kind", self.kind, ("ekfac", "kfac", "diagonal"), MethodError)
        points = all_of(f"{where}: points", self.points, Point)
        weights = checked_weights(where, self.weights, len(points))
        most = 1 if self.kind == "kfac" else None
        advice = "It counts examples; kind='kfac' squares no gradients, so there it is 1."
        batch = whole_number(f"{where}: batch", self.batch, MethodError, 1, most, advice)
        check_same_stage(where, stage, scaled=self.scaled)
        settle(self, stage=stage, points=points, weights=weights, batch=batch)


@dataclass(frozen=True, kw_only=True)
class TraceShares:
    """Each layer's share of the whole curvature, c_l = rate_l trace_l / sum over layers of rate * trace.

    An operator that has them takes lambda_l / c_l in place of a layer's eigenvalues lambda_l. Block-diagonal curvature
    lets every layer make the whole correction by itself, so that saturated directions count once for each layer; so
    divided, the layers share one correction. Where their tangent kernels are proportional, K_l = c_l K, that is a
    function of the whole matrix, exactly, and for any shares blockdiag(F_l / c_l) dominates F. A layer whose rate is 0
    in a segment learns nothing there, and its query gradient decays at the limit of rate_l / c_l: the others undo what
    it did. One that a later stage's optimizer does not have has no curvature there, and stays as it is.

    Args:
        stage: of training.
        curvature: whose traces, that of P^1/2 F P^1/2 where the optimizer has a P.
        rates: one for each parameter group.
        power: of the shares; they sum to 1 at power 1.

    Raises:
        MethodError: the curvature is of another stage, a rate is below 0, or the power is not above 0.
    """

    stage: int
    curvature: Curvature
    rates: tuple[float, ...]
    power: float = 1.0

    def __post_init__(self) -> None:
        stage = whole_number("stage", self.stage, MethodError, advice="It is a stage's place, counted from 0.")
        where = f"TraceShares(stage={stage})"
        all_of(f"{where}: curvature", (self.curvature,), Curvature)
        check_same_stage(where, stage, curvature=self.curvature)
        power = real_number(f"{where}: power", self.power, MethodError, above=0)
        settle(self, stage=stage, rates=checked_amounts(where, "rates", self.rates, 0.0), power=power)


@dataclass(frozen=True, kw_only=True)
class SampledFisher:
    """The curvature of all layers of a stage together, as the second moment of sampled pseudo-gradients.

    Args:
        stage, points, weights, scaled: as a Curvature's; P is exact, not its rank-one part.
        rates: one for each parameter group.
        most: pseudo-gradients of all points together; where there are more, examples are drawn.
    """

    stage: int
    points: tuple[Point, ...]
    weights: tuple[Weight, ...]
    rates: tuple[float, ...]
    scaled: Preconditioner | None = None
    most: int = 7_500

    def __post_init__(self) -> None:
        stage = whole_number("stage", self.stage, MethodError, advice="It is a stage's place, counted from 0.")
        where = f"SampledFisher(stage={stage})"
        points = all_of(f"{where}: points", self.points, Point)
        weights = checked_weights(where, self.weights, len(points))
        rates = checked_amounts(where, "rates", self.rates, 0.0)
        most = whole_number(f"{where}: most", self.most, MethodError, len(points))
        check_same_stage(where, stage, scaled=self.scaled)
        settle(self, stage=stage, points=points, weights=weights, rates=rates, most=most)


Part = Curvature | Preconditioner | TraceShares | SampledFisher  # what operators name


def check_same_stage(
    where: str, stage: int, **parts: Curvature | Preconditioner | TraceShares | SampledFisher | None
) -> None:
    """Raise MethodError, which says where, unless each part that is given is of its kind, and of the stage."""
    kinds: dict[str, type] = {"curvature": Curvature, "trace_shares": TraceShares, "fisher": SampledFisher}
    for name, part in parts.items():
        if part is None:
            continue
        all_of(f"{where}: {name}", (part,), kinds.get(name, Preconditioner))
        if part.stage != stage:
            raise MethodError(
                f"{where}: {name} is of stage {part.stage}, expected stage {stage}, whose layers and parameter groups "
                "are meant. Give each stage an operator of its own."
            )
