"""Forged files: every JSON value and every tensor of a good file replaced by evil ones, in a fixed order."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

EVIL_JSON = (
    "Infinity",
    "NaN",
    "9" * 400,
    "-" + "9" * 19,
    "1e999",
    "1e300",
    "[" * 900 + "]" * 900,
    "null",
    "true",
    "-1",
    "0",
    "0.5",
    "[]",
    "[[]]",
    "{}",
    '""',
    '"' + "x" * 300 + '"',
    '"a\\u0000b"',
    '"a\\nb\\ud800"',
    '"../x"',
    '"/etc/passwd"',
)
_HERE = "@here@"


def forged_json(content: Any) -> Iterator[tuple[str, str]]:
    """What was done, and the text: each value replaced, each key dropped, or given twice."""
    for path in _places(content):
        marked = json.dumps(_changed(content, path, _HERE))
        for evil in EVIL_JSON:
            yield f"{path}: {evil[:20]}", marked.replace(f'"{_HERE}"', evil)
        if path and isinstance(path[-1], str):
            yield f"{path}: dropped", json.dumps(_changed(content, path, None, drop=True))
            twice = _changed(content, path, _HERE)
            yield f"{path}: twice", json.dumps(twice).replace(f'"{_HERE}"', f"1, {json.dumps(path[-1])}: 1")


def _places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = (
        content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
    )
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _changed(content: Any, path: tuple[Any, ...], value: Any, drop: bool = False) -> Any:
    if not path:
        return value
    copy = content.copy()
    if drop and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = _changed(content[path[0]], path[1:], value, drop)
    return copy


def forged_tensors(path: Path) -> Iterator[tuple[str, bytes]]:
    """What was done, and the file: each tensor replaced, dropped or renamed, and headers that lie."""
    good = load(path.read_bytes())
    for name, tensor in good.items():
        others = {key: value for key, value in good.items() if key != name}
        for what, evil in _evil(tensor).items():
            yield f"{name}: {what}", save({**others, name: evil.contiguous()})
        for renamed in ("", "x" * 300, "a\0b", "a\nb", "../x"):
            yield f"{name}: renamed {renamed[:4]!r}", save({**others, renamed: tensor})
        yield f"{name}: dropped", save(others)
    yield from _lying_headers(sorted(good))


def _evil(tensor: Tensor) -> dict[str, Tensor]:
    real = tensor.double() if not tensor.is_complex() else tensor.real.double()
    return {
        "NaN": real * torch.nan,
        "infinite": real + torch.inf,
        "negative": -1e6 - real.abs(),
        "huge": real * 0 + 1e308,
        "0-d": torch.tensor(1.0),
        "of no size": real[..., :0] if real.ndim else torch.zeros(0),
        "a dimension more": real[None],
        "a row more": torch.cat([real, real]) if real.ndim else torch.ones(2),
        "complex": real.to(torch.complex64),
        "booleans": real.bool(),
        "whole": real.nan_to_num().clamp(-9, 9).to(torch.int32),
        "eight bits": real.to(torch.float8_e5m2),
    }


def _lying_headers(names: list[str]) -> Iterator[tuple[str, bytes]]:
    two = {"dtype": "F32", "shape": [2]}

    def file(header: dict[str, Any], content: int) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + bytes(content)

    yield "overlap", file({name: two | {"data_offsets": [0, 8]} for name in [*names, "other"]}, 8)
    yield "beyond its end", file({name: two | {"data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)}, 4)
    yield "petabytes", file({names[0]: {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}, 8)
    yield (
        "a size of 0 times a huge one",
        file({name: {"dtype": "F32", "shape": [0, 1 << 50], "data_offsets": [0, 0]} for name in names}, 0),
    )
    yield "four bits", file({name: {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]} for name in names[:1]}, 8)
    yield "a long header", struct.pack("<Q", 1 << 60)
