"""Plans of methods outside the package, of every operator and kind, equal a dense reading of what plans mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.methods import (
    Curvature,
    Plan,
    Point,
    Preconditioner,
    Scale,
    Segmentation,
    Spectral,
    Term,
    TraceShares,
    UnitNorm,
    final_point,
    segmentation,
    stage_place,
)

from ..support.dense_plans import DensePlans
from ..support.stages import Course

FIRST, LAST = Point.at(0, 0), Point.at(0, 1)
P = Preconditioner(0, ((0, 0.3), (1, 0.7)))
P_BY_GROUP = Preconditioner(0, ((0, (0.2, 0.9)), (1, (0.8, 0.1))))
POINTS = (FIRST, Point(0, ((0, 0.25), (1, 0.75))), Point.at(1, 1))  # also a mean, and another stage's
OF_ONE = Curvature(0, (LAST,), (1.0,))
OF_MANY = Curvature(0, POINTS, ((0.5, 0.1), (0.3, 0.6), (0.2, 0.3)))
LATER = Curvature(1, (Point.at(1, 0), Point.at(1, 1)), (0.6, 0.4))
RATE = {"amount": (2.0, 0.5), "shift": (0.1, 0.4)}

spectral = partial(Spectral, stage=0)
OPERATORS: dict[str, tuple[Any, ...]] = {
    **{kind: (spectral(kind=kind, curvature=OF_MANY, **RATE),) for kind in ("decay", "response", "saturation")},
    "inverse": (spectral(kind="damped_inverse", curvature=OF_MANY, amount=(0.02, 0.3), shift=(0.0, 0.1)),),
    "heuristic inverse": (spectral(kind="damped_inverse", curvature=OF_ONE, amount=(None, 0.3), shift=(0.0, 0.0)),),
    "constant": (spectral(kind="constant", curvature=None, amount=(-2.0, 0.5), shift=(0.0, 0.0)),),
    "response without a curvature": (spectral(kind="response", curvature=None, **RATE),),
    "kfac": (spectral(kind="response", curvature=Curvature(0, POINTS, (0.2, 0.3, 0.5), "kfac"), **RATE),),
    "diagonal": (spectral(kind="response", curvature=Curvature(0, POINTS, (0.2, 0.3, 0.5), "diagonal"), **RATE),),
    **{
        f"{kind} of a scaled curvature": (
            Scale(P, 0.5),
            spectral(
                kind="response",
                curvature=Curvature(0, (FIRST, LAST), (0.4, 0.6), kind, scaled=P),
                amount=(2e-3, 1e-3),
                shift=(0.1, 0.2),
                coupled=(1e-3, 2e-3),
                shifted_by=P,
            ),
            Scale(P, -0.5),
        )
        for kind in ("ekfac", "kfac", "diagonal")
    },
    "P alone": (Scale(P, 1.0),),
    "a scaled curvature alone": (
        spectral(
            kind="response",
            curvature=Curvature(0, (FIRST, LAST), (0.4, 0.6), scaled=P),
            amount=(2e-3, 1e-3),
            shift=(0.0, 0.0),
        ),
    ),
    "scaled, weights by group": (
        Scale(P_BY_GROUP, 1.5),
        spectral(
            kind="decay",
            curvature=Curvature(0, (FIRST, LAST), (0.4, 0.6), scaled=P_BY_GROUP),
            amount=(2e-3, 1e-3),
            shift=(0.0, 0.0),
        ),
    ),
    "shifted by P alone": (
        spectral(
            kind="decay", curvature=OF_ONE, amount=(0.1, 0.2), shift=(0.0, 0.1), coupled=(2e-3, 0.0), shifted_by=P
        ),
    ),
    "shifted by P without a curvature": (
        spectral(
            kind="response", curvature=None, amount=(0.1, 0.2), shift=(0.0, 0.1), coupled=(2e-3, 1e-3), shifted_by=P
        ),
    ),
    "norm, then inverse": (
        UnitNorm(),
        spectral(kind="damped_inverse", curvature=OF_ONE, amount=(0.1, 0.1), shift=(0.0, 0.0)),
    ),
    "inverse, then norm": (
        spectral(kind="damped_inverse", curvature=OF_ONE, amount=(0.1, 0.1), shift=(0.0, 0.0)),
        UnitNorm(),
    ),
    "coupled layers": (
        spectral(
            kind="response",
            curvature=OF_MANY,
            trace_shares=TraceShares(stage=0, curvature=OF_MANY, rates=(2.0, 0.5)),
            **RATE,
        ),
    ),
    "shares of another curvature, squared": (
        spectral(
            kind="damped_inverse",
            curvature=OF_ONE,
            amount=(0.02, None),
            shift=(0.0, 0.1),
            trace_shares=TraceShares(
                stage=0, curvature=Curvature(0, (FIRST, LAST), (0.4, 0.6), scaled=P), rates=(0.1, 0.7), power=2.0
            ),
        ),
    ),
    "later stage, then own": (
        Spectral(stage=1, kind="decay", curvature=LATER, amount=(0.5,), shift=(0.1,)),
        spectral(kind="response", curvature=OF_MANY, **RATE),
        Scale(Preconditioner(1, ((1, 1.0),)), 0.25),
    ),
}


@dataclass(frozen=True)
class Own:
    """The named terms for the first stage's data; each has its operators between its own query and training points."""

    names: tuple[str, ...]
    normalized: bool = False

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
        if stage_place(trajectory, stage) > 0:
            return sf.GradientDot().plan(trajectory, stage)
        final, weights = final_point(trajectory), ((0.5, 0.1), (0.3, 0.6), (0.2, 0.3))
        term = partial(Term, stage=0, train=POINTS, normalized=self.normalized)
        return tuple(
            term(label=name, query=final if place % 2 else FIRST, operators=OPERATORS[name], weights=weights)
            for place, name in enumerate(self.names)
        )


