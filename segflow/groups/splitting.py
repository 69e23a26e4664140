"""Splitting groups: which are split, which part each example falls into by chance, and what the parts are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..arguments import plain, whole_number
from ..errors import GroupError


def places_of(only: Iterable[int | str], labels: Sequence[str]) -> list[int]:
    """The places of groups that are named by place or label, in order; GroupError where there is no such group."""
    if isinstance(only, str) or not isinstance(only, Iterable):
        raise GroupError(f"only={only!r}: expected a list of places or labels of groups.")
    place_of_label, places = {label: place for place, label in enumerate(labels)}, set()
    for given in only:
        name, known = plain(given), f"The {len(labels)} groups are {labels[:8]}..."
        if isinstance(name, str) and name not in place_of_label:
            raise GroupError(f"only: there is no group {name!r}. {known}")
        advice = f"Give places or labels of groups. {known}"
        is_label = isinstance(name, str)
        place = place_of_label[name] if is_label else whole_number("only", name, GroupError, 0, len(labels) - 1, advice)
        places.add(place)
    return sorted(places)


def random_parts(size: int, count: int, seed: Sequence[int]) -> np.ndarray:
    """[size]: the part that each of a group's examples falls into by chance; sizes of parts differ by one at most."""
    part = np.empty(size, dtype=np.int64)
    for number, chosen in enumerate(np.array_split(np.random.default_rng(seed).permutation(size), count)):
        part[chosen] = number
    return part


def labels_of_parts(labels: Sequence[str], counts: Sequence[int]) -> list[list[str]]:
    """What each group's parts are called: "web/0", "web/1", ..., marked ("web'/0") where that is another's label.

    A group of one part keeps its label.
    """
    taken, named = set(labels), []
    for label, count in zip(labels, counts, strict=True):
        names, mark = [label], ""
        while count > 1 and not taken.isdisjoint(names):
            names, mark = [f"{label}{mark}/{part}" for part in range(count)], mark + "'"
        named.append(names)
        taken.update(names)
    return named
