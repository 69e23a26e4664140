"""One stage of training checked on a few batches: its checkpoints, its losses, and the curvature of `sample=True`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..curvature.passes import covariances
from ..data.batches import Batch, in_order
from ..data.readers import Reader
from ..errors import JoinError
from ..methods.plan import Point
from ..model.loss_view import LossView
from ..runtime.progress import track
from ..runtime.ranks import Ranks
from ..scoring.query_sets import query_set
from ..stage.context import StageContext
from ..tasks.task import defines_output
from .check_report import CheckReport
from .coverage import Coverage
from .curvature_scale import curvature_scale, require_scale
from .losses import check_loss, check_reached
from .probe_examples import probe_examples
from .sampling import check_sampling

_BATCH = 16  # examples of a batch
_BATCHES = 4


def check_checkpoints(contexts: Sequence[StageContext]) -> None:
    """Raise TrajectoryError unless every checkpoint of these stages fits the model."""
    points = [
        (context, Point.at(context.stage, index)) for context in contexts for index in range(len(context.trajectory))
    ]
    for context, point in track(points, "checkpoints fit the model", enabled=contexts[-1].settings.progress):
        context.load(point)


def check_stage(
    context: StageContext, coverage: Coverage, train: Any, query: Any | None, curvature_tolerance: float
) -> CheckReport:
    """Check one stage's training loss and pseudo-labels, and the measurement where queries are given.

    coverage: of this stage, for the report.
    curvature_tolerance: the factor, at least 1, by which the curvature of `sample=True` may be off. Call it inside
    `observing(model)`. Raises TaskError and LayerError.
    """
    context.load(context.last)
    view, reader = context.loss_view("train", train), context.train_reader(train)
    _check_loss(context, view, reader)
    if query is not None:
        queries = query_set(query)
        queries.check(context, view.layers)
        for loss in queries.losses(context, view.layers):
            _check_loss(context, loss.view(), loss.reader)
    if defines_output(context.task):
        _check_loss(context, context.loss_view("output", train), reader)
    sample = replace(view, kind="sample", seed=context.settings.seed)
    covariances(sample, _few_batches(context, reader), Ranks(), f"check, {context.where(context.last)}")
    context.load(Point.at(context.stage, 0))  # the least converged checkpoint: pseudo-labels still vary there
    first = context.where(Point.at(context.stage, 0))
    if curvature_tolerance < float("inf"):
        for examples in probe_examples(reader, view.device):
            check_sampling(sample, examples, first, covariances=True)
    scale = curvature_scale(view, sample, probe_examples(reader, view.device)[0], curvature_tolerance)
    require_scale(scale, curvature_tolerance, context.task)
    return CheckReport(coverage, context.layers.skipped, scale, context.trajectory.observed)


def _check_loss(context: StageContext, view: LossView, reader: Reader) -> None:
    """Check one loss, which `view` sees the model through, on a few examples."""
    where = context.where(context.last)
    reader.check_steady(context.ranks)
    for examples in probe_examples(reader, view.device):
        check_loss(view, examples, where)
    check_reached(view, _few_batches(context, reader), where)


def _few_batches(context: StageContext, reader: Reader) -> Iterator[Batch]:
    device = next(context.model.parameters()).device
    most = min(len(reader), _BATCHES * _BATCH)
    try:
        return iter(reader.probes(in_order(most, _BATCH), device))
    except JoinError:
        return iter(reader.probes(in_order(most, 1), device))
