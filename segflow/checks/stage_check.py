"""A run checked on a few examples, stage by stage: its checkpoints, its losses, and the curvature of `sample=True`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import tasks
from ..arguments import real_number, settle, truth
from ..errors import TaskError
from ..methods.plan import Plan, Point
from ..model.loss_view import LossView
from ..runtime.progress import track
from ..scoring.query_sets import query_set
from ..stage.context import StageContext
from .check_report import CheckReport
from .coverage import Coverages
from .curvature_scale import CurvatureScale, curvature_scale, require_scale
from .guards import Guards
from .probe_examples import probe_examples


@dataclass(frozen=True)
class CurvatureCheck:
    """Whether the scale of the curvature of `sample=True` is measured, and the factor by which it may be off.

    Args:
        wanted: None measures it of a user's own task; the scale of the ready-made ones is proved by tests.
        tolerance: at least 1; infinity also leaves out whether `sample` changes anything from draw to draw.
    """

    wanted: bool | None
    tolerance: float

    def __post_init__(self) -> None:
        if self.wanted is not None:
            settle(self, wanted=truth("curvature", self.wanted, TaskError))
        settle(self, tolerance=real_number("curvature_tolerance", self.tolerance, TaskError, 1, finite=False))

    def why_not(self, task: Any) -> str:
        """Why it is not measured of a task; empty if it is."""
        if self.wanted is False:
            return "curvature=False"
        if self.wanted is None and type(task).__module__.startswith(f"{tasks.__name__}."):
            return f"segflow's own tests prove it for {type(task).__name__}; curvature=True measures it here"
        return ""


def check_checkpoints(contexts: Sequence[StageContext], trains: Sequence[Any]) -> None:
    """Raise TrajectoryError unless every checkpoint fits the model, from the first stage on whose data is given.

    Only one that does not fit by its tensors' names and shapes is loaded, which tells what is wrong with it.
    """
    first = next(place for place, data in enumerate(trains) if data is not None)
    points = [(context, index) for context in contexts[first:] for index in range(len(context.trajectory))]
    for context, index in track(points, "checkpoints fit the model", enabled=contexts[-1].settings.progress):
        if not context.trajectory.fits(context.model, index):
            context.load(Point.at(context.stage, index))


def check_run(
    guards: Guards,
    coverages: Coverages,
    contexts: Sequence[StageContext],
    trains: Sequence[Any],
    query: Any | None,
    curvature: CurvatureCheck,
    plans: Sequence[Plan] | None,
) -> CheckReport:
    """Check every stage of a run whose training data is given; queries are those of the last.

    plans: the method's, None where they are not known before the fit. Call it inside `observing(model)`. Raises
    TaskError and LayerError.
    """
    reports: dict[str, CheckReport] = {}
    for context, train in zip(contexts, trains, strict=True):
        if train is not None:
            stage = context.trajectory.stage
            queries = None if query is None or context is not contexts[-1] else query_set(query)
            view = guards.check(context, train, queries, curvature.tolerance < float("inf"), plans)
            scale = _scale(context, view, train, curvature)
            skipped, seen = context.layers.skipped, context.trajectory.observed
            reports[stage] = CheckReport(coverages[stage], skipped, scale, seen, view.slower)
    *earlier, (_, last) = reports.items()
    return replace(last, earlier=dict(earlier))


def _scale(context: StageContext, view: LossView, train: Any, curvature: CurvatureCheck) -> CurvatureScale:
    """The scale of the curvature of `sample=True`, or why it is not measured; TaskError where it is too far off.

    view: of the training loss.
    """
    if why_not := curvature.why_not(context.task):
        return CurvatureScale(None, note=why_not)
    context.load(Point.at(context.stage, 0))  # the least converged checkpoint: pseudo-labels still vary there
    sample = replace(view, kind="sample", seed=context.settings.seed)
    few = probe_examples(context.train_reader(train), view.device)[0]
    scale = curvature_scale(view, sample, few, curvature.tolerance)
    require_scale(scale, curvature.tolerance, context.task)
    return scale
