"""Whether scores are about the same groups, or about the single examples of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import ScoreError
from ..groups.groups import membership_digest
from .scores import Scores


def check_same_groups(scores: Iterable[tuple[str, Scores]]) -> None:
    """ScoreError unless all these scores, each given behind its name, are about the same groups in the same order.

    Sizes must be alike, and members where they are known. Rows are compared by their places, so a query may not have
    one place here and another there; queries may be called by other names.
    """
    (first, like), *others = scores = list(scores)
    for name, other in others:
        if other.group_sizes != like.group_sizes:
            raise ScoreError(
                f"scores of {name!r}: {len(other.group_sizes)} columns, those of {first!r} have "
                f"{len(like.group_sizes)}, or other sizes. Compare scores of the same examples."
            )
        _check_places(name, other.query_labels, first, like.query_labels)
    known = [(name, of.group_digest) for name, of in scores if of.group_digest is not None]
    for name, found in known[1:]:
        if found != known[0][1]:
            raise ScoreError(
                f"scores of {name!r}: their groups hold other examples than those of {known[0][0]!r}, though their "
                "sizes are alike. Score the same groups with both, or compare scores of single examples "
                "(scores.by_example(groups))."
            )


def _check_places(name: str, labels: Sequence[str], first: str, like: Sequence[str]) -> None:
    """ScoreError if a query that both have is in another row, though both have as many."""
    place = {label: row for row, label in enumerate(like)}
    moved = [label for row, label in enumerate(labels) if place.get(label, row) != row]
    if len(labels) == len(like) and moved:
        raise ScoreError(
            f"scores of {name!r}: query {moved[0]!r} is in row {labels.index(moved[0])}, of {first!r} in row "
            f"{place[moved[0]]}. Rows are compared by their places: score the queries in one order."
        )


def check_single_examples(scores: Scores, where: str) -> None:
    """ScoreError, which says where, unless the columns are the dataset's examples, one by one and in its order."""
    sizes = scores.group_sizes
    if set(sizes) != {1}:
        raise ScoreError(
            f"{where}: {len(sizes)} groups of {min(sizes)} to {max(sizes)} examples, expected single examples. Use "
            "scores.by_example(groups), or score Groups.singletons."
        )
    if scores.group_digest not in (None, membership_digest(np.arange(len(sizes)))):
        raise ScoreError(
            f"{where}: {len(sizes)} groups of a single example each, but not all of the dataset in its order. Use "
            "scores.by_example(groups), or score Groups.singletons."
        )
