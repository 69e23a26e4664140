"""Sets of queries: examples of a dataset, or properties of the model. They are told apart here and nowhere else.

Axes: Q queries, P parts, O outputs, I inputs; a block of gradients is [Q, P, O, I].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..arguments import names
from ..curvature.kronecker import Eigenbasis
from ..data.batches import dataset_length, in_order
from ..data.code_identity import collate_fingerprint, measurement_fingerprint
from ..data.readers import Reader
from ..errors import MethodError, ScoreError, TaskError
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.representation_view import representation_view
from ..properties.property import Property
from ..stage.context import StageContext
from ..stage.unit_identity import read_and_probed
from .outer_products import Stacks
from .property_gradients import indexed, property_gradient, property_identity, property_view
from .query_gradients import query_gradients


@dataclass(frozen=True)
class QueryShare:
    """Queries that are worked on together.

    every: those of all ranks; here: this rank's among them; layers: those that are scored; batch_size: examples in one
    forward and backward.
    """

    queries: QuerySet
    every: range
    here: range
    layers: Mapping[str, TrackedLayer]
    batch_size: int


class QueryLoss(NamedTuple):
    """A loss that queries are differentiated through.

    what: tells it from others on the same data; data: as the user gave it; reader: reads it for the loss; view: makes a
    view of the loss.
    """

    what: tuple[Any, ...]
    data: Any
    reader: Reader
    view: Callable[[], LossView]


class QuerySet(ABC):
    """All queries of one call of `score`. Gradients are taken at the parameters that are in the model.

    made_of_tokens: whether a query's gradient is made of tokens, which can be rotated into an eigenbasis before the
    gradient is formed, and which stay outer products where an example has one token.
    """

    made_of_tokens: ClassVar[bool]

    @property
    @abstractmethod
    def labels(self) -> tuple[str, ...]:
        """The queries' names where the user gives none."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def measurement(self, task: Any) -> str:
        """A word for what is measured, for provenance."""

    @abstractmethod
    def identity(self, rows: range, context: StageContext) -> dict[str, Any]:
        """What identifies these queries, as the store compares it."""

    @abstractmethod
    def measured(self, context: StageContext, view: LossView) -> dict[str, Any]:
        """What identifies the function that is measured; view: of the training loss of the last stage."""

    @abstractmethod
    def gradients(
        self, share: QueryShare, context: StageContext, bases: Mapping[str, Eigenbasis], where: str
    ) -> Stacks:
        """This rank's query gradients, for each layer [Q, P, O, I]; in a basis where one is given and made_of_tokens.

        where: names the point in errors.
        """

    @abstractmethod
    def representations(
        self, share: QueryShare, context: StageContext, layer: str, normalized: bool, where: str
    ) -> Stacks:
        """This rank's queries as the inputs of one layer, [Q, 1, 1, I]; MethodError where they have none."""

    @abstractmethod
    def losses(self, context: StageContext, layers: Mapping[str, TrackedLayer]) -> list[QueryLoss]:
        """What the queries are differentiated through; each must be a sum over its data's examples."""

    @abstractmethod
    def check(self, context: StageContext, layers: Mapping[str, TrackedLayer]) -> None:
        """Raise TaskError where something is wrong with the queries, besides their losses."""


@dataclass(frozen=True)
class ExampleQueries(QuerySet):
    """Every example of a dataset is a query: the task's measurement of it."""

    dataset: Any
    made_of_tokens: ClassVar[bool] = True

    @property
    def labels(self) -> tuple[str, ...]:
        """The examples' indices."""
        return tuple(map(str, range(len(self))))

    def __len__(self) -> int:
        return dataset_length(self.dataset, "query")

    def measurement(self, task: Any) -> str:
        """The task's, by name if it has several."""
        return str(getattr(task, "measurement", "compute_measurement"))

    def _reader(self, context: StageContext) -> Reader:
        reader = context.reader(self.dataset, "query")
        reader.check_steady(context.ranks)
        return reader

    def identity(self, rows: range, context: StageContext) -> dict[str, Any]:
        """The digest of the examples."""
        return self._reader(context).fingerprint(context.ranks, context.settings.progress, rows)

    def measured(self, context: StageContext, view: LossView) -> dict[str, Any]:
        """What the task's measurement reaches, and its values of some queries."""
        view = replace(view, kind="measurement")
        reached, values = read_and_probed(context, self.dataset, view, measurement_fingerprint)
        return {
            "measurement": reached,
            "measurements": values,
            "query collate": collate_fingerprint(context.collate_fn),
        }

    def gradients(
        self, share: QueryShare, context: StageContext, bases: Mapping[str, Eigenbasis], where: str
    ) -> Stacks:
        """The measurement's gradients, batch by batch."""
        view = context.loss_view("measurement", self.dataset, share.layers)
        data = context.walk(view, self._reader(context), _batched(share), f"queries, {where}")
        return query_gradients(view, data, bases, context.ranks, where)

    def representations(
        self, share: QueryShare, context: StageContext, layer: str, normalized: bool, where: str
    ) -> Stacks:
        """The layer's inputs, averaged over positions."""
        view = context.loss_view("measurement", self.dataset, share.layers)
        data = context.walk(view, self._reader(context), _batched(share), f"queries, {where}")
        return query_gradients(representation_view(view, layer, normalized), data, {}, context.ranks, where)

    def losses(self, context: StageContext, layers: Mapping[str, TrackedLayer]) -> list[QueryLoss]:
        """The task's measurement."""
        view = partial(context.loss_view, "measurement", self.dataset, layers)
        return [QueryLoss(("measurement",), self.dataset, self._reader(context), view)]

    def check(self, context: StageContext, layers: Mapping[str, TrackedLayer]) -> None:
        """There are examples."""
        len(self)


