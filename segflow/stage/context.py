"""What all work on one stage of training shares: model, task, trajectory, store, and how to walk data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import settle, shown, truth, whole_number
from ..data.batches import Batch, Collate, Indices, dataset_length, weighted
from ..data.code_identity import task_fingerprint
from ..data.fingerprints import digest
from ..data.readers import TRAINING, Reader, Readers
from ..errors import SegflowError, TaskError, TrajectoryError
from ..methods.plan import Point
from ..model.layers.choice import LayerChoice, Selection
from ..model.layers.sizes import BlockSizes
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.make_view import make_loss_view
from ..runtime.ranks import Ranks
from ..runtime.sharding import is_sharded
from ..store.shared_store import SharedStore
from ..training.trajectory import Trajectory

_LARGEST_SEED = 2**63 - 1  # that torch and NumPy take


@dataclass(frozen=True)
class Settings:
    """What all stages of all runs of an analyzer share; see Analyzer for the fields.

    collate_fn: one for all stages, or one for each stage's name. curvature_examples: how many examples, drawn at
    random, curvature is fitted to; None for all. num_workers: processes that read data; views: of each training
    example. selection: which layers the user chose; block_sizes: up to which widths their curvature is
    dense. readers: of all data. SegflowError, by an option's name, where one makes no sense.
    """

    model: nn.Module
    store: SharedStore
    seed: int
    memory: int
    collate_fn: Collate | Mapping[str, Collate] | None
    progress: bool | None
    curvature_examples: int | None = None
    num_workers: int = 0
    views: int = 1
    selection: Selection = field(default_factory=Selection)
    block_sizes: BlockSizes = field(default_factory=BlockSizes)
    readers: Readers = field(init=False)

    def __post_init__(self) -> None:
        settle(self, seed=whole_number("seed", self.seed, SegflowError, most=_LARGEST_SEED))
        advice = "It counts bytes, such as 2 << 30."
        settle(self, memory=whole_number("memory", self.memory, SegflowError, 1, advice=advice))
        if self.progress is not None:
            settle(self, progress=truth("progress", self.progress, SegflowError))
        if self.curvature_examples is not None:
            advice = "It counts examples; None takes all."
            count = whole_number("curvature_examples", self.curvature_examples, SegflowError, 1, advice=advice)
            settle(self, curvature_examples=count)
        advice = "It counts processes that read data; 0 reads in this one."
        settle(self, num_workers=whole_number("num_workers", self.num_workers, SegflowError, advice=advice))
        advice = "It counts views of each training example; 1 where reading draws nothing at random."
        settle(self, views=whole_number("views", self.views, SegflowError, 1, advice=advice))
        if not isinstance(self.block_sizes, BlockSizes):
            raise SegflowError(f"block_sizes={shown(self.block_sizes)}: expected segflow.BlockSizes(vector=, side=).")
        settle(self, readers=Readers(self.seed, self.num_workers))


def structure(layer: TrackedLayer) -> list[Any]:
    """A layer's [P, O, I], with its kind and its diagonal sides where it is no plain matrix."""
    sides = [side for side in ("inputs", "outputs") if getattr(layer, f"diagonal_{side}")]
    return [*layer.shape, *sides, *(["uses", *(use.name for use in layer.uses)] if len(layer.uses) > 1 else [])]


