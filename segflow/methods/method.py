"""What a method is, and what the ready-made ones share."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from torch import Tensor

from ..arguments import real_number, truth, whole_number
from ..errors import MethodError, check_choice
from ..training.segments import Segmentation, cut
from .plan import Operator, Plan, Point, Term, adds_up

if TYPE_CHECKING:
    from ..training.trajectory import Trajectory

Cuts = Mapping[int, Segmentation]  # of each stage, by its place in the run


class Method(Protocol):
    """What a method must have, one of your own like the ready-made ones.

    A method is a frozen dataclass. Its fields are its options; they enter the scores' provenance, so they are what JSON
    can hold. It has

    - `plan(trajectory, stage=-1)`: the terms. What `Analyzer.fit` computes follows from their operators alone: a
      `Curvature`, a `Preconditioner`, a `ProjectedInverse` are fitted because a term names them.

    Whether its scores add up (a group's is the sum of its members') follows from the plan: they do not where a term
    divides by the norm of a group's gradient (`Term.normalized`). A method whose scores do not add up for another
    reason says so by `additive: ClassVar[bool] = False`. Such scores are neither rolled up to coarser groups nor shared
    out to single examples nor refined.

    It may say how far the sizes of its scores can be trusted, by `sizes`: a sentence (an attribute or a property) that
    `Analyzer.check` prints.

    It may have besides, where its plan depends on how a run's checkpoints differ:

    - `automatic`: an attribute or property that is True;
    - `cuts(trajectory, statistics)`: see `AutomaticMethod`;
    - an argument of `plan`, `cuts=`: what `cuts` returned.
    """

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """The terms that attribute a stage's data to the final model.

        trajectory: the whole run, whose `stages` it may look at. stage: the stage's place among them, by default the
        last one's. MethodError or TrajectoryError if the method does not fit the run; it must not need files, for it
        is also called before anything is computed, and it must give the same plan whenever it is called.
        """


class AutomaticMethod(Protocol):
    """A method that cuts stages into segments where `Analyzer.fit` finds that the checkpoints differ."""

    @property
    def automatic(self) -> bool:
        """Whether plans need cuts, with the options that were given."""

    def cuts(self, trajectory: Trajectory, statistics: Mapping[int, Tensor]) -> Cuts:
        """Where each stage is cut, by its place in the run.

        statistics: for each stage whose training data is given, a row for each checkpoint, [checkpoints, features];
        squared distances of rows are relative changes of training gradients and curvature. `Segmentation` says what
        the scores' provenance then explains; `segflow.methods.segmentation` makes one.
        """

    def plan(self, trajectory: Trajectory, stage: int = -1, cuts: Cuts | None = None) -> Plan:
        """As a `Method`'s, where `cuts` returned these."""


def is_automatic(method: Method) -> TypeGuard[AutomaticMethod]:
    """Whether a method's plans need cuts; MethodError if it says so and has no `cuts`."""
    if not getattr(method, "automatic", False):
        return False
    name = type(method).__name__
    if not callable(getattr(method, "cuts", None)):
        raise MethodError(
            f"{name}: automatic is {method.automatic!r}, and there is no "  # type: ignore[attr-defined]
            "cuts(trajectory, statistics). Add it as segflow.methods.Method says, or leave automatic out."
        )
    arguments = signature(method.plan).parameters.values()
    if not any(argument.name == "cuts" or argument.kind is Parameter.VAR_KEYWORD for argument in arguments):
        raise MethodError(
            f"{name}: automatic is {method.automatic!r}, and plan() takes no cuts. "  # type: ignore[attr-defined]
            "Expected plan(trajectory, stage=-1, cuts=None), which is given what cuts() returned."
        )
    return True


def stage_place(trajectory: Trajectory, stage: int) -> int:
    """The stage's place, counted from the first one."""
    return stage % len(trajectory.stages)


def final_point(trajectory: Trajectory) -> Point:
    """The end of training."""
    return Point.at(len(trajectory.stages) - 1, len(trajectory) - 1)


def run_points(trajectory: Trajectory, weighting: str = "nearest") -> tuple[tuple[Point, ...], tuple[float, ...]]:
    """The last stage's checkpoints, and the share of its steps that each stands for; none without a share.

    weighting: see `segflow.training.segments.cut`.
    """
    last, stage = trajectory.stages[-1], len(trajectory.stages) - 1
    [whole] = cut(last, 1, weighting)
    pairs = [pair for pair in zip(whole.checkpoints, whole.overall, strict=True) if pair[1]]
    points, weights = zip(*pairs, strict=True)
    return tuple(Point.at(stage, checkpoint) for checkpoint in points), weights