@cache
def course() -> Course:
    return Course("Adam", "RMSprop", weighted=True)


@cache
def dense() -> DensePlans:
    return DensePlans(course())


def _assert_terms(found: sf.Scores, expected: Mapping[str, Tensor]) -> None:
    assert list(found.by_term) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(
            found.by_term[name],
            values,
            rtol=1e-7,
            atol=1e-9 * values.abs().max().item(),
            msg=lambda m, n=name: f"{n}: {m}",
        )


SEVERAL = ("response", "kfac", "constant", "norm, then inverse", "later stage, then own")


@pytest.mark.parametrize(
    ("names", "normalized"), [(tuple(OPERATORS), False), (SEVERAL, True)], ids=["sums", "normalized"]
)
def test_every_operator_and_kind_means_what_the_plan_says(
    tmp_path: Path, names: tuple[str, ...], normalized: bool
) -> None:
    """All terms of one plan at once, so that none takes another's queries, basis, point or weights."""
    method = Own(names, normalized)
    found = course().scored(tmp_path, method, 0, keep=("term",))
    plan = method.plan(course().trajectory(tmp_path / "again"), 0)
    _assert_terms(found, dense().scores(plan, 0))
    assert ("additive" in found.provenance) == normalized


def test_a_p_of_the_layers_shares_alone_is_used_and_told(tmp_path: Path) -> None:
    method, run = Own(("shares of another curvature, squared",)), course()
    found = run.scored(tmp_path, method, 0, keep=("term",))
    _assert_terms(found, dense().scores(method.plan(run.trajectory(tmp_path / "again"), 0), 0))
    assert found.provenance["second_moments"] == "recorded"


@dataclass(frozen=True)
class LastPart:
    """An automatic method: the response of the stage's last segment, wherever the checkpoints' statistics cut it."""

    penalty: float = 0.0
    automatic: ClassVar[bool] = True

    def cuts(self, trajectory: sf.Trajectory, statistics: Mapping[int, Tensor]) -> dict[int, Segmentation]:
        return {s: segmentation(trajectory.stages[s], rows, self.penalty) for s, rows in statistics.items()}

    def plan(self, trajectory: sf.Trajectory, stage: int = -1, cuts: Any = None) -> Plan:
        place = stage_place(trajectory, stage)
        cut = cuts[place].cuts
        points = (LAST,) if cut else (FIRST, LAST)
        operator = spectral(kind="response", curvature=Curvature(0, points, (1 / len(points),) * len(points)), **RATE)
        label = f"from {cut[-1] if cut else 0}"
        weights = (1 / len(points),) * len(points)
        return (Term(label=label, stage=place, query=LAST, operators=(operator,), train=points, weights=weights),)


@pytest.mark.parametrize(("penalty", "start"), [(0.0, 10), (1e9, 0)])
def test_what_an_automatic_method_of_ones_own_needs_is_fitted_at_its_own_cuts(
    tmp_path: Path, penalty: float, start: int
) -> None:
    run = Course("SGD")
    found = run.scored(tmp_path, LastPart(penalty), 0, keep=("term",))
    trajectory = run.trajectory(tmp_path / "again")
    plan = LastPart().plan(trajectory, 0, {0: Segmentation((10,) if start else (), (10, 20), (), (), penalty)})
    _assert_terms(found, DensePlans(run).scores(plan, 0))
    assert list(found.by_term) == [f"from {start}"]
