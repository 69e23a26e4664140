"""Random projections that need not form a gradient: each feature is a rank-one probe of every layer.

Feature j of a gradient G is the sum over layers and parts of u_j^T G w_j / sqrt(k) with standard normal u_j and w_j, so
that products of features estimate products of gradients without bias. From tokens it is (u_j . g)(w_j . a), summed over
positions.

Axes: k features, P parts, B examples, S positions, O outputs, I inputs, Q gradients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.plan import Projection
from ..model.one_hot import OneHot
from ..model.tokens import Tokens
from .kronecker import example_gradients


@dataclass(frozen=True)
class Probes:
    """One layer's probes u and w; None where nothing is projected and every parameter is a feature."""

    outputs_kPO: Tensor | None
    inputs_kPI: Tensor | None
    shape: tuple[int, int, int]

    @property
    def features(self) -> int:
        """How many features the layer has: k, or the number of its parameters."""
        P, O, I = self.shape
        return P * O * I if self.outputs_kPO is None else len(self.outputs_kPO)

    def of_tokens(self, tokens: Tokens) -> Tensor:
        """[B, k]: the features of each example's gradient."""
        if self.outputs_kPO is None:
            return example_gradients(tokens).flatten(1)
        (_, _, S, I), O, k = tokens.a_PBSI.shape, tokens.g_PBSO.shape[-1], len(self.outputs_kPO)
        fewer = S * O * I + k * O * I < S * k * (O + I)  # multiplications, with many positions
        if fewer and not isinstance(tokens.a_PBSI, OneHot):
            return self.of_gradients(example_gradients(tokens))
        left = torch.einsum("pbso,kpo->pbsk", tokens.g_PBSO, self.outputs_kPO)
        right = tokens.times(self.inputs_kPI.permute(1, 2, 0))  # type: ignore[union-attr]
        return (left * right).sum((0, 2))

    def of_gradients(self, gradient_QPOI: Tensor) -> Tensor:
        """[Q, k]: the features of gradients."""
        if self.outputs_kPO is None:
            return gradient_QPOI.flatten(1)
        left = torch.einsum("qpoi,kpo->qkpi", gradient_QPOI, self.outputs_kPO)
        return torch.einsum("qkpi,kpi->qk", left, self.inputs_kPI)

    def gradients(self, features_Qk: Tensor) -> Tensor:
        """[Q, P, O, I]: the transposed map, from features back to gradients."""
        if self.outputs_kPO is None:
            return features_Qk.unflatten(1, self.shape)
        weighted = torch.einsum("qk,kpo->qkpo", features_Qk, self.outputs_kPO)
        return torch.einsum("qkpo,kpi->qpoi", weighted, self.inputs_kPI)


def probes(
    projection: Projection, shapes: Mapping[str, tuple[int, int, int]], dtype: torch.dtype, device: torch.device
) -> dict[str, Probes]:
    """Each layer's probes; they depend on the projection's seed and the layer's name only.

    shapes: [P, O, I] of each layer.
    """
    by_layer = {}
    for name, (P, O, I) in shapes.items():
        k = projection.dimension
        if k is None:
            by_layer[name] = Probes(None, None, (P, O, I))
            continue
        layer_seed = hashlib.sha256(f"{projection.seed}/{name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(layer_seed, "big"))
        u, w = (torch.randn(k, P, D, generator=generator, dtype=torch.float64) for D in (O, I))
        by_layer[name] = Probes((u / k**0.5).to(device, dtype), w.to(device, dtype), (P, O, I))
    return by_layer


def join_layers(features: Mapping[str, Tensor], projection: Projection) -> Tensor:
    """The features of all layers: summed where they are random probes, side by side where nothing is projected."""
    by_layer = list(features.values())
    return torch.cat(by_layer, 1) if projection.dimension is None else torch.stack(by_layer).sum(0)


def split_layers(features_Qk: Tensor, probes_of: Mapping[str, Probes], projection: Projection) -> dict[str, Tensor]:
    """The transpose of `join_layers`: each layer's own features."""
    if projection.dimension is not None:
        return dict.fromkeys(probes_of, features_Qk)
    sizes = [probe.features for probe in probes_of.values()]
    return dict(zip(probes_of, features_Qk.split(sizes, 1), strict=True))
