"""Checkpoint files: what they hold, and whether it is what a trajectory says.

A checkpoint of `record` is a safetensors file with model.NAME for every tensor of the model's state (but for parameters
that were frozen all along, which are in a file of the same form for the whole recording) and, where the optimizer keeps
second moments, second_moment.PARAMETER for every parameter that has taken a step; example_counts [N] where a sampler
was counted. Other trainers' checkpoints are state_dicts, in safetensors or as torch.save writes them.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import whole_numbers
from ..errors import TrajectoryError
from ..runtime.sharding import plain_name
from ..store.files import TensorFile, read_tensors
from .optimizers import SECOND_MOMENTS

MODEL, SECOND_MOMENT = "model.", "second_moment."  # what names begin with in a checkpoint of record()
COUNTS = "example_counts"  # how often each example had been drawn
Layouts = dict[str, tuple[tuple[int, ...], str]]  # of each tensor its shape, and its dtype as safetensors writes it
_WRITTEN = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def check_moment_files(kinds: Sequence[str], files: int, checkpoints: int) -> None:
    """Raise TrajectoryError unless an optimizer has second moments and there is a file of them for each checkpoint."""
    if not set(kinds) & set(SECOND_MOMENTS) or files != checkpoints:
        names = ", ".join(dict.fromkeys(kinds))
        raise TrajectoryError(
            f"{files} files of second moments for {checkpoints} checkpoints of {names}: expected a file for each, and "
            f"one of {', '.join(SECOND_MOMENTS)}. Leave second_moments= out otherwise."
        )


def check_moments(
    where: str,
    moments: Mapping[str, Tensor],
    group_of: Callable[[str], int | None],
    like: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise TrajectoryError naming the first parameter whose second moments are not finite numbers >= 0.

    group_of: a parameter's group, which it must have. like: the model's state, whose names and shapes they must have.
    """
    for name, values in moments.items():
        if group_of(name) is None:
            raise TrajectoryError(
                f"{where}: second moments of {name!r}, which is in no parameter group. "
                "Put it into parameter_groups, or leave its second moments out."
            )
        if like is not None and (name not in like or like[name].shape != values.shape):
            expected = "no such parameter" if name not in like else f"of shape {tuple(like[name].shape)}"
            raise TrajectoryError(
                f"{where}: second moments of {name!r} have shape {tuple(values.shape)}, but in the checkpoint it is "
                f"{expected}. Save them under the names of model.named_parameters()."
            )
        if not values.is_floating_point():
            raise TrajectoryError(f"{where}: the second moments of {name!r} are {values.dtype}, expected real numbers.")
        numbers = values.float() if values.element_size() == 1 else values  # those of eight bits cannot be compared
        wrong = numbers[~((numbers >= 0) & torch.isfinite(numbers))]
        if wrong.numel():
            raise TrajectoryError(
                f"{where}: {wrong.numel()} of {values.numel()} second moments of {name!r} are not finite numbers >= 0 "
                f"(the first is {wrong[0].item():g}). Leave this checkpoint out, or look at why training went wrong."
            )


def check_steps(steps: Sequence[int], files: int) -> tuple[int, ...]:
    """The steps; TrajectoryError unless there is one for each file, and they are whole numbers that ascend from 1."""
    whole = whole_numbers("steps", steps, TrajectoryError, 1, advice="They count optimizer steps.")
    if not files or files != len(whole):
        raise TrajectoryError(f"{files} checkpoint files for {len(whole)} steps: expected one step for each file.")
    if any(later <= earlier for earlier, later in pairwise(whole)):
        raise TrajectoryError(f"steps={list(whole)}: expected steps that ascend, each larger than the one before.")
    return whole


def open_recorded(path: Path, sha256: str | None) -> TensorFile | None:
    """A checkpoint that record() wrote; None if it is somebody else's."""
    if not re.fullmatch(r"step-\d{8,}\.safetensors", path.name):
        return None
    file = TensorFile(path, sha256, TrajectoryError)
    return file if all(name.startswith((MODEL, SECOND_MOMENT)) or name == COUNTS for name in file.names()) else None


def part_names(file: TensorFile, part: str) -> dict[str, str]:
    """{plain name: name in the file} of what is in one part of a checkpoint, MODEL or SECOND_MOMENT."""
    return {plain_name(name[len(part) :]): name for name in file.names() if name.startswith(part)}


def read_part(file: TensorFile, part: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint, by their plain names without its prefix."""
    return {plain: file.tensor(name) for plain, name in part_names(file, part).items()}


def part_layouts(file: TensorFile, part: str) -> Layouts:
    """The layouts of one part of a checkpoint, without reading its tensors."""
    return {plain: file.layout(name) for plain, name in part_names(file, part).items()}


def layouts(state: Mapping[str, Any]) -> Layouts:
    """The layouts of tensors; of others, and of dtypes that no file is read as, ones that no file's equal."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    found: Layouts = {name: (tuple(t.shape), _WRITTEN.get(t.dtype, "")) for name, t in tensors.items()}
    return dict.fromkeys(state, ((), "")) | found


def numbers_of(tensor: Tensor) -> str:
    """What kind of numbers a tensor holds: one kind is not loaded into a model's tensor of another."""
    return "complex" if tensor.is_complex() else "real" if tensor.is_floating_point() else "whole"


def read_state_dict(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """The state_dict in a file of safetensors or of torch.save; TrajectoryError where it holds anything else."""
    if path.suffix == ".safetensors":
        return read_tensors(path, sha256, TrajectoryError)
    return _torch_state_dict(path, mmap=False)


def read_one(path: Path, name: str) -> Tensor | None:
    """The tensor of a plain name in such a file, without reading others where its format allows that; None without."""
    if path.suffix == ".safetensors":
        file = TensorFile(path, None, TrajectoryError)
        raw = part_names(file, "").get(name)
        return None if raw is None else file.tensor(raw)
    state = _torch_state_dict(path, mmap=zipfile.is_zipfile(path))
    return next((value for raw, value in state.items() if plain_name(raw) == name), None)


def state_dict_names(path: Path) -> list[str]:
    """The names in such a file, without reading its tensors where its format allows that."""
    if path.suffix == ".safetensors":
        return TensorFile(path, None, TrajectoryError).names()
    return list(_torch_state_dict(path, mmap=zipfile.is_zipfile(path)))  # other files are of torch before 1.6


def load_torch(path: Path, mmap: bool = False) -> Any:
    """What torch.save wrote, if it is of tensors and plain containers; mmap: leave the tensors in the file."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)  # noqa: TID251


def _torch_state_dict(path: Path, mmap: bool) -> dict[str, Tensor]:
    """mmap: leave the tensors in the file."""
    try:
        content: Any = load_torch(path, mmap)
    except Exception as problem:  # torch raises many kinds here, none of its own
        raise TrajectoryError(
            f"{path}: not readable as a plain state_dict ({type(problem).__name__}: {problem}). "
            "Save model.state_dict() with torch.save or safetensors."
        ) from problem
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise TrajectoryError(f"{path}: expected a state_dict of tensors. Save model.state_dict() on its own.")
    return dict(state)
