"""What no kind knows: exact gradients of each example by torch.func, and a vector block for every parameter.

Axes: R rows, D numbers of a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .tracked import Owner, TrackedLayer, VectorLayer


@dataclass(frozen=True)
class FunctionLayer(VectorLayer):
    """A parameter of a module whose calls are differentiated as a whole, example by example or for all at once."""

    def vectors(self, _value: Tensor, gradient: Tensor) -> Tensor:
        """The gradient [B, D] as it is: what is handed on here is differentiated already."""
        return gradient

    @classmethod
    def of(cls, owner: Owner) -> list[TrackedLayer]:
        """A block for every parameter of a module that was trained."""
        return [
            cls(owner.within(attribute), owner.module, False, (name,), owner.sizes, attribute)
            for attribute, name in owner.names.items()
        ]


@dataclass(frozen=True)
class UnfollowedLayer(FunctionLayer):
    """A tensor of several modules that use it in ways that are not followed: its examples are run one by one."""

    @classmethod
    def over(cls, layer: TrackedLayer) -> UnfollowedLayer:
        """The tensor of a layer."""
        attribute = getattr(layer, "attribute", "") or "weight"
        return cls(layer.names[0], layer.module, False, layer.names[:1], layer.sizes, attribute)
