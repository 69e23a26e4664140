"""From covariances at several points to one eigenbasis for each layer, the eigenproblems dealt out to the ranks.

Axes: P parts, O outputs, I inputs of a layer, D either of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from torch import Tensor

from ..model.layers.tracked import TrackedLayer
from ..model.loss_view import LossView
from ..runtime.ranks import Ranks, balanced
from ..store.files import TensorFile, Tensors
from ..store.shared_store import StoredUnit
from ..training.segments import Weight, for_group
from .kronecker import Eigenbasis, eigenvectors, kfac_eigenvalues, mean_over, side_shapes
from .preconditioner import PreconditionerBlock, RankOne


class _Side(NamedTuple):
    """One side of a layer's curvature: its name, "inputs" or "outputs", and the shape of its covariance.

    That is [P, D, D], or [P, D] where the side is diagonal.
    """

    layer: str
    name: str
    shape: tuple[int, ...]


class Pool(NamedTuple):
    """The covariances that a curvature is made of: the unit of each point, and the points' weights.

    parameter_groups: each layer's, by which its weights are known.
    """

    units: Sequence[StoredUnit]
    weights: Sequence[Weight]
    parameter_groups: Mapping[str, int]

    def mean(self, side: _Side) -> Tensor | None:
        """A layer's A or S [P, D, D] averaged over the points, on rank 0; None on the others."""
        total, rows = ("a_PII", "a_rows") if side.name == "inputs" else ("g_POO", "g_rows")
        files = [unit.file for unit in self.units if unit.file is not None]
        sums = [
            (file.tensor(f"{side.layer}.{total}", side.shape, "real"), _rows(file, f"{side.layer}.{rows}"))
            for file in files
        ]
        return mean_over(sums, for_group(self.weights, self.parameter_groups[side.layer])) if files else None

    def positions(self, layer: str, examples: int) -> float:
        """How many positions an example has in a layer, on average; on rank 0, as the others hold no files."""
        rows = [_rows(unit.file, f"{layer}.g_rows").item() for unit in self.units if unit.file is not None]
        weights = for_group(self.weights, self.parameter_groups[layer])
        return sum(weight * row for weight, row in zip(weights, rows, strict=False)) / examples


def _rows(file: TensorFile, name: str) -> Tensor:
    """How many tokens were summed."""
    return file.tensor(name, (), "nonnegative")


def pooled_eigenvectors(
    pool: Pool, view: LossView, scales: Mapping[str, PreconditionerBlock] | None, ranks: Ranks, where: str
) -> Tensors:
    """The eigenvectors `<layer>.inputs` and `<layer>.outputs` [P, D, D], in float64; on rank 0, nothing elsewhere.

    Sides that are diagonal have none.

    The sides of the layers are dealt out to the ranks, each of which solves the eigenproblems of its own. scales: P of
    each layer, whose rank-one part scales the tokens; where: names the points in errors.
    """
    sides = [side for layer in view.layers.values() for side in _sides(layer) if len(side.shape) == 3]
    owners = balanced([shape[0] * shape[1] ** 3 for _, _, shape in sides], ranks.count)
    hands = [[side for side, owner in zip(sides, owners, strict=True) if owner == rank] for rank in range(ranks.count)]
    turns = list(zip_longest(*hands))  # one side for each rank, None where it has no more
    dealt = [ranks.deal([side and pool.mean(side) for side in turn], view.device) for turn in turns]
    matrices = [matrix for matrix in dealt if matrix is not None]
    bases = []
    for side, matrix in zip(hands[ranks.index], matrices, strict=True):
        scaled = _scaled(matrix, side, None if scales is None else scales[side.layer].part)
        bases.append(eigenvectors(scaled, f"layer {side.layer!r}, {side.name}, {where}"))
    collected: Tensors = {}
    for turn, basis in zip_longest(turns, bases):
        for side, vectors in zip(turn, ranks.collect(basis), strict=False):
            if side is not None and vectors is not None:
                collected[f"{side.layer}.{side.name}"] = vectors
    return collected


def pooled_kfac(
    pool: Pool,
    view: LossView,
    bases: Mapping[str, Eigenbasis],
    scales: Mapping[str, PreconditionerBlock] | None,
    examples: int,
) -> Tensors:
    """K-FAC's eigenvalues [P, O, I] of each layer, on rank 0, nothing elsewhere.

    scales: as for the bases. examples: the number of those that the covariances are of.
    """
    eigenvalues = {}
    for name, layer in view.layers.items():
        part, sides = None if scales is None else scales[name].part, _sides(layer)
        inputs, outputs = map(pool.mean, sides)
        positions = pool.positions(name, examples)
        if inputs is not None and outputs is not None:
            basis = Eigenbasis(*(None if side is None else side.double().cpu() for side in vars(bases[name]).values()))
            A, S = (_scaled(of, side, part) for of, side in zip((inputs, outputs), sides, strict=True))
            eigenvalues[name] = (positions * kfac_eigenvalues(basis, A, S)).to(view.dtype)
    return eigenvalues


def _sides(layer: TrackedLayer) -> tuple[_Side, _Side]:
    inputs, outputs = side_shapes(layer)
    return _Side(layer.name, "inputs", inputs), _Side(layer.name, "outputs", outputs)


def _scaled(covariance: Tensor, side: _Side, part: RankOne | None) -> Tensor:
    """A or S of tokens that are scaled by the square root of one side of P's rank-one part; None scales nothing."""
    if part is None:
        return covariance
    squares_PD = (part.inputs_PI if side.name == "inputs" else part.outputs_PO).to(covariance)
    if len(side.shape) == 2:
        return squares_PD * covariance
    root_PD = squares_PD.sqrt()
    return root_PD[:, :, None] * covariance * root_PD[:, None, :]
