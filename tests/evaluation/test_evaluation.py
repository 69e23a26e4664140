"""Evaluation against scipy and scikit-learn, retraining across processes, and the figure."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf
from segflow.evaluation import (
    detection_auc,
    found_among_lowest,
    linear_datamodeling_score,
    random_subsets,
    retrain,
)
from segflow.report import influence_figure

# ---- linear datamodeling score ----


def _scores(values: np.ndarray | torch.Tensor, **parts: Any) -> sf.Scores:
    values = torch.as_tensor(values)
    Q, K = values.shape
    return sf.Scores(values, tuple(f"q{q}" for q in range(Q)), tuple(f"g{k}" for k in range(K)), (1,) * K, **parts)


def _case(M: int = 30, K: int = 12, Q: int = 4, noise: float = 1.0, ties: bool = False):
    generator = np.random.default_rng(0)
    values = generator.normal(size=(Q, K))
    if ties:
        values = np.round(values)
    subsets = random_subsets(M, K, seed=1)
    measured = (~subsets) @ values.T + noise * generator.normal(size=(M, Q))
    return values, subsets, np.round(measured) if ties else measured


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys_spearman(ties: bool) -> None:
    from scipy.stats import spearmanr  # here, because the retraining processes import this file too

    values, subsets, measured = _case(ties=ties)
    found = linear_datamodeling_score(_scores(values), subsets, measured)
    predicted = (~subsets) @ values.T
    expected = [spearmanr(predicted[:, q], measured[:, q]).statistic for q in range(4)]
    np.testing.assert_allclose(found.per_query, expected, rtol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert not ties or len(np.unique(measured[:, 0])) < len(measured)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_predictor_of_the_change_on_removal_has_score_one(sign: int) -> None:
    values, subsets, _ = _case()
    measured = 5.0 - subsets @ values.T  # what is kept lowers the measurement by its score: removal raises it
    found = linear_datamodeling_score(_scores(sign * values), subsets, measured)
    np.testing.assert_allclose([found.mean, found.low, found.high], sign, rtol=1e-12)
    assert str(found) == ("1.000 [1.000, 1.000]" if sign > 0 else "-1.000 [-1.000, -1.000]")


def test_only_the_ranks_of_the_predictions_count() -> None:
    values, subsets, measured = _case()
    plain = linear_datamodeling_score(_scores(values), subsets, measured)
    scaled = linear_datamodeling_score(_scores(1e-6 * values), subsets, np.exp(measured))
    np.testing.assert_allclose(scaled.per_query, plain.per_query)
    assert linear_datamodeling_score(_scores(values), subsets, measured[:, ::-1]).mean != plain.mean


def test_tensors_and_whole_numbers_are_taken_as_arrays_are() -> None:
    values, subsets, measured = _case()
    plain = linear_datamodeling_score(_scores(values), subsets, measured)
    for kept in (torch.from_numpy(subsets), subsets.astype(int), subsets.astype(float)):
        other = linear_datamodeling_score(_scores(values), kept, torch.from_numpy(measured))
        assert (other.mean, other.low, other.high) == (plain.mean, plain.low, plain.high)


def test_the_interval_contains_the_mean_and_shrinks_with_more_subsets() -> None:
    widths = []
    for M in (15, 60, 240):
        values, subsets, measured = _case(M, Q=1)
        found = linear_datamodeling_score(_scores(values), subsets, measured)
        assert -1 <= found.low < found.mean < found.high <= 1
        widths.append(found.high - found.low)
    assert widths[0] > 1.4 * widths[1] > 1.4**2 * widths[2]


def test_confidence_resamples_and_seed_change_the_interval_and_not_the_mean() -> None:
    values, subsets, measured = _case()

    def score(**options: Any) -> sf.evaluation.LinearDatamodelingScore:
        return linear_datamodeling_score(_scores(values), subsets, measured, **options)

    plain = score()
    assert (plain.confidence, score().low, score().high) == (0.95, plain.low, plain.high)
    narrow = score(confidence=0.5)
    assert plain.low < narrow.low < narrow.high < plain.high
    assert (narrow.confidence, narrow.mean) == (0.5, plain.mean)
    for options in ({"resamples": 50}, {"seed": 1}):
        other = score(**options)
        assert other.mean == plain.mean
        assert (other.low, other.high) != (plain.low, plain.high)


def test_few_subsets_of_one_query_still_have_an_interval() -> None:
    """Some draws repeat one subset; they have no ranks and must not spoil the others."""
    found = linear_datamodeling_score(_scores([[1.0, 2.0, 4.0]]), 1 - np.eye(3), np.array([[1.0], [2.0], [1.5]]))
    assert found.mean == pytest.approx(0.5)
    assert -1 <= found.low <= 0.5 <= found.high <= 1


VALUES, SUBSETS, MEASURED = _case(6, 4, 2)
NAN = np.where(np.arange(12).reshape(6, 2) == 5, np.nan, MEASURED)
LDS_FAULTS: dict[str, tuple[tuple[Any, Any, Any], dict[str, Any], str]] = {
    "columns": (
        (VALUES, SUBSETS[:, :3], MEASURED),
        {},
        r"subsets \(6, 3\) and measurements \(6, 2\): expected \[M, 4\]",
    ),
    "rows": ((VALUES, SUBSETS, MEASURED[:5]), {}, r"measurements \(5, 2\): expected \[M, 4\] and \[M, 2\]"),
    "repetitions": ((VALUES, SUBSETS, MEASURED[:, None]), {}, r"measurements \(6, 1, 2\)"),
    "few": ((VALUES, SUBSETS[:2], MEASURED[:2]), {}, "2 subsets: expected at least 3 to rank"),
    "nan": ((VALUES, SUBSETS, NAN), {}, r"not finite\. Look for a retraining that diverged"),
    "infinite": ((VALUES * np.inf, SUBSETS, MEASURED), {}, "not finite"),
    "indices": ((VALUES, np.argsort(~SUBSETS, 1), MEASURED), {}, r"expected \[M, K\] booleans .* Are they indices\?"),
    "flat scores": (
        (VALUES * [[1], [0]], SUBSETS, MEASURED),
        {},
        "query 1: the predicted change is the same for every",
    ),
    "flat measurements": ((VALUES, SUBSETS, MEASURED * [0, 1]), {}, "query 0: the measurement is the same for every"),
    "same subsets": ((VALUES, SUBSETS[[0] * 6], MEASURED), {}, "the predicted change is the same for every subset"),
    "confidence": ((VALUES, SUBSETS, MEASURED), {"confidence": 95}, "confidence=95, resamples=200: expected 0 < conf"),
    "resamples": ((VALUES, SUBSETS, MEASURED), {"resamples": 0}, "resamples=0: expected"),
}


@pytest.mark.parametrize("fault", LDS_FAULTS)
def test_what_cannot_be_ranked_is_refused(fault: str) -> None:
    (values, subsets, measured), options, text = LDS_FAULTS[fault]
    with np.errstate(invalid="ignore"), pytest.raises(sf.ScoreError, match=text):
        linear_datamodeling_score(_scores(values), subsets, measured, **options)


# ---- wrong labels ----


@pytest.mark.parametrize("ties", [False, True])
def test_detection_auc_is_scikit_learns(ties: bool) -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(2)
    wrong = generator.random(50) < 0.3
    ranking = generator.normal(size=50) - wrong
    ranking = np.round(ranking) if ties else ranking
    assert detection_auc(ranking, wrong) == pytest.approx(roc_auc_score(wrong, -ranking), rel=1e-12)
    assert detection_auc(torch.tensor(ranking), torch.tensor(wrong)) == detection_auc(ranking, wrong)
    assert detection_auc(-ranking, wrong) == pytest.approx(1 - detection_auc(ranking, wrong))
    assert detection_auc(np.zeros(50), wrong) == 0.5


def test_found_among_lowest_counts_wrong_examples_at_the_bottom() -> None:
    ranking = np.array([5.0, -1.0, 0.5, -3.0, 2.0, 0.0])
    wrong = np.array([True, True, False, True, False, False])
    assert found_among_lowest(ranking, wrong) == 2  # of the lowest three: 3, 1, 5
    assert [found_among_lowest(ranking, wrong, count) for count in range(8)] == [0, 1, 2, 2, 2, 2, 3, 3]
    assert found_among_lowest(torch.tensor(ranking), torch.tensor(wrong), 1) == 1
    assert found_among_lowest(np.zeros(3), np.array([True, False, False])) == 1, "ties in the order given"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: detection_auc(np.zeros(3), np.zeros(4, bool)), r"ranking \(3,\) and wrong \(4,\): expected \[N\] and"),
        (lambda: found_among_lowest(np.zeros((2, 2)), np.zeros((2, 2), bool)), r"ranking \(2, 2\)"),
        (lambda: detection_auc(np.zeros(3), np.zeros(3, bool)), "needs both wrong and right examples"),
        (lambda: detection_auc(np.zeros(3), np.ones(3, bool)), "needs both wrong and right examples"),
        (lambda: detection_auc(np.array([0, np.nan]), np.array([True, False])), "ranking: example 1 .* not finite"),
        (lambda: found_among_lowest(np.zeros(2), np.ones(2, bool), -1), "count=-1: expected how many"),
    ],
)
def test_rankings_that_do_not_fit_are_refused(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        call()


# ---- subsets and retraining ----


def test_random_subsets_keep_the_fraction_evenly_and_repeat_with_the_seed() -> None:
    subsets = random_subsets(400, 10, 0.3, seed=4)
    assert subsets.shape == (400, 10)
    assert subsets.dtype == bool
    assert (subsets.sum(1) == 3).all()
    assert abs(subsets.mean(0) - 0.3).max() < 0.1
    assert (subsets == random_subsets(400, 10, 0.3, seed=4)).all()
    assert (subsets != random_subsets(400, 10, 0.3, seed=5)).any()
    assert (random_subsets(3, 10).sum(1) == 5).all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((3, 10, 0.01), r"fraction=0\.01 keeps 0 of 10 groups: expected some, but not all"),
        ((3, 10, 1.0), r"fraction=1\.0 keeps 10 of 10 groups"),
        ((3, 10, -0.5), r"fraction=-0\.5 keeps -5 of 10"),
        ((0, 10), "count=0: expected at least one subset"),
    ],
)
def test_subsets_that_keep_all_or_nothing_are_refused(arguments: tuple, text: str) -> None:
    with pytest.raises(sf.ScoreError, match=text):
        random_subsets(*arguments)


def _tell(kept: np.ndarray, seed: int) -> list[float]:
    return [float(sum(2**k for k in kept)), float(seed), float(torch.get_num_threads())]


def _train(kept: np.ndarray, seed: int) -> np.ndarray:
    """Ten steps of SGD on some examples: the same only if seeds, examples and rounding are."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).split([299, 1], 1)
    weight = torch.randn(299, 1, generator=generator).requires_grad_()
    for _ in range(10):
        loss = (x[kept] @ weight - y[kept]).square().mean()
        weight = (weight - 0.001 * torch.autograd.grad(loss, weight)[0]).detach().requires_grad_()
    return (x @ weight).detach()[:5, 0].numpy()


