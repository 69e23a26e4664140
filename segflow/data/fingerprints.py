"""Fingerprints: what a dataset, a task or a function is, in a form that tells it from others and that JSON can hold.

From the whole to its parts: a dataset is told by its examples, a task by its options and its code, and all of these
end in `digest`, a sha256 of whatever they hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

import numpy as np
import torch

from ..errors import TaskError


def task_fingerprint(task: Any) -> dict[str, Any]:
    """What tells apart the factors fitted for a task: its class, plain options, and the code of its training loss.

    Options that only the measurement depends on, by the task's `measurement_options`, do not count.
    """
    ignored = getattr(task, "measurement_options", ())
    options = {name: value for name, value in plain_options(task).items() if name not in ignored}
    return {
        "class": type(task).__qualname__,
        "options": options,
        "code": code_digest(task, "compute_train_loss", "get_attention_mask"),
    }


def measurement_fingerprint(task: Any) -> dict[str, Any]:
    """What tells apart scores of a task: its plain options, and the code of its measurement."""
    return {"options": plain_options(task), "code": code_digest(task, "compute_measurement")}


def output_fingerprint(task: Any) -> dict[str, Any]:
    """What tells apart kernels of a task's output function: its plain options, and that function's code."""
    return {"options": plain_options(task), "code": code_digest(task, "compute_output")}


def plain_options(subject: Any) -> dict[str, str]:
    """The `repr` of each attribute of an object that holds a number, a text, None, or a list or tuple."""
    plain = (bool, int, float, str, type(None), list, tuple)
    return {
        key: repr(value) for key, value in sorted(getattr(subject, "__dict__", {}).items()) if isinstance(value, plain)
    }


def code_digest(subject: Any, *methods: str) -> str:
    """A digest of the compiled code of some of an object's methods."""
    sha = hashlib.sha256()
    for name in methods:
        code = getattr(getattr(type(subject), name, None), "__code__", None)
        sha.update(repr(_instructions(code)).encode())
    return sha.hexdigest()[:16]


def _instructions(code: Any) -> Any:
    """What a function's code does: its instructions, names and constants, but not the lines where its text stands."""
    if not isinstance(code, CodeType):
        return code if isinstance(code, bool | int | float | str | bytes | tuple | None) else type(code).__name__
    return (code.co_code, code.co_names, [_instructions(constant) for constant in code.co_consts])


def digest(content: Any) -> str:
    """sha256 of nested tensors, arrays, plain values, and objects, which count by what pickle would keep of them.

    TaskError for an object whose content cannot be known.
    """
    sha = hashlib.sha256()
    _feed(sha, content, ())
    return sha.hexdigest()


def _feed(sha: Any, content: Any, within: tuple[int, ...]) -> None:
    """Add the content to the hash, each piece behind a word that says what it is; within: what it is a part of."""
    if isinstance(content, torch.Tensor):
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
