"""From the parts that scoring yields for each run to labelled Scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..curvature.names import unsaved
from ..data.fingerprints import task_fingerprint
from ..errors import ScoreError
from ..groups.groups import Groups
from ..methods.method import Cuts, Method, describe
from ..methods.plan import Plan, Point, preconditioners
from ..results.scores import Scores
from ..stage.context import Workspace


class RunParts(NamedTuple):
    """One run's workspaces (one for each stage), plan, automatic cuts, and scores [T, L, Q, K].

    batching_error: of the plan's batched second moments (see passes.BATCHING_ERROR); None where nothing is batched.
    """

    works: Sequence[Workspace]
    plan: Plan
    cuts: Cuts | None
    parts_TLQK: Tensor
    batching_error: float | None


def labelled(
    runs: Sequence[RunParts],
    method: Method,
    groups: Groups,
    stage: int,
    labels: tuple[str, ...],
    keep: Collection[str],
    of_properties: bool = False,
) -> Scores:
    """The mean over the runs, with the parts that are to be kept; of_properties: the queries are such."""
    first = runs[0]
    work = first.works[stage]
    terms = [term.label for term in first.plan]
    differing = next(([t.label for t in run.plan] for run in runs if [t.label for t in run.plan] != terms), None)
    if "term" in keep and differing:
        raise ScoreError(
            f'keep=("term",): the runs of the ensemble have different terms, {terms} and {differing}, which have '
            "no mean. Cut all runs alike, or score them one by one."
        )
    values_RQK = torch.stack([run.parts_TLQK.sum((0, 1)) for run in runs])
    by_term = torch.stack([run.parts_TLQK.sum(1) for run in runs]).mean(0) if "term" in keep else ()
    layers = _parts_of(first, work)
    by_layer = torch.stack([run.parts_TLQK.sum(0) for run in runs]).mean(0)
    return Scores(
        values_RQK.mean(0),
        labels,
        groups.labels,
        tuple(groups.sizes.tolist()),
        _provenance(runs, method, stage, of_properties),
        dict(zip(terms, by_term, strict=True)) if "term" in keep else {},
        dict(zip(layers, by_layer, strict=True)) if "layer" in keep else {},
        {f"run {number}": part for number, part in enumerate(values_RQK, start=1)} if "run" in keep else {},
        values_RQK.std(0) if len(runs) > 1 else None,
    )


def _parts_of(run: RunParts, work: Workspace) -> list[str]:
    """What the scores' layers are."""
    tracked = list(work.layers.tracked)
    term = run.plan[0]
    return [term.layer or tracked[-1]] if term.side == "representation" else tracked


def _provenance(runs: Sequence[RunParts], method: Method, stage: int, of_properties: bool) -> dict[str, Any]:
    first = runs[0]
    work, last = first.works[stage], first.works[-1]
    found = {
        **describe(method),
        "terms": {term.label: [_named(work, point) for point in term.train] for term in first.plan},
        "optimizer": work.trajectory.optimizer.name,
        "attributed_layers": _parts_of(first, work),
        "seed": work.seed,
        "not_attributed": dict(work.layers.skipped),
        "task": {key: task_fingerprint(work.task)[key] for key in ("class", "options")},
        "measurement": "properties" if of_properties else str(getattr(last.task, "measurement", "compute_measurement")),
        "segflow": metadata.version("segflow"),
    }
    if work.curvature_examples is not None:
        found["curvature_examples"] = min(work.curvature_examples, work.trajectory.dataset_size)
    if first.batching_error is not None:
        found["batching_error"] = [run.batching_error for run in runs]
    if len(first.works) > 1:
        found["stage"] = work.trajectory.stage
    if len(runs) > 1:
        found["runs"] = len(runs)
    wanted = [(run, of) for run in runs for of in preconditioners(run.plan)]
    if wanted:
        estimated = any(unsaved(run.works[of.stage], of) for run, of in wanted)
        found["second_moments"] = "estimated from gradients" if estimated else "recorded"
    if first.cuts is not None:
        found["segmentation"] = [
            {first.works[place].trajectory.stage: cut.explained() for place, cut in (run.cuts or {}).items()}
            for run in runs
        ]
    return found


def _named(work: Workspace, point: Point) -> Any:
    """The step of a checkpoint, or a word for another point."""
    alone = len(point.weights) == 1 and point.stage == work.stage
    return work.trajectory.steps[point.weights[0][0]] if alone else work.where(point)
