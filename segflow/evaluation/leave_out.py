"""Leaving one group out: is the change that was predicted the change that retraining gives?

Axis letters: Q queries, K groups, N examples, R repetitions, B resamples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import shown, whole_number
from ..data.streams import stream
from ..errors import ScoreError
from ..groups.groups import Groups
from ..groups.splitting import places_of
from ..report.row import Row
from ..report.table import Table
from ..results.scores import Scores
from ..results.slope import CALIBRATION
from .intervals import correlation_interval
from .retraining.reuse import RetrainingOptions, Retrainings
from .retraining.training import Training
from .series import NOTHING_REMOVED, RANDOM, Series, check_examples, check_queries, named_runs, values_of
from .statistics import pearson, quantile_interval, spearman, unchanged_interval, welch_interval
from .ties import merged, precision, rounding, summed

if TYPE_CHECKING:
    from typing_extensions import Unpack

_INTERVAL = (
    "Intervals: 95%, Welch's t, of the difference between retrainings without the group and with all groups. A row's "
    "values are those of the retrainings without the group, less the mean of those with all. Nothing removed: where "
    "the change of a group without effect lies in 95% of cases. Correlations: by Fisher's transformation, for other "
    "groups of the same kind; -1 to 1 for three groups; of random, quantiles over random orders of the groups."
)
_CORRELATIONS = {"spearman": spearman, "pearson": pearson}


def leave_one_group_out(
    scores: Series,
    groups: Groups,
    training: Training,
    folder: str | os.PathLike[str],
    *,
    chosen: Sequence[int | str] | None = None,
    resamples: int = 1000,
    **options: Unpack[RetrainingOptions],
) -> Table:
    """The predicted against the actual change of the mean measurement when one group is removed, group by group.

    Args:
        scores: over the groups [Q, K]; or {name: scores}; or {name: [scores of each of several runs]}, whose mean
            predicts.
        groups: the groups that were scored. Examples that partial groups leave out are always kept.
        training, folder, options: as for `retraining_score`; each group costs `repetitions` retrainings.
        chosen: groups, by place or label; by default all.
        resamples: of the correlations' bootstrap.

    Returns:
        A Table with a row for each series and chosen group, labelled as the group: x is the predicted change, the mean
        the actual one. `settings["correlations"]` has each series' "spearman" and "pearson" over the chosen groups as
        [value, low, high] (null where there are fewer than three groups, or one side does not vary), and those of
        "random". The reference, "nothing removed", is where the actual change of a group without effect lies in 95% of
        cases, by the seeds alone.

    Raises:
        ScoreError: scores, groups or training do not fit, a chosen group does not exist, or the folder holds something
            else.
    """
    series = named_runs(scores)
    for runs in series.values():
        for run in runs:
            run.check_groups(groups, "leave_one_group_out: groups")
    retrainings = Retrainings(training, folder, **options)
    check_examples(training, groups.length)
    resamples = whole_number("resamples", resamples, ScoreError, 1)
    places = _places(groups, chosen)
    kept = np.stack([_without(groups, place) for place in places])
    whole_RQ = retrainings.nothing_removed(groups.length)
    check_queries(series, whole_RQ.shape[1])
    without_KR, whole_R = retrainings.measured(kept).mean(2), whole_RQ.mean(1)
    predicted = {name: _predicted(runs)[places] for name, runs in series.items()}
    rows = tuple(
        Row(name, x, *welch_interval(without_R, whole_R), tuple(without_R - whole_R.mean()), groups.labels[place])
        for name, predicted_K in predicted.items()
        for x, without_R, place in zip(predicted_K, without_KR, places, strict=True)
    )
    change_K = merged(without_KR.mean(1), rounding(without_KR.T) / without_KR.shape[1]) - whole_R.mean()
    correlations = _correlations(predicted, change_K, resamples, retrainings.seed)
    settings = {
        **retrainings.settings(series),
        "interval": _INTERVAL,
        "correlations": correlations,
        "notes": {name: _in_words(found) + _caution(series.get(name, [])) for name, found in correlations.items()},
        "groups": len(groups),
        "chosen": [groups.labels[place] for place in places],
        "examples": groups.length,
        "resamples": resamples,
    }
    return Table(
        "Leave one group out",
        "predicted change of the mean measurement",
        "actual change of the mean measurement",
        rows,
        {NOTHING_REMOVED: unchanged_interval(whole_R)},
        settings,
        "scatter",
    )


def _places(groups: Groups, chosen: Sequence[int | str] | None) -> list[int]:
    """The chosen groups' places."""
    if chosen is None:
        return list(range(len(groups)))
    places = places_of("chosen", chosen, groups.labels, ScoreError)
    if not places or len(set(places)) < len(places):
        raise ScoreError(f"chosen={shown(chosen)}: expected one or more of the groups, each of them once.")
    return places


