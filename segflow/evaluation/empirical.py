"""Empirical influence: scores fitted to retrainings, which need no gradient and no method.

Axis letters: M subsets, R repetitions, Q queries, K groups.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import ScoreError
from ..groups.groups import Groups
from ..results.scores import GROUP_DIGEST, Scores
from .arguments import as_measurements
from .subsets import as_subsets


def empirical_influence(
    subsets: np.ndarray | Tensor, measured: np.ndarray | Tensor, groups: Groups | None = None
) -> Scores:
    """The downsampling estimator of each group's influence (Feldman and Zhang 2020, arXiv 2008.03703).

    A group's score is the mean measurement of the retrainings without it, less that of the retrainings with it: as in
    all `Scores`, the change of the measurement if the group were removed (from what the subsets keep on average). It
    is unbiased and noisy: the variance falls as one over the number of retrainings. Compare it on retrainings that it
    was not fitted to.

    Args:
        subsets: [M, K] booleans, which groups each retraining kept.
        measured: [M, Q] or [M, R, Q], each query's measurement after each retraining.
        groups: the groups, for their labels and sizes; by default K single examples.

    Raises:
        ScoreError: shapes do not fit, a number is not finite, or a group was always kept or never.

    Example:
        >>> kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=bool)
        >>> measured = 1.0 - kept @ np.array([[1.0], [2.0], [4.0]])
        >>> empirical_influence(kept, measured).values
        tensor([[-2.0000, -0.5000,  2.5000]], dtype=torch.float64)
    """
    kept, values = as_subsets(subsets), as_measurements(measured)
    if kept.ndim != 2 or values.ndim not in (2, 3) or len(values) != len(kept):
        raise ScoreError(
            f"subsets {kept.shape}, measured {values.shape}: expected [M, K], and [M, Q] or [M, R, Q] for the same M."
        )
    M, K = kept.shape
    if groups is not None and len(groups) != K:
        raise ScoreError(f"{len(groups)} groups for subsets of {K}. Give the groups that the subsets are about.")
    groups = Groups.singletons(K) if groups is None else groups
    _check_kept_and_left_out(kept)
    values_MQ = values if values.ndim == 2 else values.mean(1)
    mean_without_KM, mean_with_KM = (side.T.astype(float) / side.sum(0)[:, None] for side in (~kept, kept))
    return Scores(
        torch.from_numpy(((mean_without_KM - mean_with_KM) @ values_MQ).T.copy()),
        tuple(map(str, range(values_MQ.shape[1]))),
        groups.labels,
        tuple(groups.sizes.tolist()),
        {
            "method": "EmpiricalInfluence",
            "estimator": "mean without - mean with (arXiv 2008.03703)",
            "subsets": M,
            "repetitions": values.shape[1] if values.ndim == 3 else 1,
            "kept_share": float(kept.mean()),
            GROUP_DIGEST: groups.digest,
        },
    )


def _check_kept_and_left_out(kept_MK: np.ndarray) -> None:
    """ScoreError for a group that is in every subset, or in none."""
    M, count_K = len(kept_MK), kept_MK.sum(0)
    fixed = np.flatnonzero((count_K == 0) | (count_K == M))
    if len(fixed):
        how = "every" if count_K[fixed[0]] else "no"
        raise ScoreError(
            f"group {fixed[0]} is in {how} one of the {M} subsets, as {len(fixed)} groups are, so its influence "
            "does not show. Give more subsets, or leave the group out."
        )
