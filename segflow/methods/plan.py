"""What a plan is made of: terms, the operators on their query side, and the curvatures that these need.

    score[q, g] = sum over terms of
        < O . grad f_q(theta_query) ,  mean over points c, with weights, of sum_{i in g} grad l_i(theta_c) > / N

is the predicted change of measurement q if group g were removed from training. A plan is pure data; the engine in
`scoring` gives it its meaning and knows nothing else about a method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..arguments import settle, truth, whole_number
from ..errors import MethodError, check_choice
from ..training.segments import Weight
from .operators import (
    CoupledFunction,
    IterativeInverse,
    Operator,
    ProjectedInverse,
    Projection,
    Scale,
    Spectral,
    UnitNorm,
)
from .plan_numbers import all_of, checked_weights
from .points import Curvature, Point, Preconditioner, SampledFisher, TraceShares

__all__ = [
    "CoupledFunction",
    "Curvature",
    "IterativeInverse",
    "Operator",
    "Plan",
    "Point",
    "Preconditioner",
    "ProjectedInverse",
    "Projection",
    "SampledFisher",
    "Scale",
    "Spectral",
    "Term",
    "TraceShares",
    "UnitNorm",
    "adds_up",
    "curvatures",
    "fishers",
    "preconditioners",
    "projected",
    "spectral",
    "trace_shares",
]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a plan: where the query is, what happens to it, and which training gradients it meets.

    Its scores are divided by the number N of the stage's training examples, of either side, unless it is normalized.

    Args:
        label: the term's name in `Scores.by_term`.
        stage: whose training data.
        query: the parameters at which query gradients are taken. Of several points the mean of the gradients at them is
            taken, a smoothed query gradient, which is not the gradient at mean parameters.
        query_weights: of those points, one number each, that add up to 1; by default all weigh the same.
        operators: applied in order to the query gradient.
        train: the points at which training gradients are taken.
        weights: of those points, one number each, or one for each parameter group of the stage; they add up to 1 (a
            scale belongs into an operator, `Spectral` of kind "constant").
        side: what meets: each "gradient", or each "representation", the input of a layer.
        normalized: bring each group's gradient, or each example's representation, to norm 1 at each point, and do not
            divide by N; with UnitNorm and several points the score is the weighted mean of the points' cosines.
        layer: of representations, the layer's name; None for the last tracked one.

    Raises:
        MethodError: the side is unknown, weights are not one for each point and 1 in all, for each group, or an option
            would be ignored.
    """

    label: str
    stage: int
    query: Point | tuple[Point, ...]
    operators: tuple[Operator, ...]
    train: tuple[Point, ...]
    weights: tuple[Weight, ...]
    query_weights: tuple[float, ...] = ()
    side: str = "gradient"
    normalized: bool = False
    layer: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.label, str) or not self.label:
            raise MethodError(f"term {self.label!r}: expected a label that is text, the term's name in by_term.")
        where = f"term {self.label!r}"
        settle(self, stage=whole_number(f"{where}: stage", self.stage, MethodError))
        settle(self, normalized=truth(f"{where}: normalized", self.normalized, MethodError))
        check_choice("side", self.side, ("gradient", "representation"), MethodError)
        self._settle_query(where)
        operators = all_of(f"{where}: operators", self.operators, *get_args(Operator), least=0)
        train = all_of(f"{where}: train", self.train, Point)
        settle(self, operators=operators, train=train, weights=checked_weights(where, self.weights, len(train)))
        self._check_side(where)

    @property
    def query_points(self) -> tuple[Point, ...]:
        """The points of the query, one or several."""
        return (self.query,) if isinstance(self.query, Point) else self.query

    def _settle_query(self, where: str) -> None:
        """Points that are checked, and a weight for each; MethodError unless weights are one number for each point."""
        points = all_of(f"{where}: query", self.query_points, Point)
        given = self.query_weights or (1 / len(points),) * len(points)
        weights = checked_weights(f"{where}: query", given, len(points))
        if any(isinstance(weight, tuple) for weight in weights):
            raise MethodError(
                f"{where}: query_weights {weights}: expected one number for each point, for the mean is that of one "
                "measurement. Weights for each parameter group belong to training gradients."
            )
        settle(self, query=points if len(points) > 1 else points[0], query_weights=weights)

    def _check_side(self, where: str) -> None:
        """Raise MethodError where the side makes no sense with the layer, the query's points or the operators."""
        if self.side == "gradient" and self.layer is not None:
            raise MethodError(
                f"{where}: layer={self.layer!r}: gradients are those of all tracked layers, so it would be ignored. "
                "Leave it out, or give side='representation'."
            )
        if self.side == "representation" and len(self.query_points) > 1:
            raise MethodError(
                f"{where}: {len(self.query_points)} query points, and side='representation' compares the inputs of a "
                "layer at one. Expected one Point."
            )
        of_gradients = [type(op).__name__ for op in self.operators if not isinstance(op, UnitNorm) and not _plain(op)]
        if self.side == "representation" and of_gradients:
            raise MethodError(
                f"{where}: {' and '.join(of_gradients)} act on gradients, and side='representation' has none. Expected "
                "UnitNorm or Spectral(kind='constant', ...)."
            )


