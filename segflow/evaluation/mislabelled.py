"""Wrong labels: do the lowest-ranked examples hold them?"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..errors import ScoreError


def found_among_lowest(ranking: np.ndarray | Tensor, wrong: np.ndarray | Tensor, count: int | None = None) -> int:
    """How many of the `count` examples with the lowest `ranking` are wrong (count: as many as are wrong).

    ranking: [N], low where an example is suspected, such as the predicted change of its own loss on its removal;
    wrong: [N] booleans.

    Example:
        >>> found_among_lowest(np.array([0.3, -2.0, 0.1, 5.0]), np.array([False, True, True, False]))
        2
    """
    ranked, is_wrong = checked_pair(ranking, wrong)
    size = int(is_wrong.sum()) if count is None else count
    if size < 0:
        raise ScoreError(f"count={count}: expected how many examples to look at.")
    return int(is_wrong[np.argsort(ranked, kind="stable")[:size]].sum())


def detection_auc(ranking: np.ndarray | Tensor, wrong: np.ndarray | Tensor) -> float:
    """Probability that a wrong example ranks below a right one (area under the ROC curve; 0.5 is chance).

    Example:
        >>> detection_auc(np.array([0.3, -2.0, 0.1, 5.0]), np.array([False, True, True, False]))
        1.0
    """
    ranked, is_wrong = checked_pair(ranking, wrong)
    right = np.sort(ranked[~is_wrong])
    if len(right) in (0, len(ranked)):
        raise ScoreError("detection_auc needs both wrong and right examples.")
    above = [len(right) - np.searchsorted(right, ranked[is_wrong], side=side) for side in ("right", "left")]  # type: ignore[call-overload]
    return float((above[0] + above[1]).mean() / 2 / len(right))


def checked_pair(ranking: np.ndarray | Tensor, wrong: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays [N], of numbers and of booleans; ScoreError if they do not fit."""
    ranked, is_wrong = np.asarray(ranking, dtype=float), np.asarray(wrong, dtype=bool)
    if ranked.ndim != 1 or ranked.shape != is_wrong.shape:
        raise ScoreError(f"ranking {ranked.shape} and wrong {is_wrong.shape}: expected [N] and [N].")
    if not np.isfinite(ranked).all():
        raise ScoreError(f"ranking: example {np.flatnonzero(~np.isfinite(ranked))[0]} has a number that is not finite.")
    return ranked, is_wrong
