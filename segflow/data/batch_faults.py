"""What is in a batch, in words: for errors that name what is wrong with the data instead of passing a raw error on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SegflowError, TaskError
from ..tasks.task import FaultyRowError
from .batches import Batch

_SHOWN = 8  # parts of a batch that are described
_OF_THE_MACHINE = ("out of memory", "not enough memory", "allocate memory", "gloo", "NCCL")  # no faults of the data

_OF_ONE = (
    " This is a batch of one example, which a task must take as well: .squeeze() drops its dimension too, where "
    ".squeeze(-1) keeps it."
)


@contextmanager
def naming(what: str, batch: Batch, model: nn.Module | None = None) -> Iterator[None]:
    """Inside, an error of the user's own code becomes a TaskError that names the batch and what is in it.

    Errors of other rooms and of the machine (no memory, another process gone) pass as they are. what: is computed.
    """
    try:
        yield
    except FaultyRowError as problem:
        raise TaskError(f"{what}, example {batch.examples[problem.row]}: {problem}") from problem
    except TaskError as problem:
        if str(problem).startswith(f"{what} of {batch}"):  # named already, further inside
            raise
        data = not_finite(list(batch.examples), row_sums(batch))
        raise TaskError(f"{what} of {batch}: {problem}{f' ({data})' if data else ''}") from problem
    except Exception as problem:
        if isinstance(problem, SegflowError | MemoryError) or any(word in str(problem) for word in _OF_THE_MACHINE):
            raise
        raise TaskError(
            f"{what} of {batch} raised {type(problem).__name__}: {_first_line(problem)}. The batch holds "
            f"{described(batch)}{'' if model is None else f'; the model is in {_dtypes(model)}'}."
            f"{_OF_ONE if batch.size == 1 else ''}"
        ) from problem


def described(batch: Batch) -> str:
    """Each part of a batch: type, shape, range of whole numbers, and which example holds NaN or infinity.

    Example:
        >>> described(Batch([4, 9], [torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 7])]))
        '[0]: float32 [2, 1] (example 9 holds nan); [1]: int64 [2] from 0 to 7'
    """
    parts = list(_parts(batch.content))
    words = [f"{name or 'one'}: {_described(part, batch)}" for name, part in parts[:_SHOWN]]
    return "; ".join([*words, *(["and more"] if len(parts) > _SHOWN else [])]) or "nothing"


def row_sums(batch: Batch) -> dict[str, Tensor]:
    """The sum over each example of each part of a batch that holds floating-point numbers, [B].

    A sum is not finite if one of its numbers is not, and is on the batch's device: nothing waits for it.
    """
    floating = {name: part for name, part in _parts(batch.content) if _of_examples(part, batch)}
    return {name: part.detach().reshape(batch.size, -1).sum(1, dtype=_wide(part)) for name, part in floating.items()}


def not_finite(examples: list[int], sums: Mapping[str, Tensor]) -> str:
    """Which example holds NaN or infinity, by the `row_sums` of its batch; empty if none does."""
    for name, sums_B in sums.items():
        bad = torch.nonzero(~torch.isfinite(sums_B)).flatten().tolist()
        if bad:
            more = f", as do {len(bad) - 1} other examples of the batch" if len(bad) > 1 else ""
            return f"example {examples[bad[0]]} holds NaN or infinity in {name or 'its numbers'}{more}"
    return ""


def _of_examples(part: Any, batch: Batch) -> bool:
    is_floating = isinstance(part, Tensor) and part.is_floating_point() and part.layout == torch.strided
    return is_floating and part.ndim > 0 and len(part) == batch.size


def _wide(part: Tensor) -> torch.dtype:
    """A dtype in which a sum of the part's numbers hardly overflows."""
    return torch.float64 if part.dtype == torch.float64 else torch.float32


def _parts(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a nested batch consists of, with the place of each part."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _parts(value, f"{name}[{key!r}]")
    elif isinstance(content, tuple) or (isinstance(content, list) and any(map(_is_array, content))):
        for place, value in enumerate(content):
            yield from _parts(value, f"{name}[{place}]")
    else:
        yield name, content


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | Mapping | tuple | list)


def _described(part: Any, batch: Batch) -> str:
    if isinstance(part, np.ndarray):
        return f"a numpy array of {part.dtype} {list(part.shape)}, no tensor"
    if not isinstance(part, Tensor):
        length = f" of {len(part)}" if isinstance(part, list | str) else ""
        return f"{type(part).__name__}{length}, no tensor"
    text = f"{_name(part.dtype)} {list(part.shape)}"
    try:
        return text + _values(part, batch)
    except RuntimeError:  # the device itself failed: an assertion on an accelerator ends all work there
        return text


def _values(part: Tensor, batch: Batch) -> str:
    """What is remarkable about a tensor's numbers."""
    if part.layout != torch.strided or part.is_complex() or part.dtype == torch.bool or not part.numel():
        return ""
    if not part.is_floating_point():
        return f" from {part.min().item()} to {part.max().item()}"
    bad = torch.nonzero(~torch.isfinite(part))
    if not len(bad):
        return ""
    value = part[tuple(bad[0].tolist())].item()
    holder = f"example {batch.examples[int(bad[0, 0])]}" if part.ndim and len(part) == batch.size else "it"
    return f" ({holder} holds {value})"


def _dtypes(model: nn.Module) -> str:
    found = {f"{_name(parameter.dtype)} on {parameter.device}" for parameter in model.parameters()}
    return " and ".join(sorted(found)) or "no dtype, for it has no parameters"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [""])[0][:300].rstrip(".")
