"""The share that each training example had in training: counted where examples are drawn, and made into weights.

Example weights c have mean 1 over the training examples; training then minimised (1/N) sum_i c_i l_i.

Axes: N training examples, C checkpoints, B bounds between the checkpoints' steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import whole_number
from ..errors import TrajectoryError

_OWN = ("_sampler", "_drawn")  # attributes of a CountedSampler itself; all others are those of what it wraps


class CountedSampler:
    """Wraps a sampler, or a batch sampler, and counts how often it hands out each index.

    Order and random draws stay as they are: everything but the counting is the wrapped sampler's, its length and its
    attributes too (`set_epoch`, `generator`, `batch_size`, ...), also where they are set.

    - Workers of a DataLoader fetch in advance, so that with `num_workers` the counts run up to
      `num_workers * prefetch_factor` batches ahead of the steps. At the end of an epoch they are even again; only where
      a loop stops in the middle of an epoch is what was fetched and never used among them.
    - With `drop_last` a sampler is asked for the examples of the last, incomplete batch, which no step uses. Wrap the
      batch sampler then: `DataLoader(data, batch_sampler=CountedSampler(BatchSampler(sampler, 32, drop_last=True)))`.
    - Under several processes the counts of all ranks are added. Where each rank's sampler runs through all batches and
      some are picked behind it (as accelerate's `prepare` does), every rank counts them all, which leaves the shares
      as they are. accelerate's `use_seedable_sampler` replaces samplers of torch's own class only, not wrapped ones:
      give those a seeded generator instead.

    Example:
        >>> from torch.utils.data import DataLoader, WeightedRandomSampler
        >>> sampler = CountedSampler(WeightedRandomSampler([0.0, 1.0], num_samples=6))
        >>> loader = DataLoader(["never", "always"], sampler=sampler, batch_size=2)
        >>> sum(len(batch) for batch in loader), sampler.counts(2).tolist()
        (6, [0, 6])
    """

    def __init__(self, sampler: Iterable[Any]):
        object.__setattr__(self, "_sampler", sampler)
        object.__setattr__(self, "_drawn", array("q"))  # how often each index was handed out

    def __iter__(self) -> Iterator[Any]:
        for drawn in self._sampler:
            self._count(drawn)
            yield drawn

    def __len__(self) -> int:
        """The wrapped sampler's length; TypeError where it has none."""
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or (name.startswith("__") and name.endswith("__")):  # a copy is asked before it has any
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sampler, name, value)

    def __repr__(self) -> str:
        return f"CountedSampler({self._sampler!r})"

    def counts(self, n: int) -> Tensor:
        """How often each of `n` examples was handed out so far, [n] as int64, on this rank.

        Raises TrajectoryError where an index beyond `n` was handed out.
        """
        n = whole_number("n", n, TrajectoryError, 1, advice="Give the number of training examples.")
        drawn = np.frombuffer(self._drawn, dtype=np.int64) if self._drawn else np.zeros(0, dtype=np.int64)
        beyond = np.flatnonzero(drawn[n:])
        if len(beyond):
            raise TrajectoryError(
                f"CountedSampler: it handed out the index {n + beyond[0]}, expected indices of {n} training "
                f"examples, 0 to {n - 1}. Give the number of examples of the dataset that it draws from."
            )
        counts = torch.zeros(n, dtype=torch.int64)
        counts[: len(drawn)] = torch.from_numpy(drawn[:n].copy())
        return counts

    def _count(self, drawn: Any) -> None:
        """Count an index, or a list of them."""
        for example in _indices(drawn):
            if example < 0:
                raise TrajectoryError(
                    f"CountedSampler: {type(self._sampler).__name__} handed out the index {example}, expected one >= 0."
                )
            if example >= len(self._drawn):
                self._drawn.frombytes(bytes(8 * max(example + 1 - len(self._drawn), len(self._drawn))))
            self._drawn[example] += 1


def _indices(drawn: Any) -> Sequence[int]:
    """An index, or a list of them, as whole numbers."""
    try:
        return (index(drawn),)
    except TypeError:
        pass
    try:
        return [index(example) for example in drawn]
    except TypeError:
        raise TrajectoryError(
            f"CountedSampler: the sampler handed out {drawn!r}, expected an index, or a list of indices. "
            "Wrap the sampler or the batch sampler of a map-style dataset."
        ) from None


def check_example_weights(given: Any, n: int) -> Tensor:
    """Example weights [n] in float64, brought to a mean of 1; given as a tensor, an array or a list.

    Raises TrajectoryError unless they are `n` finite numbers >= 0, not all of them 0.
    """
    expected = f"expected one finite number >= 0 for each of the {n} training examples, not all of them 0"
    try:
        weights_N = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as problem:
        raise TrajectoryError(f"example_weights: {expected} ({problem}).") from problem
    if weights_N.shape != (n,):
        raise TrajectoryError(f"example_weights have shape {list(weights_N.shape)}: {expected}, in shape [{n}].")
    wrong = torch.nonzero(~(torch.isfinite(weights_N) & (weights_N >= 0))).flatten()
    if len(wrong):
        place = int(wrong[0])
        raise TrajectoryError(f"example_weights[{place}] is {weights_N[place].item()}: {expected}.")
    mean = weights_N.mean()
    if not 0 < mean < torch.inf:
        raise TrajectoryError(
            f"example_weights have the mean {mean.item()}: {expected}. Leave them out for equal ones."
        )
    return weights_N / mean


