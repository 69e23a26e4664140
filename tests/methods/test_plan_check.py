"""A plan that would be read otherwise than it is written is refused, by the term; and a method is taken at its word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.methods import (
    Curvature,
    IterativeInverse,
    Plan,
    Point,
    Preconditioner,
    ProjectedInverse,
    Projection,
    Scale,
    Spectral,
    Term,
    UnitNorm,
)
from segflow.methods.method import describe, is_additive, is_automatic
from segflow.methods.plan_check import StageFacts, check_plan
from segflow.results.scores import check_additive

from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

# Two stages, of two and of one parameter group; the second does not train the body.
STAGES = (StageFacts(3, 2, ("body", "head")), StageFacts(2, 1, ("head",)))
POINT, LATER = Point.at(0, 2), Point.at(1, 1)
P = Preconditioner(0, ((0, 0.5), (1, 0.5)))
CURVATURE = Curvature(0, (POINT,), (1.0,))
TERM: dict[str, Any] = {
    "label": "one",
    "stage": 0,
    "query": POINT,
    "operators": (),
    "train": (POINT,),
    "weights": (1.0,),
}
SPECTRAL: dict[str, Any] = {
    "stage": 0,
    "kind": "decay",
    "curvature": CURVATURE,
    "amount": (1.0, 2.0),
    "shift": (0.0, 0.0),
}
PROJECTED: dict[str, Any] = {
    "stage": 0,
    "point": POINT,
    "projection": Projection(4, 0),
    "features": "train",
    "damping": 0.1,
}
ITERATIVE: dict[str, Any] = {
    "stage": 0,
    "point": POINT,
    "damping": 0.1,
    "steps": 3,
    "sample_size": 2,
    "repetitions": 1,
    "seed": 0,
    "scale": None,
}


def _term(*operators: Any, **changed: Any) -> Term:
    return Term(**TERM | {"operators": operators} | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": 3}, "term 3: expected a label that is text"),
        ({"label": ""}, "term '': expected a label that is text"),
        ({"weights": (float("nan"),)}, r"term 'one': weights \(nan,\) for 1 points: expected one for each, 1 in all"),
        ({"train": (POINT, LATER), "weights": (2.0, -1.0)}, "1 in all and none below 0"),
        ({"train": (POINT, LATER), "weights": ((0.5, 0.5), (0.5, 0.4))}, "or so for each parameter group"),
        ({"train": (POINT, LATER), "weights": ((0.5, 0.5), (0.5,))}, "or so for each parameter group"),
        ({"weights": ("1",)}, "expected one for each"),
        ({"train": (0,)}, "term 'one': train: expected Point, found 0"),
        ({"query": 0}, "term 'one': query: expected Point, found 0"),
        ({"operators": (torch.relu,)}, "term 'one': operators: expected Spectral or Scale or .* or UnitNorm, found"),
        ({"normalized": "no"}, "term 'one': normalized='no': expected True or False"),
        ({"layer": "head"}, "term 'one': layer='head': gradients are those of all tracked layers"),
        (
            {"side": "representation", "operators": (Scale(P, 0.5),)},
            "term 'one': Scale act on gradients, and side='representation' has none",
        ),
    ],
)
def test_a_term_that_would_be_read_otherwise_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(sf.MethodError, match=message):
        Term(**TERM | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shift": (0.0, -1.0)}, r"Spectral\(stage=0, kind='decay'\): the shift of parameter group 1=-1.0"),
        ({"amount": (1.0, -1.0)}, "the amount of parameter group 1=-1.0: expected a finite number, at least 0"),
        ({"amount": (1.0, float("inf"))}, "the amount of parameter group 1=inf"),
        ({"amount": 1.0}, "amount=1.0: expected a tuple, one number for each parameter group"),
        ({"amount": (1.0, "x")}, "the amount of parameter group 1='x'"),
        ({"kind": "damped_inverse", "amount": (-0.1, 0.1)}, "the amount of parameter group 0=-0.1"),
        ({"ceilings": (1.0, 0.5)}, "the ceilings of parameter group 1=0.5: expected a number, at least 1"),
        ({"coupled": (0.1, 0.0)}, "expected both or neither"),
        ({"curvature": Curvature(1, (LATER,), (1.0,))}, "curvature is of stage 1, expected stage 0"),
        ({"coupled": (0.1, 0.0), "shifted_by": Preconditioner(1, ((0, 1.0),))}, "shifted_by is of stage 1"),
        ({"curvature": P}, "curvature: expected Curvature, found Preconditioner"),
        ({"kind": "constant"}, "a constant looks at no eigenvalues"),
        ({"kind": "constant", "curvature": None, "shift": (0.0, 1.0)}, "a constant looks at no eigenvalues"),
        ({"kind": "damped_inverse", "curvature": None, "amount": (None, 1.0)}, "there is nothing to invert"),
        ({"kind": "damped_inverse", "curvature": None, "amount": (0.0, 1.0)}, "there is nothing to invert"),
    ],
)
def test_a_function_of_which_something_would_be_ignored_or_zero_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(sf.MethodError, match=message):
        Spectral(**SPECTRAL | changed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Point(0, ((0, 0.5),)), r"Point\(stage=0\): weights .* 1 in all"),
        (lambda: Point(0, ((0, 0.5), (0, 0.5))), "name a checkpoint twice"),
        (lambda: Point(0, ((0, 1.5), (1, -0.5))), "none below 0"),
        (lambda: Point(0, ()), "expected at least one pair"),
        (lambda: Point(0, ((0, (0.5, 0.5)), (1, (0.5, 0.5)))), "a point is one set of parameters"),
        (lambda: Point.at(-1, 0), "stage=-1: expected a whole number"),
        (lambda: Preconditioner(0, ((0, 0.5), (1, 0.6))), r"Preconditioner\(stage=0\): weights"),
        (lambda: Preconditioner(0, ((0, 1.0),), (1, 0)), "moved=1: expected True or False"),
        (lambda: Curvature(0, (POINT,), (2.0,)), r"Curvature\(stage=0\): weights \(2.0,\)"),
        (lambda: Curvature(0, (), ()), r"Curvature\(stage=0\): points: expected Point, found none"),
        (lambda: Curvature(0, (POINT,), (1.0,), "hessian"), r"Curvature\(stage=0\): kind='hessian' is not known"),
        (lambda: Curvature(0, (POINT,), (1.0,), "kfac", batch=4), "kind='kfac' squares no gradients"),
        (lambda: Curvature(1, (LATER,), (1.0,), scaled=P), "scaled is of stage 0, expected stage 1"),
        (lambda: Scale(P, float("nan")), "Scale: power=nan"),
        (lambda: Scale(CURVATURE, 1.0), "Scale: preconditioner: expected Preconditioner"),
        (lambda: ProjectedInverse(**PROJECTED | {"features": "loss"}), "features='loss' is not known"),
        (lambda: ProjectedInverse(**PROJECTED | {"damping": -1.0}), "damping=-1.0"),
        (lambda: IterativeInverse(**ITERATIVE | {"steps": 0}), "steps=0: expected a whole number, at least 1"),
        (lambda: IterativeInverse(**ITERATIVE | {"scale": 0.0}), "scale=0.0"),
    ],
)
def test_a_part_that_makes_no_sense_is_refused_where_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(sf.MethodError, match=message):
        make()


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (_term(stage=1), "term 'one': its stage is 1, and stage 0 is scored"),
        (_term(query=Point.at(1, 2)), "names a checkpoint that is not there"),
        (_term(weights=((1.0,),)), r"term 'one': weights=\(1.0,\): 1 for 2 parameter group"),
        (_term(side="representation", layer="tail"), r"layer='tail' is not tracked. Choose one of \['body', 'head'\]"),
        *(
            (
                _term(Spectral(**SPECTRAL | {name: numbers, "shifted_by": P if name == "coupled" else None})),
                rf"term 'one': Spectral: {name}=.* 1 for 2 parameter group",
            )
            for name, numbers in (("amount", (1.0,)), ("shift", (0.0,)), ("coupled", (1.0,)), ("ceilings", (2.0,)))
        ),
        (
            _term(Spectral(**SPECTRAL | {"curvature": Curvature(0, (Point.at(0, 7),), (1.0,))})),
            "term 'one': Spectral: Curvature: .* names a checkpoint that is not there",
        ),
        (
            _term(Spectral(**SPECTRAL | {"curvature": Curvature(0, (POINT,), ((1.0, 1.0, 1.0),))})),
            "term 'one': Spectral: Curvature: weights=.* 3 for 2",
        ),
        (_term(Scale(Preconditioner(0, ((5, 1.0),)), 1.0)), "Scale: Preconditioner: .* names a checkpoint"),
        (_term(Scale(Preconditioner(0, ((0, (1.0,)),)), 1.0)), r"Scale: Preconditioner: weights=\(1.0,\): 1 for 2"),
        (_term(Scale(Preconditioner(0, ((0, 1.0),), (True,)), 1.0)), r"Preconditioner: moved=\(True,\): 1 for 2"),
        (_term(Scale(Preconditioner(2, ((0, 1.0),)), 1.0)), "Scale is of stage 2, expected 0 to 1"),
        (_term(ProjectedInverse(**PROJECTED | {"stage": 1})), "ProjectedInverse mixes the layers of stage 1"),
        (_term(IterativeInverse(**ITERATIVE | {"point": Point.at(0, 3)})), "IterativeInverse: .* names a checkpoint"),
    ],
)
def test_a_term_that_does_not_fit_the_run_is_refused(term: Term, message: str) -> None:
    with pytest.raises(sf.MethodError, match=message):
        check_plan((term,), 0, STAGES)


def test_an_operator_of_an_earlier_stage_is_refused() -> None:
    with pytest.raises(sf.MethodError, match="term 'one': Scale is of stage 0, expected 1 to 1"):
        check_plan((_term(Scale(P, 1.0), stage=1),), 1, STAGES)


def test_what_makes_sense_is_let_through_as_plain_tuples() -> None:
    operators = [UnitNorm(), Scale(P, 1), Spectral(**SPECTRAL | {"amount": [np.float32(1), torch.tensor(2.0)]})]
    term = Term(**TERM | {"operators": operators, "train": [POINT, LATER], "weights": [np.float64(0.5), 0.5]})
    assert check_plan((term,), 0, STAGES) == (term,)
    assert hash(term) == hash(replace(term)) and type(term.operators[2].amount[0]) is float


@dataclass(frozen=True)
class Own:
    """A method of one's own, whose plan is that of a ready-made one."""

    shape: str = "dot"

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
        return (sf.GradientCosine() if self.shape == "cosine" else sf.GradientDot()).plan(trajectory, stage)


