"""Whole methods in a naive dense implementation of their formulas, from the oracles' quantities at each checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf

from . import oracles
from .helpers import FixedLabels, apart, example_loss

N, QUERIES = 20, 4
LR, MOMENTUM, WEIGHT_DECAY = 0.7, 0.5, 0.03
TRAINED = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}  # for trajectory_of, with four states


@dataclass(frozen=True)
class Quantities:
    """In float64, by checkpoint and layer: covariances; gradients of sampled and real losses and of measurements."""

    layers: tuple[str, ...]
    covariances: list[dict[str, Any]]
    sampled: list[dict[str, Tensor]]
    real: list[dict[str, Tensor]]
    asked: list[dict[str, Tensor]]

    def fits(self, layer: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Each checkpoint's (A, S, example_grads) of a layer, as `oracles.pooled_ekfac` takes them."""
        return [(*c[layer], s[layer]) for c, s in zip(self.covariances, self.sampled, strict=True)]


def quantities(
    model: nn.Module, states: Sequence[dict[str, Tensor]], train: TensorDataset, query: TensorDataset
) -> Quantities:
    """What the formulas need; the model is left in float64."""
    model = model.double()
    train, query = (TensorDataset(data.tensors[0].double(), data.tensors[1]) for data in (train, query))
    task = FixedLabels()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    found = Quantities(tuple(layers), [], [], [], [])
    for state in states:
        model.load_state_dict({name: value.double() for name, value in state.items()})
        sample = example_loss(model, train, task, "sample")
        found.covariances.append(oracles.naive_covariances(model, layers, sample, N))
        found.sampled.append(oracles.example_gradients(model, layers, sample, N))
        found.real.append(oracles.example_gradients(model, layers, example_loss(model, train, task), N))
        measured = example_loss(model, query, task, "measurement")
        found.asked.append(oracles.example_gradients(model, layers, measured, QUERIES))
    return found


def ekfac_traces(of: Quantities, pool: Sequence[int], weights: Callable[[str], Sequence[float]]) -> dict[str, float]:
    """Each layer's trace of the curvature of a pool of checkpoints; weights: theirs, of a layer."""
    pooled = {name: [of.fits(name)[place] for place in pool] for name in of.layers}
    return {name: float(oracles.pooled_ekfac(fits, weights(name))[2].sum()) for name, fits in pooled.items()}


def reference(of: Quantities, groups: sf.Groups, combine: Callable[..., Tensor]) -> Tensor:
    """Scores: the sum over layers and parts of what `combine` says of the quantities of one part, in float64.

    It is called with the checkpoints' query gradients and sums of groups, and a function `curvature(pool, weights)` of
    the part, or with `coupled` of the part over its layer's share, where all layers have one rate.
    """
    total = torch.zeros(QUERIES, len(groups), dtype=torch.float64)
    for name in of.layers:
        for part in range(of.real[0][name].shape[1]):
            grouped = [torch.stack([r[name][list(m), part].flatten(1).sum(0) for m in groups.members]) for r in of.real]
            queries = [a[name][:, part].flatten(1) for a in of.asked]

            def curvature(
                pool: Any, weights: Any = None, coupled: bool = False, name: str = name, part: int = part
            ) -> Tensor:
                fits = [of.fits(name)[place] for place in pool]
                own = oracles.dense_curvature(*oracles.pooled_ekfac(fits, weights))[part]
                return own / _share(of, name, pool, weights) if coupled else own

            total = total + combine(queries, grouped, curvature)
    return total


def _share(of: Quantities, layer: str, pool: Sequence[int], weights: Sequence[float]) -> float:
    return oracles.trace_shares(ekfac_traces(of, pool, lambda _layer: weights), dict.fromkeys(of.layers, 1.0))[layer]


# What all steps take of each of 40 steps' gradients: a geometric sum of those that are left (torch.optim.SGD).
RATES = [LR * (1 - MOMENTUM**left) / (1 - MOMENTUM) for left in range(40, 0, -1)]


COVERED = [sum(part) for part in (RATES[:15], RATES[15:25], RATES[25:35], RATES[35:])]  # nearest to each checkpoint


def _source(
    queries: Any, grouped: Any, curvature: Any, weights: tuple[float, float] | None = None, default: bool = True
) -> Tensor:
    """A segment of 20 steps has checkpoints after 10 and 20: 15 steps are nearest to the first, 5 to the second.

    default: layers are coupled, and the query gradient is the mean of those at all checkpoints.
    """
    along = [0.25] * 4 if weights else [own / sum(RATES) for own in COVERED]
    query = sum(w * q for w, q in zip(along, queries, strict=True)) if default else queries[-1]
    segments = []
    for pool, rates in (((0, 1), RATES[:20]), ((2, 3), RATES[20:])):
        shares = weights or (sum(rates[:15]) / sum(rates), sum(rates[15:]) / sum(rates))
        segment = {
            "curvature": curvature(pool, shares, coupled=default),
            "weights": shares,
            "lr_steps": sum(rates),
            "decay_steps": sum(rates) * WEIGHT_DECAY,
            "group_gradients": [grouped[i] for i in pool],
        }
        segments.append(segment)
    return torch.stack(oracles.source_scores(query, segments, N)).sum(0)


def _influence(queries: Any, grouped: Any, curvature: Any) -> Tensor:
    return oracles.influence_scores(queries[-1], curvature((3,)), 0.01, grouped[-1], N)


def _tracin(queries: Any, grouped: Any, _curvature: Any) -> Tensor:
    return oracles.tracin_scores([(q, own, g) for own, q, g in zip(COVERED, queries, grouped, strict=True)], N)


METHODS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "source": (sf.Source(segments=2), _source),
    "source, equal weights": (
        sf.Source(segments=2, checkpoint_weights="equal"),
        partial(_source, weights=(0.5, 0.5)),
    ),
    "source, layers apart": (apart(2), partial(_source, default=False)),
    "the paper's source": (
        apart(2, checkpoint_weights="equal"),
        partial(_source, weights=(0.5, 0.5), default=False),
    ),
    "influence": (sf.InfluenceFunction(damping=0.01), _influence),
    "tracin": (sf.TracIn(), _tracin),
}