def example_weights_by_checkpoint(given: Any, checkpoints: int, n: int) -> tuple[Tensor, ...]:
    """Each checkpoint's example weights, [n] with a mean of 1; given as [n] for all, or [checkpoints, n].

    Raises TrajectoryError where they are not, as `check_example_weights` does.
    """
    try:
        rows = list(given)
    except TypeError:  # no list: what is wrong with it is said below
        rows = []
    if isinstance(given, str) or not any(np.ndim(row) for row in rows):
        return (check_example_weights(given, n),) * checkpoints
    if len(rows) != checkpoints:
        raise TrajectoryError(
            f"example_weights have {len(rows)} rows: expected [{n}] for all checkpoints, or one row for each of the "
            f"{checkpoints}, [{checkpoints}, {n}]."
        )
    return tuple(check_example_weights(row, n) for row in rows)


def weights_at_checkpoints(steps: Sequence[int], counts: Any) -> Tensor:
    """Example weights [C, N] in float64 around each checkpoint, each row with a mean of 1.

    A checkpoint stands for the steps nearest to it, as in `segments.covered`; between two checkpoints draws are taken
    to be spread evenly over the steps. Around a checkpoint where nothing was drawn (training went on without the
    counted sampler) an example has its share of the whole run.

    Args:
        steps: the checkpoints', ascending.
        counts: [C, N], how often each example had been drawn by each checkpoint, from the start of training.

    Raises:
        TrajectoryError: counts are not [C, N], fall from one checkpoint to the next, or are all 0.
    """
    counts_CN = torch.as_tensor(counts, dtype=torch.float64)
    _check_counts(steps, counts_CN)
    at_bounds_BN = _interpolated(steps, counts_CN, nearest_bounds(steps, 0, steps[-1]))
    drawn_CN = at_bounds_BN.diff(dim=0).clamp_min(0)  # rounding may leave less than 0
    drawn_CN[drawn_CN.sum(1) == 0] = counts_CN[-1]
    return drawn_CN / drawn_CN.mean(1, keepdim=True)


def nearest_bounds(steps: Sequence[int], start: int, end: int) -> list[int]:
    """Steps between which (start, end] is cut, so that each part holds the steps nearest to one checkpoint, in order.

    Step t goes from parameters t - 1 to t, so a checkpoint after s steps is nearest to those around s.

    Example:
        >>> nearest_bounds([10, 20, 40], 0, 40)
        [0, 15, 30, 40]
    """
    return [start, *((earlier + later) // 2 for earlier, later in pairwise(steps)), end]


def _interpolated(steps: Sequence[int], counts_CN: Tensor, bounds: Sequence[int]) -> Tensor:
    """Counts [B, N] at the bounds, linear between the checkpoints and from 0 at the start of training."""
    later = [place for place, step in enumerate(steps) if step > 0]
    known = torch.tensor([0, *(steps[place] for place in later)])
    known_counts = torch.cat([torch.zeros_like(counts_CN[:1]), counts_CN[later]])
    asked = torch.tensor(bounds)
    right = torch.searchsorted(known, asked).clamp(1, len(known) - 1)
    share = (asked - known[right - 1]).double() / (known[right] - known[right - 1])
    below, above = known_counts[right - 1], known_counts[right]
    return below + share[:, None] * (above - below)


def _check_counts(steps: Sequence[int], counts_CN: Tensor) -> None:
    if counts_CN.ndim != 2 or len(counts_CN) != len(steps) or not counts_CN.shape[1]:
        raise TrajectoryError(
            f"counts of draws have shape {list(counts_CN.shape)}: expected [{len(steps)}, examples], one row for each "
            "checkpoint."
        )
    drawn = torch.cat([counts_CN[:1], counts_CN.diff(dim=0)])
    wrong = torch.nonzero(~(torch.isfinite(drawn) & (drawn >= 0)))
    if len(wrong):
        checkpoint, example = wrong[0].tolist()
        raise TrajectoryError(
            f"counts of draws: example {example} had been drawn {counts_CN[checkpoint, example].item():g} times at "
            f"step {steps[checkpoint]}, expected a number that does not fall from one checkpoint to the next. "
            "Count with one sampler from the start of training."
        )
    if not counts_CN[-1].sum() > 0:
        raise TrajectoryError(
            f"counts of draws: no example was drawn up to step {steps[-1]}, expected those that training used. "
            "Give the CountedSampler to the DataLoader that training reads, as sampler= or batch_sampler=."
        )
