"""Whether a plan fits a run: its stages, checkpoints, parameter groups and layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import MethodError
from .plan import (
    CoupledFunction,
    IterativeInverse,
    Operator,
    Plan,
    Point,
    Preconditioner,
    ProjectedInverse,
    Term,
)
from .points import Part

_OPTIONAL = ("coupled", "ceilings", "moved")  # may be empty
_BY_GROUP = ("amount", "shift", "coupled", "ceilings")  # an operator's numbers, one for each parameter group
_OF_PARTS = ("rates", "moved")  # those of what it names


class StageFacts(NamedTuple):
    """What a plan may rely on of a stage: how many checkpoints and parameter groups it has, and the layers' names."""

    checkpoints: int
    parameter_groups: int
    layers: tuple[str, ...]


def check_plan(plan: Any, stage: int, stages: Sequence[StageFacts]) -> Plan:
    """The plan; MethodError, naming the term, unless it scores the stage and fits the run's stages."""
    if not isinstance(plan, tuple) or not plan or not all(isinstance(term, Term) for term in plan):
        raise MethodError(f"plan: expected a tuple of at least one Term, found {plan!r}.")
    labels = [term.label for term in plan]
    if len(set(labels)) < len(labels):
        raise MethodError(f"plan: two terms have one label, of {labels}. Give each a label of its own.")
    for term in plan:
        _check_term(term, stage, stages)
    return plan


def _check_term(term: Term, stage: int, stages: Sequence[StageFacts]) -> None:
    where = f"term {term.label!r}"
    if term.stage != stage:
        raise MethodError(
            f"{where}: its stage is {term.stage}, and stage {stage} is scored. Expected plan(trajectory, stage) to "
            "give terms of that stage; segflow.methods.stage_place counts a negative one from the front."
        )
    facts = stages[stage]
    for point in (*term.query_points, *term.train):
        _check_point(where, point, stages)
    _check_counts(f"{where}: weights", term.weights, facts)
    if term.layer is not None and term.layer not in facts.layers:
        raise MethodError(f"{where}: layer={term.layer!r} is not tracked. Choose one of {list(facts.layers)[:8]}.")
    for operator in term.operators:
        _check_operator(f"{where}: {type(operator).__name__}", operator, stage, stages)


def _check_operator(where: str, operator: Operator, stage: int, stages: Sequence[StageFacts]) -> None:
    """Raise MethodError unless an operator is of the scored stage or a later one, and fits it."""
    own = getattr(operator, "stage", stage)
    if not stage <= own < len(stages):
        raise MethodError(
            f"{where} is of stage {own}, expected {stage} to {len(stages) - 1}: the stage that is scored, or a later "
            "one. Only these have training data here, and what came before does not change what the data did."
        )
    facts = stages[own]
    if isinstance(operator, ProjectedInverse | IterativeInverse):
        _check_point(where, operator.point, stages)
    mixes = isinstance(operator, ProjectedInverse | IterativeInverse | CoupledFunction)
    if mixes and facts.layers != stages[stage].layers:
        raise MethodError(
            f"{where} mixes the layers of stage {own}, {list(facts.layers)[:8]}, and the scores' are those of "
            f"stage {stage}, {list(stages[stage].layers)[:8]}. Expected the same: give it stage={stage}, or "
            "take a method whose layers stay apart from each other, such as Source(curvature='ekfac')."
        )
    for name, numbers in vars(operator).items():
        if name in _BY_GROUP and len(numbers) != facts.parameter_groups and not (name in _OPTIONAL and not numbers):
            raise MethodError(_wrong_count(f"{where}: {name}", numbers, facts))
    for part in _parts(operator):
        _check_part(where, part, stages)


def _parts(operator: Operator) -> Iterator[Part]:
    """The curvatures, preconditioners and shares that an operator names, also those within others."""
    waiting = list(vars(operator).values())
    for part in waiting:
        if isinstance(part, Part):
            yield part
            waiting.extend(vars(part).values())


def _check_part(where: str, part: Part, stages: Sequence[StageFacts]) -> None:
    """Raise MethodError unless a part of an operator is at points of the run, with numbers for its parameter groups."""
    facts, named = stages[part.stage], f"{where}: {type(part).__name__}"
    points: Sequence[Point] = getattr(part, "points", ())
    weights: Sequence[Any] = getattr(part, "weights", ())
    if isinstance(part, Preconditioner):
        points = [Point.at(part.stage, index) for index, _ in part.weights]
        weights = [weight for _, weight in part.weights]
    for point in points:
        _check_point(named, point, stages)
    _check_counts(f"{named}: weights", weights, facts)
    for name, numbers in vars(part).items():
        if name in _OF_PARTS and len(numbers) != facts.parameter_groups and not (name in _OPTIONAL and not numbers):
            raise MethodError(_wrong_count(f"{named}: {name}", numbers, facts))


def _check_point(where: str, point: Point, stages: Sequence[StageFacts]) -> None:
    places = [index for index, _ in point.weights]
    if point.stage not in range(len(stages)) or max(places) >= stages[point.stage].checkpoints:
        raise MethodError(
            f"{where}: {point} names a checkpoint that is not there; the stages have "
            f"{[facts.checkpoints for facts in stages]} checkpoints. Count stages and checkpoints from 0."
        )


def _check_counts(where: str, weights: Sequence[Any], facts: StageFacts) -> None:
    """Raise MethodError where weights of each parameter group are not as many as the stage has groups."""
    for weight in weights:
        if isinstance(weight, tuple) and len(weight) != facts.parameter_groups:
            raise MethodError(_wrong_count(where, weight, facts))


def _wrong_count(where: str, numbers: Sequence[Any], facts: StageFacts) -> str:
    return (
        f"{where}={numbers}: {len(numbers)} for {facts.parameter_groups} parameter group(s) of the stage. Expected one "
        "for each, in the optimizer's order; trajectory.stages[stage].learning_rates has a column for each."
    )