@dataclass(frozen=True)
class Modest(Own):
    additive: ClassVar[bool] = False


@dataclass(frozen=True)
class Boastful(Own):
    additive: ClassVar[bool] = True


@dataclass(frozen=True)
class Unclear(Own):
    def additive(self) -> bool:
        return False


@pytest.fixture
def trajectory(tmp_path: Path) -> sf.Trajectory:
    return trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2), 8)


@pytest.mark.parametrize(
    ("method", "additive"),
    [
        (Own(), True),
        (Own("cosine"), False),
        (Modest(), False),
        (Boastful(), True),
        (Boastful("cosine"), False),
        (sf.GradientCosine(), False),
        (sf.RepresentationSimilarity(), True),
    ],
    ids=repr,
)
def test_whether_scores_add_up_follows_from_the_plan_and_the_methods_word(
    tmp_path: Path, trajectory: sf.Trajectory, method: Any, additive: bool
) -> None:
    """And it is true: groups' scores are the sums of their members' or they are not."""
    assert is_additive(method, method.plan(trajectory)) == additive
    groups, singles = sf.Groups.from_lists([[0, 1, 2], range(3, 8)], 8), sf.Groups.singletons(8)
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", method=method)
    fine, coarse = (analyzer.score(of, vectors(8), vectors(2, seed=3)) for of in (singles, groups))
    if additive:
        torch.testing.assert_close(fine.rolled_up(singles, groups).values, coarse.values)
        check_additive(coarse.by_example(groups).provenance, "here")
        return
    for refused in (
        lambda: fine.rolled_up(singles, groups),
        lambda: sf.GroupTree((groups, singles)).scores(fine),
        lambda: coarse.by_example(groups),
        lambda: analyzer.refine(groups, vectors(8), vectors(2, seed=3)),
    ):
        with pytest.raises(sf.ScoreError, match=f"scores of {type(method).__name__} do not add up"):
            refused()
    assert torch.equal(fine.by_example(singles).values, fine.values)


