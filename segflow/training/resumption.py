"""Where a recording begins: anew, or where an earlier process left off, by what the optimizers have done before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import TrajectoryError
from ..store.files import write_json
from .recording import Begun
from .recording_folder import FINISHED, STEPS, UNFINISHED, RecordingFolder, read_content
from .step_log import Logged, counts_before_and_after, cut_steps, read_steps

_UNKNOWN = -1  # steps that were taken and not counted


def begun_anew(folder: RecordingFolder, taken: Mapping[str, int], overwrite: bool) -> Begun:
    """A new recording, for which the folder is claimed.

    taken: how many steps the optimizers have taken with each parameter already, -1 where they do not count them. Those
    that earlier stages in the folder recorded are accounted for.
    """
    before = folder.claim(overwrite)
    accounted = _accounted(folder, before) if taken else {}
    missing = [n for name, n in taken.items() if not _is_accounted(n, accounted.get(name, 0))]
    unaccounted = 0 if not missing else max(missing) if max(missing) > 0 else _UNKNOWN
    return Begun(taken_before={name: n for name, n in taken.items() if n > 0}, unaccounted=unaccounted)


def _is_accounted(taken: int, recorded: int) -> bool:
    return recorded > 0 if taken == _UNKNOWN else taken == recorded


def _accounted(folder: RecordingFolder, stages: list[str]) -> dict[str, int]:
    """How many steps of each parameter the earlier stages recorded, from where its optimizer last began anew."""
    recorded: dict[str, int] = {}
    for stage in stages:
        content = read_content(folder.root / stage / FINISHED)
        log = read_steps(folder.root / stage / STEPS, content["log"]["sha256"], content["taken_before"])
        counts = counts_before_and_after(log, recorded)[-1]
        recorded |= {name: int(counts[group]) for name, group in log.group_of.items()}
    return recorded


_FORMULAS = ("eps", "nesterov", "maximize", "decoupled_weight_decay", "lr_decay")  # options that hold for a whole run


def check_same(folder: RecordingFolder, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise TrajectoryError where a recording would go on with another dataset size, sampling or optimizer."""
    for what in ("dataset_size", "sampling", "optimizers"):
        _same(folder, what, before[what], now[what])
    if "gradient_scale" in now:
        _same(folder, "gradient_scale", before.get("gradient_scale", 1.0), now["gradient_scale"])
    for option in _FORMULAS:
        of_groups = [[group.get(option) for group in content["constants"]] for content in (before, now)]
        _same(folder, f"the optimizer's {option}", *of_groups)


def _same(folder: RecordingFolder, what: str, before: Any, now: Any) -> None:
    if before != now:
        raise TrajectoryError(
            f"{folder.path}: {what} was {before}, and is {now} where the recording would go on. Go on with the same, "
            "or record the rest as a stage of its own."
        )


def begun_before(
    folder: RecordingFolder, taken: Mapping[str, int], step: int | None, now: Mapping[str, Any]
) -> Begun | None:
    """What stays of the recording in a folder where training goes on; None if there is none.

    The log and the checkpoints after the step at which training goes on are removed.

    Args:
        taken: how many steps the optimizers have taken with each parameter, -1 where they do not count them.
        step: the step after which training goes on, None to find it by these counts.
        now: what the recording that goes on says of itself.

    Raises:
        TrajectoryError: steps between the recording and where training goes on are missing, or it cannot be told where
            that is.
    """
    content = folder.reopened()
    if content is None:
        return None
    check_same(folder, content, now)
    log = read_steps(folder.path / STEPS, None, content["taken_before"])
    at = _resumed_step(folder, log, content["taken_before"], taken, step)
    entries = [entry for entry in content["checkpoints"] if entry["step"] <= at]
    write_json(folder.path / UNFINISHED, {**content, "checkpoints": entries, "log": {"steps": at, "sha256": None}})
    (folder.path / FINISHED).unlink(missing_ok=True)
    cut_steps(folder.path / STEPS, at)
    folder.drop_checkpoints({entry["file"] for entry in entries})
    return Begun(
        step=at,
        saved=entries,
        interval=content["interval"],
        frozen=content["frozen"],
        moved=tuple(content["moved"]),
        taken_before=content["taken_before"],
        unaccounted=content["unaccounted"],
        resumed=(*content["resumed"], at),
        skipped=content["skipped"],
        strange=tuple(content["strange"]),
        gradient_scale=content.get("gradient_scale", 1.0),
    )


def _resumed_step(
    folder: RecordingFolder, log: Logged, taken_before: Mapping[str, int], taken: Mapping[str, int], asked: int | None
) -> int:
    """The step after which training goes on; TrajectoryError where the log does not reach it, or it cannot be told."""
    if asked is not None and asked > len(log):
        raise TrajectoryError(
            f"{folder.path}: step={asked}, but the log ends at step {len(log)}: steps {len(log) + 1} to {asked} are "
            "missing. Train on from an earlier state, or record anew with overwrite=True."
        )
    counted = {name: n for name, n in taken.items() if n > 0 and name in log.group_of}
    if not counted:
        if asked is None:
            raise TrajectoryError(
                f"{folder.path}: the log holds {len(log)} steps, and the optimizer does not tell how many it has "
                "taken. Pass step=, the number of steps after which training goes on (0 to begin again)."
            )
        return asked
    counts = counts_before_and_after(log, taken_before)
    fits = np.all([counts[:, log.group_of[name]] == n for name, n in counted.items()], axis=0)
    steps = np.flatnonzero(fits).tolist()
    if asked in steps or (asked is None and len(steps) == 1):
        return asked if asked is not None else int(steps[0])
    name, n = next((name, n) for name, n in counted.items())
    found = f"the optimizer has taken {n} steps with {name!r}"
    if steps:
        where = f"which fits steps {steps[0]} to {steps[-1]}"
        advice = "Pass step=, the number of steps after which training goes on" + (f", not {asked}" if asked else "")
        raise TrajectoryError(f"{folder.path}: {found}, {where}. {advice}.")
    last = int(counts[-1, log.group_of[name]])
    missing = f": steps {last + 1} to {n} are missing" if n > last else ""
    raise TrajectoryError(
        f"{folder.path}: {found}, but the log holds {last}{missing}. Load the optimizer's state of a step that was "
        "recorded, or record anew with overwrite=True."
    )
