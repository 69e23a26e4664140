"""Figures of scores, drawn with matplotlib: which examples matter for a query, and how a run was cut into segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ScoreError
from ..results.same_groups import check_single_examples
from ..results.scores import Ranked, Scores
from .plain_text import as_written


def influence_figure(
    scores: Scores,
    query: int,
    query_image: np.ndarray,
    train_images: np.ndarray,
    caption: Callable[[Ranked], str] | None = None,
    query_caption: str = "",
    k: int = 6,
) -> Any:
    """The training images that raise or lower a query's measurement most, and how influence is spread over the terms.

    Args:
        scores: of single examples, kept with `keep=("term",)`.
        query: its row.
        query_image: [H, W]; train_images: [N, H, W].
        caption: text under a training image; query_caption: under the query's.
        k: images a row.

    Returns:
        A matplotlib Figure; save it with `figure.savefig(path)`.

    Raises:
        ScoreError: the scores have no terms, or are not of single examples with one image each.
    """
    if not scores.by_term:
        raise ScoreError('influence_figure: the scores have no terms. Score with keep=("term",).')
    check_single_examples(scores, "influence_figure")
    if len(train_images) != len(scores.group_labels):
        raise ScoreError(
            f"influence_figure: {len(train_images)} images for {len(scores.group_labels)} examples: expected one each."
        )
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(1.35 * (k + 3.6), 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.5, k, 3.2])
    _image(left.subplots(), query_image, f"query {scores.query_labels[query]}\n{query_caption}")
    rows: Sequence[tuple[str, bool]] = (
        ("removal raises the measurement (a loss: helpful)", True),
        ("removal lowers the measurement (a loss: harmful)", False),
    )
    for subfigure, (title, largest) in zip(middle.subfigures(2, 1), rows, strict=True):
        subfigure.suptitle(title, fontsize=9)
        axes = np.atleast_1d(subfigure.subplots(1, k))
        for axis, ranked in zip(axes, scores.top(query, k, largest), strict=False):
            text = f"{ranked.score:+.3f}" + (f"\n{caption(ranked)}" if caption else "")
            _image(axis, train_images[ranked.group], text)
    _spread(right.subplots(), scores, query)
    return figure


def _image(axis: Any, image: np.ndarray, text: str) -> None:
    axis.imshow(image, cmap="gray_r")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(as_written(text), fontsize=8)


def _spread(axis: Any, scores: Scores, query: int) -> None:
    """Share of the absolute influence that falls in each term."""
    size = np.array([values[query].abs().sum().item() for values in scores.by_term.values()])
    names = [as_written(label.replace(": ", "\n")) for label in scores.by_term]
    axis.bar(names, size / (size.sum() or 1.0), color="#4477aa")
    axis.set_ylabel("share of the query's absolute influence", fontsize=8)
    axis.set_ylim(0, 1)
    axis.tick_params(labelsize=7)
    axis.set_title("spread over training", fontsize=9)


def segmentation_figure(scores: Scores, run: int = 0, stage: str | None = None) -> Any:
    """Where `Source(segments="auto")` cut a run, and why: distances between checkpoints, and scatter by segments.

    Args:
        scores: of a method with segments="auto".
        run: which run of an ensemble; stage: which stage of training (None: the last).

    Returns:
        A matplotlib Figure; save it with `figure.savefig(path)`.

    Raises:
        ScoreError: nothing was cut, or there is no such run or stage.
    """
    by_run = scores.provenance.get("segmentation")
    if not by_run:
        raise ScoreError("segmentation_figure: these scores were not made with segments='auto', so nothing was cut.")
    if not 0 <= run < len(by_run) or (stage is not None and stage not in by_run[run]):
        raise ScoreError(
            f"segmentation_figure: no run {run} with stage {stage!r}; there are {[list(stages) for stages in by_run]}."
        )
    explained = by_run[run][list(by_run[run])[-1] if stage is None else stage]
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = _distances(left, explained)
    figure.colorbar(image, ax=left, label="distance between checkpoints (relative)")
    _scatter(right, explained)
    return figure


def _distances(axis: Any, explained: Mapping[str, Any]) -> Any:
    """The image of the distances between checkpoints, with a white line at each cut."""
    steps, cuts = explained["checkpoints"], explained["cuts"]
    image = axis.imshow(np.sqrt(np.maximum(explained["distances"], 0)), cmap="viridis")
    for cut in cuts:
        place = steps.index(cut) + 0.5
        axis.axhline(place, color="white", linewidth=2)
        axis.axvline(place, color="white", linewidth=2)
    axis.set_xticks(range(len(steps)), steps, fontsize=8)
    axis.set_yticks(range(len(steps)), steps, fontsize=8)
    axis.set_xlabel("checkpoint at step")
    axis.set_title(f"cut after {cuts}" if cuts else "not cut", fontsize=10)
    return image


def _scatter(axis: Any, explained: Mapping[str, Any]) -> None:
    """The scatter within one, two and three segments, with and without the penalty; dotted: what was chosen."""
    scatter = np.array(explained["scatter_of_1_2_3_segments"])
    counts = np.arange(1, len(scatter) + 1)
    axis.plot(counts, scatter, "o-", label="scatter within segments")
    axis.plot(counts, scatter + explained["penalty"] * counts, "s-", label=f"+ {explained['penalty']:g} a segment")
    axis.axvline(len(explained["cuts"]) + 1, color="grey", linestyle=":")
    axis.set_xticks(counts)
    axis.set_xlabel("segments")
    axis.legend(fontsize=8)
