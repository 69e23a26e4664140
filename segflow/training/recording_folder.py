"""The folder of a recorded run: what its files are called, and how a run claims, describes and erases it.

    trajectory.json                          what was recorded; recording.json as long as training goes on
    steps.jsonl                              what every step did; see `step_log`
    checkpoints/step-00000010.safetensors    model and second moments; see `checkpoints`
    frozen.safetensors                       parameters that were frozen all along
    example_weights.safetensors              the examples' shares, where the user gave them

Of training in several stages, `stages.json` lists their names in order, and each has such a folder of its own below.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TrajectoryError
from ..store.files import inside, read_json, write_json
from ..store.json_form import COUNT, SHA256, fitting

FORMAT = 3  # of trajectory.json
FINISHED, UNFINISHED = "trajectory.json", "recording.json"
STEPS, CHECKPOINTS, STAGES = "steps.jsonl", "checkpoints", "stages.json"
FROZEN, EXAMPLE_WEIGHTS = "frozen.safetensors", "example_weights.safetensors"
_OWN_NAMES = (
    FINISHED,
    UNFINISHED,
    STEPS,
    CHECKPOINTS,
    STAGES,
    FROZEN,
    EXAMPLE_WEIGHTS,
)  # a stage must not be called so

_CLAIMED = {"format": FORMAT, "finished": False}  # recording.json, before training has begun
_STORED = {"file": str, "bytes": COUNT, "sha256": SHA256}
_CONSTANTS = {
    **dict.fromkeys(("nesterov?", "maximize?", "decoupled_weight_decay?"), (bool, None)),
    **dict.fromkeys(("eps?", "lr_decay?"), (float, [float], None)),
}
_DESCRIPTION = {
    "stage": str,
    "dataset_size": range(1, 2**53),
    "batch_size": (range(1, 2**53), None),
    "optimizers": [str],
    "constants": [_CONSTANTS],
    "moved": [str],
    "unmoved": {str: str},
    "checkpoints": [_STORED | {"step": range(1, 2**53)}],
    "frozen": (_STORED | {"names": [str]}, None),
    "interval": range(1, 2**53),
    "sampling": str,
    "skipped": COUNT,
    "strange": [str],
    "log": {"steps": COUNT, "sha256": (SHA256, None)},
    "taken_before": {str: COUNT},
    "unaccounted": range(-1, 2**53),
    "resumed": [COUNT],
    "gradient_scale?": float,
}  # of trajectory.json, once training has begun


def checkpoint_file(step: int) -> str:
    """The path of a checkpoint in the folder."""
    return f"{CHECKPOINTS}/step-{step:08d}.safetensors"


def check_stage(name: str) -> str:
    """The name of a stage; TrajectoryError unless it is plain enough to name a folder."""
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name)
    if not plain or name.lower() in _OWN_NAMES:
        raise TrajectoryError(
            f"stage={name!r}: expected up to 100 letters, digits, '_', '-' and '.', no '.' first, and not {_OWN_NAMES}."
        )
    return name


def stage_names(root: Path) -> list[str]:
    """The stages recorded in a folder, first to last; none if it holds no stages. TrajectoryError if damaged."""
    path = root / STAGES
    if not path.exists():
        return []
    names = read_json(path, TrajectoryError, {"format": range(1, 2), "stages": [str]})["stages"]
    if not names or len({name.lower() for name in names}) < len(names):
        raise TrajectoryError(f'{path}: expected {{"format": 1, "stages": [names]}}. Restore it, or record again.')
    return [check_stage(name) for name in names]


@dataclass(frozen=True)
class Description:
    """What trajectory.json says, or (finished=False) recording.json of a run that was stopped."""

    path: Path
    content: Mapping[str, Any]
    finished: bool


def read_description(folder: Path, *, unfinished: bool) -> Description:
    """What a recording says of itself; TrajectoryError where there is none that can be used.

    unfinished: accept a run that was stopped after its first checkpoint.
    """
    names = _descriptions_in(folder)
    if not names:
        raise TrajectoryError(f"{folder}: no recorded run here (no {FINISHED}). Make one with segflow.record().")
    if names == [UNFINISHED] and not unfinished:
        raise TrajectoryError(
            f"{folder}: the recorded run did not finish, its process was stopped inside segflow.record(). "
            "Train again, with overwrite=True to reuse the folder; or pass unfinished=True to explain the "
            "model of its last checkpoint."
        )
    content = read_content(folder / names[0])
    if not content.get("checkpoints"):
        raise TrajectoryError(
            f"{folder}: the recorded run was stopped before its first checkpoint. Train again, with overwrite=True "
            "to reuse the folder; a stage before it can be loaded from its own folder."
        )
    return Description(folder / names[0], content, names[0] == FINISHED)


def read_content(path: Path) -> dict[str, Any]:
    """What trajectory.json or recording.json holds, in its form; TrajectoryError where it is damaged or of another."""
    content: dict[str, Any] = read_json(path, TrajectoryError, {})
    if (form := content.get("format")) != FORMAT:
        raise TrajectoryError(
            f"{path.parent}: trajectory format {form!r}, this segflow reads {FORMAT}. Record it again."
        )
    if content == _CLAIMED:  # a process was stopped before it had begun
        return content
    try:
        known: dict[str, Any] = fitting(content, _DESCRIPTION)
    except ValueError as problem:
        raise TrajectoryError(f"{path}: damaged ({problem}). Restore it, or record again.") from problem
    return known


@dataclass(frozen=True)
class RecordingFolder:
    """Where one recording goes: into `root`, or into the subfolder of its stage. TrajectoryError for a bad name."""

    root: Path
    stage: str | None

    def __post_init__(self) -> None:
        if self.stage is not None:
            check_stage(self.stage)

    @property
    def path(self) -> Path:
        """The folder that holds this recording's files."""
        return self.root if self.stage is None else self.root / self.stage

    def claim(self, overwrite: bool) -> list[str]:
        """Mark the folder as a recording under way, and return the stages before it.

        Raises TrajectoryError if that would replace a recording unasked.
        """
        names = stage_names(self.root)
        if self.stage is None and names:
            raise TrajectoryError(
                f"{self.root}: holds the stages {', '.join(names)}. Give record() a stage=, or another folder."
            )
        before = [] if self.stage is None else self._stages_before(self.stage, names, overwrite)
        if (present := _descriptions_in(self.path)) and not overwrite:
            raise TrajectoryError(
                f"{self.path}: holds a recorded run already ({present[0]}). "
                "Record into another folder, go on with it (resume=True), or pass overwrite=True."
            )
        if self.stage is not None:
            later = [inside(self.root, name, error=TrajectoryError) for name in names[len(before) + 1 :]]
            write_json(self.root / STAGES, {"format": 1, "stages": [*before, self.stage]})
            for stale in later:
                _erase(stale)
        write_json(self.path / UNFINISHED, _CLAIMED)
        _erase_content(self.path)
        return before

    def reopened(self) -> dict[str, Any] | None:
        """What the recording in the folder says of itself, so that it may go on; None if there is none to go on with.

        Raises TrajectoryError where it is damaged, or where later stages follow it.
        """
        names = _descriptions_in(self.path)
        later = stage_names(self.root)
        if self.stage in later[:-1]:
            raise TrajectoryError(
                f"{self.root}: stage {self.stage!r} cannot go on, for {later[-1]!r} was recorded after it. Record "
                "another stage, or replace those after it with overwrite=True."
            )
        if not names:
            return None
        content = read_content(self.path / names[0])
        return None if content == _CLAIMED else content

    def drop_checkpoints(self, keep: Collection[str]) -> None:
        """Remove all checkpoints but those with these paths in the folder."""
        for path in _checkpoints_in(self.path):
            if path.relative_to(self.path).as_posix() not in keep:
                path.unlink()

    def _stages_before(self, stage: str, names: list[str], overwrite: bool) -> list[str]:
        """Those of the folder's stages that stay; TrajectoryError where they and this one would make no run."""
        inside(self.root, stage, error=TrajectoryError)
        if present := _descriptions_in(self.root):
            raise TrajectoryError(
                f"{self.root}: holds a recorded run without stages ({present[0]}). Record into another folder, "
                "every stage with a stage= of its own."
            )
        alike = [name for name in names if name.lower() == stage.lower()]
        if alike and (alike != [stage] or not overwrite):
            raise TrajectoryError(
                f"{self.root}: holds stage {alike[0]!r} already. Choose another name, or replace that stage and those "
                f"after it with stage={alike[0]!r} and overwrite=True."
            )
        before = names[: names.index(stage)] if alike else names
        if before and not (self.root / before[-1] / FINISHED).exists():
            raise TrajectoryError(
                f"{self.root}: stage {before[-1]!r}, before {stage!r}, did not finish. "
                "Train it again, with overwrite=True, before recording another."
            )
        return before


def _descriptions_in(folder: Path) -> list[str]:
    return [name for name in (FINISHED, UNFINISHED) if (folder / name).exists()]


def _checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that record() wrote into a folder, also those that it did not complete."""
    return list((folder / CHECKPOINTS).glob("step-*.safetensors*"))


def _erase(folder: Path) -> None:
    """Remove what record() wrote into a folder, and the folder if nothing else is in it."""
    _erase_content(folder)
    (folder / UNFINISHED).unlink(missing_ok=True)
    for empty in (folder / CHECKPOINTS, folder):
        with suppress(OSError):
            empty.rmdir()


def _erase_content(folder: Path) -> None:
    """Remove what a recording left, but for the mark that one is under way."""
    own = (FINISHED, STEPS, FROZEN, EXAMPLE_WEIGHTS)
    for file in [*(folder / name for name in own), *_checkpoints_in(folder)]:
        file.unlink(missing_ok=True)