def _fail(kept: np.ndarray, seed: int) -> list[float]:
    raise FloatingPointError(f"diverged with {len(kept)} examples")


def _scalar(kept: np.ndarray, seed: int) -> float:
    return float(len(kept))


def test_each_subset_is_retrained_with_seeds_of_its_own_on_one_thread() -> None:
    subsets = np.array([[1, 0, 1], [0, 1, 1]], dtype=bool)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = retrain(_tell, subsets, repetitions=3, processes=1, seed=10, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert found.shape == (2, 3, 3)
    assert found.dtype == np.float64
    assert found[..., 0].tolist() == [[5.0] * 3, [6.0] * 3]
    assert len(np.unique(found[..., 1])) == 6
    assert (found[..., 2] == 1).all()
    other = retrain(_tell, subsets, repetitions=3, processes=1, seed=11, progress=False)
    assert (found[..., 1] != other[..., 1]).all()
    assert retrain(_scalar, subsets, processes=1, progress=False).tolist() == [[[2.0]], [[2.0]]]


def test_one_and_two_processes_give_equal_results() -> None:
    subsets = random_subsets(3, 64)
    one, two = (retrain(_train, subsets, repetitions=2, processes=n, progress=False) for n in (1, 2))
    assert one.shape == (3, 2, 5)
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one[..., 0])) == 6


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_failing_retraining_is_not_passed_over(processes: int) -> None:
    with pytest.raises(FloatingPointError, match="diverged with 32 examples"):
        retrain(_fail, random_subsets(2, 64), processes=processes, progress=False)


@pytest.mark.parametrize(("count", "repetitions"), [(0, 1), (2, 0)])
def test_nothing_to_retrain_is_refused(count: int, repetitions: int) -> None:
    with pytest.raises(sf.ScoreError, match=f"{count} subsets, repetitions={repetitions}: expected at least one"):
        retrain(_tell, np.ones((count, 3), dtype=bool), repetitions=repetitions, processes=1)


# ---- the figure ----

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
    with pytest.raises(sf.ScoreError, match=r"4 images for 5 groups of 1 to 1 examples\. Score Groups\.singletons"):
        influence_figure(_with_terms(), 0, IMAGES[0], IMAGES[:4])
    part = torch.zeros(1, 2)
    grouped = sf.Scores(part, ("q",), ("a", "b"), (1, 3), by_term={"t": part})
    with pytest.raises(sf.ScoreError, match="2 images for 2 groups of 1 to 3 examples"):
        influence_figure(grouped, 0, IMAGES[0], IMAGES[:2])
