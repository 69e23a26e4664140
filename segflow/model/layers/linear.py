"""Linear layers, on inputs of any rank.

Axes: R rows, S positions, I inputs, O outputs, Q gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from .registry import register
from .tracked import Modules, TrackedLayer


@register
class LinearLayer(TrackedLayer):
    """nn.Linear: a token for each position, with the features on the last axis."""

    modules: ClassVar[Modules] = (nn.Linear,)

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients as rows of features, in one part."""
        return _rows(value), _rows(gradient)


@register
class TransposedLinearLayer(LinearLayer):
    """transformers' Conv1D, a linear layer whose weight is [I, O]."""

    modules: ClassVar[Modules] = ("transformers.pytorch_utils.Conv1D",)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[1, O, I]."""
        inputs, outputs = self.parameters[0].shape
        return 1, outputs, inputs + int(self.has_bias)

    def gradient_matrices(self, tensors_Q: Sequence[Tensor]) -> Tensor:
        """[Q, 1, O, I], the weight transposed."""
        return super().gradient_matrices([tensors_Q[0].mT, *tensors_Q[1:]])

    def by_parameter(self, gradient_QPOI: Tensor) -> list[Tensor]:
        """[Q, I, O], and [Q, O] of the bias."""
        inputs = self.shape[2] - int(self.has_bias)
        weight_QIO, bias_QO = gradient_QPOI[:, 0, :, :inputs].mT, gradient_QPOI[:, 0, :, inputs:]
        return [weight_QIO, bias_QO.squeeze(-1)] if self.has_bias else [weight_QIO]


def _rows(tensor_R: Tensor) -> Tensor:
    """[1, R, S, I] from a tensor whose features are on the last axis, positions in between."""
    return rearrange(tensor_R, "r ... i -> 1 r (...) i")
