"""The data passes that fit Kronecker factors per checkpoint and pool them per segment, unit by unit.

Each rank walks its share of the data, and the sums are reduced once for each unit. Units in the store:

    covariance/step-S             sums of a a^T and g g^T at the checkpoint of step S
    eigenbasis/steps-S-T          bases of A and S averaged over the checkpoints of steps S, T, ...
    eigenvalues/steps-S-T/step-S  corrected eigenvalues in that basis at the checkpoint of step S
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Batch, digest, in_order
from .errors import FactorError, TaskError
from .files import Tensors
from .kronecker import Covariance, Eigenbasis, KroneckerBlock, add_squared_projections_, eigenvectors, mean_over
from .layers import Tokens, TrackedLayer
from .lens import FiniteWatch, Lens
from .ranks import Ranks, balanced
from .task import attention_mask
from .units import Planned, Unit
from .workspace import Workspace

Pool = tuple[int, ...]  # indices of the checkpoints whose curvature is averaged
_NAMED = 6  # steps that a unit's name spells out
_KEPT_SHARE = 8  # of the memory budget, for a pool's blocks


def covariances(lens: Lens, data: Iterable[Batch], ranks: Ranks, where: str) -> dict[str, Covariance]:
    """Covariance sums of every layer over one pass with pseudo-labels, of what all `ranks` walk.

    where: names the checkpoint in errors.
    """
    totals = {name: Covariance.zeros(layer.shape, lens.dtype, lens.device) for name, layer in lens.layers.items()}
    watch = FiniteWatch(f"covariance pass, {where}")
    masks = used = 0
    for batch in data:
        mask = attention_mask(lens.task, batch.content)
        _check_mask(mask, lens)
        masks += mask is not None and not batch.idle

        def consume(layer: TrackedLayer, tokens: Tokens, mask: Any = mask) -> None:
            nonlocal used
            own = _mask_of(layer, tokens, mask)
            used += own is not None
            totals[layer.name].add_(tokens, own)

        lens.capture(batch, consume, watch)
    watch.finish(lens.layers, ranks)
    of_ranks = ranks.gather([masks, used])
    if any(masks for masks, _ in of_ranks) and not any(used for _, used in of_ranks):
        raise TaskError(
            f"{watch.where}: get_attention_mask() fits no tracked layer's [examples, positions], so it would be "
            "ignored. Return the mask of the positions that the layers see (shifted as the inputs are), or None."
        )
    ranks.sum_([total for sums in totals.values() for total in vars(sums).values()])
    return totals


def corrected_eigenvalues(
    lens: Lens, data: Iterable[Batch], bases: Mapping[str, Eigenbasis], ranks: Ranks, where: str, budget: int
) -> dict[str, Tensor]:
    """Lambda [P, O, I] of every layer: the mean over examples of (Q_S^T G Q_A)^2, over one pass with pseudo-labels.

    ranks: those that share the data; budget: bytes for per-example gradients of sequence and convolution layers.
    """
    totals = {
        name: torch.zeros(layer.shape, dtype=lens.dtype, device=lens.device) for name, layer in lens.layers.items()
    }
    watch = FiniteWatch(f"corrected-eigenvalue pass, {where}")
    examples = torch.zeros((), dtype=torch.float64, device=lens.device)

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        add_squared_projections_(totals[layer.name], tokens, bases[layer.name], budget)

    for batch in data:
        lens.capture(batch, consume, watch)
        examples += 0 if batch.idle else batch.size
    watch.finish(lens.layers, ranks)
    ranks.sum_([*totals.values(), examples])
    finite = torch.stack([torch.isfinite(total).all() for total in totals.values()]).tolist()
    if not all(finite):
        raise FactorError(
            f"{watch.where}: the corrected eigenvalues of layer {list(totals)[finite.index(False)]!r} are not finite. "
            "Their sum over the data overflows; use a model in float64."
        )
    return {name: total / examples.to(total.dtype) for name, total in totals.items()}


def fit(work: Workspace, pools: Iterable[Pool], train: Any, batch_size: int) -> None:
    """Make every unit that the pools need and the store does not hold; only inside `observing(model)`.

    A covariance whose eigenbasis is there is not needed any more.
    """
    fitting = _Fitting(work, train, batch_size)
    units, planned = work.units, {pool: fitting.planned(pool) for pool in pools}
    every = {unit.name: unit for each in planned.values() for unit in each}.values()
    while True:  # a covariance made anew may make another pool's eigenbasis stale
        held = units.held(every)
        needed: dict[str, Planned] = {}
        for pool, each in planned.items():
            first = len(pool) if each[len(pool)].name in held else 0
            needed |= {unit.name: unit for unit in each[first:]}
        expected: Counter[str] = Counter()
        for unit in needed.values():
            expected[unit.kind] += unit.examples
        units.journal.expect(expected)
        if not units.settle(list(needed.values()), held):
            return


class _Fitting:
    """One fitting run: plans the units of a pool and makes them."""

    def __init__(self, work: Workspace, train: Any, batch_size: int):
        self.work, self.train = work, train
        work.load(len(work.trajectory) - 1)
        lens = work.lens("train", train)  # checked with labels that repeat themselves
        self.lens = replace(lens, kind="sample", seed=work.seed, place=work.trajectory.total_steps)
        self.lists = work.ranks.share(in_order(len(train), batch_size))
        self.made_from = {
            **work.made_from(train, self.lens),
            **work.sampling_needs(train, self.lens, batch_size),
            "dtype": str(lens.dtype),
        }
        self.bases = lru_cache(1)(self._read_bases)

    def planned(self, pool: Pool) -> list[Planned]:
        """A pool's units in the order of making: a covariance for each checkpoint, the eigenbasis, the eigenvalues."""
        work, examples = self.work, sum(map(len, self.lists))
        digests = {index: work.checkpoint_digest(index) for index in pool}
        covariances = [
            Planned(
                "covariance",
                _covariance_unit(work, index),
                self.made_from | {"checkpoint": digests[index]},
                (),
                examples,
                partial(self._make_covariance, index),
            )
            for index in pool
        ]
        basis_from = self.made_from | {"checkpoints": list(digests.values())}
        sources = tuple(unit.name for unit in covariances)
        basis = Planned(
            "eigenbasis", _basis_unit(work, pool), basis_from, sources, 0, partial(self._make_bases, pool, covariances)
        )
        eigenvalues = [
            Planned(
                "eigenvalues",
                _eigenvalues_unit(work, pool, index),
                basis_from | {"checkpoint": digests[index]},
                (basis.name,),
                examples,
                partial(self._make_eigenvalues, index, basis),
            )
            for index in pool
        ]
        return [*covariances, basis, *eigenvalues]

    def _pass(self, index: int, kind: str) -> tuple[Lens, Iterator[Batch], str]:
        """The lens and the data for one pass at a checkpoint, and the checkpoint's name."""
        self.work.load(index)
        lens, where = replace(self.lens, place=self.work.step(index)), self.work.where(index)
        return lens, self.work.walk(lens, self.train, self.lists, f"{kind}, {where}"), where

    def _make_covariance(self, index: int) -> Tensors:
        lens, data, where = self._pass(index, "covariance")
        found = covariances(lens, data, self.work.ranks, where)
        return {f"{name}.{key}": value for name, sums in found.items() for key, value in vars(sums).items()}

    def _make_eigenvalues(self, index: int, basis: Planned) -> Tensors:
        bases = self.bases(basis.name)
        lens, data, where = self._pass(index, "eigenvalues")
        return corrected_eigenvalues(lens, data, bases, self.work.ranks, where, self.work.memory // 8)

    def _make_bases(self, pool: Pool, sources: list[Planned]) -> Tensors:
        """Eigenvectors of the pooled covariances in float64, each side of each layer on one rank."""
        ranks, steps = self.work.ranks, [self.work.step(index) for index in pool]
        units = [self.work.units.open(source.name, source.made_from) for source in sources]
        sides = _sides(self.lens)
        owners = balanced([shape[0] * shape[1] ** 3 for _, _, shape in sides], ranks.count)
        hands = [
            [side for side, owner in zip(sides, owners, strict=True) if owner == rank] for rank in range(ranks.count)
        ]
        own: list[Tensor] = []
        for dealt in zip_longest(*hands):
            matrix = ranks.deal([side and _pooled(units, side) for side in dealt], self.lens.device)
            if matrix is not None:
                own.append(matrix)
        found = []
        for (name, side, _), matrix in zip(hands[ranks.index], own, strict=True):
            found.append(eigenvectors(matrix, f"layer {name!r}, {side}, checkpoints at steps {steps}"))
        made = {}
        for dealt, vectors in zip_longest(zip_longest(*hands), found):
            for side, theirs in zip(dealt, ranks.collect(vectors), strict=False):
                if side is not None and theirs is not None:
                    made[f"{side.layer}.{side.name}"] = theirs
        return made

    def _read_bases(self, unit: str) -> dict[str, Eigenbasis]:
        basis = self.work.units.open(unit, self.made_from)
        return {name: _basis(basis, name, self.lens) for name in self.lens.layers}


class StoredCurvature(Mapping[str, KroneckerBlock]):
    """The fitted blocks of a pool, eigenvalues averaged over its checkpoints, read layer by layer when asked for.

    fits: whether all blocks together take no more than their share of the memory budget; if so they are kept. Every
    rank must ask for the same layers in the same order. Raises StoreError where they were not fitted, or from something
    else.

    Args:
        train_from: `Workspace.made_from` of the training data.
    """

    def __init__(self, work: Workspace, pool: Pool, train_from: Mapping[str, Any], lens: Lens):
        self.lens = lens
        self.units = [_basis_unit(work, pool), *(_eigenvalues_unit(work, pool, index) for index in pool)]
        made_from = {
            **train_from,
            "dtype": str(lens.dtype),
            "checkpoints": [work.checkpoint_digest(index) for index in pool],
        }
        self._basis, *self._eigenvalues = [work.units.open(unit, made_from) for unit in self.units]
        numbers = sum(P * (O * O + I * I + O * I) for P, O, I in (layer.shape for layer in lens.layers.values()))
        self.fits = numbers * lens.dtype.itemsize <= work.memory // _KEPT_SHARE
        self._kept: dict[str, KroneckerBlock] = {}

    def __getitem__(self, name: str) -> KroneckerBlock:
        if name in self._kept:
            return self._kept[name]
        shape, device = self.lens.layers[name].shape, self.lens.device
        total = torch.stack([unit.tensor(name, shape, device) for unit in self._eigenvalues]).mean(0)
        block = KroneckerBlock(_basis(self._basis, name, self.lens), total)
        if self.fits:
            self._kept[name] = block
        return block

    def __iter__(self) -> Iterator[str]:
        return iter(self.lens.layers)

    def __len__(self) -> int:
        return len(self.lens.layers)


def _basis(unit: Unit, name: str, lens: Lens) -> Eigenbasis:
    """One layer's eigenbasis, in the lens's precision."""
    P, O, I = lens.layers[name].shape
    inputs = unit.tensor(f"{name}.inputs", (P, I, I), lens.device)
    return Eigenbasis(inputs.to(lens.dtype), unit.tensor(f"{name}.outputs", (P, O, O), lens.device).to(lens.dtype))


class _Side(NamedTuple):
    """One side of a layer's curvature: "inputs" or "outputs", and the shape of its covariance."""

    layer: str
    name: str
    shape: tuple[int, int, int]


def _sides(lens: Lens) -> list[_Side]:
    shapes = {name: layer.shape for name, layer in lens.layers.items()}
    return [
        _Side(name, side, (P, D, D))
        for name, (P, O, I) in shapes.items()
        for side, D in (("inputs", I), ("outputs", O))
    ]


def _pooled(units: Sequence[Unit], side: _Side) -> Tensor | None:
    """A layer's A or S averaged over the units' checkpoints, on rank 0."""
    total, rows = ("a_PII", "a_rows") if side.name == "inputs" else ("g_POO", "g_rows")
    names = [(f"{side.layer}.{total}", side.shape), (f"{side.layer}.{rows}", ())]
    files = [unit.file for unit in units if unit.file is not None]
    return mean_over([(file.tensor(*names[0]), file.tensor(*names[1])) for file in files]) if files else None


def _covariance_unit(work: Workspace, index: int) -> str:
    return f"covariance/step-{work.step(index)}"


def _pool_name(work: Workspace, pool: Pool) -> str:
    steps = [str(work.step(index)) for index in pool]
    if len(steps) <= _NAMED:
        return "steps-" + "-".join(steps)
    return f"steps-{steps[0]}-to-{steps[-1]}-{digest(steps)[:12]}"


def _basis_unit(work: Workspace, pool: Pool) -> str:
    return f"eigenbasis/{_pool_name(work, pool)}"


def _eigenvalues_unit(work: Workspace, pool: Pool, index: int) -> str:
    return f"eigenvalues/{_pool_name(work, pool)}/step-{work.step(index)}"


def _check_mask(mask: Any, lens: Lens) -> None:
    """Raise TaskError unless the mask is None, a tensor, or a mapping from tracked layers' names to tensors."""
    masks = mask if isinstance(mask, Mapping) else {} if mask is None else {next(iter(lens.layers)): mask}
    unknown = sorted(set(masks) - set(lens.layers))
    if unknown or not all(isinstance(one, Tensor) for one in masks.values()):
        raise TaskError(
            f"get_attention_mask(): expected a tensor [examples, positions], or a mapping to such tensors from names "
            f"of {list(lens.layers)[:8]}, found {f'names {unknown[:4]}' if unknown else type(mask).__name__}."
        )


def _mask_of(layer: TrackedLayer, tokens: Tokens, mask: Tensor | Mapping[str, Tensor] | None) -> Tensor | None:
    """The mask if it speaks of this layer's positions."""
    if isinstance(mask, Mapping):
        mask = mask.get(layer.name)
    return mask if mask is not None and mask.shape == tokens.a_PBSI.shape[1:3] else None
