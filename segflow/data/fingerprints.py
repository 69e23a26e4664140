"""Fingerprints: what a dataset is, in a form that tells it from others and that JSON can hold.

A dataset is told by its examples, and these end in `digest`, a sha256 of whatever they hold. What a task or a function
is stands in `code_identity.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import TaskError


def digest(content: Any) -> str:
    """sha256 of nested tensors, arrays, plain values, and objects, which count by what pickle would keep of them.

    TaskError for an object whose content cannot be known.
    """
    sha = hashlib.sha256()
    _feed(sha, content, ())
    return sha.hexdigest()


def _feed(sha: Any, content: Any, within: tuple[int, ...]) -> None:
    """Add the content to the hash, each piece behind a word that says what it is; within: what it is a part of."""
    if isinstance(content, torch.Tensor) and content.is_nested:
        _feed(sha, list(content.unbind()), within)
    elif isinstance(content, torch.Tensor):
        content = content.detach().cpu().to_dense().resolve_conj().contiguous()
        sha.update(f"tensor {content.dtype} {tuple(content.shape)}".encode())
        sha.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(content, np.ndarray) and not content.dtype.hasobject:
        sha.update(f"array {content.dtype} {content.shape}".encode())
        sha.update(np.ascontiguousarray(content).tobytes())
    elif isinstance(content, bytes | str | int | float | bool | None | np.generic):
        sha.update(f"{type(content).__name__} {content!r}".encode())
    elif id(content) in within:
        sha.update(f"again {len(within) - within.index(id(content))}".encode())
    else:
        _feed_parts(sha, content, (*within, id(content)))


def _feed_parts(sha: Any, content: Any, within: tuple[int, ...]) -> None:
    """The same for what has parts."""
    if isinstance(content, np.ndarray):
        sha.update(f"array {content.shape}".encode())
        _feed(sha, content.tolist(), within)
    elif isinstance(content, Mapping):
        sha.update(f"mapping {len(content)}".encode())
        for key in sorted(content, key=lambda key: (str(key), type(key).__name__)):
            sha.update(f"key {type(key).__name__} {key}".encode())
            _feed(sha, content[key], within)
    elif isinstance(content, list | tuple):
        sha.update(f"sequence {len(content)}".encode())
        for item in content:
            _feed(sha, item, within)
    elif isinstance(content, set | frozenset):
        sha.update(f"set {sorted(map(digest, content))}".encode())
    elif hasattr(content, "__array_interface__"):  # a PIL image
        sha.update(f"image {getattr(content, 'mode', '')}".encode())
        _feed(sha, np.asarray(content), within)
    else:
        sha.update(f"object {type(content).__qualname__}".encode())
        _feed(sha, _state(content), within)


def _state(content: Any) -> Any:
    """What pickle would keep of an object, besides its class."""
    if callable(content) and hasattr(content, "__qualname__"):
        return str(content.__qualname__)
    try:
        reduced = content.__reduce_ex__(2)
    except Exception as problem:
        raise TaskError(
            f"it holds a {type(content).__name__}, whose content cannot be told from another's ({problem}). Give "
            "tensors, arrays, numbers, texts, mappings and lists of them, or objects that can be pickled."
        ) from problem
    if isinstance(reduced, str):
        return reduced
    parts = [list(part) if isinstance(part, Iterator) else part for part in reduced[1:]]
    return [part for part in parts if part is not None and part != (type(content),)]
