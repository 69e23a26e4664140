"""Where a plan looks: at parameters, at the optimizer's P over checkpoints, at the curvature of an objective."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import settle, truth, whole_number
from ..errors import MethodError, check_choice
from ..training.segments import Weight
from .plan_numbers import all_of, checked_weights, indexed_weights

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


def check_same_stage(where: str, stage: int, **parts: Curvature | Preconditioner | None) -> None:
    """Raise MethodError, which says where, unless what is given is of the stage, a Curvature or a Preconditioner."""
    for name, part in parts.items():
        if part is None:
            continue
        all_of(f"{where}: {name}", (part,), Curvature if name == "curvature" else Preconditioner)
        if part.stage != stage:
            raise MethodError(
                f"{where}: {name} is of stage {part.stage}, expected stage {stage}, whose layers and parameter groups "
                "are meant. Give each stage an operator of its own."
            )
