"""What a method is: a frozen dataclass of options whose plan lists its terms; and what methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import MethodError, check_choice, is_whole
from ..training.segments import Segmentation
from .plan import Plan, Point

if TYPE_CHECKING:
    from ..training.trajectory import Trajectory

Cuts = Mapping[int, Segmentation]  # of each stage


class Method(Protocol):
    """A method: a frozen dataclass whose fields are its options and whose `plan` lists its terms.

    A method whose group scores are not the sums of their members' says so by `additive: ClassVar[bool] = False`; its
    scores are then neither rolled up to coarser groups nor refined.
    """

    def plan(self, trajectory: Trajectory, stage: int = -1) -> Plan:
        """The terms that attribute a stage's data (by default the last one's) to the final model."""


def stage_place(trajectory: Trajectory, stage: int) -> int:
    """The stage's place, counted from the first one."""
    return stage % len(trajectory.stages)


def final_point(trajectory: Trajectory) -> Point:
    """The end of training."""
    return Point.at(len(trajectory.stages) - 1, len(trajectory) - 1)


def check_batch(size: int) -> None:
    """Raise MethodError unless a batched Fisher's size is a whole number from 1."""
    if not is_whole(size, 1):
        raise MethodError(f"fisher_batch={size!r}: expected a whole number of examples, at least 1.")


def describe(method: Method) -> dict[str, Any]:
    """The method's name and options, for provenance, and that it is not additive if it says so."""
    described = {"method": type(method).__name__, **asdict(method)}  # type: ignore[call-overload]
    return described if getattr(method, "additive", True) else described | {"additive": False}


def damping_amount(damping: float | str) -> float | None:
    """The damping as an operator has it: None for the heuristic one."""
    return None if isinstance(damping, str) else float(damping)


def check_damping(damping: float | str) -> None:
    """Raise MethodError unless it is a finite number >= 0, or "heuristic"."""
    if isinstance(damping, str):
        check_choice("damping", damping, ("heuristic",), MethodError)
    elif not 0 <= damping < float("inf"):
        raise MethodError(f"damping={damping}: expected a finite number >= 0, or 'heuristic'.")
