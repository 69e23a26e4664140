"""Map-style datasets as batches of chosen examples, and what identifies a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from .errors import SegflowError, TaskError
from .progress import track
from .ranks import Ranks, to_device

Collate = Callable[[list[Any]], Any]
Indices = Sequence[int] | np.ndarray
_LARGE = 1024  # a TensorDataset beyond this is digested by its tensors, not by its examples
_PIECE = 256  # examples that are digested together, by one rank
_REREAD = 64  # examples that are read three times, to see whether reading is random


class Batch(NamedTuple):
    """One batch: its examples' indices in the dataset, and what the collate function made of them.

    idle: True for a batch that is run only because other ranks have one more, so that all take part in what a sharded
    model's forward exchanges.
    """

    examples: Indices
    content: Any
    idle: bool = False

    @property
    def size(self) -> int:
        """How many examples the batch holds."""
        return len(self.examples)

    def __str__(self) -> str:
        first, last = self.examples[0], self.examples[-1]
        return f"example {first}" if self.size == 1 else f"the batch of {self.size} examples from {first} to {last}"


def batches(
    dataset: Any, index_lists: Sequence[Indices], collate_fn: Collate | None, device: torch.device, idle: int = 0
) -> Iterator[Batch]:
    """Yield one collated batch on `device` for each list of example indices, in that order; then `idle` idle ones."""
    lists = [np.asarray(indices).tolist() for indices in index_lists] + [[0]] * idle
    contents = _contents(dataset, lists, collate_fn)
    for number, (indices, content) in enumerate(zip(lists, contents, strict=True)):
        yield Batch(indices, to_device(content, device), number >= len(index_lists))


def _contents(dataset: Any, lists: list[list[int]], collate_fn: Collate | None) -> Iterable[Any]:
    """What the collate function makes of each list of examples; of a plain TensorDataset without a call for each."""
    if type(dataset) is TensorDataset and collate_fn is None:
        return ([tensor[indices] for tensor in dataset.tensors] for indices in lists)
    return DataLoader(
        dataset,
        batch_sampler=lists,  # type: ignore[arg-type]
        collate_fn=collate_fn,
        generator=torch.Generator(),
    )


def in_order(length: int, batch_size: int) -> list[range]:
    """Index lists that walk a dataset of `length` examples once, `batch_size` at a time."""
    if batch_size < 1:
        raise SegflowError(f"batch_size={batch_size}: expected at least 1.")
    return [range(start, min(start + batch_size, length)) for start in range(0, length, batch_size)]


def dataset_length(dataset: Any, role: str) -> int:
    """The dataset's length; `role` names it in errors."""
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


def evenly_spaced(length: int, count: int) -> list[int]:
    """Up to `count` indices spread over a dataset of `length` examples, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, length - 1, count)})


def dataset_fingerprint(dataset: Any, role: str, ranks: Ranks, progress: bool | None = None) -> dict[str, Any]:
    """Length, and a digest of every example ("random" where reading one twice differs, as with augmentation).

    Each rank reads its share of the examples; RankError where the ranks' datasets differ in length or in some examples.
    """
    length = dataset_length(dataset, role)
    ranks.agree(f"the {role} dataset's length", length)
    some = evenly_spaced(length, _REREAD)
    readings = {digest([dataset[index] for index in some]) for _ in range(3)}
    if max(ranks.gather(len(readings))) > 1:
        return {"length": length, "examples": "random"}
    ranks.agree(f"some examples of the {role} dataset (does every rank build it with the same seed?)", sorted(readings))
    if type(dataset) is TensorDataset and length > _LARGE:
        return {"length": length, "examples": digest(dataset.tensors)}
    pieces = in_order(length, _PIECE)
    own = track(ranks.share(pieces), f"reading the {role} data", enabled=progress)
    shares = ranks.gather([digest([digest(dataset[index]) for index in piece]) for piece in own])
    every = [shares[number % ranks.count][number // ranks.count] for number in range(len(pieces))]
    return {"length": length, "examples": digest(every)}


def digest(content: Any) -> str:
    """sha256 of nested tensors, arrays, dataclasses and plain values; other objects count by their type alone."""
    sha = hashlib.sha256()
    _feed(sha, content)
    return sha.hexdigest()


def _feed(sha: Any, content: Any) -> None:
    if isinstance(content, torch.Tensor):
        content = content.detach().cpu().to_dense().resolve_conj().contiguous()
        sha.update(f"tensor {content.dtype} {tuple(content.shape)}".encode())
        sha.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(content, np.ndarray) and content.dtype.hasobject:
        sha.update(f"array {content.shape}".encode())
        _feed(sha, content.tolist())
    elif isinstance(content, np.ndarray):
        sha.update(f"array {content.dtype} {content.shape}".encode())
        sha.update(np.ascontiguousarray(content).tobytes())
    elif isinstance(content, Mapping):
        for key in sorted(content, key=str):
            sha.update(f"key {key}".encode())
            _feed(sha, content[key])
    elif isinstance(content, list | tuple):
        sha.update(f"sequence {len(content)}".encode())
        for item in content:
            _feed(sha, item)
    elif isinstance(content, bytes | str | int | float | bool | None | np.generic):
        sha.update(f"{type(content).__name__} {content!r}".encode())
    elif is_dataclass(content) and not isinstance(content, type):
        _feed(sha, {field.name: getattr(content, field.name) for field in fields(content)})
    elif hasattr(content, "__array_interface__"):  # a PIL image
        _feed(sha, np.asarray(content))
    else:
        sha.update(f"object {type(content).__qualname__}".encode())
