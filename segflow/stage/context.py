"""What all work on one stage of training shares - model, task, trajectory, store, and how to walk data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..data.batches import Batch, Collate, Indices, batches, dataset_length, evenly_spaced
from ..data.fingerprints import dataset_fingerprint, digest, task_fingerprint
from ..errors import TaskError, TrajectoryError
from ..methods.plan import Point
from ..model.layers.registry import LayerChoice
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView, make_loss_view
from ..runtime.ranks import Ranks
from ..store.shared import SharedStore
from ..training.trajectory import Trajectory
from .identity import PROBES, rounded, short


@dataclass(frozen=True)
class StageContext:
    """Everything but the data and the method, for one stage of training; see Analyzer for the fields.

    run: the whole run's trajectory, of whose stages `stage` is one. layers: those that the stage trained;
    parameter_groups: the optimizer's parameter group of each; sharded: True if the model's parameters are spread over
    the ranks, so that all ranks must run every forward together; prefix: of the names of the stage's units.
    curvature_examples: how many examples, drawn at random, curvature is fitted to; None for all.
    """

    model: nn.Module
    task: Any
    run: Trajectory
    stage: int
    store: SharedStore
    layers: LayerChoice
    parameter_groups: Mapping[str, int]
    seed: int
    memory: int
    collate_fn: Collate | None
    progress: bool | None
    sharded: bool
    prefix: str = ""
    curvature_examples: int | None = None

    @property
    def trajectory(self) -> Trajectory:
        """The stage's own trajectory."""
        return self.run.stages[self.stage]

    @property
    def last(self) -> Point:
        """The stage's last checkpoint."""
        return Point.at(self.stage, len(self.trajectory) - 1)

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.store.ranks

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Each tracked layer's [P, O, I]."""
        return {name: [*layer.shape] for name, layer in self.layers.tracked.items()}

    @property
    def parameters(self) -> int:
        """How many parameters are attributed."""
        return sum(layer.size for layer in self.layers.tracked.values())

    def name(self, point: Point) -> str:
        """The point in a unit's name: the steps of its checkpoints, and their stage where that is another one."""
        trajectory = self.run.stages[point.stage]
        steps = [str(trajectory.steps[index]) for index, _ in point.weights]
        words = ["step", *steps] if len(steps) == 1 else ["mean", short(steps), rounded(point.weights)]
        return "-".join(([] if point.stage == self.stage else [trajectory.stage]) + words)

    def where(self, point: Point) -> str:
        """Names a point in errors and progress bars."""
        trajectory = self.run.stages[point.stage]
        steps = [trajectory.steps[index] for index, _ in point.weights]
        of = f" of {trajectory.stage!r}" if len(self.run.stages) > 1 else ""
        return f"checkpoint at step {steps[0]}{of}" if len(steps) == 1 else f"mean of the checkpoints at {steps}{of}"

    def load(self, point: Point) -> None:
        """Put the parameters at a point into the model; only inside `observing(model)`."""
        weights = dict(point.weights)
        chosen = weights if len(weights) > 1 else next(iter(weights))
        self.run.stages[point.stage].load_into(self.model, chosen)

    def loss_view(self, kind: str, dataset: Any, layers: Mapping[str, TrackedLayer] | None = None) -> LossView:
        """The model seen through one of the task's losses (see `summed_loss`) on this dataset; layers: other ones."""
        return make_loss_view(self.model, self.task, kind, layers or self.layers.tracked, dataset, self.collate_fn)

    def checkpoint_digest(self, point: Point) -> str:
        """sha256 of a checkpoint's file (of several: of their digests and weights), the same on every rank."""
        trajectory = self.run.stages[point.stage]
        if len(point.weights) == 1:
            found = trajectory.digest(point.weights[0][0]) if self.ranks.main else None
        else:
            found = digest([[trajectory.digest(i), w] for i, w in point.weights]) if self.ranks.main else None
        return str(self.ranks.same(found))

    def walk(
        self, view: LossView, dataset: Any, lists: Sequence[Indices], label: str, collate_fn: Collate | None = None
    ) -> Iterator[Batch]:
        """One batch for each of this rank's lists of example indices, behind a progress bar; collate_fn: another one.

        Where the model is sharded, ranks with fewer batches than another run idle ones at the end.
        """
        idle = max(self.ranks.gather(len(lists))) - len(lists) if self.sharded else 0
        data = batches(dataset, lists, collate_fn or self.collate_fn, view.device, idle)
        examples = sum(map(len, lists))
        return self.store.journal.walk(data, label, examples, lambda b: 0 if b.idle else b.size)

    def settings(self) -> dict[str, Any]:
        """What must be the same on every rank."""
        return {
            "model": self.shapes,
            "task": task_fingerprint(self.task),
            "steps": [list(stage.steps) for stage in self.run.stages],
            "seed": self.seed,
            "memory": self.memory,
        }

    def require_task(self) -> None:
        """Raise TaskError unless the stage has a task."""
        if self.task is None:
            raise TaskError(
                f"stage {self.trajectory.stage!r} has training data and no task. Give one in {{stage: task}}."
            )

    def require_training_data(self, train: Any) -> None:
        """Raise TrajectoryError unless `train` is as long as the dataset that the run was recorded with."""
        length = dataset_length(train, "training")
        if length != self.trajectory.dataset_size:
            raise TrajectoryError(
                f"the training dataset has {length} examples, but the {self._named()} was recorded with "
                f"dataset_size={self.trajectory.dataset_size}. Give the dataset that the model was trained on."
            )

    def _named(self) -> str:
        return f"stage {self.trajectory.stage!r}" if len(self.run.stages) > 1 else "run"

    def made_from(self, train: Any, view: LossView) -> dict[str, Any]:
        """What binds a unit of the store to this model, training dataset and task.

        Besides names and shapes these are the training losses of some examples at the last checkpoint, which change
        with whatever the loss depends on: the task's tensors and helpers, the collate function.
        """
        dataset = dataset_fingerprint(train, "training", self.ranks, self.progress)
        random = dataset["examples"] == "random"
        fewer = self.curvature_examples is not None and self.curvature_examples < len(train)
        some = {"curvature examples": self.curvature_examples} if fewer else {}
        return some | {
            "model": self.shapes,
            "dataset": dataset,
            "task": task_fingerprint(self.task),
            "training losses": "random" if random else self.steady_losses(train, replace(view, kind="train")),
            "seed": self.seed,
        }

    def steady_losses(self, train: Any, view: LossView) -> list[float] | str:
        """The view's losses of some examples at the last checkpoint; "random" where they do not repeat themselves."""
        first, second = (self.probe_losses(train, view) for _ in range(2))
        return first if first == second else "random"

    def probe_losses(self, train: Any, view: LossView) -> list[float]:
        """The view's loss of evenly spaced examples, each a batch of its own, at the last checkpoint."""
        self.load(self.last)
        chosen = [[index] for index in evenly_spaced(len(train), PROBES)]
        torch.manual_seed(self.seed)
        with torch.enable_grad():  # parameters are frozen; a task may differentiate by itself
            losses = [view.loss(batch).detach() for batch in batches(train, chosen, self.collate_fn, view.device)]
        return torch.stack(losses).tolist()

    def sampling_needs(self, train: Any, sample: LossView, batch_size: int) -> dict[str, Any]:
        """What pseudo-labels depend on besides seed, checkpoint and example, and what they are for some examples.

        Measured: if some examples' sampled losses alone do not add up to their loss in one batch, the task draws in a
        way that mixes examples (for a selection of rows, say), and a store keeps its batch size.
        """
        alone = self.probe_losses(train, sample)
        chosen = evenly_spaced(len(train), PROBES)
        with torch.enable_grad():
            [together] = [sample.loss(batch) for batch in batches(train, [chosen], self.collate_fn, sample.device)]
        off = abs(sum(alone) - together.item())
        mixes = off > max(1e-4, sample.tolerance) * sum(map(abs, alone))
        return {"sampled losses": alone, "batch_size": batch_size if mixes else "any"}
