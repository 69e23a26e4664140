"""What a dataset, a task or a function is, as a digest that tells it from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ..runtime.progress import track
from ..runtime.ranks import Ranks
from .batches import dataset_length, evenly_spaced, in_order

_LARGE = 1024  # a TensorDataset beyond this is digested by its tensors, not by its examples
_PIECE = 256  # examples that are digested together, by one rank
_REREAD = 64  # examples that are read three times, to see whether reading is random


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


def task_fingerprint(task: Any) -> dict[str, Any]:
    """The task's class, plain-valued attributes and training loss's compiled code: what tells apart fitted factors."""
    ignored = getattr(task, "measurement_options", ())
    options = {name: value for name, value in plain_options(task).items() if name not in ignored}
    return {
        "class": type(task).__qualname__,
        "options": options,
        "code": code_digest(task, "compute_train_loss", "get_attention_mask"),
    }


def output_fingerprint(task: Any) -> dict[str, Any]:
    """What tells apart kernels of the task's output function."""
    return {"options": plain_options(task), "code": code_digest(task, "compute_output")}


def measurement_fingerprint(task: Any) -> dict[str, Any]:
    """The task's plain-valued attributes and measurement's compiled code: what tells apart scores."""
    return {"options": plain_options(task), "code": code_digest(task, "compute_measurement")}


def plain_options(task: Any) -> dict[str, str]:
    """An object's plain-valued attributes."""
    plain = (bool, int, float, str, type(None), list, tuple)
    return {
        key: repr(value) for key, value in sorted(getattr(task, "__dict__", {}).items()) if isinstance(value, plain)
    }


def code_digest(task: Any, *methods: str) -> str:
    """A digest of some methods' compiled code."""
    sha = hashlib.sha256()
    for name in methods:
        code = getattr(getattr(type(task), name, None), "__code__", None)
        sha.update(repr(_instructions(code)).encode())
    return sha.hexdigest()[:16]


def _instructions(code: Any) -> Any:
    """What a function does, without where its text stands."""
    if not isinstance(code, CodeType):
        return code if isinstance(code, bool | int | float | str | bytes | tuple | None) else type(code).__name__
    return (code.co_code, code.co_names, [_instructions(constant) for constant in code.co_consts])
