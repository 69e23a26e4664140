"""Empirical influence: scores fitted to retrainings, which need no gradient and no method.

Measurements are taken to fall by an effect of its own for each group that is kept, and to be off by noise:

    measured = level - (sum of the kept groups' effects) + noise.

Subsets of one size cannot tell the level from the effects' mean: more for each group and a higher level measure the
same. What the groups' effects have in common is then known only from retrainings on everything, if at all.

Axis letters: M subsets (rows: and everything), R repetitions, Q queries, K groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import truth
from ..errors import ScoreError
from ..groups.groups import Groups
from ..results.scores import GROUP_DIGEST, Scores
from .arguments import as_measurements
from .subsets import Subsets, as_subsets

_REGRESSION_FROM = 2.0  # subsets for each group: as exact as means where noise has the signal's variance; simulated


def empirical_influence(
    subsets: Subsets,
    measured: np.ndarray | Tensor,
    groups: Groups | None = None,
    *,
    whole: np.ndarray | Tensor | None = None,
    centred: bool = False,
) -> Scores:
    """Each group's influence, estimated from retrainings on random subsets of the groups.

    As in all `Scores`, a group's score is the change of the measurement if the group were removed, on average over what
    the subsets keep. Where there are at least twice as many subsets as groups, it is a regression of the measurements
    on the groups kept. Where there are fewer, it is the downsampling estimator of Feldman and Zhang (2020, arXiv
    2008.03703), the mean without a group less the mean with it, in which the sizes of the subsets are allowed for: by
    itself it would be the group's effect less the mean of the others' where all subsets have one size, and noisy by
    their sizes where they have several. Both are unbiased where effects add up, and their variance falls as one over
    the number of retrainings. Compare the scores on retrainings that they were not fitted to.

    Args:
        subsets: [M, K] booleans, which groups each retraining kept; or for each a list of the groups that it kept.
        measured: [M, Q] or [M, R, Q], each query's measurement after each retraining.
        groups: the groups, for their labels and sizes; by default K single examples.
        whole: [Q] or [R, Q], the measurements of retrainings on all the groups. Needed, unless `centred`, where all
            subsets have one size. It is far from them: where effects do not add up, the mean of the effects is that on
            the way from the subsets to everything.
        centred: the effects less their mean over the groups, which rank groups and subsets of one size and need nothing
            else, but whose signs do not say what helps. The provenance says so, and they do not add up.

    Returns:
        Scores [Q, K]. The provenance holds the estimator and whether the effects are centred; otherwise also what their
        mean is known from, and its standard error for each query ("mean_effect_error"; None for too few subsets).

    Raises:
        ScoreError: shapes do not fit, a number is not finite, a group was always kept or never, two cannot be told
            apart, or all subsets have one size and neither `whole` nor `centred` was given.

    Example:
        >>> kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=bool)
        >>> effects, level = np.array([[1.0], [2.0], [4.0]]), 9.0
        >>> empirical_influence(kept, level - kept @ effects, whole=level - effects.sum(0)).values
        tensor([[1.0000, 2.0000, 4.0000]], dtype=torch.float64)
        >>> empirical_influence(kept, level - kept @ effects, centred=True).values
        tensor([[-1.3333, -0.3333,  1.6667]], dtype=torch.float64)
    """
    fit = _Fit.of(as_subsets(subsets, None if groups is None else len(groups)), measured, whole)
    centred, K = truth("centred", centred, ScoreError), fit.kept.shape[1]
    if not (centred or fit.sizes_vary):
        raise ScoreError(
            f"every subset keeps {int(fit.kept[0].sum())} of {K} groups, so their mean effect does not show. Give "
            "whole= (measurements of retrainings on all of them), or subsets of several sizes, as by "
            "random_subsets(..., fixed=False); or ask for the effects less their mean: centred=True."
        )
    groups = Groups.singletons(K) if groups is None else groups
    regression = len(fit.kept) >= _REGRESSION_FROM * K
    effects_KQ, error_Q = fit.by_regression() if regression else fit.by_means()
    known = {
        "mean_effect_from": fit.source,
        "mean_effect_error": error_Q.tolist() if np.isfinite(error_Q).all() else None,
    }
    provenance: dict[str, Any] = {
        "method": "EmpiricalInfluence",
        "estimator": "regression on the groups kept" if regression else "mean without - mean with (arXiv 2008.03703)",
        "subsets": len(fit.kept),
        "repetitions": np.shape(measured)[1] if np.ndim(measured) == 3 else 1,
        "kept_share": float(fit.kept.mean()),
        "centred": centred,
        GROUP_DIGEST: groups.digest,
        **({"additive": False} if centred else known),
    }
    return Scores(
        torch.from_numpy((_less_mean(effects_KQ) if centred else effects_KQ).T.copy()),
        tuple(map(str, range(len(error_Q)))),
        groups.labels,
        tuple(groups.sizes.tolist()),
        provenance,
    )


@dataclass(frozen=True)
class _Fit:
    """Retrainings to fit effects to; kept: [M, K]; values: [rows, Q] and weight: [rows], with everything as last row.

    A weight is how many repetitions are averaged, against those of a subset.
    """

    kept: np.ndarray
    values: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, kept: np.ndarray, measured: np.ndarray | Tensor, whole: np.ndarray | Tensor | None) -> _Fit:
        """Of what a user gave; ScoreError where it does not fit."""
        values = as_measurements(measured)
        if values.ndim not in (2, 3) or len(values) != len(kept):
            raise ScoreError(
                f"subsets {kept.shape}, measured {values.shape}: expected [M, K], and [M, Q] or [M, R, Q] for the same "
                "M."
            )
        _check_kept_and_left_out(kept)
        values_MQ = values if values.ndim == 2 else values.mean(1)
        if whole is None:
            return cls(kept, values_MQ, np.ones(len(kept)))
        every = np.atleast_2d(as_measurements(whole))
        if every.ndim != 2 or every.shape[1] != values_MQ.shape[1] or not len(every):
            raise ScoreError(
                f"whole {every.shape}: expected [Q] or [R, Q] of the {values_MQ.shape[1]} queries measured."
            )
        weight = len(every) / (values.shape[1] if values.ndim == 3 else 1)
        return cls(kept, np.vstack([values_MQ, every.mean(0)]), np.append(np.ones(len(kept)), weight))

    @property
    def rows(self) -> np.ndarray:
        """[rows, K]: what was kept, in float64."""
        everything = np.ones((len(self.values) - len(self.kept), self.kept.shape[1]))
        return np.vstack([self.kept, everything])

    @property
    def sizes_vary(self) -> bool:
        """Whether the mean effect shows."""
        return len(np.unique(self.rows.sum(1))) > 1

    @property
    def source(self) -> str:
        """Where the mean effect is known from."""
        with_whole = "retrainings on everything" if len(self.values) > len(self.kept) else ""
        of_sizes = "the sizes of the subsets" if len(np.unique(self.kept.sum(1))) > 1 else ""
        return " and ".join(filter(None, (of_sizes, with_whole)))

    def by_regression(self) -> tuple[np.ndarray, np.ndarray]:
        """The effects [K, Q] by least squares, beside a level, and the standard error of their mean [Q]."""
        rows, K, root = len(self.values), self.kept.shape[1], np.sqrt(self.weight)[:, None]
        design = root * np.column_stack([np.ones(rows), self.rows])
        inverse = np.linalg.pinv(design)
        if round(float(np.trace(inverse @ design))) < K + self.sizes_vary:
            raise self._not_told_apart()
        level_and_effects = inverse @ (root * self.values)
        squares_Q = ((root * self.values - design @ level_and_effects) ** 2).sum(0)
        error_Q = np.linalg.norm(inverse[1:].mean(0)) * _spread(squares_Q, rows - K - 1)
        return -level_and_effects[1:], error_Q

    def by_means(self) -> tuple[np.ndarray, np.ndarray]:
        """The effects [K, Q], by differences of means of what the sizes leave unexplained, and the error as above.

        Without group k the others are kept more often, where sizes are fixed. Their part in the difference follows
        from the mean correlation of being kept, which the variance of the sizes gives.
        """
        M, K = self.kept.shape
        self._check_told_apart()
        mean_Q, error_Q, rest = self._mean_effect()
        without_KM, with_KM = (side.T.astype(float) / side.sum(0)[:, None] for side in (~self.kept, self.kept))
        independent = K * self.kept.mean() * (1 - self.kept.mean())
        together = (self.kept.sum(1).var() / independent - 1) / max(1, K - 1)
        return _less_mean((without_KM - with_KM) @ rest[:M]) / (1 - together) + mean_Q, error_Q

    def _check_told_apart(self) -> None:
        """ScoreError if two groups are always kept together, or one in place of the other.

        Two that are all there is may be kept in place of each other, as may any beside retrainings on everything.
        """
        columns = [column.tobytes() for column in self.rows.T.astype(bool)]
        others = {column.tobytes() for column in ~self.rows.T.astype(bool)} if len(columns) > 2 else set()
        if len(set(columns)) < len(columns) or others.intersection(columns):
            raise self._not_told_apart()

    def _not_told_apart(self) -> ScoreError:
        return ScoreError(
            f"the effects of {self.kept.shape[1]} groups cannot be told apart by these {len(self.kept)} subsets: some "
            "are always kept together, or one in place of the other. Draw subsets at random, or make such groups one."
        )

    def _mean_effect(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of measurements over sizes: minus the slope [Q] (0 for one size), its error, and what is left [rows, Q]."""
        size, values = (
            side - np.average(side, axis=0, weights=self.weight) for side in (self.rows.sum(1), self.values)
        )
        weighted = self.weight * size
        spread = float(weighted @ size) if self.sizes_vary else 1.0
        slope_Q = weighted @ values / spread
        rest = values - np.outer(size, slope_Q)
        return -slope_Q, _spread(self.weight @ rest**2, len(values) - 2) / np.sqrt(spread), rest


def _spread(squares_Q: np.ndarray, freedom: int) -> np.ndarray:
    """[Q]: the noise's standard deviation; infinite where everything was fitted."""
    return np.sqrt(squares_Q / freedom) if freedom > 0 else np.full(len(squares_Q), np.inf)


def _less_mean(values_KQ: np.ndarray) -> np.ndarray:
    centred: np.ndarray = values_KQ - values_KQ.mean(0)
    return centred


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
