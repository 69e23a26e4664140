"""What a plan is made of: terms, the operators on their query side, and the curvatures that these need.

    score[q, g] = sum over terms of
        < O . grad f_q(theta_query) ,  mean over points c, with weights, of sum_{i in g} grad l_i(theta_c) > / N

is the predicted change of measurement q if group g were removed from training. A plan is pure data; the engine in
`scoring` gives it its meaning and knows nothing else about a method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import MethodError, check_choice
from ..training.segments import Weight, for_group
from .spectra import damped_inverse, decay, response, saturation

_ROUNDING = 1e-6  # of weights that add up to 1
HEURISTIC_SHARE = 0.1  # of a layer's mean eigenvalue; Grosse et al. 2023, arXiv 2308.03296
Weights = tuple[tuple[int, float], ...]  # (index of a checkpoint within its stage, weight); the weights sum to 1
_OF_RATE: dict[str, Callable[[Tensor, float, Tensor | float], Tensor]] = {
    "decay": decay,
    "response": response,
    "saturation": saturation,
}


@dataclass(frozen=True)
class Point:
    """Parameters at which something is evaluated: a stage's checkpoint, or the weighted mean of several."""

    stage: int
    weights: Weights

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


@dataclass(frozen=True)
class Curvature:
    """The curvature of a stage's objective, averaged over points with weights that sum to 1.

    Args:
        weights: of each point one number, or one for each parameter group of the stage.
        kind: "ekfac", "kfac" or "diagonal".
        scaled: P, for the curvature of P^1/2 H P^1/2 instead of H; "ekfac" and "kfac" take the rank-one part of P.
        batch: second moments are those of so many examples' summed gradients, over `batch`.
    """

    stage: int
    points: tuple[Point, ...]
    weights: tuple[Weight, ...]
    kind: str = "ekfac"
    scaled: Preconditioner | None = None
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Spectral:
    """A function of a curvature's eigenvalues (of sigma = 0 without a curvature).

    Args:
        stage: the stage of training whose parameter groups are meant, and whose layers the operator acts on.
        kind: "decay", "response" or "saturation", each of a rate (see `spectra`), "damped_inverse" or "constant".
        amount: the rate (the segment's summed lr_steps), the damping or the constant, one for each parameter group;
            None for a damping of 0.1 times each layer's mean eigenvalue.
        shift: what weight decay adds to rate * eigenvalue, a sum over the segment's steps; for "damped_inverse" what it
            adds to the eigenvalue; one for each parameter group.
        coupled: the part of the shift that is times P, as the coupled weight decay of Adam and its like; one for each
            parameter group, or empty where no group has such a part.
        shifted_by: the P of that part.
        ceilings: where training's batches may have left layers out, how many times the rate of each parameter group may
            count: a layer's is rate * min(1 / share, ceiling), share being that of the training examples that reach
            it. Weight decay is not multiplied. Empty: every rate counts once.

    Raises:
        MethodError: the kind is not known, an amount is None that is no damping, or of `coupled` and `shifted_by` only
            one is given.
    """

    stage: int
    kind: str
    curvature: Curvature | None
    amount: tuple[float | None, ...]
    shift: tuple[float, ...]
    coupled: tuple[float, ...] = ()
    shifted_by: Preconditioner | None = None
    ceilings: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, (*_OF_RATE, "damped_inverse", "constant"), MethodError)
        if bool(self.coupled) != (self.shifted_by is not None):
            raise MethodError(
                f"Spectral(stage={self.stage}, kind={self.kind!r}): coupled={self.coupled} and "
                f"shifted_by={self.shifted_by}: expected both or neither. The coupled part of a shift is times the P "
                "that shifted_by names."
            )
        if self.kind != "damped_inverse":
            for parameter_group in range(len(self.amount)):
                self._number(parameter_group)

    def needs_share(self, parameter_group: int) -> bool:
        """Whether the function of a layer in this group depends on the share of the examples that reach it."""
        return bool(self.ceilings) and self.ceilings[parameter_group] > 1

    def on(
        self, eigenvalues: Tensor, parameter_group: int, P: Tensor | float = 1.0, share: float | None = None
    ) -> Tensor:
        """The function's values at a layer's eigenvalues [P, O, I], or [] for a constant.

        parameter_group: the layer's. P: that of `shifted_by`, in the eigenvalues' basis. share: of the training
        examples, those that reach the layer; None where it does not matter.
        """
        counts = 1.0 if share is None else min(1 / share, self.ceilings[parameter_group])
        if self.kind == "constant":
            return eigenvalues.new_full((), counts * self._number(parameter_group))
        shift: Tensor | float = self.shift[parameter_group]
        if self.coupled:
            shift = shift + self.coupled[parameter_group] * P
        if self.kind == "damped_inverse":
            damping = self.amount[parameter_group]
            heuristic = HEURISTIC_SHARE * eigenvalues.mean()
            # the shift is a sum of weight decay per rate
            return damped_inverse(eigenvalues + shift / counts, heuristic if damping is None else damping)
        return _OF_RATE[self.kind](eigenvalues, counts * self._number(parameter_group), shift)

    def _number(self, parameter_group: int) -> float:
        amount = self.amount[parameter_group]
        if amount is None:
            raise MethodError(
                f"Spectral(stage={self.stage}, kind={self.kind!r}): the amount of parameter group {parameter_group} is "
                f"None, expected {'a number' if self.kind == 'constant' else 'its rate'}. Only a damping may be "
                "None, which stands for the heuristic one."
            )
        return amount


@dataclass(frozen=True)
class Scale:
    """Multiplies by P to a power, elementwise, in parameter space: where the exact P enters and leaves."""

    preconditioner: Preconditioner
    power: float