@dataclass(frozen=True)
class PropertyQueries(QuerySet):
    """Each query is one differentiable number of the model, with data of its own."""

    properties: tuple[Property, ...]
    made_of_tokens: ClassVar[bool] = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The properties' names."""
        return tuple(prop.name for prop in self.properties)

    def measurement(self, task: Any) -> str:
        """Each query measures what its property says."""
        return "properties"

    def identity(self, rows: range, context: StageContext) -> dict[str, Any]:
        """The properties' classes, options, code and data."""
        return {"properties": [property_identity(self.properties[row], context) for row in rows]}

    def measured(self, context: StageContext, view: LossView) -> dict[str, Any]:
        """The properties' own identities say it, and those of how the context joins their examples."""
        return {"query collate": collate_fingerprint(context.collate_fn)}

    def gradients(
        self, share: QueryShare, context: StageContext, bases: Mapping[str, Eigenbasis], where: str
    ) -> Stacks:
        """All ranks work on each property; each keeps the gradients of its own queries, in no basis."""
        of_layers: dict[str, list[Tensor]] = {name: [] for name in share.layers}
        for row in share.every:
            gradient = property_gradient(context, share.layers, self.properties[row], where, share.batch_size)
            for name, gradient_POI in gradient.items() if row in share.here else ():
                of_layers[name].append(gradient_POI)
        return {name: torch.stack(rows) if rows else gradient[name][None][:0] for name, rows in of_layers.items()}

    def representations(
        self, share: QueryShare, context: StageContext, layer: str, normalized: bool, where: str
    ) -> Stacks:
        """Refused: a property has no representation."""
        raise MethodError(
            "a property has a gradient, but no representation. Use GradientDot or another method of gradients."
        )

    def losses(self, context: StageContext, layers: Mapping[str, TrackedLayer]) -> list[QueryLoss]:
        """The sum of each property's outputs, or parts; once where properties take them alike, from the same data."""
        found = []
        for prop in self.properties:
            code = tuple(getattr(type(prop), name, None) for name in ("outputs", "part", "total"))
            what = ("property", *code, prop.inputs, prop.targets, prop.collate_fn, getattr(prop, "task", None))
            view = partial(property_view, context, layers, prop)
            found.append(QueryLoss(what, prop.data, indexed(context, prop), view))
        return found

    def check(self, context: StageContext, layers: Mapping[str, TrackedLayer]) -> None:
        """Each property can be differentiated."""
        for prop in self.properties:
            property_gradient(context, layers, prop, context.where(context.last), batch_size=16)


def query_set(query: Any) -> QuerySet:
    """The query set of what a user gave: a dataset, a property or several; TaskError for a list of both."""
    if isinstance(query, Property):
        return PropertyQueries((query,))
    are_properties = [isinstance(item, Property) for item in query] if isinstance(query, list | tuple) else []
    if not any(are_properties):
        return ExampleQueries(query)
    if not all(are_properties):
        raise TaskError(
            "query: a list of both properties and examples. Score them in two calls, or make a property of the "
            "examples: properties.MeanMeasurement(examples, task)."
        )
    return PropertyQueries(tuple(query))


def _batched(share: QueryShare) -> list[range]:
    """This rank's queries, a batch at a time."""
    return [share.here[batch.start : batch.stop] for batch in in_order(len(share.here), share.batch_size)]


def checked_labels(queries: QuerySet, given: Sequence[object] | None) -> tuple[str, ...]:
    """The queries' names, their own where none are given; ScoreError unless each query has one of its own."""
    labels = queries.labels if given is None else names("query_labels", given, ScoreError)
    if len(labels) != len(queries):
        raise ScoreError(f"{len(labels)} query labels for {len(queries)} queries: expected one for each.")
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise ScoreError(
            f"two queries are called {twice[0]!r}. Give each a name of its own: in query_labels, or of properties as "
            "name=."
        )
    return labels
