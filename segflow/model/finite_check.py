"""A check that all numbers of a pass are finite, which does not wait for the device at every batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch_faults import not_finite, row_sums
from ..data.batches import Batch
from ..errors import LayerError, TaskError
from ..runtime.ranks import Ranks

_DRAIN_EVERY = 64  # batches between two looks at the numbers that the device computed


class _Origin(NamedTuple):
    """Where a number comes from; layer: None for a loss; sums: of each example's own numbers, on the device."""

    batch: Batch
    layer: str | None
    sums: Mapping[str, Tensor]


@dataclass
class FiniteCheck:
    """Collects a number for each layer and loss of each batch, and looks only now and then whether all are finite.

    where: the pass's name and its checkpoint, for errors.
    """

    where: str
    _numbers: list[Tensor] = field(default_factory=list)
    _origins: list[_Origin] = field(default_factory=list)  # of each number
    _layers_of_batch: list[str] = field(default_factory=list)  # noted since the last batch's loss
    _reached: set[str] = field(default_factory=set)  # layers, by any batch so far
    _batches: int = 0

    def see(self, layer: str, number: Tensor) -> None:
        """Note a number that is finite only if all of a layer's tokens in the current batch are."""
        self._reached.add(layer)
        self._layers_of_batch.append(layer)
        self._numbers.append(number)

    def see_loss(self, batch: Batch, loss: Tensor) -> None:
        """Note the loss of the current batch, which ends the batch; every so often look at all that was noted."""
        bare, sums = batch._replace(content=None), row_sums(batch)
        self._origins += [_Origin(bare, layer, sums) for layer in [*self._layers_of_batch, None]]
        self._numbers.append(loss)
        self._layers_of_batch.clear()
        self._batches += 1
        if self._batches % _DRAIN_EVERY == 0:
            self.drain()

    def drain(self) -> None:
        """Look at all that was noted; raise for the first batch with a number that is not finite.

        Raises TaskError for a loss, LayerError for a layer's gradient or input.
        """
        if not self._numbers:
            return
        finite = torch.stack([torch.isfinite(number) for number in self._numbers]).tolist()
        bad = [origin for origin, is_finite in zip(self._origins, finite, strict=True) if not is_finite]
        self._numbers.clear()
        self._origins.clear()
        if not bad:
            return
        bad_losses = [origin for origin in bad if origin.layer is None]
        raise self._error((bad_losses or bad)[0])

    def _error(self, origin: _Origin) -> TaskError | LayerError:
        """Names what is not finite: the data of the batch, or what the model made of it."""
        what = "loss" if origin.layer is None else f"gradient or input of layer {origin.layer!r}"
        data = not_finite(list(origin.batch.examples), origin.sums)
        cause = (
            f"{data}. Mend or leave out such examples."
            if data
            else "the batch's own numbers are, so it is what the model makes of them. Look at the checkpoint; a run "
            "that diverged has no influence to explain."
        )
        return (TaskError if origin.layer is None else LayerError)(
            f"{self.where}: the {what} of {origin.batch} is not finite: {cause}"
        )

    def finish(self, layers: Iterable[str], ranks: Ranks, every: bool = True) -> None:
        """Look at what is left, and raise LayerError unless every layer was reached by some batch on some rank.

        every: False where one reached layer is enough, as the gradient of a measurement may be zero in others.
        """
        self.drain()
        expected = set(layers)
        unreached = sorted(expected.difference(*ranks.gather(sorted(self._reached))))
        if unreached and (every or len(unreached) == len(expected)):
            raise LayerError(
                f"{self.where}: layer {unreached[0]!r} was never reached: no batch's loss depends on it"
                f"{f' (nor on {unreached[1:]})' if unreached[1:] else ''}. "
                f"Leave out what is not used: Analyzer(..., exclude={unreached}) (under activation checkpointing, pass "
                "use_reentrant=False)."
            )
