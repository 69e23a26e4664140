"""A fitted curvature, as the query side reads it from the store, layer by layer.

Axes: P parts, O outputs, I inputs of a layer, D either of these, k random vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import StoreError
from ..methods.plan import Curvature
from ..model.loss_view import LossView
from ..stage.context import StageContext
from ..stage.unit_identity import SAMPLING_KEYS
from ..store.shared_store import StoredUnit
from ..store.store import MadeFrom
from ..training.segments import Weight, for_group
from .kronecker import Eigenbasis, KroneckerBlock, side_shapes, weighted_mean
from .preconditioner import PreconditionerBlock
from .unit_names import at_point, basis_unit, eigenvalues_unit, pool_from

_BLOCKS_SHARE = 8  # blocks stay in memory where they take no more than an eighth of the budget
_ORTHONORMAL = 1e-3  # by so much Q^T Q x may differ from x, standard normal


class StoredCurvature(Mapping[str, KroneckerBlock]):
    """The fitted blocks of a curvature by layer, averaged over its points and read when asked for.

    Every rank must ask for the same layers in the same order. Raises StoreError where the blocks were not fitted, or
    were fitted to something else.

    Args:
        context: that of the curvature's stage.
        train_from: `training_identity` of the stage's training data.
        preconditioner: each layer's block of the preconditioner that the curvature is scaled with.

    Attributes:
        eigenvalue_units: the unit of each point's eigenvalues.
        unit_names: of all units that the blocks are made of.
        fits: whether all blocks together take no more than their share of the memory; if so they stay there.
    """

    def __init__(
        self,
        context: StageContext,
        curvature: Curvature,
        train_from: MadeFrom,
        view: LossView,
        preconditioner: Mapping[str, PreconditionerBlock] | None = None,
    ):
        self.view, self.curvature, self._preconditioner = view, curvature, preconditioner
        made_from = pool_from(context, curvature, train_from, view)
        points = curvature.points[:1] if curvature.kind == "kfac" else curvature.points
        names = [eigenvalues_unit(context, curvature, point) for point in points]
        bases = [] if curvature.kind == "diagonal" else [basis_unit(context, curvature)]
        if curvature.kind == "diagonal":
            made_from = {**train_from, "dtype": str(view.dtype)}
        identities = [
            made_from if curvature.kind == "kfac" else at_point(made_from, context, point) for point in points
        ]
        self.unit_names = [*bases, *names]
        self._basis = context.store.open(bases[0], made_from, SAMPLING_KEYS) if bases else None
        self.eigenvalue_units = [
            context.store.open(name, identity, SAMPLING_KEYS) for name, identity in zip(names, identities, strict=True)
        ]
        self._weights: tuple[Weight, ...] = (1.0,) if curvature.kind == "kfac" else curvature.weights
        self._parameter_groups = context.parameter_groups
        layers = view.layers.values()
        numbers = sum(layer.size + sum(map(math.prod, side_shapes(layer))) for layer in layers)
        self.fits = numbers * view.dtype.itemsize <= context.memory // _BLOCKS_SHARE
        self._in_memory: dict[str, KroneckerBlock] = {}

    def __getitem__(self, name: str) -> KroneckerBlock:
        if name in self._in_memory:
            return self._in_memory[name]
        if name not in self.view.layers:
            raise KeyError(name)
        mean_POI = self._eigenvalues(name)
        basis = None if self._basis is None else stored_basis(self._basis, name, self.view)
        block = KroneckerBlock(basis, mean_POI)
        if self.fits:
            self._in_memory[name] = block
        return block

    def _eigenvalues(self, name: str) -> Tensor:
        """A layer's eigenvalues [P, O, I]."""
        shape, device = self.view.layers[name].shape, self.view.device
        weights = for_group(self._weights, self._parameter_groups[name])
        at_points = [unit.tensor(name, shape, device, "nonnegative") for unit in self.eigenvalue_units]
        mean_POI = weighted_mean(at_points, weights)
        if self._preconditioner is not None and self._basis is None:
            mean_POI = mean_POI * self._preconditioner[name].exact_POI
        return mean_POI

    def traces(self) -> dict[str, float]:
        """Each layer's trace, in float64; every rank must ask."""
        return {name: self._eigenvalues(name).double().sum().item() for name in self.view.layers}

    def __contains__(self, name: object) -> bool:
        return name in self.view.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.view.layers)

    def __len__(self) -> int:
        return len(self.view.layers)


def stored_basis(unit: StoredUnit, name: str, view: LossView) -> Eigenbasis:
    """One layer's eigenbasis, in the view's precision and on its device; StoreError unless it is orthonormal."""
    sides = zip(("inputs", "outputs"), side_shapes(view.layers[name]), strict=True)
    return Eigenbasis(
        *(
            _orthonormal(unit, f"{name}.{side}", shape, view).to(view.dtype) if len(shape) == 3 else None
            for side, shape in sides
        )
    )


def _orthonormal(unit: StoredUnit, side: str, shape: tuple[int, ...], view: LossView) -> Tensor:
    vectors_PDD = unit.tensor(side, shape, view.device)
    x_PDk = torch.randn(*shape[:2], 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(view.device)
    exact_PDD = vectors_PDD.double()
    off = (exact_PDD.mT @ (exact_PDD @ x_PDk) - x_PDk).abs().max().item()
    if off > _ORTHONORMAL:
        raise StoreError(
            f"{unit.file.path if unit.file else 'eigenbasis'}: {side!r} holds vectors that are not orthonormal (off by "
            f"{off:.2g}). {unit.file.advice if unit.file else ''}"
        )
    return vectors_PDD
