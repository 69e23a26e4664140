"""What a plan needs of the training data as units of the store, each made once, from the units below it.

Each rank walks its share of the data, and the sums are reduced once for each unit. `names` lists the units.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..data.batches import Batch, evenly_spaced, in_order
from ..methods.plan import (
    Curvature,
    Plan,
    Point,
    Preconditioner,
    ProjectedInverse,
    Projection,
    curvatures,
    preconditioners,
    projected,
)
from ..model.loss_view import LossView
from ..runtime.ranks import balanced
from ..stage.context import StageContext
from ..store.files import Tensors
from ..store.shared import StoredUnit, UnitRecipe
from .kronecker import Eigenbasis, eigenvectors, kfac_eigenvalues, mean_over
from .names import (
    basis_unit,
    covariance_unit,
    eigenvalues_unit,
    kernel_from,
    kernel_unit,
    moments_unit,
    pool_from,
    preconditioner_from,
    statistics_unit,
)
from .passes import corrected_eigenvalues, covariances, gradient_moments, projected_kernel, sketches
from .preconditioner import RankOne
from .saved_moments import check_saved, unsaved
from .second_moments import preconditioner_blocks
from .stored import stored_basis

_PROBED = 256  # training examples whose gradients tell checkpoints apart
_SKETCH = Projection(64, 0)


class Needs(NamedTuple):
    """What plans need of one stage's data."""

    curvatures: Sequence[Curvature] = ()
    preconditioners: Sequence[Preconditioner] = ()
    kernels: Sequence[ProjectedInverse] = ()
    statistics: bool = False


def fitting_needs(plans: Iterable[Plan]) -> dict[int, Needs]:
    """What plans need of each stage's data; stages of which they need nothing are absent."""
    every = tuple(term for plan in plans for term in plan)
    found = (curvatures(every), preconditioners(every), projected(every))
    stages = sorted({of.stage for kind in found for of in kind})
    needs = {}
    for stage in stages:
        blocks, scales, kernels = (_of_stage(kind, stage) for kind in found)
        needs[stage] = Needs(blocks, scales, kernels)
    return needs


def _of_stage(needed: Iterable[Any], stage: int) -> list[Any]:
    return [of for of in needed if of.stage == stage]


def _needed(recipes: Mapping[str, UnitRecipe], targets: Iterable[str], held: set[str]) -> list[UnitRecipe]:
    """The targets and whatever is missing below those that are not held, in the order of planning."""
    chosen: set[str] = set()

    def choose(name: str) -> None:
        if name not in chosen:
            chosen.add(name)
            for source in () if name in held else recipes[name].inputs:
                choose(source)

    for name in targets:
        choose(name)
    return [unit for name, unit in recipes.items() if name in chosen]


def check_needs(context: StageContext, needs: Needs) -> None:
    """Raise TrajectoryError if second moments can be neither read nor estimated; warn if any must be estimated."""
    missing = {index for of in needs.preconditioners for index in unsaved(context, of)}
    for of in needs.preconditioners:
        preconditioner_from(context, of)
        check_saved(context, of)
    if missing:
        warnings.warn(
            f"{context.trajectory.optimizer.name}'s second moments were not saved at {len(missing)} checkpoints, "
            "so they are estimated from gradients there (see the scores' provenance).",
            stacklevel=3,
        )


