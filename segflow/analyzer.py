"""Analyzer: the face that ties the rooms together: check, fit, score, features, refine."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from . import checks
from .arguments import names
from .curvature.fitted_factors import FittedFactors, checkpoint_statistics
from .curvature.fitting import FactorFitter
from .curvature.fitting_needs import Needs, check_needs, fitting_needs
from .data.batches import Collate, checked_batch_size
from .errors import ScoreError, check_choice
from .groups.features import check_kind, example_features
from .groups.groups import Groups, check_groups
from .methods.method import Cuts, Method, check_cuts, describe, is_additive, is_automatic, sizes_of, uncut
from .methods.plan import Plan
from .methods.source import Source
from .model.layers.choice import Selection, chosen_layers
from .model.layers.sizes import BlockSizes
from .results.refinement import Refinement, refine
from .results.scores import Scores, check_additive
from .runtime.ranks import current
from .runtime.sharding import unwrap
from .scoring.plan_walk import ScoringRequest, score_parts
from .scoring.provenance import RunParts, labelled_scores
from .scoring.query_sets import checked_labels, query_set
from .stage.calling import one_call_of
from .stage.context import Settings, StageContext
from .stage.opening import (
    check_alike,
    given_runs,
    open_stages,
    scored_stage,
    training_data,
)
from .stage.planning import check_method, plan_for
from .stage.unfilled import check_unfilled
from .store.journal import Journal, Summary
from .store.shared_store import SharedStore
from .store.store import MadeFrom, Store
from .training.trajectory import Trajectory


class Analyzer:
    """Explains a trained model: check, fit factors across checkpoints, score groups of training data.

    Under `accelerate launch` (or torchrun) every process makes the same calls and gets the same results; the work is
    shared, and only the first process touches the store.

    Args:
        model: the model that was trained; only its architecture matters, its parameters are put back as they were.
        task: a segflow.Task (or any object with its methods, such as a Kronfluence task); of training in several stages
            with losses of their own, {stage: task}.
        trajectory: what training left behind; a list of several runs of one recipe is an ensemble, whose scores are
            averaged, with their spread.
        store: the folder for factors and scores; methods may share one, one run at a time (a lock sees to it). Its
            `events.jsonl` logs what was done.
        method: what to compute, by default Source(); see segflow.methods.
        seed: of the pseudo-labels, and of what reading the data draws at random.
        memory: bytes that queries, groups and per-example gradients may take together in one process, besides the
            model's own activations; what needs more is taken in tiles (of at least one query and one group), each of
            which walks the training data once more. Several processes hold as many tiles of queries at a time.
        collate_fn: joins examples into a batch, as for a DataLoader; {stage: function} where stages differ.
        progress: show bars: True always, False never, None on a terminal only.
        curvature_examples: fit curvature to so many training examples of a stage, drawn at random, so that its cost
            does not grow with the data; None takes all. Groups are always scored with all of their examples.
        num_workers: processes that read data, as of a DataLoader; 0 reads in this one.
        views: how many views of each training example are averaged, where reading draws at random (augmentation, masked
            tokens): view v of example i depends on (seed, v, i) only. Passes over training data take so many times
            longer. Queries are read in one view; LiSSA's batches take the views in turn.
        layers: names or patterns ("encoder.*") of the modules, layers or parameters to attribute; None for all that
            training changed. exclude: of those to leave out.
        block_sizes: up to which widths curvature is dense.

    Raises:
        TaskError, LayerError, TrajectoryError, MethodError: something does not fit together.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        task: Any,
        trajectory: Trajectory | Sequence[Trajectory],
        *,
        store: str | os.PathLike[str],
        method: Method | None = None,
        seed: int = 0,
        memory: int = 2 << 30,
        collate_fn: Collate | Mapping[str, Collate] | None = None,
        progress: bool | None = None,
        curvature_examples: int | None = None,
        num_workers: int = 0,
        views: int = 1,
        layers: str | Collection[str] | None = None,
        exclude: str | Collection[str] = (),
        block_sizes: BlockSizes = BlockSizes(),  # noqa: B008
    ):
        runs = given_runs(trajectory)
        self.method = method if method is not None else Source()
        check_method(self.method)
        describe(self.method)  # refuses now what is no dataclass of plain options
        ranks = current()
        shared = SharedStore(Store(store), ranks, Journal(Path(store) / "events.jsonl", ranks, progress))
        settings = Settings(
            unwrap(model),
            shared,
            seed,
            memory,
            collate_fn,
            progress,
            curvature_examples,
            num_workers,
            views,
            Selection.of(layers, exclude),
            block_sizes,
        )
        self.runs = [
            open_stages(settings, task, run, f"runs/{number}/" if len(runs) > 1 else "")
            for number, run in enumerate(runs, start=1)
        ]
        check_alike(self.runs)
        check_unfilled(self.runs)
        self._guards = checks.Guards()
        self._coverages = checks.Coverages(self.runs[0])
        for contexts in self.runs:  # refuses now what does not fit
            self._uncut_plan(contexts)

    @property
    def context(self) -> StageContext:
        """The last stage of the first run."""
        return self.runs[0][-1]

    @property
    def _automatic(self) -> bool:
        """Whether plans need statistics of the checkpoints."""
        return is_automatic(self.method)

    def check(
        self,
        train: Any,
        query: Any | None = None,
        *,
        curvature: bool | None = None,
        curvature_tolerance: float = 1.25,
    ) -> checks.CheckReport:
        """Say what is wrong with the task, the model or the trajectory, before hours are spent.

        On a few examples: the loss is a sum over the batch, repeats itself, reaches every layer and is finite, and
        `sample=True` is honoured; every checkpoint fits the model. `fit` and `score` do not probe the same again.

        Args:
            train: the training data, as given to `fit`; of an ensemble the losses are those of the first run.
            query: what `score` is to be given, whose measurement is then checked likewise.
            curvature: measure whether `sample=True` has the exact Gauss-Newton curvature's scale; None does so for a
                task of your own.
            curvature_tolerance: the factor, at least 1, by which it may be off.

        Returns:
            A report that prints what share of the trained parameters is attributed, and why the rest is not. Below 95%
            a UserWarning says so; `fit` and `score` warn as well if they come first.

        Raises:
            TaskError, LayerError, TrajectoryError: naming the fault.
        """
        of_curvature, trains = checks.CurvatureCheck(curvature, curvature_tolerance), self._by_stage(train)
        with self._call("check", store=False):
            self._coverages.warn(trains, stacklevel=2)
            for contexts in self.runs:
                checks.check_checkpoints(contexts, trains)
                if not self._automatic:
                    self._check_needs(contexts, trains, None)
            plans = None if self._automatic else self._plans(self.runs[0], trains, None)
            report = checks.check_run(self._guards, self._coverages, self.runs[0], trains, query, of_curvature, plans)
        return replace(report, sizes=sizes_of(self.method))

    def fit(self, train: Any, batch_size: int = 128) -> None:
        """Fit what the method needs of the training data; what the store holds already is not done again.

        A run that was stopped goes on where it was, also with another batch size or number of processes: what a pass
        draws for an example depends on the seed, the checkpoint and the example only.

        Args:
            train: the training dataset; of training in several stages {stage: dataset}, where stages that come before
                the first one that is to be attributed may be left out.
            batch_size: examples in one forward and backward.

        Raises:
            StoreError: the store holds factors of another model, dataset, task, checkpoint or setting, is damaged, or
                is in use by another run.
            RankError: another process of this run failed, died, or was given something else.
            TaskError, LayerError: a loss is no sum over examples that stay apart, does not repeat itself, or ignores
                `sample`, as a few distinct examples show before anything is fitted (`score` and `features` look
                likewise, once for each dataset); or the data holds NaN, labels out of range, or wrong types.
            LayerError, FactorError: a layer is never reached, or numbers are not finite.
        """
        batch_size = checked_batch_size(batch_size)
        trains = self._by_stage(train)
        if not self._automatic and not any(
            fitting_needs(contexts, self._plans(contexts, trains, None)) for contexts in self.runs
        ):
            return
        with self._call("fit", batch_size=batch_size):
            self._coverages.warn(trains, stacklevel=2)
            if not self._automatic:  # before hours are spent
                for contexts in self.runs:
                    self._check_needs(contexts, trains, None)
            plans = None if self._automatic else self._plans(self.runs[0], trains, None)
            self._guards.before_fit(self.runs[0], trains, plans, batch_size)
            for contexts in self.runs:
                self._fit(contexts, trains, batch_size)

    def _fit(self, contexts: Sequence[StageContext], trains: Sequence[Any], batch_size: int) -> None:
        """Fit one run."""
        fitters = {
            place: FactorFitter(contexts[place], data, batch_size)
            for place, data in enumerate(trains)
            if data is not None
        }
        cuts = None
        if self._automatic:
            for fitter in fitters.values():
                fitter.run(Needs(statistics=True))
            cuts = self._cuts(contexts, {place: fitter.train_from for place, fitter in fitters.items()})
            self._check_needs(contexts, trains, cuts)
        for place, needs in fitting_needs(contexts, self._plans(contexts, trains, cuts)).items():
            fitters[place].run(needs)

    def _check_needs(self, contexts: Sequence[StageContext], trains: Sequence[Any], cuts: Cuts | None) -> None:
        for place, needs in fitting_needs(contexts, self._plans(contexts, trains, cuts)).items():
            check_needs(contexts[place], needs)

    def score(
        self,
        groups: Groups,
        train: Any,
        query: Any,
        *,
        batch_size: int = 128,
        stage: str | None = None,
        query_labels: Sequence[object] | None = None,
        keep: str | Collection[str] = (),
        layers: str | Collection[str] | None = None,
    ) -> Scores:
        """Score groups of training data against queries.

        Args:
            groups: of the stage's examples.
            train: the training data, as given to `fit`.
            query: a dataset whose every example is a query, or properties (`segflow.properties`): numbers of the model
                with data of their own, such as a mean loss, a soft F-measure or a fairness gap; one or a list.
            batch_size: examples in one forward and backward.
            stage: whose training data is scored, of training in several stages; by default the last one's.
            query_labels: names for the queries; by default their indices, or the properties' names.
            keep: "term", "layer", "run" and "token": keep the scores' parts in `by_term` (for SOURCE: by segment),
                `by_layer`, of an ensemble `by_run`, and of groups of one example each `by_token` (see `Scores.tokens`).
            layers: names or patterns of layers whose scores alone are summed, out of all that were fitted.

        Returns:
            Scores [queries, groups]: the predicted change of each query's measurement if the group were removed.

        Raises:
            StoreError: `fit` has not run with this store, or for something else.
            GroupError, ScoreError, TrajectoryError: groups, queries or training data do not fit.
        """
        for part in (keep := names("keep", keep, ScoreError)):
            check_choice("keep", part, ("term", "layer", "run", "token"), ScoreError)
        batch_size, trains = checked_batch_size(batch_size), self._by_stage(train)
        place = scored_stage(self.runs[0], stage, trains)
        check_groups(groups, self.context.run.stages[place].dataset_size)
        queries = query_set(query)
        labels = checked_labels(queries, query_labels)
        of_runs: list[RunParts] = []
        with self._call("score", batch_size=batch_size, groups=len(groups), queries=len(queries)):
            self._coverages.warn(trains, stacklevel=2)
            self._guards.before_score(self.runs[0], trains, queries, place, batch_size)
            for contexts in self.runs:
                fitted = FittedFactors(contexts, trains)
                given = [p for p, data in enumerate(trains) if data is not None]
                cuts = self._cuts(contexts, {p: fitted.train_from(p) for p in given}) if self._automatic else None
                plan = plan_for(self.method, contexts, place, cuts)
                chosen = chosen_layers(contexts[place].layers.tracked, layers)
                asked = groups, queries, batch_size, "layer" in keep, chosen, "token" in keep
                scored = score_parts(ScoringRequest(fitted, place, plan, *asked))
                parts, tokens = (scored.sum(-1), scored) if "token" in keep else (scored, None)
                error, shares = fitted.batching_error(plan), fitted.told_trace_shares(plan)
                of_runs.append(RunParts(contexts, plan, cuts, parts, error, shares, chosen, tokens))
            return labelled_scores(of_runs, self.method, groups, place, labels, keep, queries)

    def features(
        self,
        train: Any,
        of: str = "gradient",
        *,
        layer: str | None = None,
        batch_size: int = 256,
        out: str | os.PathLike[str] | None = None,
    ) -> np.ndarray:
        """Features of every training example at the end of training, for `Groups.kmeans`; one pass over the data.

        Args:
            train: the training data, as given to `fit`; features are of the last stage's (of an ensemble: of its
                first run).
            of: "gradient" of the training loss with respect to the input of a linear layer, summed over positions
                (Ley et al. 2024, arXiv 2410.09940); "weight gradient", of a layer's own parameters, as 64 random
                projections; "representation", the layer's input, averaged over positions; "input", what the model is
                given.
            layer: a tracked layer; by default the last, whose input are the penultimate activations.
            batch_size: examples in one forward and backward.
            out: a .npy file to write instead, for features beyond memory; it is then opened read-only.

        Returns:
            [N, D] in single precision, in the dataset's order, the same on every rank.

        Raises:
            LayerError, TaskError: the layer or the model's input has no such features, or they are not finite.
        """
        batch_size = checked_batch_size(batch_size)
        check_kind(of, layer)
        data = self._by_stage(train)[-1]
        with self._call("features", store=False, batch_size=batch_size, asked=[of, layer]):
            if of != "input":  # which no loss enters
                self._guards.before_features(self.context, data, layer, batch_size)
            return example_features(self.context, data, of, layer, batch_size, out)

    def refine(
        self,
        groups: Groups,
        train: Any,
        query: Any,
        *,
        keep: float = 0.1,
        sizes: Sequence[int] = (16, 1),
        features: Any = None,
        largest: bool | None = None,
        batch_size: int = 128,
        seed: int = 0,
    ) -> Refinement:
        """Score coarse groups, then the parts of those that matter, down to the single examples that matter most.

        Opposing examples of one group cancel, so a group that matters little may hide single ones that matter much;
        groups of like examples (`Groups.kmeans`) hide fewer.

        Args:
            groups, train, query, batch_size: as for `score`, of the last stage.
            keep: the share of the groups scored at a level that is split, those that matter most: by their score summed
                over the queries, its magnitude (largest=None), or only where it is positive (True) or negative (False).
            sizes: examples in a part, level by level; 1 for single examples.
            features: parts are clusters of them (see `Groups.split`); None: random parts. seed: of the parts.

        Raises:
            GroupError, ScoreError: options make no sense, or the method's scores do not add up; and as `score`.
        """
        if not is_additive(self.method, self._uncut_plan(self.runs[0])):  # before anything is scored
            check_additive(describe(self.method) | {"additive": False}, "refine")

        def score(parts: Groups) -> Scores:
            return self.score(parts, train, query, batch_size=batch_size)

        return refine(score, groups, features, keep=keep, sizes=sizes, largest=largest, seed=seed)

    def summary(self) -> Summary:
        """What was done so far: units made and found, time and peak memory, for each call and kind of work."""
        return self.context.store.journal.summary()

    def _call(self, name: str, store: bool = True, **facts: Any) -> AbstractContextManager[None]:
        """One call on all ranks: the store locked, the work logged, the model left as it was."""
        return one_call_of(self.runs, describe(self.method), name, store, facts)

    def _uncut_plan(self, contexts: Sequence[StageContext]) -> Plan:
        """The method's plan for the last stage's data, as far as it is known before its stages are cut."""
        return plan_for(self.method, contexts, len(contexts) - 1, uncut(contexts[-1].run) if self._automatic else None)

    def _plans(self, contexts: Sequence[StageContext], trains: Sequence[Any], cuts: Cuts | None) -> list[Plan]:
        """The plans for every stage whose training data is given."""
        return [plan_for(self.method, contexts, place, cuts) for place, data in enumerate(trains) if data is not None]

    def _cuts(self, contexts: Sequence[StageContext], trains_from: Mapping[int, MadeFrom]) -> Cuts | None:
        """Where an automatic method cuts the stages, from the statistics that `fit` left in the store."""
        if not is_automatic(self.method):
            return None
        statistics = {place: checkpoint_statistics(contexts[place], of) for place, of in trains_from.items()}
        return check_cuts(self.method.cuts(contexts[-1].run, statistics), list(statistics))

    def _by_stage(self, train: Any) -> list[Any]:
        """The training data of each stage, None where it is not given."""
        return training_data(self.runs, train)
