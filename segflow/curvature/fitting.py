"""Fitting: what plans need of the training data, made once as units of the store, each from the units below it.

Each rank walks its share of the data, and the sums are reduced once for each unit. `unit_names` lists the units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from torch import Tensor

from ..data.batches import Batch, Indices, evenly_spaced, in_order
from ..data.streams import stream
from ..errors import FactorError
from ..methods.plan import (
    Curvature,
    Point,
    Preconditioner,
    ProjectedInverse,
    Projection,
    SampledFisher,
)
from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..model.tokens import Tokens
from ..stage.context import StageContext
from ..stage.unit_identity import sampling_identity, training_identity
from ..store.files import Tensors
from ..store.shared_store import UnitRecipe
from ..store.store import MadeFrom
from ..training.segments import for_group
from .bases import Pool, pooled_eigenvectors, pooled_kfac
from .coupled import check_memory, coupled_tensors, metric_of, on_main, pseudo_gradients, sampled_at
from .fitting_needs import Needs
from .kronecker import Eigenbasis
from .layer_shares import check_shares, measured_shares, shares_point
from .passes import corrected_eigenvalues, covariances, gradient_moments, projected_kernel, sketches
from .preconditioner import PreconditionerBlock
from .saved_moments import unsaved
from .second_moments import preconditioner_blocks
from .stored_curvature import stored_basis
from .unit_names import (
    at_point,
    basis_unit,
    coupled_from,
    coupled_unit,
    covariance_unit,
    eigenvalues_unit,
    kernel_from,
    kernel_unit,
    moments_unit,
    pool_from,
    shares_unit,
    statistics_unit,
)

_PROBED = 256  # training examples whose gradients tell checkpoints apart
_SKETCH = Projection(64, 0)
_WITHOUT_PASS = ("eigenbasis", "kfac", "statistics")  # kinds of units whose making the progress does not count
_PASS_SHARE = 8  # gradients of single examples may take an eighth of the memory budget in a pass


def _needed(recipes: Mapping[str, UnitRecipe], targets: Iterable[str], held: set[str]) -> list[UnitRecipe]:
    """The targets, and all that those which are not held are made of, in the order of the recipes."""
    needed: set[str] = set()

    def need(name: str) -> None:
        if name not in needed:
            needed.add(name)
            for source in () if name in held else recipes[name].inputs:
                need(source)

    for name in targets:
        need(name)
    return [recipe for name, recipe in recipes.items() if name in needed]


def _by_exact_P(layer: TrackedLayer) -> bool:
    """Whether eigenvalues take P exactly where its rank-one part is not exact anyway, as it is for a vector."""
    return layer.exact_P and min(layer.shape[1:]) > 1


class FactorFitter:
    """Fits what is needed of one stage: lists the units and makes those that are missing; inside `observing(model)`.

    Args:
        context: the stage's.
        train: the stage's training data.
        batch_size: examples that are run forward together.
    """

    def __init__(self, context: StageContext, train: Any, batch_size: int):
        self.context, self.train, self.batch_size = context, train, batch_size
        context.load(context.last)
        self.view = context.loss_view("train", train)  # checked with labels that repeat themselves
        seed, last_step = context.settings.seed, context.trajectory.total_steps
        self.sample = replace(self.view, kind="sample", seed=seed, place=last_step)
        self.drawn = stream(seed, "curvature examples").permutation(len(train))[: context.settings.curvature_examples]
        self.train_from = training_identity(context, train, self.view)
        self.sampled_from = {
            **self.train_from,
            **sampling_identity(context, train, self.sample, batch_size),
            "dtype": str(self.view.dtype),
        }
        self.preconditioner = lru_cache(2)(self._read_preconditioner)
        self.bases = lru_cache(1)(self._read_bases)
        self._recipes: dict[str, UnitRecipe] = {}

    def run(self, needs: Needs) -> None:
        """Make every unit that is needed and that the store does not hold.

        A unit that is needed for others alone is not made where the store holds those.
        """
        store, (recipes, targets) = self.context.store, self.recipes(needs)
        while True:  # a covariance made anew may make another pool's eigenbasis stale
            held = store.held(recipes.values())
            needed = _needed(recipes, targets, held)
            expected: Counter[str] = Counter()
            for unit in needed:
                expected[unit.kind] += unit.examples
            store.journal.expect(expected)
            if not store.settle(needed, held):
                return

    def recipes(self, needs: Needs) -> tuple[dict[str, UnitRecipe], list[str]]:
        """Recipes by name in the order of making, and the names of the units that must be there in the end."""
        unsaved_points = dict.fromkeys(point for scale in needs.preconditioners for point in self._unsaved(scale))
        targets = [self._moments(point) for point in unsaved_points]
        for curvature in needs.curvatures:
            targets += self._curvature(curvature)
        targets += [self._kernel(inverse) for inverse in needs.kernels]
        targets += [self._coupled(fisher) for fisher in needs.fishers]
        targets += [self._shares(needs.capped)] if needs.capped else []
        if needs.statistics:
            stage = self.context.stage
            targets += [self._statistics(Point.at(stage, index)) for index in range(len(self.context.trajectory))]
        return self._recipes, targets

    def _unsaved(self, preconditioner: Preconditioner) -> list[Point]:
        """The checkpoints whose second moments must be estimated."""
        return [Point.at(preconditioner.stage, index) for index in unsaved(self.context, preconditioner)]

    def _add(self, kind: str, name: str, made_from: Mapping[str, Any], make: Any, inputs: Sequence[str] = ()) -> str:
        """Add a recipe; returns its unit's name."""
        examples = 0 if kind in _WITHOUT_PASS else self.context.settings.views * sum(map(len, self._lists(1)))
        self._recipes.setdefault(name, UnitRecipe(kind, name, dict(made_from), tuple(inputs), examples, make))
        return name

    def _curvature(self, curvature: Curvature) -> list[str]:
        """Add the recipes of a curvature's units; the names of those that must be there in the end."""
        if curvature.kind == "diagonal":
            return [self._eigenvalues(curvature, point, self.sampled_from, ()) for point in curvature.points]
        sources = [self._covariance(point) for point in curvature.points]
        made_from = self.sampled_from | pool_from(self.context, curvature, {}, self.view)
        moments = [self._moments(point) for point in self._unsaved(curvature.scaled)] if curvature.scaled else []
        make = partial(self._make_bases, curvature, sources)
        basis = self._add("eigenbasis", basis_unit(self.context, curvature), made_from, make, [*sources, *moments])
        if curvature.kind == "kfac":
            name = eigenvalues_unit(self.context, curvature, curvature.points[0])
            make = partial(self._make_kfac, curvature, sources)
            return [basis, self._add("kfac", name, made_from, make, [*sources, basis])]
        return [basis, *(self._eigenvalues(curvature, point, made_from, (basis,)) for point in curvature.points)]

    def _covariance(self, point: Point) -> str:
        made_from = at_point(self.sampled_from, self.context, point)
        make = partial(self._make_covariance, point)
        return self._add("covariance", covariance_unit(self.context, point), made_from, make)

    def _eigenvalues(self, curvature: Curvature, point: Point, made_from: MadeFrom, inputs: Sequence[str]) -> str:
        kind = "diagonal" if curvature.kind == "diagonal" else "eigenvalues"
        name, make = eigenvalues_unit(self.context, curvature, point), partial(self._make_eigenvalues, point, curvature)
        return self._add(kind, name, at_point(made_from, self.context, point), make, inputs)

    def _lists(self, summed: int) -> list[np.ndarray]:
        """This rank's batches, as indices, of the examples that curvature is fitted to.

        `summed` examples in a row are always in one batch, for their gradients are summed. The batches are in the
        data's order where that is 1, otherwise as the examples were drawn, for neighbours in the data may be alike.
        """
        examples = np.sort(self.drawn) if summed == 1 else self.drawn
        size = self.batch_size if summed == 1 else max(1, self.batch_size // summed) * summed
        return self.context.ranks.share([examples[part.start : part.stop] for part in in_order(len(examples), size)])

    def _moments(self, point: Point) -> str:
        made_from = at_point(self.train_from, self.context, point)
        return self._add("moments", moments_unit(self.context, point), made_from, partial(self._make_moments, point))

    def _shares(self, capped: Sequence[str]) -> str:
        made_from = at_point(self.train_from, self.context, shares_point(self.context))
        return self._add("shares", shares_unit(self.context), made_from, partial(self._make_shares, capped))

    def _kernel(self, inverse: ProjectedInverse) -> str:
        made_from = kernel_from(self.context, inverse, self.train_from, self.view, self.train)
        return self._add("kernel", kernel_unit(self.context, inverse), made_from, partial(self._make_kernel, inverse))

    def _coupled(self, fisher: SampledFisher) -> str:
        made_from = coupled_from(self.context, fisher, self.sampled_from, self.view)
        moments = [self._moments(point) for point in self._unsaved(fisher.scaled)] if fisher.scaled else []
        name, make = coupled_unit(self.context, fisher), partial(self._make_coupled, fisher)
        return self._add("coupled", name, made_from, make, moments)

    def _statistics(self, point: Point) -> str:
        made_from = at_point(self.sampled_from, self.context, point)
        name = statistics_unit(self.context, point)
        return self._add("statistics", name, made_from, partial(self._make_statistics, point))

    def _pass(self, point: Point, view: LossView, kind: str, summed: int = 1) -> tuple[LossView, Iterator[Batch], str]:
        """The view and the data for one pass at a point, and the point's name; summed: see `_lists`."""
        weights_N = self._some_weight(point, self.drawn)
        return self._walked(point, view, kind, self._lists(summed), weights_N, self.context.settings.views)

    def _walked(
        self, point: Point, view: LossView, kind: str, lists: Sequence[Indices], weights_N: Tensor | None, views: int
    ) -> tuple[LossView, Iterator[Batch], str]:
        """The view and the data, in this rank's lists of indices, for one pass at a point, and the point's name."""
        self.context.load(point)
        steps = self.context.run.stages[point.stage].steps
        view, where = replace(view, place=steps[point.weights[-1][0]]), self.context.where(point)
        reader, label = self.context.train_reader(self.train), f"{kind}, {where}"
        return view, self.context.walk(view, reader, lists, label, views, weights_N), where

    def _weights(self, point: Point, examples: Indices) -> Tensor | None:
        """Example weights [N] at a point, with a mean of 1 over some examples (or all 0 there); None: all alike."""
        weights_N = self.context.example_weights(point)
        if weights_N is None:
            return None
        mean = weights_N[examples].mean()
        return weights_N / mean if mean > 0 else weights_N

    def _some_weight(self, point: Point, examples: Indices) -> Tensor | None:
        """As `_weights`; FactorError where none of the examples counts."""
        weights_N = self._weights(point, examples)
        if weights_N is not None and not weights_N[examples].any():
            raise FactorError(
                f"{self.context.where(point)}: all of the {len(examples)} examples that curvature is fitted to have "
                "an example weight of 0, expected some that training drew there. Raise curvature_examples=."
            )
        return weights_N

    def _make_covariance(self, point: Point) -> Tensors:
        view, data, where = self._pass(point, self.sample, "covariance")
        by_layer = covariances(view, data, self.context.ranks, where)
        return {f"{name}.{key}": value for name, sums in by_layer.items() for key, value in vars(sums).items()}

    def _make_eigenvalues(self, point: Point, curvature: Curvature) -> Tensors:
        bases, roots = None if curvature.kind == "diagonal" else self.bases(curvature), {}
        if bases and curvature.scaled is not None:
            P, exact = (
                self.preconditioner(curvature.scaled),
                [n for n, of in self.view.layers.items() if _by_exact_P(of)],
            )
            roots = {name: P[name].exact_POI.sqrt() for name in exact}
            bases = {n: basis if n in roots else basis.scaled(P[n].part) for n, basis in bases.items()}
        view, data, where = self._pass(point, self.sample, "eigenvalues", curvature.batch)
        ranks, budget = self.context.ranks, self.context.memory // _PASS_SHARE
        return corrected_eigenvalues(view, data, bases, ranks, where, budget, curvature.batch, roots)

    def _make_moments(self, point: Point) -> Tensors:
        view, data, where = self._pass(point, self.view, "moments")
        return gradient_moments(view, data, self.context.ranks, where, self.context.memory // _PASS_SHARE)

    def _make_shares(self, capped: Sequence[str]) -> Tensors:
        view, data, where = self._pass(shares_point(self.context), self.view, "shares")
        shares = measured_shares(view, data, self.context.ranks, where)
        check_shares(self.context, {name: share.item() for name, share in shares.items()}, capped)
        return shares

    def _make_kernel(self, inverse: ProjectedInverse) -> Tensors:
        self.context.load(inverse.point)
        features = self.view if inverse.features == "train" else self.context.loss_view(inverse.features, self.train)
        view, data, where = self._pass(inverse.point, features, "projection", inverse.batch)
        return projected_kernel(view, data, inverse.projection, self.context.ranks, where, inverse.batch)

    def _make_coupled(self, fisher: SampledFisher) -> Tensors:
        """Each layer's tokens of the pseudo-gradients, `<layer>.a` and `.g`, and the spectrum of G^T M G; on rank 0."""
        context, views = self.context, self.context.settings.views
        chosen, where = sampled_at(fisher, self.drawn, views), ", ".join(map(context.where, fisher.points))
        check_memory(views * sum(map(len, chosen)), self.view, context.memory, where)
        tokens: dict[str, list[Tokens]] = {name: [] for name in self.view.layers}
        for place, (point, examples) in enumerate(zip(fisher.points, chosen, strict=True)):
            lists = [np.sort(examples)[part.start : part.stop] for part in in_order(len(examples), self.batch_size)]
            weights_N, here = self._some_weight(point, examples), context.ranks.share(lists)
            view, data, at = self._walked(point, self.sample, "pseudo-gradients", here, weights_N, views)
            for name, of_layer in pseudo_gradients(view, data, at, context.ranks).items():
                weight = for_group((fisher.weights[place],), context.parameter_groups[name])[0]
                factor = (weight / (views * len(examples))) ** 0.5
                tokens[name] += on_main(of_layer, factor, context.ranks)
        metric = metric_of(self.view, fisher, context.parameter_groups, self.preconditioner)
        return coupled_tensors(tokens, metric, context.memory, where) if context.ranks.main else {}

    def _make_statistics(self, point: Point) -> Tensors:
        """Sketches of some examples' training gradients (`gradients`) and pseudo-gradients (`curvature`) by layer."""
        chosen = evenly_spaced(len(self.train), _PROBED)
        lists = [chosen[part.start : part.stop] for part in in_order(len(chosen), self.batch_size)]
        statistics: Tensors = {}
        for kind, loss_view in (("gradients", self.view), ("curvature", self.sample)):
            here, weights_N = self.context.ranks.share(lists), self._weights(point, chosen)
            view, data, where = self._walked(point, loss_view, "statistics", here, weights_N, views=1)
            rows = sketches(view, data, _SKETCH, self.context.ranks, where)
            statistics |= {f"{name}.{kind}": value for name, value in rows.items()}
        return statistics

    def _make_bases(self, curvature: Curvature, sources: list[str]) -> Tensors:
        scales = self._scales(curvature)
        where = ", ".join(self.context.where(point) for point in curvature.points)
        return pooled_eigenvectors(self._pool(curvature, sources), self.view, scales, self.context.ranks, where)

    def _make_kfac(self, curvature: Curvature, sources: list[str]) -> Tensors:
        bases, scales = self.bases(curvature), self._scales(curvature)
        walked = self.context.settings.views * len(self.drawn)
        return pooled_kfac(self._pool(curvature, sources), self.view, bases, scales, walked)

    def _scales(self, curvature: Curvature) -> Mapping[str, PreconditionerBlock] | None:
        return None if curvature.scaled is None else self.preconditioner(curvature.scaled)

    def _pool(self, curvature: Curvature, sources: list[str]) -> Pool:
        units = [self.context.store.open(source, self._recipes[source].made_from) for source in sources]
        return Pool(units, curvature.weights, self.context.parameter_groups)

    def _read_preconditioner(self, preconditioner: Preconditioner) -> Mapping[str, PreconditionerBlock]:
        """A preconditioner's block of each layer."""
        return preconditioner_blocks(self.context, preconditioner, self.train_from, self.view)

    def _read_bases(self, curvature: Curvature) -> dict[str, Eigenbasis]:
        """A curvature's eigenbasis of each layer, from the unit that was made."""
        made_from = self.sampled_from | pool_from(self.context, curvature, {}, self.view)
        basis = self.context.store.open(basis_unit(self.context, curvature), made_from)
        return {name: stored_basis(basis, name, self.view) for name in self.view.layers}