class FactorFitter:
    """One fitting run of one stage: lists the units that are needed and makes them; only inside `observing(model)`."""

    def __init__(self, context: StageContext, train: Any, batch_size: int):
        self.context, self.train, self.batch_size = context, train, batch_size
        context.load(context.last)
        self.own = context.loss_view("train", train)  # checked with labels that repeat themselves
        self.sample = replace(self.own, kind="sample", seed=context.seed, place=context.trajectory.total_steps)
        drawn = np.random.default_rng(context.seed).permutation(len(train))
        self.drawn = drawn[: context.curvature_examples]
        self.train_from = context.made_from(train, self.own)
        self.sampled_from = {
            **self.train_from,
            **context.sampling_needs(train, self.sample, batch_size),
            "dtype": str(self.own.dtype),
        }
        self.blocks = lru_cache(2)(lambda of: preconditioner_blocks(context, of, self.train_from, self.own))
        self.bases = lru_cache(1)(self._read_bases)
        self._recipes: dict[str, UnitRecipe] = {}

    def run(self, needs: Needs) -> None:
        """Make every unit that is needed and that the store does not hold.

        A unit whose only use is in units that are there is not made.
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
        """Units by name in the order of making, and the names of those that must be there in the end."""
        missing = dict.fromkeys(point for of in needs.preconditioners for point in self._unsaved(of))
        targets = [self._moments(point) for point in missing]
        for curvature in needs.curvatures:
            targets += self._curvature(curvature)
        targets += [self._kernel(inverse) for inverse in needs.kernels]
        if needs.statistics:
            stage = self.context.stage
            targets += [self._statistics(Point.at(stage, index)) for index in range(len(self.context.trajectory))]
        return self._recipes, targets

    def _unsaved(self, of: Preconditioner) -> list[Point]:
        return [Point.at(of.stage, index) for index in unsaved(self.context, of)]

    def _add(self, kind: str, name: str, made_from: Mapping[str, Any], make: Any, inputs: Sequence[str] = ()) -> str:
        examples = 0 if kind in ("eigenbasis", "kfac", "statistics") else sum(map(len, self._lists(1)))
        self._recipes.setdefault(name, UnitRecipe(kind, name, dict(made_from), tuple(inputs), examples, make))
        return name

    def _curvature(self, curvature: Curvature) -> list[str]:
        """Recipes for a curvature's units: a covariance for each point, the eigenbasis, the eigenvalues."""
        context, points = self.context, curvature.points
        digests = [context.checkpoint_digest(point) for point in points]
        if curvature.kind == "diagonal":
            return [
                self._add(
                    "diagonal",
                    eigenvalues_unit(context, curvature, point),
                    self.sampled_from | {"checkpoint": digest},
                    partial(self._make_eigenvalues, point, None, curvature.batch),
                )
                for point, digest in zip(points, digests, strict=True)
            ]
        sources = [
            self._add(
                "covariance",
                covariance_unit(context, point),
                self.sampled_from | {"checkpoint": digest},
                partial(self._make_covariance, point),
            )
            for point, digest in zip(points, digests, strict=True)
        ]
        made_from = self.sampled_from | pool_from(context, curvature, {}, self.own)
        make = partial(self._make_bases, curvature, sources)
        moments = [] if curvature.scaled is None else [self._moments(p) for p in self._unsaved(curvature.scaled)]
        basis = self._add("eigenbasis", basis_unit(context, curvature), made_from, make, [*sources, *moments])
        if curvature.kind == "kfac":
            make = partial(self._make_kfac, curvature, sources)
            name = eigenvalues_unit(context, curvature, points[0])
            return [basis, self._add("kfac", name, made_from, make, [*sources, basis])]
        return [basis] + [
            self._add(
                "eigenvalues",
                eigenvalues_unit(context, curvature, point),
                made_from | {"checkpoint": digest},
                partial(self._make_eigenvalues, point, curvature, curvature.batch),
                [basis],
            )
            for point, digest in zip(points, digests, strict=True)
        ]

    def _lists(self, batch: int) -> list[np.ndarray]:
        """This rank's batches of the examples that curvature is fitted to, `batch` in a row always in the same one.

        In the data's order where `batch` is 1; otherwise as drawn, for neighbours in the data may be alike.
        """
        walked = np.sort(self.drawn) if batch == 1 else self.drawn
        size = self.batch_size if batch == 1 else max(1, self.batch_size // batch) * batch
        return self.context.ranks.share([walked[part.start : part.stop] for part in in_order(len(walked), size)])

    def _moments(self, point: Point) -> str:
        made_from = self.train_from | {"checkpoint": self.context.checkpoint_digest(point)}
        return self._add("moments", moments_unit(self.context, point), made_from, partial(self._make_moments, point))

    def _kernel(self, inverse: ProjectedInverse) -> str:
        made_from = kernel_from(self.context, inverse, self.train_from, self.own, self.train)
        return self._add("kernel", kernel_unit(self.context, inverse), made_from, partial(self._make_kernel, inverse))

    def _statistics(self, point: Point) -> str:
        made_from = self.sampled_from | {"checkpoint": self.context.checkpoint_digest(point)}
        name = statistics_unit(self.context, point)
        return self._add("statistics", name, made_from, partial(self._make_statistics, point))

    def _pass(self, point: Point, view: LossView, kind: str, batch: int = 1) -> tuple[LossView, Iterator[Batch], str]:
        """The view and the data for one pass at a point, and the point's name; batch: see `_lists`."""
        self.context.load(point)
        steps = self.context.run.stages[point.stage].steps
        view, where = replace(view, place=steps[point.weights[-1][0]]), self.context.where(point)
        return view, self.context.walk(view, self.train, self._lists(batch), f"{kind}, {where}"), where

    def _make_covariance(self, point: Point) -> Tensors:
        view, data, where = self._pass(point, self.sample, "covariance")
        found = covariances(view, data, self.context.ranks, where)
        return {f"{name}.{key}": value for name, sums in found.items() for key, value in vars(sums).items()}

    def _make_eigenvalues(self, point: Point, curvature: Curvature | None, batch: int) -> Tensors:
        bases = self.bases(curvature) if curvature is not None else None
        if bases and curvature is not None and curvature.scaled is not None:
            blocks = self.blocks(curvature.scaled)
            bases = {name: basis.scaled(blocks[name].part) for name, basis in bases.items()}
        view, data, where = self._pass(point, self.sample, "eigenvalues", batch)
        return corrected_eigenvalues(view, data, bases, self.context.ranks, where, self.context.memory // 8, batch)

    def _make_moments(self, point: Point) -> Tensors:
        view, data, where = self._pass(point, self.own, "moments")
        return gradient_moments(view, data, self.context.ranks, where, self.context.memory // 8)

    def _make_kernel(self, inverse: ProjectedInverse) -> Tensors:
        self.context.load(inverse.point)
        own = self.own if inverse.features == "train" else self.context.loss_view(inverse.features, self.train)
        view, data, where = self._pass(inverse.point, own, "projection", inverse.batch)
        return projected_kernel(view, data, inverse.projection, self.context.ranks, where, inverse.batch)

    def _make_statistics(self, point: Point) -> Tensors:
        """Sketches of some examples' training gradients (`gradients`) and pseudo-gradients (`curvature`)."""
        chosen = evenly_spaced(len(self.train), _PROBED)
        lists = [chosen[part.start : part.stop] for part in in_order(len(chosen), self.batch_size)]
        found: Tensors = {}
        for kind, own in (("gradients", self.own), ("curvature", self.sample)):
            view, _, where = self._pass(point, own, "statistics")
            data = self.context.walk(view, self.train, self.context.ranks.share(lists), f"statistics, {where}")
            rows = sketches(view, data, _SKETCH, self.context.ranks, where)
            found |= {f"{name}.{kind}": value for name, value in rows.items()}
        return found

    def _make_kfac(self, curvature: Curvature, sources: list[str]) -> Tensors:
        bases = self.bases(curvature)
        units = [self.context.store.open(source, self._recipes[source].made_from) for source in sources]
        made = {}
        for name, layer in self.own.layers.items():
            inputs, outputs = (_pooled(units, _Side(name, *of), curvature.weights) for of in _shapes(*layer.shape))
            positions = _positions(units, name, len(self.drawn), curvature.weights)
            if inputs is not None and outputs is not None:
                basis = Eigenbasis(*(side.double().cpu() for side in vars(bases[name]).values()))
                made[name] = (positions * kfac_eigenvalues(basis, inputs, outputs)).to(self.own.dtype)
        return made

    def _make_bases(self, curvature: Curvature, sources: list[str]) -> Tensors:
        """Eigenvectors of the pooled covariances in float64, each side of each layer on one rank."""
        ranks, where = self.context.ranks, [self.context.where(point) for point in curvature.points]
        units = [self.context.store.open(source, self._recipes[source].made_from) for source in sources]
        sides, scales = _sides(self.own), self.blocks(curvature.scaled) if curvature.scaled else None
        owners = balanced([shape[0] * shape[1] ** 3 for _, _, shape in sides], ranks.count)
        hands = [
            [side for side, owner in zip(sides, owners, strict=True) if owner == rank] for rank in range(ranks.count)
        ]
        own: list[Tensor] = []
        for dealt in zip_longest(*hands):
            matrix = ranks.deal([side and _pooled(units, side, curvature.weights) for side in dealt], self.own.device)
            if matrix is not None:
                own.append(matrix)
        found = []
        for side, matrix in zip(hands[ranks.index], own, strict=True):
            scaled = matrix if scales is None else _scaled(matrix, side, scales[side.layer].part)
            found.append(eigenvectors(scaled, f"layer {side.layer!r}, {side.name}, {', '.join(where)}"))
        made = {}
        for dealt, vectors in zip_longest(zip_longest(*hands), found):
            for side, theirs in zip(dealt, ranks.collect(vectors), strict=False):
                if side is not None and theirs is not None:
                    made[f"{side.layer}.{side.name}"] = theirs
        return made

    def _read_bases(self, curvature: Curvature) -> dict[str, Any]:
        basis = self.context.store.open(basis_unit(self.context, curvature), self.sampled_from)
        return {name: stored_basis(basis, name, self.own) for name in self.own.layers}


class _Side(NamedTuple):
    """One side of a layer's curvature: "inputs" or "outputs", and the shape of its covariance."""

    layer: str
    name: str
    shape: tuple[int, int, int]


def _shapes(P: int, O: int, I: int) -> tuple[tuple[str, tuple[int, int, int]], ...]:
    return ("inputs", (P, I, I)), ("outputs", (P, O, O))


def _sides(view: LossView) -> list[_Side]:
    return [_Side(name, *of) for name, layer in view.layers.items() for of in _shapes(*layer.shape)]


def _pooled(units: Sequence[StoredUnit], side: _Side, weights: Sequence[float]) -> Tensor | None:
    """A layer's A or S averaged over the units' points, on rank 0."""
    total, rows = ("a_PII", "a_rows") if side.name == "inputs" else ("g_POO", "g_rows")
    names = [(f"{side.layer}.{total}", side.shape), (f"{side.layer}.{rows}", ())]
    files = [unit.file for unit in units if unit.file is not None]
    return mean_over([(file.tensor(*names[0]), file.tensor(*names[1])) for file in files], weights) if files else None


def _scaled(matrix_PDD: Tensor, side: _Side, part: RankOne) -> Tensor:
    """A or S of tokens that are scaled by the square root of P's rank-one part."""
    root_PD = (part.inputs_PI if side.name == "inputs" else part.outputs_PO).double().sqrt()
    return root_PD[:, :, None] * matrix_PDD * root_PD[:, None, :]


def _positions(units: Sequence[StoredUnit], layer: str, examples: int, weights: Sequence[float]) -> float:
    """How many positions an example has in a layer, on average; on rank 0."""
    rows = [unit.file.tensor(f"{layer}.g_rows", ()).item() for unit in units if unit.file is not None]
    return sum(weight * row for weight, row in zip(weights, rows, strict=False)) / examples
