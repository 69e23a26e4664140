"""Attribution methods as plans of terms; the engine knows nothing else about a method.

    score[q, g] = sum over terms of
        < O . grad f_q(theta_query) ,  mean over c in C of sum_{i in g} grad l_i(theta_c) > / N

is the predicted change of measurement q if group g were removed from training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import index
from typing import Any, Protocol

from torch import Tensor

from .errors import MethodError, check_choice
from .segments import cut
from .spectra import damped_inverse, decay, response
from .trajectory import Trajectory

_HEURISTIC_SHARE = 0.1  # of a layer's mean eigenvalue; Grosse et al. 2023, arXiv 2308.03296


@dataclass(frozen=True)
class Operator:
    """A function of the curvature pooled over `checkpoints` (of no curvature, sigma = 0, where there are none).

    kind: "decay", "response" or "damped_inverse". amount: lr_steps, or the damping (None: the heuristic one), and
    shift: weight decay added to the eigenvalues; one number for each parameter group.
    """

    kind: str
    checkpoints: tuple[int, ...]
    amount: tuple[float | None, ...]
    shift: tuple[float, ...]

    def on(self, eigenvalues: Tensor, parameter_group: int) -> Tensor:
        """The operator's own eigenvalues for a layer of that parameter group."""
        amount = self.amount[parameter_group]
        sigma = eigenvalues + self.shift[parameter_group]
        if self.kind == "damped_inverse":
            heuristic = _HEURISTIC_SHARE * eigenvalues.mean()
            return damped_inverse(sigma, heuristic if amount is None else amount)
        function = decay if self.kind == "decay" else response
        return function(sigma, 0.0 if amount is None else amount)


@dataclass(frozen=True)
class Term:
    """One term of a plan: where the query is, what happens to it, and which training gradients it meets.

    label: the term's name in `Scores.by_term`; operators: applied in order to the query gradient.
    """

    label: str
    query_checkpoint: int
    operators: tuple[Operator, ...]
    train_checkpoints: tuple[int, ...]


Plan = tuple[Term, ...]


class Method(Protocol):
    """A method: a frozen dataclass whose fields are its options and whose `plan` lists its terms."""

    def plan(self, trajectory: Trajectory) -> Plan:
        """The terms for this trajectory."""


@dataclass(frozen=True)
class Source:
    """SOURCE: the final query gradient walked back through training (Bae et al. 2024, arXiv 2405.12186).

    Args:
        segments: how many segments, or the steps at which one ends and the next begins.

    Example:
        >>> Source(segments=3)
        Source(segments=3)
    """

    segments: int | Sequence[int] = 3

    def __post_init__(self) -> None:
        try:
            if isinstance(self.segments, bool | str):
                raise TypeError
            plain = index(self.segments) if hasattr(self.segments, "__index__") else tuple(map(index, self.segments))
        except TypeError:
            raise MethodError(
                f"segments={self.segments!r}: expected a count, or the steps at which to cut, as whole numbers."
            ) from None
        object.__setattr__(self, "segments", plain)

    def plan(self, trajectory: Trajectory) -> Plan:
        """One term for each segment, first to last; MethodError if the cut does not fit the trajectory."""
        walked: tuple[Operator, ...] = ()
        terms = []
        for number, part in reversed(list(enumerate(cut(trajectory, self.segments), start=1))):
            settings = (part.checkpoints, part.lr_steps, part.weight_decay)
            label = f"segment {number}: steps {part.start + 1}-{part.end}"
            operators = (*walked, Operator("response", *settings))
            terms.append(Term(label, len(trajectory) - 1, operators, part.checkpoints))
            walked = (*walked, Operator("decay", *settings))
        return tuple(reversed(terms))


@dataclass(frozen=True)
class InfluenceFunction:
    """Influence function at the last checkpoint: (curvature + damping)^-1 (Grosse et al. 2023, arXiv 2308.03296).

    Args:
        damping: added to the eigenvalues (the objective's weight decay, for the exact inverse Hessian of a
            regularised objective), or "heuristic": 0.1 times each layer's mean eigenvalue.
    """

    damping: float | str = "heuristic"

    def __post_init__(self) -> None:
        if isinstance(self.damping, str):
            check_choice("damping", self.damping, ("heuristic",), MethodError)
        elif not 0 <= self.damping < float("inf"):
            raise MethodError(f"damping={self.damping}: expected a finite number >= 0, or 'heuristic'.")

    def plan(self, trajectory: Trajectory) -> Plan:
        """One term at the last checkpoint."""
        last = len(trajectory) - 1
        groups = trajectory.learning_rates.shape[1]
        amount = (None if isinstance(self.damping, str) else float(self.damping),) * groups
        operator = Operator("damped_inverse", (last,), amount, (0.0,) * groups)
        return (Term("final", last, (operator,), (last,)),)


@dataclass(frozen=True)
class TracIn:
    """TracIn: gradient products at every checkpoint (Pruthi et al. 2020, arXiv 2002.08484).

    A checkpoint stands for the steps since the one before it, so it weighs the sum of their effective learning rates.
    """

    def plan(self, trajectory: Trajectory) -> Plan:
        """One term for each checkpoint."""
        terms = []
        for place, (start, end) in enumerate(zip((0, *trajectory.steps), trajectory.steps, strict=False)):
            amount = trajectory.lr_steps(start, end)
            operator = Operator("response", (), amount, (0.0,) * len(amount))
            terms.append(Term(f"checkpoint at step {end}", place, (operator,), (place,)))
        return tuple(terms)


def curvatures(plan: Plan) -> list[tuple[int, ...]]:
    """The distinct checkpoint sets whose pooled curvature a plan needs, in order of first use."""
    needed = dict.fromkeys(op.checkpoints for term in plan for op in term.operators if op.checkpoints)
    return list(needed)


def describe(method: Method) -> dict[str, Any]:
    """The method's name and options, for provenance."""
    return {"method": type(method).__name__, **asdict(method)}  # type: ignore[call-overload]
