"""What every kind of layer gives: tokens whose product is the weight's gradient, and the layout of that gradient.

The gradient of example b is, for each part p, sum_s g_PBSO[p,b,s,o] a_PBSI[p,b,s,i] (Eschenhagen et al. 2023, arXiv
2311.00636, the setting "expand").

Axes: B examples, S positions, P parts (the groups of a grouped convolution; 1 elsewhere), I inputs of a part (with the
bias as a last input that is always 1), O outputs of a part, Q gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..tokens import Tokens


@dataclass(frozen=True)
class TrackedLayer(ABC):
    """One layer to attribute: its weight, and its bias as one more input.

    A kind of layer is a subclass that says which modules are of its kind (`modules`), how the input and the output
    gradient of a call become tokens (`sides`), and how many positions an example has (`positions`). Where the weight
    does not have the outputs on its first axis, as nn.Linear's has, the subclass defines `shape`, `gradient_matrices`
    and `by_parameter` as well.

    Args:
        name: the module's name in the model.
        has_bias: False for a layer without a bias, or whose bias was not trained.
    """

    name: str
    module: nn.Module
    has_bias: bool

    modules: ClassVar[tuple[type[nn.Module], ...]] = ()  # the types of modules that are of this kind
    methods: ClassVar[tuple[str, ...]] = ("forward", "__call__")  # a module that overrides one of these is refused
    examples_first: ClassVar[bool] = False  # True if only the first axis of an input may count the examples

    @abstractmethod
    def sides(self, value: Tensor, gradient: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Inputs a [P, B, S, I], without the bias's, and output gradients g [P, B, S, O] of one call of the layer.

        Args:
            value: the call's input.
            gradient: the gradient of the summed loss with respect to the call's output.
            axis: the axis on which both count the examples.
        """

    @abstractmethod
    def positions(self, shape: torch.Size) -> int:
        """About how many positions an example has, from the shape of the layer's input for two examples."""

    @property
    def parts(self) -> int:
        """P: the number of groups of a convolution, 1 elsewhere."""
        return 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """[P, O, I], the shape of the layer's gradient; the bias is the last input."""
        weight = self.module.get_parameter("weight")
        outputs = weight.shape[0] // self.parts
        return self.parts, outputs, weight.shape[1:].numel() + int(self.has_bias)

    @property
    def size(self) -> int:
        """The number of attributed parameters."""
        parts, outputs, inputs = self.shape
        return parts * outputs * inputs

    @property
    def parameter_names(self) -> list[str]:
        """The model's names of the weight, and of the bias if it is attributed."""
        prefix = f"{self.name}." if self.name else ""
        return [f"{prefix}weight", f"{prefix}bias"] if self.has_bias else [f"{prefix}weight"]

    @property
    def parameters(self) -> list[Tensor]:
        """The weight, and the bias if it is attributed."""
        names = ("weight", "bias") if self.has_bias else ("weight",)
        return [self.module.get_parameter(name) for name in names]

    def tokens(self, value: Tensor, gradient: Tensor, axis: int, dtype: torch.dtype) -> Tokens:
        """Tokens of one call of the layer; see `sides` for the arguments."""
        a, g = self.sides(value.detach().to(dtype), gradient.detach().to(dtype), axis)
        return Tokens(functional.pad(a, (0, 1), value=1.0) if self.has_bias else a, g)

    def gradient_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[P, O, I] from a weight-shaped and a bias-shaped tensor: the layout of everything segflow computes."""
        return self.gradient_matrices(weight[None], None if bias is None else bias[None])[0]

    def gradient_matrices(self, weight_Q: Tensor, bias_Q: Tensor | None) -> Tensor:
        """[Q, P, O, I] from Q weight-shaped and bias-shaped tensors."""
        matrix = rearrange(weight_Q, "q (p o) ... -> q p o (...)", p=self.parts)
        if not self.has_bias or bias_Q is None:
            return matrix
        return torch.cat([matrix, rearrange(bias_Q, "q (p o) -> q p o 1", p=self.parts)], -1)

    def by_parameter(self, gradient_QPOI: Tensor) -> list[Tensor]:
        """[Q, ...] shaped as the weight, and as the bias if it is attributed: the inverse of `gradient_matrices`."""
        weight, Q = self.module.get_parameter("weight"), len(gradient_QPOI)
        inputs = self.shape[2] - int(self.has_bias)
        tensors = [gradient_QPOI[..., :inputs].reshape(Q, *weight.shape)]
        return [*tensors, gradient_QPOI[..., inputs].reshape(Q, -1)] if self.has_bias else tensors
