"""From the parts that scoring yields for each run to Scores with labels and provenance."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..curvature.coupled import sample_size
from ..curvature.fitted_factors import in_words
from ..curvature.saved_moments import unsaved
from ..data.code_identity import plain_options
from ..errors import ScoreError
from ..groups.groups import Groups
from ..methods.method import Cuts, Method, describe, is_additive, prefixed
from ..methods.plan import Plan, Point, SampledFisher, fishers, preconditioners
from ..model.layers.tracked import TrackedLayer
from ..model.representation_view import last_matrix
from ..results.scores import GROUP_DIGEST, REST, Scores
from ..results.slope import CALIBRATION
from ..stage.context import StageContext
from ..version import __version__
from .query_sets import QuerySet


class RunParts(NamedTuple):
    """One run's stage contexts, plan, automatic cuts, and scores [T, L, Q, K].

    batching_error: of the plan's batched second moments (see passes.BATCHING_ERROR); None where nothing is batched.
    tokens_TLQKW: where they were asked for, the scores of what is of no token, and of the examples' tokens.
    trace_shares: the layers' shares of each curvature whose eigenvalues the plan divides by them. layers: that were
    scored.
    """

    contexts: Sequence[StageContext]
    plan: Plan
    cuts: Cuts | None
    parts_TLQK: Tensor
    batching_error: float | None
    trace_shares: dict[str, dict[str, float]]
    layers: Mapping[str, TrackedLayer]
    tokens_TLQKW: Tensor | None = None


def labelled_scores(
    runs: Sequence[RunParts],
    method: Method,
    groups: Groups,
    stage: int,
    labels: tuple[str, ...],
    keep: Collection[str],
    queries: QuerySet,
) -> Scores:
    """The mean over the runs, with the parts that `keep` names: "term", "layer", "run", "token".

    stage: whose training data was scored; labels: the queries'. ScoreError for "term" where the runs' terms differ.
    """
    first = runs[0]
    terms = [term.label for term in first.plan]
    differing = next(([t.label for t in run.plan] for run in runs if [t.label for t in run.plan] != terms), None)
    if "term" in keep and differing:
        raise ScoreError(
            f'keep=("term",): the runs of the ensemble have different terms, {terms} and {differing}, which have '
            "no mean. Cut all runs alike, or score them one by one."
        )
    values_RQK = torch.stack([run.parts_TLQK.sum((0, 1)) for run in runs])
    by_term = torch.stack([run.parts_TLQK.sum(1) for run in runs]).mean(0) if "term" in keep else ()
    layers = _layers_of(first)
    by_layer = torch.stack([run.parts_TLQK.sum(0) for run in runs]).mean(0)
    return Scores(
        values_RQK.mean(0),
        labels,
        groups.labels,
        tuple(groups.sizes.tolist()),
        _provenance(runs, method, groups, stage, queries),
        by_term=dict(zip(terms, by_term, strict=True)) if "term" in keep else {},
        by_layer=dict(zip(layers, by_layer, strict=True)) if "layer" in keep else {},
        by_run={f"run {number}": part for number, part in enumerate(values_RQK, start=1)} if "run" in keep else {},
        by_token=_by_token(runs) if "token" in keep else {},
        spread=values_RQK.std(0) if len(runs) > 1 else None,
    )


def _by_token(runs: Sequence[RunParts]) -> dict[str, Tensor]:
    """The mean over the runs of the scores of what is of no token, and of each token."""
    of_runs = [run.tokens_TLQKW.sum((0, 1)) for run in runs if run.tokens_TLQKW is not None]
    rest, *tokens = torch.stack(of_runs).mean(0).unbind(-1)
    return {REST: rest} | {str(place): part for place, part in enumerate(tokens)}


def _layers_of(run: RunParts) -> list[str]:
    """The layers that the scores are of: all that were scored, or those whose representations are compared."""
    if any(term.side != "representation" for term in run.plan):
        return list(run.layers)
    return list(dict.fromkeys(term.layer or last_matrix(run.layers) for term in run.plan))


def _provenance(
    runs: Sequence[RunParts], method: Method, groups: Groups, stage: int, queries: QuerySet
) -> dict[str, Any]:
    first = runs[0]
    context, last = first.contexts[stage], first.contexts[-1]
    provenance: dict[str, Any] = {
        "terms": {term.label: [_named(context, point) for point in term.train] for term in first.plan},
        "optimizer": " and ".join(dict.fromkeys(context.trajectory.kinds)),
        "training": context.trajectory.observed,
        "attributed_layers": _layers_of(first),
        "seed": context.settings.seed,
        "not_attributed": dict(context.layers.skipped),
        "task": {"class": type(context.task).__qualname__, "options": _training_options(context.task)},
        "measurement": queries.measurement(last.task),
        "segflow": __version__,
        GROUP_DIGEST: groups.digest,
    }
    if not all(is_additive(method, run.plan) for run in runs):
        provenance["additive"] = False
    if context.settings.curvature_examples is not None:
        provenance["curvature_examples"] = min(context.settings.curvature_examples, context.trajectory.dataset_size)
    if len(first.plan[0].query_points) > 1:
        pairs = zip(first.plan[0].query_points, first.plan[0].query_weights, strict=True)
        provenance["queries_at"] = {last.where(point): weight for point, weight in pairs}
    if len(first.contexts) > 1:
        provenance["stage"] = context.trajectory.stage
    if len(runs) > 1:
        provenance["runs"] = len(runs)
        provenance["training"] = [run.contexts[stage].trajectory.observed for run in runs]
    needed = [(run, preconditioner) for run in runs for preconditioner in preconditioners(run.plan)]
    if needed:
        estimated = any(unsaved(run.contexts[preconditioner.stage], preconditioner) for run, preconditioner in needed)
        provenance["second_moments"] = "estimated from gradients" if estimated else "recorded"
    provenance |= _of_curvature(runs)
    if first.cuts is not None:
        provenance["segmentation"] = [
            {first.contexts[place].trajectory.stage: cut.explained() for place, cut in (run.cuts or {}).items()}
            for run in runs
        ]
    return prefixed(describe(method), {*provenance, CALIBRATION}) | provenance


def _sampled(context: StageContext, fisher: SampledFisher) -> dict[str, int]:
    """How many pseudo-gradients a curvature of all layers together is made of, and of how many examples."""
    views, data = context.settings.views, context.trajectory.dataset_size
    count = sample_size(fisher, min(data, context.settings.curvature_examples or data), views)
    return {
        "pseudo_gradients": len(fisher.points) * count * views,
        "examples_at_each_point": count,
        "of_examples": data,
    }


def _of_curvature(runs: Sequence[RunParts]) -> dict[str, Any]:
    """What the runs' curvatures were made of, and how they were used, where there is something to say."""
    first = runs[0]
    told: dict[str, Any] = {}
    if first.batching_error is not None:
        told["batching_error"] = [run.batching_error for run in runs]
    if fishers(first.plan):
        told["coupled_curvature"] = [
            {
                in_words(run.contexts[fisher.stage], fisher.points): _sampled(run.contexts[fisher.stage], fisher)
                for fisher in fishers(run.plan)
            }
            for run in runs
        ]
    if first.trace_shares:
        told["trace_shares"] = [run.trace_shares for run in runs]
    return told


def _training_options(task: Any) -> dict[str, str]:
    """A task's plain options, but those of its measurement alone."""
    ignored = getattr(task, "measurement_options", ())
    return {name: value for name, value in plain_options(task).items() if name not in ignored}


def _named(context: StageContext, point: Point) -> Any:
    """The step of one checkpoint of the stage, or words for another point."""
    one_checkpoint = len(point.weights) == 1 and point.stage == context.stage
    return context.trajectory.steps[point.weights[0][0]] if one_checkpoint else context.where(point)
