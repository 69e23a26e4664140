"""Splitting groups: which are split, which part each example falls into by chance, and what the parts are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..arguments import plain, shown, whole_number
from ..errors import SegflowError


def places_of(name: str, given: Iterable[int | str], labels: Sequence[str], error: type[SegflowError]) -> list[int]:
    """The places of groups that an argument names by place or label; `error`, by its name, where there is none such."""
    place_of_label = {label: place for place, label in enumerate(labels)}
    there_are = f"The {len(labels)} groups are {shown(list(labels))}."
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise error(f"{name}={shown(given)}: expected a list of places or labels of groups. {there_are}")
    places = []
    for group in map(plain, given):
        if isinstance(group, str):
            if group not in place_of_label:
                raise error(f"{name}: there is no group {group!r}. {there_are}")
            places.append(place_of_label[group])
        else:
            advice = f"Give places or labels of groups. {there_are}"
            places.append(whole_number(name, group, error, 0, len(labels) - 1, advice))
    return places


def random_parts(size: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """[size]: the part that each of a group's examples falls into by chance; sizes of parts differ by one at most."""
    part = np.empty(size, dtype=np.int64)
    for number, chosen in enumerate(np.array_split(generator.permutation(size), count)):
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
