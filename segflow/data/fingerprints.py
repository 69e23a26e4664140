"""Fingerprints: what a dataset is, in a form that tells it from others and that JSON can hold.

A dataset is told by its examples, and these end in `digest`, a sha256 of whatever they hold. What a task or a function
is stands in `code_identity.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ..runtime.progress import track
from ..runtime.ranks import Ranks
from .batches import dataset_length, evenly_spaced, in_order

_LARGE = 1024  # a longer TensorDataset is digested by its tensors, not by its examples
_PIECE = 256  # examples that are digested together, by one rank
_REREAD = 64  # examples that are read three times, to see whether reading is random


def dataset_fingerprint(dataset: Any, role: str, ranks: Ranks, progress: bool | None = None) -> dict[str, Any]:
    """A dataset's length, and a digest of every example ("random" where reading one twice differs: augmentation).

    Each rank reads its share of the examples. Raises RankError where the datasets of the ranks differ in length or in
    those examples that all read. role: names the dataset in errors.
    """
    length = dataset_length(dataset, role)
    ranks.agree(f"the {role} dataset's length", length)
    reread = evenly_spaced(length, _REREAD)
    readings = {digest([dataset[index] for index in reread]) for _ in range(3)}
    if max(ranks.gather(len(readings))) > 1:
        return {"length": length, "examples": "random"}
    ranks.agree(f"some examples of the {role} dataset (does every rank build it with the same seed?)", sorted(readings))
    if type(dataset) is TensorDataset and length > _LARGE:
        return {"length": length, "examples": digest(dataset.tensors)}
    pieces = in_order(length, _PIECE)
    share = track(ranks.share(pieces), f"reading the {role} data", enabled=progress)
    by_rank = ranks.gather([digest([digest(dataset[index]) for index in piece]) for piece in share])
    in_turn = [by_rank[number % ranks.count][number // ranks.count] for number in range(len(pieces))]
    return {"length": length, "examples": digest(in_turn)}


def digest(content: Any) -> str:
    """sha256 of nested tensors, arrays, dataclasses and plain values; other objects count by their type alone."""
    sha = hashlib.sha256()
    _feed(sha, content)
    return sha.hexdigest()


def _feed(sha: Any, content: Any) -> None:
    """Add the content to the hash, each piece behind a word that says what it is."""
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