@dataclass(frozen=True)
class StageContext:
    """All that work on one stage of training needs, except data and method.

    run: the whole run's trajectory; stage: the place of the stage in run.stages; task: None where the stage has none;
    layers: those that the stage trained; parameter_groups: the optimizer's parameter group of each; collate_fn: None
    for torch's default; prefix: what the names of the stage's units begin with.
    """

    settings: Settings
    run: Trajectory
    stage: int
    task: Any
    layers: LayerChoice
    parameter_groups: Mapping[str, int]
    collate_fn: Collate | None
    prefix: str = ""

    @property
    def model(self) -> nn.Module:
        """The model, with the parameters of the point that was loaded last."""
        return self.settings.model

    @property
    def store(self) -> SharedStore:
        """The store of units, as every rank sees it."""
        return self.settings.store

    @property
    def memory(self) -> int:
        """Bytes that queries, groups and gradients of single examples may take together."""
        return self.settings.memory

    @property
    def sharded(self) -> bool:
        """True if the model's parameters are spread over the ranks, so that all must run every forward together."""
        return is_sharded(self.model)

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
    def shapes(self) -> dict[str, list[Any]]:
        """Each tracked layer's [P, O, I], and which of its sides are diagonal."""
        return {name: structure(layer) for name, layer in self.layers.tracked.items()}

    @property
    def parameters(self) -> int:
        """How many parameters are attributed."""
        return sum(layer.size for layer in self.layers.tracked.values())

    def where(self, point: Point) -> str:
        """Names a point in errors and progress bars."""
        trajectory = self.run.stages[point.stage]
        steps = [trajectory.steps[index] for index, _ in point.weights]
        of_stage = f" of {trajectory.stage!r}" if len(self.run.stages) > 1 else ""
        point_words = f"checkpoint at step {steps[0]}" if len(steps) == 1 else f"mean of the checkpoints at {steps}"
        return point_words + of_stage

    def load(self, point: Point) -> None:
        """Put the parameters at a point into the model; only inside `observing(model)`."""
        weights = dict(point.weights)
        checkpoints = weights if len(weights) > 1 else next(iter(weights))
        self.run.stages[point.stage].load_into(self.model, checkpoints)

    def example_weights(self, point: Point) -> Tensor | None:
        """The share that each example of the stage's training data had at a point, [N] with mean 1; None: all alike.

        Of a mean of checkpoints it is the mean of theirs. A point of another stage takes this stage's first or last
        checkpoint, whichever is nearer.
        """
        places = dict(point.weights)
        if point.stage != self.stage:
            places = {0 if point.stage < self.stage else len(self.trajectory) - 1: 1.0}
        of_checkpoints = [self.trajectory.example_weights(place) for place in places]
        if all(weights_N is None for weights_N in of_checkpoints):
            return None
        alike_N = torch.ones(self.trajectory.dataset_size, dtype=torch.float64)
        rows_CN = torch.stack([alike_N if weights_N is None else weights_N for weights_N in of_checkpoints])
        shares_C = torch.tensor(list(places.values()), dtype=torch.float64)
        return shares_C @ rows_CN / shares_C.sum()

    def loss_view(self, kind: str, dataset: Any, layers: Mapping[str, TrackedLayer] | None = None) -> LossView:
        """The model seen through a loss of the task on a dataset; kind: see `summed_loss`; layers: None for all."""
        reader = self.reader_of(kind, dataset)
        return make_loss_view(self.model, self.task, kind, layers or self.layers.tracked, reader)

    def reader_of(self, kind: str, dataset: Any) -> Reader:
        """The reader of the dataset that a kind of loss is taken of."""
        return self.reader(dataset, "query") if kind == "measurement" else self.train_reader(dataset)

    def reader(self, dataset: Any, role: str, collate_fn: Collate | None = None) -> Reader:
        """The reader of a dataset; role: names it in errors; collate_fn: instead of the stage's."""
        return self.settings.readers.of(dataset, collate_fn or self.collate_fn, role)

    def train_reader(self, train: Any) -> Reader:
        """The reader of the stage's training data."""
        return self.reader(train, TRAINING)

    def walk(
        self,
        view: LossView,
        reader: Reader,
        lists: Sequence[Indices],
        label: str,
        views: int = 1,
        weights_N: Tensor | None = None,
    ) -> Iterator[Batch]:
        """One batch for each of this rank's lists of example indices, with a progress bar of this label.

        Where the model is sharded, ranks with fewer batches than another run idle ones at the end. views: how many
        batches there are of each list, in a row, each of another view of its examples. weights_N: how much each example
        of the dataset counts; None: all alike.
        """
        idle = views * (max(self.ranks.gather(len(lists))) - len(lists)) if self.sharded else 0
        data = reader.batches(lists, view.device, idle, views)
        if weights_N is not None:
            data = weighted(data, weights_N.to(view.dtype).to(view.device))
        examples = views * sum(map(len, lists))
        return self.store.journal.walk(data, label, examples, lambda b: 0 if b.idle else b.size)

    def agreement(self) -> dict[str, Any]:
        """What must be the same on every rank."""
        weights = [self.example_weights(Point.at(self.stage, index)) for index in range(len(self.trajectory))]
        return {
            "model": self.shapes,
            "task": task_fingerprint(self.task, self.model),
            "steps": [list(stage.steps) for stage in self.run.stages],
            "seed": self.settings.seed,
            "memory": self.memory,
            "example weights": digest(weights),
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
