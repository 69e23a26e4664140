"""What the parts of a plan are checked for where they are made: weights, numbers for parameter groups, kinds of parts.

Each function gives back plain Python, in tuples, so that a plan can be compared, hashed and written down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..arguments import plain, real_number, shown, whole_number
from ..errors import MethodError
from ..training.segments import Weight, for_group

_ROUNDING = 1e-6  # of weights that add up to 1


def all_of(name: str, parts: Any, *kinds: type, least: int = 1) -> tuple[Any, ...]:
    """The parts as a tuple; MethodError unless they are at least so many, and of the kinds."""
    found = tuple(parts) if isinstance(parts, Iterable) and not isinstance(parts, str) else (parts,)
    wrong = [part for part in found if not isinstance(part, kinds)]
    if wrong or len(found) < least:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise MethodError(f"{name}: expected {expected}, found {shown(wrong[0]) if wrong else 'none'}.")
    return found


def checked_weights(where: str, weights: Any, points: int) -> tuple[Weight, ...]:
    """The weights of so many points; MethodError unless none is below 0 and they are 1 in all, for each group.

    A weight is one number, or one for each parameter group.
    """
    found = tuple(map(_weight, weights)) if isinstance(weights, Iterable) and not isinstance(weights, str) else ()
    if not points or len(found) != points or not _add_up(found):
        raise MethodError(
            f"{where}: weights {weights} for {points} points: expected one for each, 1 in all and none below 0, or "
            'so for each parameter group. Put a scale into an operator, such as Spectral(kind="constant", ...).'
        )
    return found


def indexed_weights(where: str, pairs: Any) -> tuple[tuple[int, Any], ...]:
    """Pairs (index of a checkpoint, weight); MethodError unless indices are distinct and weights as for a point."""
    try:
        indices, weights = zip(*((index, weight) for index, weight in pairs), strict=True)
    except (TypeError, ValueError):
        raise MethodError(
            f"{where}: weights {pairs!r}: expected at least one pair (index of a checkpoint, weight)."
        ) from None
    places = tuple(whole_number(f"{where}: checkpoint", index, MethodError) for index in indices)
    if len(set(places)) < len(places):
        raise MethodError(f"{where}: weights {pairs!r} name a checkpoint twice. Give each one weight.")
    return tuple(zip(places, checked_weights(where, weights, len(places)), strict=True))


def checked_amounts(where: str, name: str, amounts: Any, least: float, none_is: str = "") -> tuple[Any, ...]:
    """One number for each parameter group; MethodError where one is below `least`, or no number.

    NaN stands for a rate that is not known, which is refused where a layer needs it. none_is: what None stands for,
    where it may stand among the numbers.
    """
    if not isinstance(amounts, Iterable) or isinstance(amounts, str):
        raise MethodError(f"{where}: {name}={amounts!r}: expected a tuple, one number for each parameter group.")
    found: list[float | None] = []
    for group, amount in enumerate(amounts):
        if amount is None and not none_is:
            raise MethodError(
                f"{where}: the {name} of parameter group {group} is None, expected a number. Only a damping may be "
                "None, which stands for the heuristic one."
            )
        known = amount is not None and not _is_nan(amount)
        one = f"{where}: the {name} of parameter group {group}"
        finite = name != "ceilings"
        found.append(real_number(one, amount, MethodError, least, finite=finite) if known else plain(amount))
    return tuple(found)


def _is_nan(amount: Any) -> bool:
    found = plain(amount)
    return isinstance(found, float) and math.isnan(found)


def _weight(weight: Any) -> Weight:
    """A weight in plain Python; NaN for what is no number, which no sum of 1 has."""
    found = plain(weight)
    if isinstance(found, Iterable) and not isinstance(found, str):
        return tuple(_weight(one) for one in found)  # type: ignore[misc]
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan


def _add_up(weights: Sequence[Weight]) -> bool:
    """Whether weights are 1 in all, none below 0, for each parameter group where they are one for each."""
    groups = {len(weight) for weight in weights if isinstance(weight, tuple)} or {1}
    if len(groups) > 1:
        return False
    of_groups = [for_group(weights, group) for group in range(min(groups))]
    return all(min(of_group) >= 0 and abs(sum(of_group) - 1) <= _ROUNDING for of_group in of_groups)
