"""The data passes that fit Kronecker factors per checkpoint and pool them per segment, unit by unit.

Units in the store:

    covariance/step-S             sums of a a^T and g g^T at the checkpoint of step S
    eigenbasis/steps-S-T          bases of A and S averaged over the checkpoints of steps S, T, ...
    eigenvalues/steps-S-T/step-S  corrected eigenvalues in that basis at the checkpoint of step S
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .data import Batch, digest, in_order
from .errors import FactorError, TaskError
from .kronecker import Covariance, Eigenbasis, KroneckerBlock, add_squared_projections_, eigenbasis
from .layers import Tokens, TrackedLayer
from .lens import FiniteWatch, Lens
from .progress import track
from .store import Tensors
from .task import attention_mask
from .workspace import Workspace

Pool = tuple[int, ...]  # indices of the checkpoints whose curvature is averaged
_NAMED = 6  # steps that a unit's name spells out


def covariances(lens: Lens, data: Iterable[Batch], seed: int, where: str) -> dict[str, Covariance]:
    """Covariance sums of every layer over one pass with pseudo-labels; where names the checkpoint in errors."""
    totals = {name: Covariance.zeros(layer.shape, lens.dtype, lens.device) for name, layer in lens.layers.items()}
    watch = FiniteWatch(f"covariance pass, {where}")
    masks = used = 0
    for batch in data:
        mask = attention_mask(lens.task, batch.content)
        _check_mask(mask, lens)
        masks += mask is not None

        def consume(layer: TrackedLayer, tokens: Tokens, mask: Any = mask) -> None:
            nonlocal used
            own = _mask_of(layer, tokens, mask)
            used += own is not None
            totals[layer.name].add_(tokens, own)

        torch.manual_seed(_seed_of(seed, where, "covariance", batch.number))
        lens.capture(batch, consume, watch)
    watch.finish(lens.layers)
    if masks and not used:
        raise TaskError(
            f"{watch.where}: get_attention_mask() fits no tracked layer's [examples, positions], so it would be "
            "ignored. Return the mask of the positions that the layers see (shifted as the inputs are), or None."
        )
    return totals


def corrected_eigenvalues(
    lens: Lens, data: Iterable[Batch], bases: Mapping[str, Eigenbasis], seed: int, where: str, budget: int
) -> dict[str, Tensor]:
    """Lambda [P, O, I] of every layer: the mean over examples of (Q_S^T G Q_A)^2, over one pass with pseudo-labels.

    budget: bytes for per-example gradients of sequence and convolution layers.
    """
    totals = {
        name: torch.zeros(layer.shape, dtype=lens.dtype, device=lens.device) for name, layer in lens.layers.items()
    }
    watch = FiniteWatch(f"corrected-eigenvalue pass, {where}")
    examples = 0

    def consume(layer: TrackedLayer, tokens: Tokens) -> None:
        add_squared_projections_(totals[layer.name], tokens, bases[layer.name], budget)

    for batch in data:
        torch.manual_seed(_seed_of(seed, where, "eigenvalues", batch.number))
        lens.capture(batch, consume, watch)
        examples += batch.size
    watch.finish(lens.layers)
    finite = torch.stack([torch.isfinite(total).all() for total in totals.values()]).tolist()
    if not all(finite):
        raise FactorError(
            f"{watch.where}: the corrected eigenvalues of layer {list(totals)[finite.index(False)]!r} are not finite. "
            "Their sum over the data overflows; use a model in float64."
        )
    return {name: total / examples for name, total in totals.items()}


def fit(work: Workspace, pools: Iterable[Pool], train: Any, batch_size: int) -> None:
    """Make every unit that the pools need and the store does not hold; only inside `observing(model)`."""
    work.load(len(work.trajectory) - 1)
    lens = replace(work.lens("train", train), kind="sample")  # checked with labels that repeat themselves
    lists = in_order(len(train), batch_size)
    made_from = {
        **work.made_from(train, lens),
        "sampled losses": work.probe_losses(train, lens),
        "batch_size": batch_size,
        "dtype": str(lens.dtype),
    }

    def make_covariance(index: int) -> Tensors:
        work.load(index)
        where = work.where(index)
        found = covariances(lens, work.walk(lens, train, lists, f"covariance, {where}"), work.seed, where)
        return {f"{name}.{key}": value for name, sums in found.items() for key, value in vars(sums).items()}

    def make_eigenvalues(index: int, bases: Mapping[str, Eigenbasis]) -> Tensors:
        work.load(index)
        where = work.where(index)
        data = work.walk(lens, train, lists, f"eigenvalues, {where}")
        return corrected_eigenvalues(lens, data, bases, work.seed, where, work.memory // 8)

    for pool in pools:
        digests = {index: work.trajectory.digest(index) for index in pool}
        for index in pool:
            unit = _covariance_unit(work, index)
            work.store.get_or_make(unit, made_from | {"checkpoint": digests[index]}, partial(make_covariance, index))
        basis_from = made_from | {"checkpoints": list(digests.values())}
        tensors = work.store.get_or_make(
            _basis_unit(work, pool), basis_from, partial(_make_bases, work, pool, made_from)
        )
        bases = _bases(lens, tensors)
        for index in pool:
            eigenvalues_from = basis_from | {"checkpoint": digests[index]}
            unit = _eigenvalues_unit(work, pool, index)
            work.store.get_or_make(unit, eigenvalues_from, partial(make_eigenvalues, index, bases))


def pooled_curvature(
    work: Workspace, pool: Pool, train_from: Mapping[str, Any], lens: Lens
) -> dict[str, KroneckerBlock]:
    """The fitted blocks of every layer, eigenvalues averaged over the pool's checkpoints.

    train_from: `Workspace.made_from` of the training data. Raises StoreError where they were not fitted, or from
    something else.
    """
    digests = [work.trajectory.digest(index) for index in pool]
    made_from = {**train_from, "dtype": str(lens.dtype), "checkpoints": digests}
    bases = _bases(lens, work.store.read(_basis_unit(work, pool), made_from))
    each = [work.store.read(_eigenvalues_unit(work, pool, index), made_from) for index in pool]
    return {
        name: KroneckerBlock(basis, torch.stack([one[name] for one in each]).mean(0).to(lens.device))
        for name, basis in bases.items()
    }


def _make_bases(work: Workspace, pool: Pool, made_from: Mapping[str, Any]) -> Tensors:
    """Eigenvectors of the pooled covariances, in float64."""
    sums = [work.store.read(_covariance_unit(work, index), made_from) for index in pool]
    steps = [work.step(index) for index in pool]
    tensors: Tensors = {}
    for name in track(work.layers.tracked, f"eigenbases, steps {steps}", enabled=work.progress):
        parts = [Covariance(**{f.name: one[f"{name}.{f.name}"] for f in fields(Covariance)}) for one in sums]
        basis = eigenbasis(parts, f"layer {name!r}, checkpoints at steps {steps}")
        tensors |= {f"{name}.inputs": basis.inputs_PII, f"{name}.outputs": basis.outputs_POO}
    return tensors


def _bases(lens: Lens, tensors: Tensors) -> dict[str, Eigenbasis]:
    def side(name: str, which: str) -> Tensor:
        return tensors[f"{name}.{which}"].to(lens.device, lens.dtype)

    return {name: Eigenbasis(side(name, "inputs"), side(name, "outputs")) for name in lens.layers}


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


def _seed_of(seed: int, *place: object) -> int:
    """A seed of its own for each place of each pass, the same in every run."""
    content = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return int.from_bytes(content[:7], "little")