def ceilings(trajectory: Trajectory) -> tuple[float, ...]:
    """A stage's ceilings as an operator has them: empty where every rate counts once."""
    return trajectory.ceilings if any(ceiling > 1 for ceiling in trajectory.ceilings) else ()


def final_plan(trajectory: Trajectory, stage: int, *operators: Operator, **options: Any) -> Plan:
    """One term, in which queries and a stage's training gradients meet at the end of training.

    options: of the Term, besides.
    """
    place, final = stage_place(trajectory, stage), final_point(trajectory)
    term = Term(label="final", stage=place, query=final, operators=operators, train=(final,), weights=(1.0,), **options)
    return (term,)


def batch_of_fisher(size: object) -> int:
    """The option `fisher_batch`, a batched Fisher's size; MethodError unless it is a whole number from 1."""
    return whole_number("fisher_batch", size, MethodError, 1, advice="It counts examples; 1 batches nothing.")


def check_cuts(cuts: Any, stages: Sequence[int]) -> Cuts:
    """What an automatic method's `cuts` returned; MethodError unless it has a Segmentation for each of the stages."""
    if not isinstance(cuts, Mapping) or not all(isinstance(cuts.get(stage), Segmentation) for stage in stages):
        raise MethodError(
            f"cuts: expected {{stage: Segmentation}} for the stages {list(stages)}, found {cuts!r}. Make them with "
            "segflow.methods.segmentation."
        )
    return cuts


def uncut(trajectory: Trajectory) -> Cuts:
    """Each stage as one segment, for what can be said of an automatic method's plan before its cuts are known."""
    return {place: Segmentation((), stage.steps, (), (), 0.0) for place, stage in enumerate(trajectory.stages)}


def sizes_of(method: Method) -> str:
    """How far the sizes of a method's scores can be trusted, in words; MethodError unless it is text."""
    said = getattr(method, "sizes", "not known for this method; take their ranks")
    if not isinstance(said, str):
        raise MethodError(f"{type(method).__name__}: sizes is {said!r}, expected text, a sentence for people.")
    return said


def is_additive(method: Method, plan: Plan) -> bool:
    """Whether a method's group scores, by this plan, are the sums of their members'; False of either wins."""
    return declared_additive(method) and adds_up(plan)


def declared_additive(method: Method) -> bool:
    """What the method says of itself; MethodError unless it is True or False."""
    advice = "It is an attribute or a property, that says whether a group's score is the sum of its members'."
    return truth(f"{type(method).__name__}: additive", getattr(method, "additive", True), MethodError, advice)


def describe(method: Method) -> dict[str, Any]:
    """The method's name and options, for provenance, and that it is not additive if it says so.

    Raises MethodError unless it is a dataclass whose options JSON can hold.
    """
    name = type(method).__name__
    if not is_dataclass(method):
        raise MethodError(f"{name}: expected a dataclass. Put @dataclass(frozen=True) before the class.")
    options = asdict(method)  # type: ignore[call-overload]
    if "method" in options:
        raise MethodError(f"{name}: an option called 'method' would hide the method's name. Call it otherwise.")
    try:
        json.dumps(options)
    except (TypeError, ValueError) as problem:
        raise MethodError(
            f"{name}: an option is not what JSON can hold ({problem}). Keep options to numbers, text, lists of these, "
            "and None; they enter the scores' provenance."
        ) from problem
    return {"method": name, **options, **({} if declared_additive(method) else {"additive": False})}


def prefixed(described: Mapping[str, Any], reserved: Collection[str]) -> dict[str, Any]:
    """What `describe` gave, where an option whose name is reserved is called method_<name>.

    Example:
        >>> prefixed({"method": "TRAK", "seed": 1}, {"seed"})
        {'method': 'TRAK', 'method_seed': 1}
    """
    return {
        f"method_{key}" if key in reserved and key != "additive" else key: value for key, value in described.items()
    }


def damping_amount(damping: float | str) -> float | None:
    """The damping as an operator has it: None for the heuristic one."""
    return None if isinstance(damping, str) else float(damping)


def damping_option(damping: object) -> float | str:
    """The option `damping`; MethodError unless it is a finite number >= 0, or "heuristic"."""
    if isinstance(damping, str):
        check_choice("damping", damping, ("heuristic",), MethodError)
        return str(damping)
    return real_number("damping", damping, MethodError, 0, advice="Or give 'heuristic'.")
