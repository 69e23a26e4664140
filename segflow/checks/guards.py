"""Guards: cheap probes that `fit`, `score` and `features` run before their passes, once for each loss and dataset.

`check` runs them all, whatever was probed before, and what it has probed need not be probed again.

A loss takes at most 33 passes of single examples, the pseudo-labels 24 more, and what rounding may explain 16 more; so
a dataset takes at most 130. `check` alone judges a layer that no probe reaches: the passes themselves do so at their
end (FiniteCheck.finish). Where all units are stored the probes are run all the same: telling takes longer than they.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from ..data.batches import Batch, in_order
from ..data.changing import reference
from ..data.readers import Reader
from ..errors import JoinError
from ..methods.plan import Plan, Point, curvatures, projected
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.representation_view import last_matrix
from ..scoring.query_sets import QuerySet
from ..stage.context import StageContext
from .losses import check_loss, check_reached
from .probe_examples import MOST, probe_examples
from .sampling import check_sampling

_FURTHER = 64  # examples, among which `check` looks for layers that no probe reaches


class Guards:
    """The probes of one analyzer, which are run on the first run of an ensemble: the others share its code.

    All ranks probe the same examples and so come to the same end.
    """

    def __init__(self) -> None:
        self._passed: list[tuple[tuple[Any, ...], Callable[[], Any]]] = []  # what was probed, and of which dataset

    def check(
        self,
        context: StageContext,
        data: Any,
        queries: QuerySet | None,
        sampling: bool,
        plans: Sequence[Plan] | None,
    ) -> LossView:
        """Probe anew what `fit` and `score` may of one stage, and look further for layers that no probe reaches.

        queries: None where there are none; sampling: whether pseudo-labels are probed; plans: None where they are not
        known. Returns the view of the training loss.
        """
        reader, stage, layers = context.train_reader(data), context.stage, context.layers.tracked
        context.load(context.last)
        if queries is not None:
            queries.check(context, layers)
        make = lru_cache(1)(partial(context.loss_view, "train", data))
        _probe_loss(context, reader, MOST, make, further=True)
        self._note((stage, "train", *layers), data)
        for loss in queries.losses(context, layers) if queries else ():
            _probe_loss(context, loss.reader, MOST, loss.view, further=True)
            self._note((stage, *loss.what), loss.data)
        if stage in _stages_of_outputs(plans):
            _probe_loss(context, reader, MOST, partial(context.loss_view, "output", data), further=True)
            self._note((stage, "output"), data)
        if sampling:
            _probe_sampling(context, data, MOST, make(), covariances=True)
            for joined in (False, True):
                self._note((stage, "sample", joined), data)
        return make()

    def before_fit(
        self, contexts: Sequence[StageContext], trains: Sequence[Any], plans: Sequence[Plan] | None, batch_size: int
    ) -> None:
        """Probe the training loss of each stage, and what `fit` walks besides; plans: None where they are not known."""
        terms = tuple(term for plan in plans or () for term in plan)
        sampled = {curvature.stage for curvature in curvatures(terms)}
        covariances = {curvature.stage for curvature in curvatures(terms) if curvature.kind != "diagonal"}
        outputs = _stages_of_outputs(plans)
        for context, data in _given(contexts, trains):
            view = self._train(context, data, batch_size)
            if plans is None or context.stage in sampled:
                joined = batch_size > 1 and (plans is None or context.stage in covariances)
                probe = partial(_probe_sampling, context, data, batch_size, view, joined)
                self._once(context, (context.stage, "sample", joined), data, probe)
            if context.stage in outputs:
                probe = partial(_probe_loss, context, context.train_reader(data), batch_size)
                make = partial(context.loss_view, "output", data)
                self._once(context, (context.stage, "output"), data, partial(probe, make))

    def before_score(
        self, contexts: Sequence[StageContext], trains: Sequence[Any], queries: QuerySet, place: int, batch_size: int
    ) -> None:
        """Probe the training loss of each stage, and what queries are differentiated through.

        place: of the stage whose data is scored, in whose layers queries are taken.
        """
        for context, data in _given(contexts, trains):
            self._train(context, data, batch_size)
        for loss in queries.losses(contexts[-1], contexts[place].layers.tracked):
            probe = partial(_probe_loss, contexts[-1], loss.reader, batch_size, loss.view)
            self._once(contexts[-1], (place, *loss.what), loss.data, probe)

    def before_features(self, context: StageContext, train: Any, layer: str | None, batch_size: int) -> None:
        """Probe the training loss in the one layer that features are taken of; None: the last."""
        tracked = context.layers.tracked
        name = last_matrix(tracked) if layer is None else layer
        if name in tracked:  # otherwise refused by what follows
            self._train(context, train, batch_size, {name: tracked[name]})

    def _train(
        self, context: StageContext, data: Any, batch_size: int, layers: Mapping[str, TrackedLayer] | None = None
    ) -> LossView | None:
        """Probe the training loss; the view of it, if it was not probed before."""
        make = lru_cache(1)(partial(context.loss_view, "train", data, layers))
        probe = partial(_probe_loss, context, context.train_reader(data), batch_size, make)
        what = (context.stage, "train", *(layers or context.layers.tracked))
        return make() if self._once(context, what, data, probe) else None

    def _once(self, context: StageContext, what: tuple[Any, ...], data: Any, probe: Callable[[], None]) -> bool:
        """Probe what was not found to be in order before, on any rank; whether it was probed now."""
        known = any(key == what and held() is data for key, held in self._passed)
        if not any(context.ranks.gather(not known)):
            return False
        probe()
        self._note(what, data)
        return True

    def _note(self, what: tuple[Any, ...], data: Any) -> None:
        """Note what was found to be in order, and of which dataset."""
        self._passed = [pair for pair in self._passed if pair[1]() is not None]
        self._passed.append((what, reference(data)))


def _probe_loss(
    context: StageContext,
    reader: Reader,
    batch_size: int,
    make_view: Callable[[], LossView],
    further: bool = False,
) -> None:
    """Probe a loss at the stage's last checkpoint.

    further: as `check` does, which has loaded the checkpoint: more examples are run where layers are not reached.
    """
    if not further:
        context.load(context.last)
    view, where = make_view(), context.where(context.last)
    reached: set[str] = set()
    for examples in probe_examples(reader, view.device, _most(batch_size)):
        reached |= check_loss(view, examples, where)
    if further:
        reader.check_steady(context.ranks)
        check_reached(view, reached, _few_batches(reader, view.device), where)


def _few_batches(reader: Reader, device: torch.device) -> Iterator[Batch]:
    """The first examples of a dataset, one by one where they cannot be joined."""
    for rows in in_order(min(len(reader), _FURTHER), MOST):
        try:
            yield from reader.probes([rows], device)
        except JoinError:
            yield from reader.probes([[row] for row in rows], device)


def _probe_sampling(
    context: StageContext, dataset: Any, batch_size: int, view: LossView | None, covariances: bool
) -> None:
    """Probe pseudo-labels at the stage's first checkpoint, the least converged one: there they still vary.

    covariances: whether those of the inputs of examples in batches are wanted.
    """
    first = Point.at(context.stage, 0)
    context.load(first)
    view = view or context.loss_view("train", dataset)
    sample = replace(view, kind="sample", seed=context.settings.seed, place=context.trajectory.steps[0])
    for examples in probe_examples(context.train_reader(dataset), view.device, _most(batch_size)):
        check_sampling(sample, examples, context.where(first), covariances)


def _stages_of_outputs(plans: Sequence[Plan] | None) -> set[int]:
    """The stages whose task's output function the plans' terms need."""
    terms = tuple(term for plan in plans or () for term in plan)
    return {inverse.stage for inverse in projected(terms) if inverse.features == "output"}


def _most(batch_size: int) -> int:
    """How many examples are probed in a batch: no more than the passes have in one, but two, so that they can meet."""
    return min(MOST, max(2, batch_size))


def _given(contexts: Sequence[StageContext], trains: Sequence[Any]) -> Iterable[tuple[StageContext, Any]]:
    return [(context, data) for context, data in zip(contexts, trains, strict=True) if data is not None]
