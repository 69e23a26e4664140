"""What a recording's files say, as the arguments of a Trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TrajectoryError
from ..runtime.sharding import plain_name
from ..store.files import TensorFile, inside
from .checkpoints import COUNTS, MODEL, Layouts, part_layouts, read_part
from .motion import Moves
from .optimizers import KNOWN, OptimizerConstants
from .recording_folder import EXAMPLE_WEIGHTS, STEPS, Description
from .step_log import CARRIED, FRESH, LEFT_OUT, MOVED, Logged, counts_before_and_after, read_steps


@dataclass(frozen=True)
class Recorded:
    """What a recording says besides a trajectory's arguments; without values, of a run that other trainers left.

    Args:
        sha256: of each checkpoint's file. frozen: the file of the parameters that were frozen all along, and its
        sha256.
        unmoved: why each parameter that is in no parameter group was not trained.
        missing: what of the run the recording does not have, in words; None if it has all.
        counted: whether checkpoints hold how often each example was drawn.
        observed: for `Trajectory.observed`.
    """

    sha256: Mapping[int, str] = field(default_factory=dict)
    frozen: Path | None = None
    frozen_sha256: str | None = None
    unmoved: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    counted: bool = False
    observed: Mapping[str, Any] = field(default_factory=dict)

    def frozen_state(self) -> dict[str, Tensor]:
        """The parameters that were frozen all along."""
        return {} if self.frozen is None else read_part(self._frozen_file(self.frozen), MODEL)

    def layouts(self, checkpoint: TensorFile) -> Layouts:
        """The layouts of a checkpoint's tensors, and of those of the parameters that were frozen all along."""
        frozen = {} if self.frozen is None else part_layouts(self._frozen_file(self.frozen), MODEL)
        return frozen | part_layouts(checkpoint, MODEL)

    def _frozen_file(self, path: Path) -> TensorFile:
        return TensorFile(path, self.frozen_sha256, TrajectoryError)


def read_recorded(folder: Path, description: Description) -> tuple[dict[str, Any], Recorded]:
    """The arguments of the Trajectory that a recording describes, and what it says besides.

    Of a run that was stopped, only what is surely there. KeyError, TypeError and the like where the description is
    damaged.
    """
    content, finished = description.content, description.finished
    sha256 = content["log"]["sha256"]
    if finished and sha256 is None:
        raise TrajectoryError(
            f"{description.path}: damaged, it has no checksum of {STEPS}. Restore it, or record again."
        )
    log = read_steps(folder / STEPS, sha256 if finished else None, content["taken_before"])
    entries = [(inside(folder, entry["file"], error=TrajectoryError), entry) for entry in content["checkpoints"]]
    entries = [(path, entry) for path, entry in entries if finished or path.exists()]
    last = entries[-1][1]["step"] if entries else 0
    if finished and len(log) != last:
        raise TrajectoryError(
            f"{folder}: the log has {len(log)} steps, but the last checkpoint stands at step {last}. Restore the "
            "recording, or record again."
        )
    log = log.until(last)
    groups = [content["constants"][group] for group in log.optimizer_groups]
    arguments = {
        "checkpoints": [path for path, _ in entries],
        "steps": [entry["step"] for _, entry in entries],
        "learning_rates": _decayed(log, groups, content["taken_before"]),
        "dataset_size": content["dataset_size"],
        "optimizer": _optimizer(content, log, groups),
        "parameter_groups": {name: log.group_of[name] for name in content["moved"]},
        "stage": content["stage"],
        "moves": _moves(content, log),
        "example_weights": _example_weights(folder / EXAMPLE_WEIGHTS),
    }
    frozen = content["frozen"]
    recorded = Recorded(
        sha256={index: entry["sha256"] for index, (_, entry) in enumerate(entries)},
        frozen=None if frozen is None else inside(folder, frozen["file"], error=TrajectoryError),
        frozen_sha256=None if frozen is None else frozen["sha256"],
        unmoved={plain_name(name): why for name, why in content["unmoved"].items()},
        missing=f"{unaccounted_words(content['unaccounted'])} before the recording are missing"
        if content["unaccounted"]
        else None,
        counted=content["sampling"] == "counted",
        observed=_observed(content),
    )
    return arguments, recorded


def _example_weights(path: Path) -> Tensor | None:
    return TensorFile(path, None, TrajectoryError).tensor("weights", None, "nonnegative") if path.exists() else None


def _optimizer(content: Mapping[str, Any], log: Logged, groups: list[Mapping[str, Any]]) -> OptimizerConstants:
    """groups: the constants of each set of parameters."""
    kinds = [content["optimizers"][group] for group in log.optimizer_groups]
    return OptimizerConstants(
        name=kinds[0] if len(set(kinds)) == 1 else kinds,
        momentum=log.numbers["momentum"],
        dampening=log.numbers["dampening"],
        weight_decay=log.numbers["weight_decay"],
        nesterov=[bool(group.get("nesterov")) for group in groups],
        maximize=any(group.get("maximize") for group in groups),
        eps=[group.get("eps", 1e-8) if kind in KNOWN else 0.0 for kind, group in zip(kinds, groups, strict=True)],
        decoupled=[
            bool(group.get("decoupled_weight_decay", kind == "AdamW"))
            for kind, group in zip(kinds, groups, strict=True)
        ],
        batch_size=content["batch_size"],
        beta1=log.numbers["beta1"],
    )


def _moves(content: Mapping[str, Any], log: Logged) -> Moves:
    before = counts_before_and_after(log.until(0), content["taken_before"])[0]
    return Moves(
        clip_factors=log.clip_factors,
        moved=log.flags(MOVED).astype(float),
        carried=log.flags(CARRIED).astype(float),
        left_out=log.flags(LEFT_OUT).astype(float),
        fresh=log.flags(FRESH).astype(float),
        taken_before=before.tolist(),
        gradient_scale=content.get("gradient_scale", 1.0),
    )


def _decayed(log: Logged, groups: list[Mapping[str, Any]], taken_before: Mapping[str, int]) -> np.ndarray:
    """The learning rates as the steps used them: Adagrad divides by 1 + (t - 1) lr_decay, t counting its own steps."""
    decays = np.array([float(group.get("lr_decay") or 0.0) for group in groups])
    if not decays.any():
        return log.numbers["learning_rate"]
    counts = counts_before_and_after(log, taken_before)[1:]
    return log.numbers["learning_rate"] / (1 + np.maximum(counts - 1, 0) * decays)


def _observed(content: Mapping[str, Any]) -> dict[str, Any]:
    words = {
        "skipped steps": content["skipped"],
        "resumed after steps": list(content["resumed"]),
        "steps before the recording": unaccounted_words(content["unaccounted"]) if content["unaccounted"] else None,
        "gradients, not followed": list(content["strange"]),
        "sampling": content["sampling"],
    }
    return {name: value for name, value in words.items() if value}


def unaccounted_words(unaccounted: int) -> str:
    """How many steps came before a recording, in words."""
    return "an unknown number of steps" if unaccounted == -1 else f"{unaccounted} steps"


def read_counts(path: Path, sha256: str | None, dataset_size: int) -> Tensor:
    """How often each example had been drawn by a checkpoint, [N]."""
    counts = TensorFile(path, sha256, TrajectoryError).tensor(COUNTS, (dataset_size,), "whole")
    return counts.to(torch.int64)
