"""Embeddings: their inputs are one-hot, so that the input side of the curvature is diagonal and never formed.

Axes: R rows (bags), S positions (indices of a bag), V the vocabulary, D the width of the embedding, Q gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..one_hot import OneHot
from .registry import register
from .tracked import Modules, TrackedLayer


@register
@dataclass(frozen=True)
class EmbeddingLayer(TrackedLayer):
    """nn.Embedding, of shape [1, O = D, I = V]: a token for each index."""

    modules: ClassVar[Modules] = (nn.Embedding,)
    exact_P: ClassVar = True

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Options that change the weight in the forward, or its gradient by what else is in the batch."""
        if module.max_norm is not None:
            return "max_norm= changes its weight in the forward"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq= makes an example's gradient depend on the rest of the batch"
        return None

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[OneHot, Tensor]:
        """The indices, and the gradients of the rows that were looked up."""
        index_RS, g_RSD = value.reshape(len(value), -1), gradient.reshape(len(gradient), -1, gradient.shape[-1])
        counts_RS = torch.ones_like(index_RS, dtype=gradient.dtype)
        if self.module.padding_idx is not None:
            counts_RS = counts_RS * (index_RS != self.module.padding_idx)
        return OneHot(index_RS, counts_RS, self.parameters[0].shape[0]), g_RSD[None]

    def positions(self, shape: torch.Size) -> int:
        """How many indices."""
        return max(1, shape.numel() // 2)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[1, D, V]."""
        vocabulary, width = self.parameters[0].shape
        return 1, width, vocabulary

    @property
    def diagonal_inputs(self) -> bool:
        """The inputs are one-hot."""
        return True

    def gradient_matrices(self, tensors_Q: Sequence[Tensor]) -> Tensor:
        """[Q, 1, D, V], the weight transposed."""
        return tensors_Q[0].mT[:, None]

    def by_parameter(self, gradient_QPOI: Tensor) -> list[Tensor]:
        """[Q, V, D]."""
        return [gradient_QPOI[:, 0].mT]


@register
class ScaledEmbeddingLayer(EmbeddingLayer):
    """The transformers families' embeddings whose output is multiplied by a constant, `embed_scale`."""

    @classmethod
    def base_of(cls, module: nn.Module) -> type[nn.Module] | None:
        """By the class's name: each family has its own."""
        scaled = isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")
        return type(module) if scaled and hasattr(module, "embed_scale") else None

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[OneHot, Tensor]:
        """As an embedding's, of gradients that are scaled back."""
        scale: Any = self.module.embed_scale
        return super().sides(value, gradient * (scale.to(gradient) if isinstance(scale, Tensor) else scale))


@register
class EmbeddingBagLayer(EmbeddingLayer):
    """nn.EmbeddingBag with sums or means: every index of a bag is a position. One of maxima is no sum of them."""

    modules: ClassVar[Modules] = (nn.EmbeddingBag,)
    examples_first: ClassVar = True

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        """Not for the largest of a bag's rows: which one that is depends on the weight."""
        return module.mode != "max"

    def call_value(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """[R, S, 2]: each bag's indices, and the bits of how often each counts, 0 where a bag has fewer."""
        names = ("input", "offsets", "per_sample_weights")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        indices, offsets, weights = (given.get(name) for name in names)
        if indices.ndim == 1:  # type: ignore[union-attr]
            indices, present, weights = _bags(indices, offsets, weights, bool(self.module.include_last_offset))  # type: ignore[arg-type]
        else:
            present = torch.ones_like(indices, dtype=torch.bool)  # type: ignore[arg-type]
        if self.module.padding_idx is not None:
            present = present & (indices != self.module.padding_idx)
        counts = present.double() if weights is None else present * weights.double()
        if self.module.mode == "mean":
            counts = counts / present.sum(1, keepdim=True).clamp_min(1)
        return torch.stack([indices.long(), counts.view(torch.long)], -1)  # type: ignore[union-attr]

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[OneHot, Tensor]:
        """Every index of a bag sees the bag's gradient, as often as it counts."""
        index_RS, counts_RS = value[..., 0], value[..., 1].contiguous().view(torch.double).to(gradient.dtype)
        g_RSD = gradient[:, None].expand(-1, index_RS.shape[1], -1)
        return OneHot(index_RS, counts_RS, self.parameters[0].shape[0]), g_RSD[None]

    def positions(self, shape: torch.Size) -> int:
        """How many indices the larger bag has."""
        return max(1, shape[1])


def _bags(
    indices_T: Tensor, offsets_R: Tensor, weights_T: Tensor | None, ends: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Indices [R, S] of bags one after the other, whether each is there, and their weights.

    ends: whether the last offset is the end of the last bag.
    """
    starts_R = offsets_R[:-1] if ends else offsets_R
    stops_R = torch.cat([starts_R[1:], offsets_R[-1:] if ends else offsets_R.new_full((1,), len(indices_T))])
    most = int((stops_R - starts_R).max()) if len(starts_R) else 0
    places_RS = starts_R[:, None] + torch.arange(most, device=offsets_R.device)
    present_RS = places_RS < stops_R[:, None]
    places_RS = places_RS.clamp_max(max(0, len(indices_T) - 1))
    return indices_T[places_RS], present_RS, None if weights_T is None else weights_T[places_RS]
