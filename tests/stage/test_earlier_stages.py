"""Scores of every stage's data, by every method and optimizer, equal dense formulas of stages that differ in all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf

from ..support.helpers import apart
from ..support.stages import Course

course = cache(Course)


def _assert_equal(folder: Path, run: Course, method: Any, place: int, expected: Tensor, rtol: float = 1e-8) -> None:
    assert expected.abs().max() > 0
    found = run.scored(folder, method, place).values
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-9 * expected.abs().max().item())


METHODS: dict[str, tuple[Any, Callable[[Course, int], Tensor]]] = {
    "dot": (sf.GradientDot(), lambda run, place: run.dot(place)),
    "cosine": (sf.GradientCosine(), lambda run, place: run.cosine(place)),
    "products of representations": (
        sf.RepresentationSimilarity(cosine=False),
        lambda run, place: run.similarity(place, False),
    ),
    "cosines of representations": (sf.RepresentationSimilarity(), lambda run, place: run.similarity(place, True)),
    "TRAK": (sf.TRAK(None, 0.01), lambda run, place: run.projected(place, "output", 0.01)),
    "projected Fisher": (sf.ProjectedFisher(None, 0.02), lambda run, place: run.projected(place, "train", 0.02)),
    **{
        f"influence, {kind}": (
            sf.InfluenceFunction(0.01, curvature=kind),
            lambda run, place, kind=kind: run.influence(place, kind, 0.01),
        )
        for kind in ("ekfac", "kfac", "diagonal", "identity")
    },
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("weighted", [False, True], ids=["all alike", "drawn unequally"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_at_the_end_of_training_look_at_the_scored_stages_data_and_loss_only(
    tmp_path: Path, name: str, weighted: bool, place: int
) -> None:
    run, (method, reference) = course("AdamW", "momentum", weighted=weighted), METHODS[name]
    _assert_equal(tmp_path, run, method, place, reference(run, place))


@pytest.mark.parametrize("place", [0, 1])
def test_lissa_inverts_the_hessian_of_the_scored_stages_loss(tmp_path: Path, place: int) -> None:
    run, method = course("AdamW", "momentum"), sf.LiSSA(3.0, steps=32, sample_size=50, scale=4.0)
    _assert_equal(tmp_path, run, method, place, run.exact_inverse(place, 3.0))


PAIRS = [("SGD", "AdamW"), ("momentum", "Adagrad"), ("AdamW", "momentum"), ("Adam", "SGD"), ("RMSprop", "Adam")]


@pytest.mark.parametrize("recipes", [*PAIRS, ("AdamW", "SGD", "momentum")], ids=" then ".join)
@pytest.mark.parametrize("method", [sf.TracIn(), sf.Hydra()], ids=["TracIn", "Hydra"])
def test_rates_are_those_of_the_scored_stage(tmp_path: Path, method: Any, recipes: tuple[str, ...]) -> None:
    run = course(*recipes)
    _assert_equal(tmp_path, run, method, 0, run.rate_weighted(0, isinstance(method, sf.Hydra)))


BOTH = pytest.mark.parametrize("source", [sf.Source(), apart()], ids=["default", "apart"])


@BOTH
@pytest.mark.parametrize("recipes", PAIRS, ids=" then ".join)
@pytest.mark.parametrize("form", ["kronecker", "diagonal", "none"])
def test_source_walks_back_through_each_later_stages_own_operators(
    tmp_path: Path, form: str, recipes: tuple[str, ...], source: sf.Source
) -> None:
    """Curvature, P, rates, decay, loss, data, parameter groups and layers' shares of each stage in its own operators.

    By default the queries are measured at all checkpoints of the last stage.
    """
    run, method = course(*recipes), replace(source, preconditioner=form)
    _assert_equal(tmp_path, run, method, 0, run.source(0, method))


@BOTH
@pytest.mark.parametrize("place", [0, 1, 2])
def test_source_walks_three_stages_from_the_last_to_the_first(tmp_path: Path, place: int, source: sf.Source) -> None:
    run = course("RMSprop", "SGD", "AdamW", weighted=True)
    _assert_equal(tmp_path, run, source, place, run.source(place, source))


@BOTH
@pytest.mark.parametrize("recipes", [("AdamW", "SGD"), ("SGD", "Adam")], ids=" then ".join)
def test_fast_source_takes_each_stage_at_its_own_mean_parameters(
    tmp_path: Path, recipes: tuple[str, ...], source: sf.Source
) -> None:
    run, method = course(*recipes), replace(source, fast=True)
    _assert_equal(tmp_path, run, method, 0, run.source(0, method))
