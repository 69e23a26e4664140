"""The figure of the images that matter for a query."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.report import influence_figure


def _scores(values: np.ndarray | torch.Tensor, **parts: Any) -> sf.Scores:
    values = torch.as_tensor(values)
    Q, K = values.shape
    return sf.Scores(values, tuple(f"q{q}" for q in range(Q)), tuple(f"g{k}" for k in range(K)), (1,) * K, **parts)


IMAGES = np.random.default_rng(0).random((5, 8, 8))


def _with_terms() -> sf.Scores:
    first, second = torch.tensor([[3.0, 0, 0, 1, 0], [1, 1, 1, 1, -1]]), torch.tensor([[0.0, -12, 0, 0, 0], [0] * 5])
    return _scores(first + second, by_term={"segment 1: steps 1-5": first, "segment 2: steps 6-9": second})


def _axes(figure: Any) -> list[Any]:
    """Every axis, left to right: the query's, the rows' from top to bottom, the spread's."""
    left, middle, right = figure.subfigs
    return [*left.axes, *(axis for row in middle.subfigs for axis in row.axes), *right.axes]


def test_the_figure_shows_the_top_images_both_ways_and_the_spread() -> None:
    figure = influence_figure(
        _with_terms(), 0, IMAGES[0], IMAGES, caption=lambda ranked: f"train {ranked.label}", query_caption="a five", k=2
    )
    png = io.BytesIO()
    figure.savefig(png)
    assert png.getvalue().startswith(b"\x89PNG")
    assert len(png.getvalue()) > 5000
    axes = _axes(figure)
    texts = [axis.get_xlabel() for axis in axes]
    assert texts[:5] == [
        "query q0\na five",
        "+3.000\ntrain g0",
        "+1.000\ntrain g3",
        "-12.000\ntrain g1",
        "+0.000\ntrain g2",
    ]
    shown = [axis.images[0].get_array() for axis in axes[:5]]
    for image, index in zip(shown, (0, 0, 3, 1, 2), strict=True):
        np.testing.assert_array_equal(image, IMAGES[index])
    assert [bar.get_height() for bar in axes[5].patches] == [0.25, 0.75]


def test_the_figure_is_of_the_query_and_the_number_of_images_asked_for() -> None:
    figure = influence_figure(_with_terms(), 1, IMAGES[1], IMAGES, k=4)
    axes = _axes(figure)
    assert len(axes) == 1 + 2 * 4 + 1
    assert axes[0].get_xlabel() == "query q1\n"
    assert axes[5].get_xlabel() == "-1.000"
    assert [bar.get_height() for bar in axes[-1].patches] == [1, 0]


def test_the_figure_of_scores_that_are_all_zero_can_be_drawn() -> None:
    zero = torch.zeros(1, 5)
    influence_figure(_scores(zero, by_term={"a": zero}), 0, IMAGES[0], IMAGES, k=9).savefig(io.BytesIO())


def test_the_figure_refuses_scores_without_terms_or_of_other_groups() -> None:
    with pytest.raises(sf.ScoreError, match=r'the scores have no terms\. Score with keep=\("term",\)'):
        influence_figure(_scores(torch.zeros(1, 5)), 0, IMAGES[0], IMAGES)
    with pytest.raises(sf.ScoreError, match="4 images for 5 examples: expected one each"):
        influence_figure(_with_terms(), 0, IMAGES[0], IMAGES[:4])
    part = torch.zeros(1, 2)
    grouped = sf.Scores(part, ("q",), ("a", "b"), (1, 3), by_term={"t": part})
    with pytest.raises(sf.ScoreError, match="influence_figure: 2 groups of 1 to 3 examples, expected single examples"):
        influence_figure(grouped, 0, IMAGES[0], IMAGES[:2])


def test_names_and_captions_are_drawn_as_they_are_written() -> None:
    part = torch.ones(1, 5)
    scores = sf.Scores(part, ("$q_$",), tuple("abcde"), (1,) * 5, by_term={r"$\frac$": part})
    figure = influence_figure(
        scores, 0, IMAGES[0], IMAGES, caption=lambda ranked: "$5 to $10_$", query_caption="$", k=1
    )
    figure.savefig(file := io.StringIO(), format="svg", metadata={"Date": None})
    axes = _axes(figure)
    drawn = [axes[0].get_xlabel(), axes[1].get_xlabel(), axes[-1].get_xticklabels()[0].get_text()]
    assert [text.replace("\\$", "$") for text in drawn] == ["query $q_$\n$", "+1.000\n$5 to $10_$", r"$\frac$"]
    assert file.getvalue().rstrip().endswith("</svg>")