def _predicted(runs: Sequence[Scores]) -> np.ndarray:
    """[K]: the mean over runs and queries, in which numbers that differ by rounding alone are equal."""
    terms = np.concatenate([values_of(run) for run in runs])
    return summed(terms, max(precision(run.values) for run in runs)) / len(terms)


def _without(groups: Groups, place: int) -> np.ndarray:
    """[N] booleans: what is kept without one group."""
    kept = np.ones(groups.length, dtype=bool)
    kept[groups.members[place]] = False
    if not kept.any():
        raise ScoreError(
            f"group {groups.labels[place]!r} has all {groups.length} examples, so nothing is left to train on without "
            "it. Leave it out of `chosen`."
        )
    return kept


def _correlations(
    predicted: Mapping[str, np.ndarray], change_K: np.ndarray, resamples: int, seed: int
) -> dict[str, dict[str, list[float] | None]]:
    """{series: {"spearman" | "pearson": [value, low, high]}}; None where a correlation does not exist."""
    K = len(change_K)
    rows_KB = stream(seed, "bootstrap of groups").integers(0, K, (K, resamples))
    change_KB = np.tile(change_K[:, None], resamples)
    shuffled_KB = stream(seed, "random orders of groups").permuted(change_KB, axis=0)
    correlations: dict[str, dict[str, list[float] | None]] = {
        name: {kind: _with_interval(predicted_K, change_K, rows_KB, kind) if K > 2 else None for kind in _CORRELATIONS}
        for name, predicted_K in predicted.items()
    }
    varies = K > 2 and np.ptp(change_K) > 0
    correlations[RANDOM] = {
        kind: list(quantile_interval(0.0, correlate(change_KB, shuffled_KB))) if varies else None
        for kind, correlate in _CORRELATIONS.items()
    }
    return correlations


def _with_interval(predicted_K: np.ndarray, change_K: np.ndarray, rows_KB: np.ndarray, kind: str) -> list[float] | None:
    correlate = _CORRELATIONS[kind]
    value = float(correlate(predicted_K[:, None], change_K[:, None])[0])
    draws = correlate(predicted_K[rows_KB], change_K[rows_KB])
    return list(correlation_interval(value, draws, len(change_K), kind == "spearman")) if np.isfinite(value) else None


def _in_words(correlations: Mapping[str, Sequence[float] | None]) -> str:
    """The correlations of one series."""
    return ", ".join(
        f"{kind.capitalize()} " + ("none" if interval is None else "{:.2f} [{:.2f}, {:.2f}]".format(*interval))
        for kind, interval in correlations.items()
    )


def _caution(runs: Sequence[Scores]) -> str:
    """What is to be known of predictions that are not the changes themselves."""
    centred = any(run.provenance.get("centred") for run in runs)
    calibrated = any(CALIBRATION in run.provenance for run in runs)
    return (
        "; predictions less their mean over all groups: compare their order, not their signs" if centred else ""
    ) + ("; predictions calibrated on retrainings" if calibrated else "")
