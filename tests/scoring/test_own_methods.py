"""A user's own method is taken at its word: each term has the side, the layer and the norm that its plan gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.methods.method import final_point
from segflow.methods.plan import Plan, Point, Term, UnitNorm

from ..support.helpers import FixedLabels, analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N = 20
GROUPS = sf.Groups.random(N, 5)
Score = Callable[..., sf.Scores]


@dataclass(frozen=True)
class Mixed:
    """Terms by name: gradients and representations, of this layer or that, scaled or not."""

    terms: tuple[str, ...]

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
        final = final_point(trajectory)
        term = partial(Term, stage=0, query=final, operators=(), train=(final,), weights=(1.0,))
        [influence] = sf.InfluenceFunction(0.01).plan(trajectory, stage)
        known = {
            "dot": term(label="dot"),
            "cosine": term(label="cosine", normalized=True),
            "influence": replace(influence, label="influence"),
            "representation": term(label="representation", side="representation"),
            "normalized": term(label="normalized", side="representation", normalized=True),
            "other layer": term(label="other layer", side="representation", layer="2"),
        }
        cosine, first = partial(term, operators=(UnitNorm(),), normalized=True), Point.at(0, 0)
        known["cosine at first"] = cosine(label="cosine at first", train=(first,))
        known["cosine at last"] = cosine(label="cosine at last")
        both = {"train": (first, final), "weights": (0.25, 0.75)}
        known["cosine at both"] = cosine(label="cosine at both", **both)
        return tuple(known[name] for name in self.terms)


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> Score:
    """Scores of a plan with these terms; every call has a store of its own, so that no unit is found ready."""
    folder = tmp_path_factory.mktemp("own")
    trajectory = trajectory_of(folder / "run", perturbed_states(mlp(), 2, 0.3), N)

    def scored(*terms: str, query: Any = None, keep: tuple[str, ...] = ("term",)) -> sf.Scores:
        analyzer = analyzer_of(
            mlp(), trajectory, folder / f"store-{len(list(folder.iterdir()))}", FixedLabels(), method=Mixed(terms)
        )
        analyzer.fit(vectors(N))
        return analyzer.score(GROUPS, vectors(N), query or vectors(3, seed=9), keep=keep)

    return scored


@pytest.fixture(scope="module")
def alone(score: Score) -> dict[str, Tensor]:
    """Each term's scores in a plan of its own."""
    terms = ("dot", "cosine", "influence", "representation", "normalized", "other layer")
    return {term: score(term).by_term[term] for term in terms}


@pytest.mark.parametrize(
    "terms",
    [
        ("representation", "normalized"),
        ("normalized", "representation"),
        ("dot", "representation"),
        ("representation", "dot"),
        ("representation", "other layer"),
        ("other layer", "representation"),
        ("influence", "other layer", "cosine", "normalized", "dot", "representation"),
    ],
    ids=" + ".join,
)
def test_a_term_among_others_scores_what_it_scores_alone(
    score: Score, alone: dict[str, Tensor], terms: tuple[str, ...]
) -> None:
    together = score(*terms)
    assert tuple(together.by_term) == terms
    for term in terms:
        torch.testing.assert_close(together.by_term[term], alone[term], rtol=1e-12, atol=0)
    torch.testing.assert_close(together.values, sum(alone[term] for term in terms), rtol=1e-12, atol=1e-15)


def test_representations_are_those_of_the_layer_that_the_term_names(alone: dict[str, Tensor]) -> None:
    """Against the inputs of layers, taken from the model by hand."""
    model = mlp()
    model.load_state_dict(perturbed_states(model, 2, 0.3)[-1])
    with torch.no_grad():
        last, other = ([model[:end](data.tensors[0]) for data in (vectors(3, seed=9), vectors(N))] for end in (4, 2))
    unit = [side / side.norm(dim=1, keepdim=True) for side in last]
    for term, (asked_QI, trained_NI), scale in (
        ("representation", last, N),
        ("other layer", other, N),
        ("normalized", unit, 1),
    ):
        expected = torch.stack([asked_QI @ trained_NI[list(group)].sum(0) for group in GROUPS.members], 1) / scale
        torch.testing.assert_close(alone[term], expected, rtol=1e-10, atol=1e-14)


def test_a_normalized_term_of_several_points_is_the_weighted_mean_of_their_cosines(score: Score) -> None:
    first, last, both = score("cosine at first", "cosine at last", "cosine at both").by_term.values()
    model, cosines = mlp(), []
    for state in (perturbed_states(mlp(), 2, 0.3)[place] for place in (0, -1)):
        trained_KD = torch.stack([_gradient(model, state, vectors(N), list(group)) for group in GROUPS.members])
        queried = [_gradient(model, perturbed_states(mlp(), 2, 0.3)[-1], vectors(3, seed=9), [q]) for q in range(3)]
        cosines.append(torch.nn.functional.cosine_similarity(torch.stack(queried)[:, None], trained_KD[None], dim=2))
    for found, expected in ((first, cosines[0]), (last, cosines[1]), (both, 0.25 * cosines[0] + 0.75 * cosines[1])):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def _gradient(model: torch.nn.Module, state: Any, data: Any, chosen: list[int]) -> Tensor:
    model.load_state_dict(state)
    loss = FixedLabels().compute_train_loss([side[chosen] for side in data.tensors], model)
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("terms", [("representation",), ("dot", "representation"), ("representation", "dot")])
def test_a_property_has_no_representation_to_compare_whatever_else_the_plan_asks(
    score: Score, terms: tuple[str, ...]
) -> None:
    margin = sf.properties.SliceMargin(vectors(6, seed=4))
    assert score("dot", query=margin).values.abs().max() > 0
    with pytest.raises(sf.MethodError, match="a property has a gradient, but no representation"):
        score(*terms, query=margin)


@pytest.mark.parametrize("terms", [("dot", "representation"), ("representation", "other layer")])
def test_layers_of_terms_with_different_sides_are_not_kept_apart(score: Score, terms: tuple[str, ...]) -> None:
    with pytest.raises(sf.ScoreError, match=r'keep=\("layer",\): the method\'s terms compare gradients and'):
        score(*terms, keep=("layer",))


def test_layers_of_one_side_are_kept_apart_whether_its_terms_are_normalized_or_not(score: Score) -> None:
    for terms in (("dot", "cosine"), ("representation", "normalized")):
        scores = score(*terms, keep=("layer",))
        torch.testing.assert_close(sum(scores.by_layer.values()), scores.values, rtol=1e-12, atol=1e-15)