def test_a_word_on_additivity_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(sf.MethodError, match=r"Unclear: additive=.*expected True or False"):
        describe(Unclear())


@dataclass(frozen=True)
class Options(Own):
    """Options that are called as facts about scores and calls are."""

    name: str = "x"
    seed: int = 7
    terms: int = 3
    batch_size: int = 1
    ranks: int = 5
    groups: str = "mine"
    calibration: str = "none"


def test_options_that_are_called_as_other_facts_are_hide_none_and_are_kept(
    tmp_path: Path, trajectory: sf.Trajectory
) -> None:
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", method=Options(), seed=2)
    found = analyzer.score(sf.Groups.singletons(8), vectors(8), vectors(2)).provenance
    assert (found["method"], found["seed"], found["method_seed"], found["batch_size"]) == ("Options", 2, 7, 1)
    assert found["terms"] == {"final": [20]} and found["method_terms"] == 3
    assert found["method_calibration"] == "none"  # not what calibrated scores say
    kept = analyzer_of(mlp(), trajectory, tmp_path / "trak", method=sf.TRAK(4, 0.1, seed=5))
    kept.fit(vectors(8))
    scores = kept.score(sf.Groups.singletons(8), vectors(8), vectors(2))
    assert scores.provenance["method_seed"] == 5


@dataclass(frozen=True)
class NamedMethod(Own):
    method: str = "other"


def test_an_option_that_would_hide_the_methods_name_is_refused() -> None:
    with pytest.raises(sf.MethodError, match="NamedMethod: an option called 'method' would hide"):
        describe(NamedMethod())


@dataclass(frozen=True)
class Fickle:
    """A plan that is another one each time."""

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
        [term] = sf.GradientDot().plan(trajectory, stage)
        return (replace(term, label=f"at {np.random.default_rng().random()}"),)


def test_a_plan_that_is_another_one_each_time_is_refused(tmp_path: Path, trajectory: sf.Trajectory) -> None:
    with pytest.raises(sf.MethodError, match=r"Fickle: plan\(\) gave two different plans for the same run"):
        analyzer_of(mlp(), trajectory, tmp_path / "store", method=Fickle())


@dataclass(frozen=True)
class Deaf(Own):
    automatic: ClassVar[bool] = True

    def cuts(self, trajectory: sf.Trajectory, statistics: Any) -> Any:
        return {}


def test_an_automatic_method_whose_plan_takes_no_cuts_is_refused() -> None:
    with pytest.raises(sf.MethodError, match=r"Deaf: automatic is True, and plan\(\) takes no cuts"):
        is_automatic(Deaf())
