"""Analyzer: the face that ties the stages together."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checks
from .capture import observing
from .data import Batch, Collate, batches, dataset_length, in_order
from .errors import GroupError, MethodError, ScoreError, SegflowError, TrajectoryError, check_choice
from .factors import covariances, fit
from .groups import Groups
from .interrupts import orderly
from .journal import Journal, Summary
from .layers import choose_layers
from .lens import Lens
from .methods import Method, Plan, Source, curvatures, describe
from .progress import track
from .ranks import Ranks, current, is_sharded, unwrap
from .scores import Scores
from .scoring import score_parts
from .store import Store
from .task import check_task, task_fingerprint, tracked_module_names
from .trajectory import Trajectory
from .units import Units
from .workspace import Workspace, check_parameter_names, settle_parameter_groups


class Analyzer:
    """Explains a trained model: check, fit factors across checkpoints, score groups of training data.

    Under `accelerate launch` (or torchrun) every process makes the same calls and gets the same results; the work is
    shared, and only the first process touches the store.

    Args:
        model: the model that was trained; only its architecture matters, its parameters are put back as they were.
        task: a segflow.Task (or any object with its methods, such as a Kronfluence task).
        trajectory: what training left behind.
        store: the folder for factors and scores; methods may share one, one run at a time (a lock sees to it). Its
            `events.jsonl` logs what was done.
        method: what to compute, by default Source(); see segflow.methods.
        seed: of the pseudo-labels.
        memory: bytes that queries, groups and per-example gradients may take together in one process, besides the
            model's own activations; what needs more is taken in tiles (of at least one query and one group), each of
            which walks the training data once more. Several processes hold as many tiles of queries at a time.
        collate_fn: joins examples into a batch, as for a DataLoader.
        progress: show bars: True always, False never, None on a terminal only.

    Raises:
        TaskError, LayerError, TrajectoryError, MethodError: something does not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        trajectory: Trajectory,
        *,
        store: str | os.PathLike[str],
        method: Method | None = None,
        seed: int = 0,
        memory: int = 2 << 30,
        collate_fn: Collate | None = None,
        progress: bool | None = None,
    ):
        _check_arguments(task, trajectory, method, memory)
        model = unwrap(model)
        check_parameter_names(model, trajectory)
        recorded = trajectory.parameter_groups
        layers = choose_layers(model, tracked_module_names(task), None if recorded is None else recorded.__contains__)
        layers, groups = settle_parameter_groups(layers, trajectory)
        self.method = method if method is not None else Source()
        self.plan: Plan = self.method.plan(trajectory)
        ranks = current()
        units = Units(Store(store), ranks, Journal(Path(store) / "events.jsonl", ranks, progress))
        self.work = Workspace(
            model, task, trajectory, units, layers, groups, seed, memory, collate_fn, progress, is_sharded(model)
        )

    def check(self, train: Any, query: Any | None = None, *, curvature_tolerance: float = 1.25) -> checks.CheckReport:
        """Say what is wrong with the task, the model or the trajectory, before hours are spent.

        On a few batches: the loss is a sum over the batch, repeats itself, reaches every tracked layer and is finite;
        `sample=True` has the exact Gauss-Newton curvature's scale to within `curvature_tolerance`; every checkpoint
        fits the model. With `query`, the measurement is checked likewise.

        Returns:
            A report that prints what share of the parameters is attributed, and what is not, and why.

        Raises:
            TaskError, LayerError, TrajectoryError: naming the fault.
        """
        work, last = self.work, len(self.work.trajectory) - 1
        work.require_training_data(train)
        with self._stage("check", store=False):
            for index in track(range(last + 1), "checkpoints fit the model", enabled=work.progress):
                work.load(index)
            lens = work.lens("train", train)
            self._check_loss(lens, train)
            if query is not None:
                dataset_length(query, "query")
                self._check_loss(work.lens("measurement", query), query)
            sample = replace(lens, kind="sample", seed=work.seed)
            covariances(sample, self._few(train), Ranks(), f"check, {work.where(last)}")
            work.load(0)  # the least converged checkpoint: pseudo-labels still vary there
            scale = checks.curvature_scale(lens, sample, next(self._few(train)))
        checks.require_scale(scale, curvature_tolerance, work.task)
        return checks.report(work.model, work.layers, scale)

    def fit(self, train: Any, batch_size: int = 128) -> None:
        """Fit the Kronecker factors that the method needs; what the store holds already is not done again.

        A run that was stopped goes on where it was, also with another batch size or number of processes: what a pass
        draws for an example depends on the seed, the checkpoint and the example only.

        Raises:
            StoreError: the store holds factors of another model, dataset, task, checkpoint or setting, is damaged, or
                is in use by another run.
            RankError: another process of this run failed, died, or was given something else.
            LayerError, TaskError, FactorError: a layer is never reached, or numbers are not finite.
        """
        batch_size = _batch_size(batch_size)
        self.work.require_training_data(train)
        pools = curvatures(self.plan)
        if pools:
            with self._stage("fit", batch_size=batch_size):
                fit(self.work, pools, train, batch_size)

    def score(
        self,
        groups: Groups,
        train: Any,
        query: Any,
        *,
        batch_size: int = 128,
        query_labels: Sequence[object] | None = None,
        keep: Collection[str] = (),
    ) -> Scores:
        """Score groups of training data against queries.

        Args:
            groups: of `train`'s examples.
            train: the training dataset; query: a dataset whose every example is a query.
            batch_size: examples in one forward and backward.
            query_labels: names for the queries; by default their indices.
            keep: "term" and "layer": keep the scores' parts in `by_term` (for SOURCE: by segment) and `by_layer`.

        Returns:
            Scores [queries, groups]: the predicted change of each query's measurement if the group were removed.

        Raises:
            StoreError: `fit` has not run with this store, or for something else.
            GroupError, ScoreError, TrajectoryError: groups, queries or training data do not fit.
        """
        for part in keep:
            check_choice("keep", part, ("term", "layer"), ScoreError)
        batch_size = _batch_size(batch_size)
        self.work.require_training_data(train)
        length = self.work.trajectory.dataset_size
        if not isinstance(groups, Groups):
            raise GroupError(
                f"groups is a {type(groups).__name__}: expected segflow.Groups, as from Groups.from_lists()."
            )
        if groups.length != length:
            raise GroupError(
                f"the groups are about {groups.length} examples, the training data has {length}. "
                "Make the groups anew from this dataset."
            )
        count = dataset_length(query, "query")
        labels = tuple(map(str, range(count) if query_labels is None else query_labels))
        if len(labels) != count:
            raise ScoreError(f"{len(labels)} query labels for {count} queries: expected one for each.")
        with self._stage("score", batch_size=batch_size, groups=len(groups), queries=count):
            parts = score_parts(self.work, self.plan, groups, train, query, batch_size, "layer" in keep)
        return self._labelled(parts, groups, labels, keep)

    def summary(self) -> Summary:
        """What was done so far: units made and found, time and peak memory, for each stage and kind of work."""
        return self.work.units.journal.summary()

    @contextmanager
    def _stage(self, name: str, store: bool = True, **facts: Any) -> Iterator[None]:
        """One stage of work on all ranks: the store locked, the work logged, the model left as it was."""
        work, units = self.work, self.work.units
        with ExitStack() as stack:
            stack.enter_context(orderly())
            stack.enter_context(work.ranks.together(name))
            held = stack.enter_context(units.store.locked(name)) if store and work.ranks.main else None
            stack.enter_context(units.journal.stage(name, ranks=work.ranks.count, **describe(self.method), **facts))
            if held is not None and held.took_over:
                units.journal.event("took_over", holder=held.took_over)
            work.ranks.agree("the model, task and settings", work.settings() | facts)
            stack.enter_context(observing(work.model))
            yield

    def _labelled(self, parts_TLQK: Tensor, groups: Groups, labels: tuple[str, ...], keep: Collection[str]) -> Scores:
        terms = [term.label for term in self.plan]
        steps, layers = self.work.trajectory.steps, list(self.work.layers.tracked)
        provenance = {
            **describe(self.method),
            "terms": {term.label: [steps[index] for index in term.train_checkpoints] for term in self.plan},
            "optimizer": self.work.trajectory.optimizer.name,
            "attributed_layers": layers,
            "seed": self.work.seed,
            "not_attributed": dict(self.work.layers.skipped),
            "task": {key: task_fingerprint(self.work.task)[key] for key in ("class", "options")},
            "measurement": str(getattr(self.work.task, "measurement", "compute_measurement")),
            "segflow": metadata.version("segflow"),
        }
        return Scores(
            parts_TLQK.sum((0, 1)),
            labels,
            groups.labels,
            tuple(groups.sizes.tolist()),
            provenance,
            dict(zip(terms, parts_TLQK.sum(1), strict=True)) if "term" in keep else {},
            dict(zip(layers, parts_TLQK.sum(0), strict=True)) if "layer" in keep else {},
        )

    def _few(self, dataset: Any, size: int = 16) -> Iterator[Batch]:
        device = next(self.work.model.parameters()).device
        lists = in_order(min(len(dataset), 4 * size), size)
        return batches(dataset, lists, self.work.collate_fn, device)

    def _check_loss(self, lens: Lens, dataset: Any) -> None:
        count = min(len(dataset), 16)
        lists = [range(count), *in_order(count, max(1, (count + 1) // 2))]
        whole, *halves = batches(dataset, lists, self.work.collate_fn, lens.device)
        checks.check_sum(lens, whole, halves)
        some = range(min(count, 4))
        together, *alone = batches(dataset, [some, *([index] for index in some)], self.work.collate_fn, lens.device)
        checks.check_examples(lens, together, alone)
        checks.check_reached(lens, self._few(dataset), self.work.where(len(self.work.trajectory) - 1))


def _batch_size(given: int) -> int:
    if given < 1 or int(given) != given:
        raise SegflowError(f"batch_size={given}: expected at least 1, a whole number.")
    return int(given)


def _check_arguments(task: Any, trajectory: Any, method: Any, memory: Any) -> None:
    """Name what was given where something else is expected."""
    check_task(task)
    if not isinstance(trajectory, Trajectory):
        raise TrajectoryError(
            f"trajectory={trajectory!r}: expected a segflow.Trajectory. "
            "Read a recorded run with Trajectory.load(folder)."
        )
    if method is not None and (isinstance(method, type) or not callable(getattr(method, "plan", None))):
        raise MethodError(f"method={method!r}: expected one of Source(...), InfluenceFunction(...), TracIn().")
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise SegflowError(f"memory={memory!r}: expected a whole number of bytes, such as 2 << 30.")
