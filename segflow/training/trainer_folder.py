"""The folder of a transformers Trainer whose run is over, as the arguments of a Trajectory.

Steps are the optimizer's: those that mixed precision left out count for nothing, though the Trainer counts them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..errors import TrajectoryError
from .checkpoints import check_steps
from .moment_files import OptimizerFile, named_state
from .motion import Moves
from .optimizers import KNOWN, OptimizerConstants
from .per_step import PerStep, rates_by_step
from .trainer_accumulation import added_up, batches_of_a_step
from .trainer_checks import check_arguments, check_frozen, check_goes_on, check_places, check_saved_rates
from .trainer_clipping import ClipLog, clip_factors_of
from .trainer_files import (
    OPTIMIZER,
    STATE,
    TrainerState,
    batch_size_of,
    read_state,
    schedule_of,
    scheduled_steps,
    training_arguments,
)
from .trainer_schedule import LoggedRate, check_logged, schedule_factors

_UNCONFIRMED = "as the arguments say; nothing that was logged confirms them"


@dataclass(frozen=True)
class TrainerWords:
    """What the user says of a Trainer's run; see `Trajectory.from_trainer` for the fields."""

    dataset_size: int
    gradient_scale: float | None = None
    args: Any = None
    learning_rates: PerStep | Mapping[int, float] | None = None
    clip_factors: PerStep | None = None
    parameter_names: Sequence[str] | None = None
    batch_size: int | None = None
    unfinished: bool = False


