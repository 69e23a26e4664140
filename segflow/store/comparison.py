"""Whether what was stored was made from what is asked now, numbers compared but for rounding, and how both differ."""

from __future__ import annotations

import math
from typing import Any

PROBES = "probes"  # the key of values that are compared as rounded
_ROUNDING, _ROUNDING_AT_0 = 1e-4, 1e-5  # of probes, relative to a value, and to the mean of all
_LAST_DIGITS = 1e-9  # of other numbers, whose sums may be taken in another order


def agree(stored: Any, now: Any) -> bool:
    """Equal, numbers but for their last digits, and those of probes up to what other machines may round differently."""
    if isinstance(now, dict) and isinstance(stored, dict) and stored.keys() == now.keys():
        if list(now) == [PROBES]:
            return _probes_agree(_flat(stored[PROBES]), _flat(now[PROBES]))
        return all(agree(stored[key], now[key]) for key in now)
    if isinstance(now, list) and isinstance(stored, list) and len(stored) == len(now):
        return all(agree(*pair) for pair in zip(stored, now, strict=True))
    if isinstance(now, float) and isinstance(stored, float):
        return math.isclose(stored, now, rel_tol=_LAST_DIGITS) or (math.isnan(stored) and math.isnan(now))
    return bool(stored == now)


def difference(stored: Any, now: Any) -> str:
    """Both sides; of long lists only how many entries differ, and the first that do; of mappings, the keys that do."""
    if isinstance(stored, dict) and isinstance(now, dict):
        if list(now) == list(stored) == [PROBES]:
            return difference(_flat(stored[PROBES]), _flat(now[PROBES]))
        keys = [key for key in {**stored, **now} if not agree(stored.get(key), now.get(key))]
        return ", ".join(f"{key}: {difference(stored.get(key), now.get(key))}" for key in keys)
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now) > 3:
        pairs = [pair for pair in zip(stored, now, strict=True) if not agree(*pair)]
        if pairs:
            return f"{len(pairs)} of {len(now)} differ, the first: {difference(*pairs[0])}"
    return f"stored {stored!r}, now {now!r}"


def _probes_agree(stored: list[Any], now: list[Any]) -> bool:
    """Whether probes have the same values, relative to their own scale: values near 0 are rounded as others are."""
    if len(stored) != len(now):
        return False
    numbers = [abs(value) for value in stored + now if isinstance(value, float)]
    least = _ROUNDING_AT_0 * (sum(numbers) / max(1, len(numbers)))
    return all(
        math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=least)
        if isinstance(one, float) and isinstance(other, float)
        else one == other
        for one, other in zip(stored, now, strict=True)
    )


def _flat(nested: Any) -> list[Any]:
    if isinstance(nested, list):
        return [value for part in nested for value in _flat(part)]
    return [nested]
