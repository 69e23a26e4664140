"""Norms: what is normalised is scaled and shifted elementwise, so that each parameter is a vector by itself.

Axes: R rows, D numbers of a parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .registry import register
from .tracked import BiasLayer, Modules, Owner, TrackedLayer, VectorLayer, summed_to

_FAMILIES = ("RMSNorm", "LayerNorm")  # what classes of the transformers families end with


@dataclass(frozen=True)
class ScaleLayer(VectorLayer):
    """The weight of a norm: its gradient is the output's times what was normalised, summed over the positions.

    axis: that of the output which counts the weight's numbers, 1 or the last ones.
    """

    axis: int = -1

    @property
    def examples_first(self) -> bool:  # type: ignore[override]
        """Where channels are on axis 1."""
        return self.axis == 1

    @property
    def counts_last(self) -> bool:
        """But for norms of channels."""
        return self.axis == -1

    def vectors(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The output's gradient times what the weight multiplies."""
        return summed_to(gradient * self._normalised(value), self.parameters[0].ndim, self.axis)

    def _normalised(self, value: Tensor) -> Tensor:
        """The output for a weight of ones and no bias, without what the norm adds by itself (as in 1 + weight)."""
        if type(self.module) is nn.LayerNorm:
            return functional.layer_norm(value, self.module.normalized_shape, None, None, self.module.eps)
        of_ones, of_zeros = (self._output(value, fill) for fill in (1.0, 0.0))
        return of_ones - of_zeros

    def _output(self, value: Tensor, fill: float) -> Tensor:
        like = dict(self.module.named_parameters(recurse=False))
        state = {name: p.new_full(p.shape, fill, dtype=value.dtype) for name, p in like.items()}
        state |= {name: torch.zeros_like(p, dtype=value.dtype) for name, p in like.items() if name == "bias"}
        with torch.no_grad():
            return functional_call(self.module, state, (value,))  # type: ignore[no-any-return]


class _Norm(TrackedLayer):
    """A kind that has no weight block: a vector for the weight, and one for the bias."""

    @classmethod
    def blocks(cls, owner: Owner) -> list[TrackedLayer]:
        """A block for each parameter."""
        found: list[TrackedLayer] = []
        axis = cls.axis_of(owner.module)
        if "weight" in owner.names:
            names = (owner.names["weight"],)
            name, module = owner.within("weight"), owner.module
            found.append(ScaleLayer(name, module, False, names, owner.sizes, "weight", axis))
        if "bias" in owner.names:
            found.append(BiasLayer.of(owner, "bias", axis, axis == 1))
        return found

    @classmethod
    def axis_of(cls, _module: nn.Module) -> int:
        """The axis of the output that counts a parameter's numbers: 1, or the last ones."""
        return cls.features

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of no use: the blocks are vectors."""
        raise NotImplementedError


@register
class LastAxesNorm(_Norm):
    """nn.LayerNorm, nn.RMSNorm, and the transformers families' own: the parameters count the last axes."""

    modules: ClassVar[Modules] = (nn.LayerNorm, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))

    @classmethod
    def base_of(cls, module: nn.Module) -> type[nn.Module] | None:
        """torch's, or a class that is called so and has no other parameters than a weight and a bias."""
        base = super().base_of(module)
        if base is not None and type(module).forward is base.forward:
            return base
        named = type(module).__name__.endswith(_FAMILIES) and not list(module.children())
        return type(module) if named and "weight" in module._parameters and _takes_one(type(module).forward) else None

    @classmethod
    def axis_of(cls, module: nn.Module) -> int:
        """The last ones, but for ConvNext's and others that say otherwise."""
        return 1 if getattr(module, "data_format", None) == "channels_first" else -1


def _takes_one(forward: Callable[..., Any]) -> bool:
    """Whether a forward takes the module and one tensor, and nothing else that it needs."""
    needed = [p for p in inspect.signature(forward).parameters.values() if p.default is p.empty]
    return len(needed) == 2 and all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed)


@register
class ChannelNorm(_Norm):
    """nn.BatchNorm in eval mode, nn.InstanceNorm and nn.GroupNorm: the parameters count the channels, on axis 1."""

    modules: ClassVar[Modules] = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
    features: ClassVar = 1

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """An option that takes statistics of the batch in eval mode as well."""
        if not isinstance(module, _BatchNorm) or module.track_running_stats:
            return None
        return "track_running_stats=False makes an example's gradient depend on the rest of the batch"
