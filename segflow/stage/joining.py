"""Which of a dataset's examples can be joined into one batch, where those of different shapes cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.readers import Reader
from ..errors import JoinError


def joinable(reader: Reader, device: torch.device, indices: Sequence[int]) -> list[int]:
    """The same indices, if their examples can be joined; otherwise as many of the first ones, or two; or none.

    Of data that is sorted so that neighbours can be joined, those that are spread over it cannot.
    """
    first = list(range(len(indices)))
    for candidates in (list(indices), first, first[:2]):
        try:
            reader.probes([candidates], device)
        except JoinError:
            continue
        return candidates
    return []
