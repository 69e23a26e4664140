"""The checkpoints of a run as their files hold them: states, second moments, and what tells files apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.sharding import named_parameters, state_of
from ..store.files import TensorFile, file_digest
from .adapters import check_config, has_adapter
from .averaged import AveragedFiles
from .checkpoints import MODEL, SECOND_MOMENT, check_moments, layouts, open_recorded, part_names, read_part
from .recorded import Recorded
from .state_files import StateFiles
from .state_names import check_trained, filled, under_own_names, with_tied


class MomentFiles(Protocol):
    """What holds the bias-corrected second moments of one checkpoint: files of state, or an optimizer's."""

    @property
    def path(self) -> Path:
        """Where they are, for messages."""

    def names(self) -> list[str]:
        """The names of the parameters."""

    def read(self) -> dict[str, Tensor]:
        """The second moments by these names, on the CPU."""

    def digests(self) -> list[str]:
        """The sha256 of each file that is read."""


@dataclass(frozen=True)
class RecordedMoments:
    """The second moments in a checkpoint of record()."""

    file: TensorFile

    @property
    def path(self) -> Path:
        """The checkpoint's."""
        return self.file.path

    def names(self) -> list[str]:
        """The names of the parameters that have taken a step."""
        return list(part_names(self.file, SECOND_MOMENT))

    def read(self) -> dict[str, Tensor]:
        """The second moments by these names, on the CPU."""
        return read_part(self.file, SECOND_MOMENT)

    def digests(self) -> list[str]:
        """The sha256 of the checkpoint."""
        return [file_digest(self.path, TrajectoryError)]


@dataclass(frozen=True)
class SavedCheckpoints:
    """The files of a run's checkpoints, told by their index.

    Args:
        files: each checkpoint's. moments: of each its second moments; None where no files were given for them.
        recorded: of a recording, what its files say besides.
    """

    files: tuple[StateFiles, ...]
    moments: tuple[MomentFiles, ...] | None = None
    recorded: Recorded = field(default_factory=Recorded)

    def averaged(self, average: AveragedFiles, words: str, moments: bool) -> SavedCheckpoints:
        """The same with averaged weights in the place of the last checkpoint's; moments: whether there are some.

        words: how they were averaged.
        """
        last = len(self.files) - 1
        kept = {index: sha256 for index, sha256 in self.recorded.sha256.items() if index != last}
        observed = {**self.recorded.observed, "explained": f"averaged weights ({average.path.name}): {words}"}
        of_all = self.moments
        if moments and of_all is None:
            files = [self.recorded_file(index) for index in range(len(self.files))]
            of_all = tuple(RecordedMoments(file) for file in files if file is not None)
            of_all = of_all if len(of_all) == len(files) else None
        recorded = replace(self.recorded, sha256=kept, observed=observed)
        return SavedCheckpoints((*self.files[:-1], average), of_all, recorded)

    def recorded_file(self, index: int) -> TensorFile | None:
        """The file of checkpoint `index` if record() wrote it; None if it is somebody else's."""
        return open_recorded(self.files[index].path, self.recorded.sha256.get(index))

    def state(self, index: int) -> dict[str, Tensor]:
        """The state that the files of checkpoint `index` hold, on the CPU, under the names that they have there."""
        file = self.recorded_file(index)
        if file is not None:
            return self.recorded.frozen_state() | read_part(file, MODEL)
        return self.files[index].read(self.recorded.sha256.get(index))

    def mean(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        """The weighted mean of states in double precision; what is not real, such as counters, is the last one's."""
        total = sum(weights.values())
        known = all(index in range(len(self.files)) for index in weights)
        if not known or not all(weight >= 0 for weight in weights.values()) or not 0 < total < math.inf:
            raise TrajectoryError(
                f"mean of checkpoints: got {{checkpoint: weight}} {dict(weights)}, expected checkpoints 0 to "
                f"{len(self.files) - 1} with finite weights >= 0, not all of them 0."
            )
        last = self.state(max(weights))
        mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in last.items() if t.is_floating_point()}
        for index in (index for index, weight in weights.items() if weight > 0):
            state = self.state(index)
            if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in last.items()}:
                raise TrajectoryError(f"{self.files[index].path}: its tensors are not those of the last of the mean.")
            for name in mean:
                mean[name] += state[name].double() * (weights[index] / total)
        return last | {name: summed.to(last[name].dtype) for name, summed in mean.items()}

    def fits(self, model: nn.Module, index: int) -> bool:
        """Whether checkpoint `index` is seen to have the model's tensors by its names, shapes and dtypes alone."""
        file = self.recorded_file(index)
        found = self.files[index].layouts() if file is None else self.recorded.layouts(file)
        return found == layouts(state_of(model))

    def left_alone(self, model: nn.Module, index: int, where: str, trained: Collection[str]) -> frozenset[str]:
        """The names in the model's state that checkpoint `index` leaves as they are; see `Trajectory.left_alone`.

        where: names the checkpoint. trained: the parameters that must not be among them.
        """
        if self.recorded_file(index) is not None or not has_adapter(model):
            return frozenset()
        match = filled(self.files[index].names(), model, where)
        check_trained(match, trained, where)
        if match.left:
            check_config(model, self.files[index].parts[0].parent)
        return match.left

    def digest(self, index: int) -> str:
        """sha256 of each file that is read for the checkpoint, joined by "-"."""
        moments = self.moments[index].digests() if self.moments else []
        frozen = [file_digest(path, TrajectoryError) for path in [self.recorded.frozen] if path is not None]
        return "-".join([*self.files[index].digests(), *moments, *frozen])

    def moment_names(self, index: int, model: nn.Module | None) -> frozenset[str] | None:
        """The names of the parameters whose second moments are there, the model's own; None where none were saved.

        Of a recording they may be none at all: those that its optimizer had not stepped yet have none.
        """
        if self.moments is not None:
            files = self.moments[index]
            named = under_own_names(dict.fromkeys(files.names()), model, str(files.path))
            return frozenset(with_tied(named, model)) or None
        file = self.recorded_file(index)
        return None if file is None else frozenset(with_tied(dict.fromkeys(part_names(file, SECOND_MOMENT)), model))

    def second_moments(
        self, index: int, model: nn.Module | None, group_of: Callable[[str], int | None]
    ) -> dict[str, Tensor] | None:
        """The bias-corrected second moments at checkpoint `index`, by the model's own names; None if not saved.

        group_of: a parameter's group. TrajectoryError names one whose moments cannot be those of the checkpoint.
        """
        if self.moments is not None:
            files = self.moments[index]
            moments = under_own_names(files.read(), model, where := str(files.path))
            like = self.state(index) if model is None else named_parameters(model, remove_duplicate=False)
            check_moments(where, moments, group_of, like)
        else:
            file = self.recorded_file(index)
            moments = {} if file is None else read_part(file, SECOND_MOMENT)
            check_moments(str(self.files[index].path), moments, group_of)
        return with_tied(moments, model) or None
