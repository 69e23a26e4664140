"""A watch for numbers that are not finite, which does not wait for the device at every batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.batches import Batch
from ..errors import LayerError, TaskError
from ..runtime.ranks import Ranks

_DRAIN_EVERY = 64  # batches between two looks at the device for non-finite numbers


@dataclass
class FiniteCheck:
    """Collects one number for each layer and batch, and looks at them only now and then.

    where: what the pass is, for errors (a checkpoint and a pass's name).
    """

    where: str
    _places: list[tuple[str, str | None]] = field(default_factory=list)
    _pending: list[str] = field(default_factory=list)
    _numbers: list[Tensor] = field(default_factory=list)
    _batches: int = 0
    _seen: set[str] = field(default_factory=set)

    def see(self, layer: str, number: Tensor) -> None:
        """Note a number that is finite only if all of a layer's tokens are."""
        self._seen.add(layer)
        self._pending.append(layer)
        self._numbers.append(number)

    def see_loss(self, batch: Batch, loss: Tensor) -> None:
        """Note the batch's loss; every so often all that was noted is looked at."""
        self._places += [(str(batch), layer) for layer in [*self._pending, None]]
        self._numbers.append(loss)
        self._pending.clear()
        self._batches += 1
        if self._batches % _DRAIN_EVERY == 0:
            self.drain()

    def drain(self) -> None:
        """Raise for the first batch with a non-finite number."""
        if not self._numbers:
            return
        finite = torch.stack([torch.isfinite(number) for number in self._numbers]).tolist()
        bad = [place for place, good in zip(self._places, finite, strict=True) if not good]
        self._numbers.clear()
        self._places.clear()
        if not bad:
            return
        losses = [place for place in bad if place[1] is None]
        batch, layer = (losses or bad)[0]
        what = "loss" if layer is None else f"gradient or input of layer {layer!r}"
        raise (TaskError if layer is None else LayerError)(
            f"{self.where}: the {what} of {batch} is not finite. Look at that batch's data and at the "
            "checkpoint; a run that diverged has no influence to explain."
        )

    def finish(self, layers: Iterable[str], ranks: Ranks, every: bool = True) -> None:
        """Look at what is left, and raise unless every layer was reached by some batch's loss on some rank.

        every: False where one is enough, as the gradient of a measurement may be zero in some.
        """
        self.drain()
        asked = set(layers)
        unreached = sorted(asked.difference(*ranks.gather(sorted(self._seen))))
        if unreached and (every or len(unreached) == len(asked)):
            raise LayerError(
                f"{self.where}: layer {unreached[0]!r} was never reached: no batch's loss depends on it"
                f"{f' (nor on {unreached[1:]})' if unreached[1:] else ''}. "
                "Leave it out with get_influence_tracked_modules() (under activation checkpointing, pass "
                "use_reentrant=False)."
            )
