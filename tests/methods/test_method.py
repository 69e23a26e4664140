"""Methods of one's own: what `Method` says is enough, and what makes no sense is refused where it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.methods.plan import Curvature, Plan, Point, Spectral, Term
from segflow.training.segments import Segmentation, cut, segmentation

from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N, LR = 20, 0.3
GROUPS = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)


@dataclass(frozen=True)
class LastSegment:
    """TracIn over the last segment only, which begins where the checkpoints changed."""

    penalty: float = 0.05
    automatic: bool = True

    def cuts(self, trajectory: sf.Trajectory, statistics: Mapping[int, Tensor]) -> dict[int, Segmentation]:
        stages = trajectory.stages
        return {stage: segmentation(stages[stage], rows, self.penalty) for stage, rows in statistics.items()}

    def plan(self, trajectory: sf.Trajectory, stage: int = -1, cuts: Mapping[int, Segmentation] | None = None) -> Plan:
        assert cuts is not None
        place = stage % len(trajectory.stages)
        last = cut(trajectory.stages[place], cuts[place].cuts)[-1]
        terms = []
        for checkpoint, weight in zip(last.checkpoints, last.weights, strict=True):
            rates = tuple(weight * rate for rate in last.lr_steps)
            operator = Spectral(stage=place, kind="constant", curvature=None, amount=rates, shift=(0.0,))
            point, label = Point.at(place, checkpoint), str(checkpoint)
            terms.append(
                Term(label=label, stage=place, query=point, operators=(operator,), train=(point,), weights=(1.0,))
            )
        return tuple(terms)


def _jumping(folder: Path) -> sf.Trajectory:
    """Four checkpoints, of which the last two are far from the first two."""
    first, second = (perturbed_states(mlp(seed=seed), 2, scale=0.01) for seed in (0, 3))
    return trajectory_of(folder, [*first, *second], N, lr=LR)


def _scored(folder: Path, trajectory: sf.Trajectory, method: Any) -> sf.Scores:
    analyzer = analyzer_of(mlp(), trajectory, folder, method=method)
    analyzer.fit(vectors(N))
    return analyzer.score(GROUPS, vectors(N), vectors(4, seed=5))


def test_an_automatic_method_of_ones_own_is_cut_and_explained(tmp_path: Path) -> None:
    trajectory = _jumping(tmp_path / "run")
    found = _scored(tmp_path / "store", trajectory, LastSegment())
    assert found.provenance["segmentation"][0]["train"]["cuts"] == [20]
    end = sf.Trajectory(trajectory.checkpoints[2:], (10, 20), LR, N)  # the last segment alone
    expected = _scored(tmp_path / "other", end, LastSegment(penalty=1e9))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)


def test_an_automatic_method_without_cuts_is_refused_at_once(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Headless:
        automatic: bool = True

        def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
            return sf.TracIn().plan(trajectory, stage)

    with pytest.raises(sf.MethodError, match=r"Headless: automatic is True, and there is no cuts\(trajectory, statist"):
        analyzer_of(mlp(), _jumping(tmp_path / "run"), tmp_path / "store", method=Headless())
    found = _scored(tmp_path / "store", _jumping(tmp_path / "run"), Headless(automatic=False))
    assert torch.equal(found.values, _scored(tmp_path / "other", _jumping(tmp_path / "run"), sf.TracIn()).values)


def test_a_method_that_is_no_dataclass_says_what_it_lacks(tmp_path: Path) -> None:
    class Bare:
        def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
            return sf.TracIn().plan(trajectory, stage)

    with pytest.raises(sf.MethodError, match="Bare: expected a dataclass"):
        _scored(tmp_path / "store", _jumping(tmp_path / "run"), Bare())


@pytest.mark.parametrize("kind", ["decay", "response", "saturation", "constant"])
def test_an_amount_that_is_none_is_refused_unless_it_is_a_damping(kind: str) -> None:
    curvature = None if kind == "constant" else Curvature(1, (Point.at(1, 0),), (1.0,))
    with pytest.raises(
        sf.MethodError, match=rf"Spectral\(stage=1, kind='{kind}'\): the amount of parameter group 1 is None"
    ):
        Spectral(stage=1, kind=kind, curvature=curvature, amount=(0.5, None), shift=(0.0, 0.0))


def test_a_damping_that_is_none_is_a_tenth_of_the_mean_eigenvalue() -> None:
    curvature = Curvature(0, (Point.at(0, 0),), (1.0,))
    operator = Spectral(stage=0, kind="damped_inverse", curvature=curvature, amount=(None,), shift=(0.5,))
    eigenvalues = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(operator.on(eigenvalues, 0), 1 / (eigenvalues + 0.5 + 0.2))


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(sf.MethodError, match="kind='inverse' is not known"):
        Spectral(stage=0, kind="inverse", curvature=None, amount=(1.0,), shift=(0.0,))


FINAL = Point.at(0, 3)
TERM: dict[str, Any] = {
    "label": "one",
    "stage": 0,
    "query": FINAL,
    "operators": (),
    "train": (FINAL,),
    "weights": (1.0,),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"side": "reps"}, "side='reps' is not known"),
        ({"weights": (0.5,)}, r"term 'one': weights \(0.5,\) for 1 points: expected one for each, 1 in all"),
        ({"weights": (0.5, 0.5)}, r"weights \(0.5, 0.5\) for 1 points"),
        ({"train": (FINAL, FINAL), "weights": (1.0, 1.0)}, r"weights \(1.0, 1.0\) for 2 points"),
        ({"train": (), "weights": ()}, "term 'one': train: expected Point, found none"),
    ],
)
def test_a_term_that_makes_no_sense_is_refused_where_it_is_made(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(sf.MethodError, match=message):
        Term(**TERM | changed)


@dataclass(frozen=True)
class Planned:
    """A method whose plan is given."""

    number: int = 0
    terms: ClassVar[Any] = ()

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
        return self.terms


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((), r"plan: expected a tuple of at least one Term, found \(\)"),
        ([Term(**TERM)], r"plan: expected a tuple of at least one Term, found \["),
        ((Term(**TERM), Term(**TERM)), r"plan: two terms have one label, of \['one', 'one'\]"),
        ((Term(**TERM | {"query": Point.at(0, 17)}),), r"names a checkpoint that is not there; the stages have \[4\]"),
        (
            (Term(**TERM | {"train": (Point.at(2, 0),)}),),
            r"names a checkpoint that is not there; the stages have \[4\]",
        ),
    ],
)
def test_a_plan_that_does_not_fit_the_run_is_refused_at_once(tmp_path: Path, terms: Any, message: str) -> None:
    method = type("Given", (Planned,), {"terms": terms})()
    with pytest.raises(sf.MethodError, match=message):
        analyzer_of(mlp(), _jumping(tmp_path / "run"), tmp_path / "store", method=method)


def test_an_option_that_json_cannot_hold_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    method = type("Given", (Planned,), {"terms": (Term(**TERM),)})(number=torch.ones(1))  # type: ignore[call-arg]
    with pytest.raises(sf.MethodError, match="Given: an option is not what JSON can hold"):
        analyzer_of(mlp(), _jumping(tmp_path / "run"), tmp_path / "store", method=method)


def test_cuts_that_are_no_segmentation_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Wrong(LastSegment):
        def cuts(self, trajectory: sf.Trajectory, statistics: Mapping[int, Tensor]) -> Any:
            return {0: (20,)}

    with pytest.raises(sf.MethodError, match=r"cuts: expected \{stage: Segmentation\} for the stages \[0\], found"):
        _scored(tmp_path / "store", _jumping(tmp_path / "run"), Wrong())