@dataclass(frozen=True)
class Projection:
    """Random rank-one probes (u_j, w_j) for each layer: feature j of a gradient G is the layers' sum of u_j^T G w_j.

    dimension: the number of features; None: every parameter is a feature of its own, nothing is random.
    """

    dimension: int | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class ProjectedInverse:
    """(R^T F R + damping)^-1 in a projection's features, F being a second moment of per-example gradients.

    Args:
        stage: whose training examples; point: the parameters at which their gradients are taken.
        features: "train" for gradients of the training loss (an empirical Fisher), "output" for those of the task's
            output function (TRAK).
        damping: None for 0.1 times the mean eigenvalue.
        batch: F is that of so many examples' summed gradients, over `batch`.
    """

    stage: int
    point: Point
    projection: Projection
    features: str
    damping: float | None
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class IterativeInverse:
    """(H + damping)^-1 by LiSSA: `steps` products with the Hessian H of batches of a stage's training loss at a point.

    Args:
        sample_size: examples of a batch.
        repetitions: independent estimates that are averaged.
        scale: divides the damped Hessian, at least half its largest eigenvalue; None estimates it.
    """

    stage: int
    point: Point
    damping: float
    steps: int
    sample_size: int
    repetitions: int
    seed: int
    scale: float | None


@dataclass(frozen=True)
class UnitNorm:
    """Brings each query gradient to norm 1, for cosines."""


Operator = Spectral | Scale | ProjectedInverse | IterativeInverse | UnitNorm


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a plan: where the query is, what happens to it, and which training gradients it meets.

    Args:
        label: the term's name in `Scores.by_term`.
        stage: whose training data.
        query: the parameters at which query gradients are taken.
        operators: applied in order to the query gradient.
        train: the points at which training gradients are taken.
        weights: of those points, one number each, or one for each parameter group of the stage; they add up to 1 (a
            scale belongs into an operator, `Spectral` of kind "constant").
        side: what meets: each "gradient", or each "representation", the input of a layer.
        normalized: bring each group's gradient, or each example's representation, to norm 1.
        layer: of representations, the layer's name; None for the last tracked one.

    Raises:
        MethodError: the side is unknown, or the weights are not one for each point and 1 in all, for each group.
    """

    label: str
    stage: int
    query: Point
    operators: tuple[Operator, ...]
    train: tuple[Point, ...]
    weights: tuple[Weight, ...]
    side: str = "gradient"
    normalized: bool = False
    layer: str | None = None

    def __post_init__(self) -> None:
        check_choice("side", self.side, ("gradient", "representation"), MethodError)
        if not self.train or len(self.weights) != len(self.train) or not _add_up(self.weights):
            raise MethodError(
                f"term {self.label!r}: weights {self.weights} for {len(self.train)} points: expected one for each, 1 "
                'in all. Put a scale into an operator, such as Spectral(kind="constant", ...).'
            )


Plan = tuple[Term, ...]


def _add_up(weights: Sequence[Weight]) -> bool:
    """Whether weights are 1 in all, for each parameter group where they are one for each."""
    groups = {len(weight) for weight in weights if isinstance(weight, tuple)} or {1}
    sums = [sum(for_group(weights, group)) for group in range(min(groups))]
    return len(groups) == 1 and all(abs(total - 1) <= _ROUNDING for total in sums)


def check_plan(plan: Any, checkpoints: Sequence[int]) -> Plan:
    """The plan; MethodError unless it has terms of different labels, at points that are there.

    checkpoints: how many each stage has.
    """
    if not isinstance(plan, tuple) or not plan or not all(isinstance(term, Term) for term in plan):
        raise MethodError(f"plan: expected a tuple of at least one Term, found {plan!r}.")
    labels = [term.label for term in plan]
    if len(set(labels)) < len(labels):
        raise MethodError(f"plan: two terms have one label, of {labels}. Give each a label of its own.")
    for term in plan:
        for point in (term.query, *term.train):
            places = [index for index, _ in point.weights]
            if point.stage not in range(len(checkpoints)) or not all(
                index in range(checkpoints[point.stage]) for index in places
            ):
                raise MethodError(
                    f"term {term.label!r}: {point} names a checkpoint that is not there; the stages have "
                    f"{list(checkpoints)} checkpoints. Count stages and checkpoints from 0."
                )
    return plan


def spectral(plan: Plan) -> list[Spectral]:
    """The distinct functions of eigenvalues, and constants, in a plan, in order of first use."""
    return list(dict.fromkeys(op for term in plan for op in term.operators if isinstance(op, Spectral)))


def curvatures(plan: Plan) -> list[Curvature]:
    """The distinct curvatures that a plan needs, in order of first use."""
    return list(dict.fromkeys(op.curvature for op in spectral(plan) if op.curvature is not None))


def preconditioners(plan: Plan) -> list[Preconditioner]:
    """The distinct preconditioners that a plan needs, in order of first use."""
    used: list[Preconditioner | None] = []
    for operator in (operator for term in plan for operator in term.operators):
        if isinstance(operator, Scale):
            used.append(operator.preconditioner)
        elif isinstance(operator, Spectral):
            used += [operator.shifted_by, operator.curvature.scaled if operator.curvature else None]
    return list(dict.fromkeys(preconditioner for preconditioner in used if preconditioner is not None))


def projected(plan: Plan) -> list[ProjectedInverse]:
    """The distinct inverses in a projection that a plan needs."""
    return list(dict.fromkeys(op for term in plan for op in term.operators if isinstance(op, ProjectedInverse)))
