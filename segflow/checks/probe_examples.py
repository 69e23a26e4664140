"""The few examples on which a loss is probed: distinct ones, for equal ones hide that a model mixes or sorts rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch

from ..data.batches import Batch, evenly_spaced
from ..data.fingerprints import digest
from ..data.readers import Reader
from ..stage.joining import joinable

MOST = 8  # examples of a batch
_LOOKED_AT = 64  # examples at most, among which distinct ones are looked for


@dataclass(frozen=True)
class ProbeExamples:
    """Some examples of a dataset: each alone, and together.

    alone: a batch for each, in the order in which `together` has them.
    """

    reader: Reader
    device: torch.device
    alone: tuple[Batch, ...]

    @property
    def indices(self) -> list[int]:
        """Their places in the dataset."""
        return [int(batch.examples[0]) for batch in self.alone]

    def together(self, most: int = MOST, backwards: bool = False) -> Batch:
        """One batch of all of them, or of the first."""
        indices = self.indices[::-1] if backwards else self.indices[:most]
        [batch] = self.reader.probes([indices], self.device)
        return batch


def probe_examples(reader: Reader, device: torch.device, most: int = MOST) -> list[ProbeExamples]:
    """Up to `most` examples that can be joined into a batch; where none can, some for each of which a batch is its own.

    They stand in no order that the dataset may be sorted in.
    """
    spread = _spread(reader, device, most)
    joined = joinable(reader, device, spread)
    chosen = joined or spread
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).tolist()
    alone = reader.probes([[chosen[place]] for place in order], device)
    batches = [alone] if joined else [[single] for single in alone]
    return [ProbeExamples(reader, device, tuple(batch)) for batch in batches]


def _spread(reader: Reader, device: torch.device, most: int) -> list[int]:
    """Places of up to `most` examples, spread over the dataset, of different content as far as there are any."""
    length = len(reader)
    first = evenly_spaced(length, min(most, length))
    places = [*first, *(place for place in evenly_spaced(length, min(_LOOKED_AT, length)) if place not in set(first))]
    distinct: dict[str, int] = {}
    alike: list[int] = []
    for place in places:
        [single] = reader.probes([[place]], device)
        content = digest(single.content)
        if content in distinct:
            alike.append(place)
        distinct.setdefault(content, place)
        if len(distinct) == most:
            break
    return [*distinct.values(), *islice(alike, max(0, most - len(distinct)))]
