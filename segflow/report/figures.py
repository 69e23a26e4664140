"""Figures of scores, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import ScoreError
from ..scores import Ranked, Scores


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
        caption: text under a training image.
        k: images a row.

    Returns:
        A matplotlib Figure; save it with `figure.savefig(path)`.
    """
    if not scores.by_term:
        raise ScoreError('influence_figure: the scores have no terms. Score with keep=("term",).')
    if set(scores.group_sizes) != {1} or len(train_images) != len(scores.group_labels):
        raise ScoreError(
            f"influence_figure: {len(train_images)} images for {len(scores.group_labels)} groups of "
            f"{min(scores.group_sizes)} to {max(scores.group_sizes)} examples. Score Groups.singletons, one image each."
        )
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(1.35 * (k + 3.6), 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.5, k, 3.2])
    _image(left.subplots(), query_image, f"query {scores.query_labels[query]}\n{query_caption}")
    rows: Sequence[tuple[str, bool]] = (
        ("removal raises the measurement (a loss: helpful)", True),
        ("removal lowers the measurement (a loss: harmful)", False),
    )
    for part, (title, largest) in zip(middle.subfigures(2, 1), rows, strict=True):
        part.suptitle(title, fontsize=9)
        axes = np.atleast_1d(part.subplots(1, k))
        for axis, ranked in zip(axes, scores.top(query, k, largest), strict=False):
            text = f"{ranked.score:+.3f}" + (f"\n{caption(ranked)}" if caption else "")
            _image(axis, train_images[ranked.group], text)
    _spread(right.subplots(), scores, query)
    return figure


def _image(axis: Any, image: np.ndarray, text: str) -> None:
    axis.imshow(image, cmap="gray_r")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(text, fontsize=8)


def _spread(axis: Any, scores: Scores, query: int) -> None:
    """Share of the absolute influence that falls in each term."""
    size = np.array([part[query].abs().sum().item() for part in scores.by_term.values()])
    names = [label.replace(": ", "\n") for label in scores.by_term]
    axis.bar(names, size / (size.sum() or 1.0), color="#4477aa")
    axis.set_ylabel("share of the query's absolute influence", fontsize=8)
    axis.set_ylim(0, 1)
    axis.tick_params(labelsize=7)
    axis.set_title("spread over training", fontsize=9)