class TrainerFolder:
    """What a Trainer's run left in `root`, put together for a Trajectory; TrajectoryError says what is missing or odd.

    `arguments`: of the Trajectory, but for its dataset's. `moments`: of each checkpoint the file of its second moments,
    None if the optimizer keeps none. `unmoved`, `observed`: as in `Recorded`.
    """

    def __init__(self, root: Path, model: nn.Module, words: TrainerWords):
        self.root, self.words = root, words
        self.folders = _checkpoint_folders(root)
        self.states = [read_state(folder) for folder in self.folders]
        check_places(self.folders, self.states)
        self.args = training_arguments(words.args, self.folders[-1])
        if words.args is None:
            given = {
                name: getattr(words, name) is not None for name in ("learning_rates", "clip_factors", "batch_size")
            }
            check_arguments(self.states, self.args, given)
        self.last = self._last_state()
        optim = str(self.args["optim"])
        self.optimizers = [
            named_state(folder / OPTIMIZER, model, optim, words.parameter_names) for folder in self.folders
        ]
        self._check_constants()
        self.taken = self._steps_taken()
        self._adds_up = added_up(model, self.args)
        if self._adds_up is None and words.gradient_scale is None:
            raise TrajectoryError(
                f"{root}: it cannot be told whether the losses of a step's "
                f"{self.args['gradient_accumulation_steps']} batches were averaged. Give gradient_scale=, 1 if they "
                "were, or their number if they were added up."
            )
        if words.parameter_names is None:
            check_frozen(self._checkpoints, model, self.optimizers[-1].names)

    def _last_state(self) -> TrainerState:
        """The state at the end of training, which must be there, unless the user takes the last checkpoint for it."""
        last = self.states[-1]
        after = read_state(self.root) if (self.root / STATE).is_file() else last
        if after.step < last.step:
            raise TrajectoryError(
                f"{after.path}: of step {after.step}, before the last checkpoint's {last.step}. Remove what is of "
                "another run."
            )
        check_goes_on(last, after)
        if self.words.unfinished or (after.step == last.step and (last.ended or after.ended or after is not last)):
            return last
        if after.step == last.step:
            raise TrajectoryError(
                f"{self.root}: the last checkpoint stands at step {last.step} of {last.planned}, and nothing says that "
                "training ended there. Pass unfinished=True to explain the model of that checkpoint; or save the end "
                "too: trainer.save_model() and trainer.save_state()."
            )
        if self.args.get("load_best_model_at_end") or self.args.get("fp16"):
            why = (
                "the best one" if self.args.get("load_best_model_at_end") else "after steps that fp16 may have left out"
            )
            raise TrajectoryError(
                f"{self.root}: training ended at step {after.step}, after the last checkpoint (step {last.step}), and "
                f"the model beside it is {why}. Pass unfinished=True to explain the model of the last checkpoint."
            )
        return after

    @property
    def beyond(self) -> bool:
        """Whether training ended after the last checkpoint, so that the model saved beside them is its end."""
        return self.last is not self.states[-1]

    def _check_constants(self) -> None:
        """Raise TrajectoryError where the optimizer's options, other than the rate, changed between checkpoints."""
        first = self.optimizers[0]
        for other in self.optimizers[1:]:
            for one, two in zip(first.groups, other.groups, strict=False):
                changed = [key for key in one if key not in ("lr", "initial_lr") and one[key] != two.get(key)]
                if changed or len(first.groups) != len(other.groups):
                    raise TrajectoryError(
                        f"{other.path}: the optimizer's {changed or 'groups'} were others in {first.path}. Explain the "
                        "two parts as stages: one Trajectory.from_trainer of each, in folders of their own."
                    )

    def _steps_taken(self) -> list[int]:
        """How many steps the optimizer had taken at each checkpoint."""
        taken = []
        for state, optimizer in zip(self.states, self.optimizers, strict=True):
            counts, scheduled = optimizer.steps(), scheduled_steps(optimizer.path.parent)
            steps = max(counts.values()) if counts is not None else state.step if scheduled is None else scheduled
            if scheduled not in (None, steps) and steps <= state.step:
                raise TrajectoryError(
                    f"{optimizer.path}: the optimizer has taken {steps} steps, and its scheduler {scheduled}. Restore "
                    "the folder, or train with RecordCallback."
                )
            if steps > state.step:
                raise TrajectoryError(
                    f"{optimizer.path}: the optimizer has taken {steps} steps, and the Trainer counts {state.step}, so "
                    f"that {steps - state.step} were before this run. Train with RecordCallback, each train() as a "
                    "stage of its own."
                )
            taken.append(steps)
        check_steps(taken, len(taken))
        return [*taken, taken[-1] + self.last.step - self.states[-1].step] if self.beyond else taken

    @property
    def total(self) -> int:
        """The optimizer's steps up to the end."""
        return self.taken[-1]

    def skipped(self, step: int) -> tuple[int, int]:
        """The least and the most steps of the Trainer up to this one that the optimizer may have left out."""
        places = [(0, 0), *((state.step, state.step - n) for state, n in zip(self.states, self.taken, strict=False))]
        before = max(count for at, count in places if at <= step)
        return before, min((count for at, count in places if at >= step), default=before)

    @cached_property
    def rates(self) -> np.ndarray:
        """The learning rate of every step and parameter group, checked against all that was saved, [steps, groups]."""
        optimizer = self.optimizers[-1]
        bases = np.array([float(group.get("initial_lr", group["lr"])) for group in optimizer.groups])
        if self.words.learning_rates is None:
            factors = schedule_factors(schedule_of(self.args, self.last.planned), self.total + 1)
            rates = factors[:, None] * bases
        else:
            rates = rates_by_step(self.words.learning_rates, self.total).numpy() * np.ones(len(bases))
        points = [LoggedRate(step, rate, self.skipped(step)) for step, rate in self.last.logged("learning_rate")]
        check_logged(rates[:, 0].tolist(), points, float(bases[0]))
        for taken, saved in zip(self.taken, self.optimizers, strict=False):
            check_saved_rates(saved, rates[taken : taken + 1], taken, bases)
        return rates[: self.total] / self._adagrad_decay()

    def _adagrad_decay(self) -> np.ndarray:
        """What Adagrad divides the rates by, [steps, groups]; 1 for others."""
        decays = np.array([float(group.get("lr_decay") or 0.0) for group in self.optimizers[-1].groups])
        return 1 + np.arange(self.total)[:, None] * decays

    @cached_property
    def clipping(self) -> ClipLog:
        """What is known of the factors by which gradients were clipped."""
        norms = self.last.logged("grad_norm")
        limit = float(self.args["max_grad_norm"] or 0.0)
        return clip_factors_of(norms, limit, self.total, self.skipped, self.words.clip_factors)

    @cached_property
    def unmoved(self) -> dict[str, str]:
        """Why parameters that the optimizer holds are not attributed."""
        counts = self.optimizers[-1].steps()
        if counts is None:
            return {}
        most = max(counts.values())
        why = "the optimizer stepped it in {} of {} steps, and the folder does not say in which (RecordCallback does)"
        partly = {name: why.format(n, most) for name, n in counts.items() if 0 < n < most}
        return partly | {name: "no step moved it" for name, n in counts.items() if n == 0}

    @property
    def _checkpoints(self) -> list[Path]:
        return [*self.folders, self.root] if self.beyond else self.folders

    @property
    def _unconfirmed(self) -> bool:
        """Whether the rates are the arguments' alone: none was logged, and no checkpoint before the end tells one."""
        told = self.words.learning_rates is not None or self.last.logged("learning_rate")
        return not told and self.taken[0] == self.total

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the Trajectory."""
        optimizer = self.optimizers[-1]
        clipping = self.clipping
        self._warn(clipping)
        factors = clipping.factors
        return {
            "checkpoints": self._checkpoints,
            "steps": self.taken,
            "learning_rates": self.rates,
            "optimizer": self._constants(),
            "parameter_groups": {n: g for n, g in optimizer.group_of.items() if n not in self.unmoved},
            "moves": Moves(clip_factors=factors, gradient_scale=self._gradient_scale),
        }

    @property
    def _gradient_scale(self) -> float:
        """What gradients were multiples of the mean loss's, where accumulated batches were added up."""
        if self.words.gradient_scale is not None or not self._adds_up:
            return 1.0 if self.words.gradient_scale is None else self.words.gradient_scale
        accumulated, of_step = int(self.args["gradient_accumulation_steps"]), batch_size_of(self.args, self.last)
        if of_step is None:
            return float(accumulated)
        of_epoch = self.words.dataset_size / (of_step // accumulated)
        batches = int(of_epoch) if self.args.get("dataloader_drop_last") else math.ceil(of_epoch)
        return batches_of_a_step(max(1, batches), accumulated, self.total)

    def _constants(self) -> OptimizerConstants:
        groups, kinds = self.optimizers[-1].groups, self.optimizers[-1].kinds
        known = [group if kind in KNOWN else {} for group, kind in zip(groups, kinds, strict=True)]

        def by_step(option: str) -> np.ndarray:
            return np.broadcast_to([float(group.get(option) or 0.0) for group in known], (self.total, len(known)))

        betas = [float((group.get("betas") or (0.0,))[0]) for group in known]
        batch_size = self.words.batch_size
        return OptimizerConstants(
            name=kinds[0] if len(set(kinds)) == 1 else kinds,
            momentum=by_step("momentum"),
            dampening=by_step("dampening"),
            weight_decay=by_step("weight_decay"),
            nesterov=[bool(group.get("nesterov")) for group in known],
            maximize=any(group.get("maximize") for group in known),
            eps=[float(group.get("eps", 1e-8)) for group in known],
            decoupled=[kind == "AdamW" for kind in kinds],
            batch_size=batch_size_of(self.args, self.last) if batch_size is None else batch_size,
            beta1=np.broadcast_to(betas, (self.total, len(betas))),
        )

    @property
    def moments(self) -> tuple[OptimizerFile, ...]:
        """The file of the second moments of each checkpoint; an end without one has those of the last."""
        without = frozenset(self.unmoved)
        files = [OptimizerFile(one.path, one.names, one.kinds, without) for one in self.optimizers]
        return tuple([*files, files[-1]] if self.beyond else files)

    @property
    def observed(self) -> dict[str, Any]:
        """What the folder says, and what it does not, for `Trajectory.observed`."""
        counted = self.optimizers[-1].steps() is not None or scheduled_steps(self.folders[-1]) is not None
        skipped = self.states[-1].step - self.taken[len(self.states) - 1]
        words = {
            "read from": "a Trainer's folder",
            "skipped steps": skipped,
            "steps that fp16 left out": "not known" if self.args.get("fp16") and not counted else None,
            "learning rates": _UNCONFIRMED if self._unconfirmed else None,
            "clip factors": self.clipping.words,
            "accumulated batches": self._accumulation(),
            "model": self._which_model(),
            "second moments at the end": f"those of step {self.taken[-2]}" if self.beyond else None,
        }
        return {name: value for name, value in words.items() if value}

    def _accumulation(self) -> str | None:
        accumulated = int(self.args.get("gradient_accumulation_steps") or 1)
        if accumulated == 1 or self.words.gradient_scale is not None:
            return None
        words = "added up" if self._adds_up else "averaged"
        return (
            f"taken as {words}, as transformers' own Trainer has them; the folder does not tell of a loss of one's own"
        )

    def _which_model(self) -> str | None:
        best = self.last.best
        if not self.args.get("load_best_model_at_end") or best is None or Path(best).name == self.folders[-1].name:
            return None
        return f"the last step's is explained, not that of {Path(best).name}, which the Trainer loaded as the best"

    def _warn(self, clipping: ClipLog) -> None:
        found = [f"of the models {words}" if (words := self._which_model()) else None, clipping.warning]
        if self._unconfirmed:
            found.append(f"the learning rates are {_UNCONFIRMED} (a scheduler of one's own is not among the arguments)")
        if self.beyond:
            found.append(
                f"training ended at step {self.total}, after the last checkpoint (step {self.taken[-2]}), whose second "
                "moments stand for those of the end"
            )
        for warning in filter(None, found):
            warnings.warn(f"{self.root}: {warning}.", stacklevel=4)


def _checkpoint_folders(root: Path) -> list[Path]:
    """The checkpoint-* folders, by their steps; TrajectoryError where there are none."""
    numbered = {int(found[1]): path for path in root.glob("checkpoint-*") if (found := _numbered(path))}
    if not numbered:
        raise TrajectoryError(
            f"{root}: no checkpoint-* folders here. Give the output_dir of a Trainer that saved some (save_strategy), "
            "or train with RecordCallback."
        )
    return [numbered[step] for step in sorted(numbered)]


def _numbered(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None