Plan = tuple[Term, ...]


def _plain(operator: Operator) -> bool:
    """Whether an operator multiplies by a number."""
    return isinstance(operator, Spectral) and operator.kind == "constant"


def adds_up(plan: Plan) -> bool:
    """Whether a group's score is the sum of its members' scores: no term divides by the norm of a group's gradient.

    An example's representation has a norm of its own, so that a group's sum is still that of its members.
    """
    return not any(term.normalized and term.side == "gradient" for term in plan)


def spectral(plan: Plan) -> list[Spectral]:
    """The distinct functions of eigenvalues, and constants, in a plan, in order of first use."""
    return list(dict.fromkeys(op for term in plan for op in term.operators if isinstance(op, Spectral)))


def curvatures(plan: Plan) -> list[Curvature]:
    """The distinct curvatures that a plan needs, in order of first use."""
    found: list[Curvature | None] = []
    for operator in spectral(plan):
        found += [operator.curvature, operator.trace_shares.curvature if operator.trace_shares else None]
    return list(dict.fromkeys(curvature for curvature in found if curvature is not None))


def trace_shares(plan: Plan) -> list[Spectral]:
    """One operator for each of the distinct layers' shares that a plan's eigenvalues are divided by."""
    return list({op.trace_shares: op for op in spectral(plan) if op.trace_shares is not None}.values())


def preconditioners(plan: Plan) -> list[Preconditioner]:
    """The distinct preconditioners that a plan needs: of its curvatures, then of its operators."""
    used: list[Preconditioner | None] = [curvature.scaled for curvature in curvatures(plan)]
    for operator in (operator for term in plan for operator in term.operators):
        if isinstance(operator, Scale):
            used.append(operator.preconditioner)
        elif isinstance(operator, Spectral):
            used.append(operator.shifted_by)
        elif isinstance(operator, CoupledFunction):
            used.append(operator.fisher.scaled)
    return list(dict.fromkeys(preconditioner for preconditioner in used if preconditioner is not None))


def fishers(plan: Plan) -> list[SampledFisher]:
    """The distinct curvatures of all layers together that a plan needs."""
    return list(dict.fromkeys(op.fisher for term in plan for op in term.operators if isinstance(op, CoupledFunction)))


def projected(plan: Plan) -> list[ProjectedInverse]:
    """The distinct inverses in a projection that a plan needs."""
    return list(dict.fromkeys(op for term in plan for op in term.operators if isinstance(op, ProjectedInverse)))


def mixes_layers(plan: Plan) -> bool:
    """Whether some operator makes a layer's part of the answer of all layers' gradients."""
    mixing = ProjectedInverse | IterativeInverse | CoupledFunction
    return any(isinstance(operator, mixing) for term in plan for operator in term.operators)
