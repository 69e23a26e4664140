"""nn.MultiheadAttention: its projections of queries, keys and values, each a linear layer by itself.

torch's module uses its weights without calling anything. While a model is observed, its calls take another way to the
same numbers: each projection is a call of its own, and torch's attention is run on what they give, with identities for
projections.
Axes: E the width, Q gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from .linear import LinearLayer
from .registry import register
from .tracked import BiasLayer, Modules, Owner, TrackedLayer

_PARTS = ("q", "k", "v")
_PROJECTIONS: WeakKeyDictionary[nn.Module, dict[str, Projection]] = WeakKeyDictionary()


class Projection(nn.Module):
    """One of an attention's projections, as a module that can be called; it holds nothing of its own."""

    def __init__(self, attention: nn.MultiheadAttention, part: str):
        super().__init__()
        self._attention, self.part = weakref.ref(attention), part

    @property
    def attention(self) -> Any:
        """The module whose projection it is."""
        return self._attention()

    @property
    def weight(self) -> Tensor:
        """[E, inputs]."""
        attention = self.attention
        if attention.in_proj_weight is None:
            return getattr(attention, f"{self.part}_proj_weight")  # type: ignore[no-any-return]  # no parameter in torch.func
        return attention.in_proj_weight[self.rows]

    @property
    def rows(self) -> slice:
        """Of the joint bias, and of the joint weight where there is one."""
        E = self.attention.embed_dim
        place = _PARTS.index(self.part)
        return slice(place * E, (place + 1) * E)

    def forward(self, x: Tensor) -> Tensor:
        """The projection."""
        bias = self.attention.in_proj_bias
        return functional.linear(x, self.weight, None if bias is None else bias[self.rows])


def projections(attention: nn.MultiheadAttention) -> dict[str, Projection]:
    """The three projections of a module, the same ones each time."""
    if attention not in _PROJECTIONS:
        _PROJECTIONS[attention] = {part: Projection(attention, part) for part in _PARTS}
    return _PROJECTIONS[attention]


@dataclass(frozen=True)
class ProjectionLayer(LinearLayer):
    """The weight of one projection, and its bias where both were trained alike: rows of the module's tensors."""

    modules: ClassVar[Modules] = ()

    @property
    def projection(self) -> Projection:
        """What is called."""
        return self.module  # type: ignore[return-value]

    @property
    def joint(self) -> bool:
        """Whether all three weights are one tensor."""
        return self.projection.attention.in_proj_weight is not None

    @property
    def parameters(self) -> list[Tensor]:
        """The module's tensors, all rows of them."""
        attention = self.projection.attention
        weight = attention.in_proj_weight if self.joint else self.projection.weight
        return [weight, attention.in_proj_bias] if self.has_bias else [weight]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[1, E, inputs]."""
        outputs, inputs = self.projection.weight.shape
        return 1, outputs, inputs + int(self.has_bias)

    def gradient_matrices(self, tensors_Q: Sequence[Tensor]) -> Tensor:
        """[Q, 1, E, inputs]: this projection's rows."""
        rows = self.projection.rows
        weight_Q = tensors_Q[0][:, rows] if self.joint else tensors_Q[0]
        return super().gradient_matrices([weight_Q, *(bias_Q[:, rows] for bias_Q in tensors_Q[1:])])

    def by_parameter(self, gradient_QPOI: Tensor) -> list[Tensor]:
        """Shaped as the module's tensors, zeros in the other projections' rows."""
        inputs = self.shape[2] - int(self.has_bias)
        own = [gradient_QPOI[:, 0, :, :inputs], gradient_QPOI[:, 0, :, inputs:].flatten(1)][: len(self.parameters)]
        return [_in_rows(of, p, self.projection.rows) for of, p in zip(own, self.parameters, strict=True)]


@dataclass(frozen=True)
class ProjectionBias(BiasLayer):
    """The bias of one projection, by itself: rows of the module's bias."""

    @property
    def projection(self) -> Projection:
        """What is called."""
        return self.module  # type: ignore[return-value]

    @property
    def parameters(self) -> list[Tensor]:
        """The module's bias, all of it."""
        return [self.projection.attention.in_proj_bias]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[1, E, 1]."""
        return 1, self.projection.attention.embed_dim, 1

    def gradient_matrices(self, tensors_Q: Sequence[Tensor]) -> Tensor:
        """[Q, 1, E, 1]."""
        return super().gradient_matrices([tensors_Q[0][:, self.projection.rows]])

    def by_parameter(self, gradient_QPOI: Tensor) -> list[Tensor]:
        """[Q, 3 E], zeros in the other projections' rows."""
        [bias] = self.parameters
        return [_in_rows(gradient_QPOI.flatten(1), bias, self.projection.rows)]


@register
class AttentionLayer(TrackedLayer):
    """nn.MultiheadAttention: blocks for the projections of queries, keys and values, called NAME.q, NAME.k, NAME.v."""

    modules: ClassVar[Modules] = (nn.MultiheadAttention,)

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        """Without bias_k and bias_v."""
        return module.bias_k is None and module.bias_v is None

    @classmethod
    def blocks(cls, owner: Owner) -> list[TrackedLayer]:
        """A block for each projection, and for its bias where that was trained otherwise."""
        found: list[TrackedLayer] = []
        names, bias = owner.names, owner.names.get("in_proj_bias")
        for part, module in projections(owner.module).items():  # type: ignore[arg-type]
            attribute = "in_proj_weight" if "in_proj_weight" in names else f"{part}_proj_weight"
            name, folded = owner.within(part), bias is not None and attribute in names
            folded = folded and owner.alike(attribute, "in_proj_bias")
            if attribute in names:
                own = (names[attribute], str(bias)) if folded else (names[attribute],)
                found.append(ProjectionLayer(name, module, folded, own, owner.sizes))
            if bias is not None and not folded:
                found.append(ProjectionBias(f"{name}.bias", module, False, (bias,), owner.sizes, "in_proj_bias"))
        return found

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of no use: the projections are called."""
        raise NotImplementedError


@contextmanager
def called_projections(model: nn.Module) -> Iterator[None]:
    """Inside, every nn.MultiheadAttention of the model calls its projections, and gives the same numbers as before."""
    changed = [
        module
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
        if "forward" not in vars(module)
    ]
    for module in changed:
        module.forward = _forward(module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _forward(attention: nn.MultiheadAttention) -> Any:
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        given = zip(projections(attention).values(), (query, key, value), strict=True)
        projected = [projection(x) for projection, x in given]
        batched = query.dim() == 3 and attention.batch_first
        q, k, v = (x.transpose(0, 1) if batched else x for x in projected)
        E = attention.embed_dim
        identity = torch.eye(E, dtype=q.dtype, device=q.device)
        output, weights = functional.multi_head_attention_forward(
            q,
            k,
            v,
            E,
            attention.num_heads,
            None,
            None,
            attention.bias_k,
            attention.bias_v,
            attention.add_zero_attn,
            attention.dropout,
            identity,
            None,
            training=attention.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=identity,
            k_proj_weight=identity,
            v_proj_weight=identity,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        output = attention.out_proj(output)
        return (output.transpose(0, 1) if batched else output), weights

    return forward


def _in_rows(values_Q: Tensor, parameter: Tensor, rows: slice) -> Tensor:
    """Values in some rows of a tensor shaped as a parameter, zeros in the others."""
    if len(parameter) == values_Q.shape[1]:
        return values_Q
    whole = values_Q.new_zeros(len(values_Q), *parameter.shape)
    whole[:, rows] = values_Q
    return whole
