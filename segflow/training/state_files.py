"""Which files hold a state: one file, or a folder as transformers, accelerate and peft save it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ..errors import TrajectoryError
from ..runtime.sharding import plain_name
from ..store.files import TensorFile, file_digest, read_json
from .checkpoints import Layouts, part_layouts, read_one, read_state_dict, state_dict_names

Content = TypeVar("Content")
_MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_INDEX = {"weight_map": {str: str}}


@dataclass(frozen=True)
class StateFiles:
    """The files that a path given as a checkpoint stands for.

    path: as it was given; parts: the files that hold tensors; index: the file that lists those of each part, None of
    a state in one file.
    """

    path: Path
    parts: tuple[Path, ...]
    index: Path | None = None

    def read(self, sha256: str | None = None) -> dict[str, Tensor]:
        """All tensors by their plain names (see `runtime.sharding`), on the CPU; sha256: of the one file."""
        return self._joined(read_state_dict(part, sha256) for part in self.parts)

    def names(self) -> list[str]:
        """The tensors' plain names."""
        return list(self._joined(dict.fromkeys(state_dict_names(part)) for part in self.parts))

    def tensor(self, name: str) -> Tensor:
        """The tensor of a plain name, on the CPU; where the format allows it, without reading others."""
        for part in self.parts:
            if (found := read_one(part, name)) is not None:
                return found
        raise TrajectoryError(f"{self.path}: holds no tensor {name!r}. Restore it.")

    def layouts(self) -> Layouts:
        """The layouts of the tensors in safetensors files, by their plain names; of other files none."""
        files = [part for part in self.parts if part.suffix == ".safetensors"]
        by_part = (part_layouts(TensorFile(part, None, TrajectoryError), "") for part in files)
        return self._joined(by_part) if len(files) == len(self.parts) else {}

    def digests(self) -> list[str]:
        """The sha256 of each file that is read."""
        files = self.parts if self.index is None else (*self.parts, self.index)
        return [file_digest(file, TrajectoryError) for file in files]

    def _joined(self, parts: Iterable[Mapping[str, Content]]) -> dict[str, Content]:
        """The content of all parts by plain names; TrajectoryError where a name comes twice, or the index is wrong."""
        joined: dict[str, Content] = {}
        raw: set[str] = set()
        for content in parts:
            raw |= set(content)
            for name, value in content.items():
                if plain_name(name) in joined:
                    raise TrajectoryError(f"{self.path}: holds {plain_name(name)!r} twice. Save one state_dict.")
                joined[plain_name(name)] = value
        if self.index is not None and (odd := sorted(raw ^ set(_weight_map(self.index)))):
            raise TrajectoryError(
                f"{self.index}: the index and the files beside it differ in {odd[:4]}. Restore the folder."
            )
        return joined


def state_files(path: Path, kind: str) -> StateFiles:
    """The files that a path stands for; kind: what it should be. TrajectoryError where there are none, or too many.

    Of a folder they are those that transformers' `from_pretrained` would read, or peft's.
    """
    if path.is_file():
        return StateFiles(path, (path,))
    if not path.is_dir():
        raise TrajectoryError(f"{path}: no such {kind}. Restore it, or leave it out of the trajectory.")
    of_model, of_adapter = ([path / name for name in names if (path / name).is_file()] for names in (_MODEL, _ADAPTER))
    if not of_model and not of_adapter:
        raise TrajectoryError(
            f"{path}: a folder without any of {', '.join((*_MODEL, *_ADAPTER))}. Give the {kind} itself, or a folder "
            "as save_pretrained writes it."
        )
    if of_model and of_adapter:
        raise TrajectoryError(
            f"{path}: holds a model ({of_model[0].name}) and an adapter ({of_adapter[0].name}). Give the file that is "
            "the state of the model to analyse."
        )
    file = (of_model or of_adapter)[0]
    return StateFiles(path, (file,)) if file.suffix != ".json" else _sharded(path, file, kind)


def _sharded(path: Path, index: Path, kind: str) -> StateFiles:
    names = sorted(set(_weight_map(index).values()))
    if odd := [name for name in names if Path(name).name != name]:
        raise TrajectoryError(f"{index}: names {odd[0]!r}, expected files beside it. Restore the folder.")
    if lost := [name for name in names if not (path / name).is_file()]:
        raise TrajectoryError(f"{path / lost[0]}: no such {kind}, which {index.name} names. Restore the folder.")
    return StateFiles(path, tuple(path / name for name in names), index)


def _weight_map(index: Path) -> Mapping[str, str]:
    """{tensor: the file that holds it}, as an index says."""
    content: Mapping[str, Mapping[str, str]] = read_json(index, TrajectoryError, _INDEX)
    return content["weight_map"]
