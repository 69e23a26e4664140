"""Batches of a map-style dataset, and lists of the examples to choose for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ..arguments import shown, whole_number
from ..errors import SegflowError, TaskError

Collate = Callable[[list[Any]], Any]
Indices = Sequence[int] | np.ndarray


class Batch(NamedTuple):
    """One batch: the indices of its examples in the dataset, and what the collate function made of them.

    idle: True for a batch that is run but counts for nothing. A rank runs one where other ranks have more batches, so
    that all ranks take part in what the forward of a sharded model exchanges.
    weights: how much each example counts, [B]; None: all alike.
    alone: reads each of its examples again, as a batch of one; None where that is not known.
    """

    examples: Indices
    content: Any
    idle: bool = False
    weights: torch.Tensor | None = None
    alone: Callable[[], Iterator[Batch]] | None = None

    @property
    def size(self) -> int:
        """How many examples the batch holds."""
        return len(self.examples)

    @property
    def root_weights(self) -> torch.Tensor | None:
        """The square roots of the weights, [B], for gradients that will be squared; None: all alike."""
        return None if self.weights is None else self.weights.sqrt()

    def __str__(self) -> str:
        first, last = self.examples[0], self.examples[-1]
        return f"example {first}" if self.size == 1 else f"the batch of {self.size} examples from {first} to {last}"


def weighted(data: Iterable[Batch], weights_N: torch.Tensor) -> Iterator[Batch]:
    """The batches with their examples' weights, out of those of all examples of the dataset."""
    for batch in data:
        yield batch._replace(weights=weights_N[batch.examples])


def in_order(length: int, batch_size: int) -> list[range]:
    """Lists of indices that walk a dataset of `length` examples once and in order, `batch_size` at a time."""
    size = checked_batch_size(batch_size)
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def checked_batch_size(given: object) -> int:
    """The option `batch_size`; SegflowError unless it is a whole number from 1."""
    return whole_number("batch_size", given, SegflowError, 1, advice="It counts examples, such as 128.")


def dataset_length(dataset: Any, role: str) -> int:
    """The dataset's length; TaskError if it has none, is not indexed, or is empty. role: names it in errors."""
    if advice := _mistaken(dataset):
        kind = type(dataset).__name__
        raise TaskError(f"the {role} dataset is {'an' if kind[0] in 'AEIOaeio' else 'a'} {kind}{advice}")
    try:
        length = len(dataset)
    except TypeError:
        length = -1
    if length < 0 or isinstance(dataset, IterableDataset):
        raise TaskError(
            f"the {role} dataset has no {'length' if length < 0 else 'indices'}. "
            "Expected a map-style dataset (with __len__ and __getitem__); "
            "put the examples of an iterable dataset into a list."
        )
    if length == 0:
        raise TaskError(f"the {role} dataset is empty. Expected at least one example.")
    return int(length)


def _mistaken(dataset: Any) -> str:
    """What was given in the place of a dataset, and what to give; empty for a dataset."""
    if isinstance(dataset, DataLoader):
        return ". Give loader.dataset, and Analyzer(..., collate_fn=loader.collate_fn) where it has one of its own."
    plain_text = isinstance(dataset, str | bytes)
    if plain_text or (not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__iter__")):
        return (
            f", {shown(dataset)}. Expected a map-style dataset (with __len__ and __getitem__), or a list of examples."
        )
    if isinstance(dataset, Mapping) and 0 not in dataset:
        return f" with the keys {shown(list(dataset))}. Expected one dataset, whose examples are numbered from 0: " + (
            "give a list of examples, each a mapping of one example's values."
            if dataset and all(map(_is_array, dataset.values()))
            else "give one of the mapping's, or a list of examples."
        )
    if _are_columns(dataset):
        return (
            f" of {len(dataset)} tensors, a column each and no examples. Give "
            "torch.utils.data.TensorDataset(*columns), or a list of examples."
        )
    arrays = isinstance(dataset, tuple) and len(dataset) > 1 and all(map(_is_array, dataset))
    if arrays and any(part.ndim == 0 for part in dataset):
        return f" of {len(dataset)} tensors, which looks like one example. Give a list of examples, [example]."
    return ""


def _are_columns(dataset: Any) -> bool:
    """Whether these are the columns of a dataset: a tuple of tensors, or a list of some that no batch could join."""
    if not isinstance(dataset, tuple | list) or len(dataset) < 2 or not all(map(_is_array, dataset)):
        return False
    shapes = {tuple(column.shape) for column in dataset}
    same_length = all(shapes) and len({shape[0] for shape in shapes if shape}) == 1
    return same_length and (isinstance(dataset, tuple) or len({len(shape) for shape in shapes}) > 1)


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def evenly_spaced(length: int, count: int) -> list[int]:
    """Up to `count` indices spread over a dataset of `length` examples, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, length - 1, count)})
