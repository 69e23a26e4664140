"""Progress bars for long work: on a terminal only, and never when asked to be quiet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def track(items: Iterable[Item], label: str, total: int | None = None, enabled: bool | None = None) -> Iterator[Item]:
    """Yield `items` behind a progress bar on standard error.

    enabled: True shows it always, False never, None only where standard error is a terminal and the
    environment variable `SEGFLOW_QUIET` is not set.
    """
    if enabled is None and os.environ.get("SEGFLOW_QUIET"):
        enabled = False
    disable = None if enabled is None else not enabled
    yield from tqdm(items, desc=label, total=total, disable=disable, leave=False, dynamic_ncols=True)
