"""What every kind of layer gives: tokens whose product is a parameter's gradient, and the layout of that gradient.

A tracked layer is a block of the model's parameters: a weight, with its bias where both were trained alike, or one
tensor by itself. The gradient of example b is, for each part p, sum_s g_PBSO[p,b,s,o] a_PBSI[p,b,s,i] (Eschenhagen et
al. 2023, arXiv 2311.00636, the setting "expand").

Axes: B examples, R rows (examples, or several of each), S positions, P parts (the groups of a grouped convolution; 1
elsewhere), I inputs of a part (with the bias as a last input that is always 1), O outputs of a part, Q gradients, D
numbers of a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..one_hot import OneHot
from ..tokens import Tokens, regrouped
from .sizes import BlockSizes

Modules = tuple[
    type[nn.Module] | str, ...
]  # types, or their full names where those are in a package that may be missing


class Owner(NamedTuple):
    """A module whose own parameters are divided into blocks.

    names: the model's names of those that were trained, by their names in the module; alike: whether training treated
    two of them alike, so that they may be one block.
    """

    name: str
    module: nn.Module
    names: Mapping[str, str]
    alike: Callable[[str, str], bool]
    sizes: BlockSizes

    def within(self, name: str) -> str:
        """The model's name of something in the module."""
        return f"{self.name}.{name}" if self.name else name


@dataclass(frozen=True)
class TrackedLayer(ABC):
    """One block: a weight, and its bias as one more input.

    A kind of layer is a subclass that says which modules are of its kind (`modules`), and how the input and the output
    gradient of a call become tokens (`sides`). Where the weight does not have the outputs on its first axis, as
    nn.Linear's has, the subclass defines `shape`, `gradient_matrices` and `by_parameter` as well; where a module has
    other parameters than a weight and a bias, `blocks`.

    Args:
        name: of the module in the model, or of the parameter for a block that is no module's weight.
        has_bias: False for a layer without a bias, or whose bias was not trained, or not as the weight was.
        names: the model's names of the weight, and of the bias if it is part of the block.
        sizes: up to which widths its curvature is dense.
    """

    name: str
    module: nn.Module
    has_bias: bool = False
    names: tuple[str, ...] = ()
    sizes: BlockSizes = field(default_factory=BlockSizes)

    modules: ClassVar[Modules] = ()  # of this kind
    methods: ClassVar[tuple[str, ...]] = ("forward", "__call__")  # a module that overrides one of these is not of it
    examples_first: ClassVar[bool] = False  # True if only the first axis of an input may count the examples
    features: ClassVar[int] = -1  # the axis of a call's output that counts the bias's numbers
    exact_P: ClassVar[bool] = False  # whether eigenvalues take the optimizer's exact P, not its rank-one part

    @classmethod
    def base_of(cls, module: nn.Module) -> type[nn.Module] | None:
        """The type among `modules` that a module is of; None if it is of none."""
        for base in type(module).__mro__:
            if base in cls.modules or f"{base.__module__}.{base.__qualname__}" in cls.modules:
                return base
        return None

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module of this kind cannot be attributed at all, because of its options; None if it can."""
        return None

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        """Whether a module of these types has no parameters and options but those that the kind knows."""
        return set(module._parameters) <= {"weight", "bias"}

    @classmethod
    def blocks(cls, owner: Owner) -> list[TrackedLayer]:
        """The blocks of a module: its weight, with its bias where both were trained alike; otherwise the bias too."""
        name, names, found = owner.name, owner.names, []
        folded = cls._folds(owner)
        if "weight" in names:
            own = (names["weight"], names["bias"]) if folded else (names["weight"],)
            found.append(cls(name, owner.module, folded, own, owner.sizes))
        if "bias" in names and not folded:
            found.append(BiasLayer.of(owner, "bias", cls.features, cls.examples_first))
        return found

    @classmethod
    def _folds(cls, owner: Owner) -> bool:
        """Whether the bias is part of the weight's block."""
        return {"weight", "bias"} <= set(owner.names) and owner.alike("weight", "bias")

    def call_value(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What is kept of a call's arguments: its first."""
        return args[0] if args else next(iter(kwargs.values()))  # type: ignore[no-any-return]

    @abstractmethod
    def sides(self, value: Tensor, gradient: Tensor) -> tuple[Tensor | OneHot, Tensor]:
        """Inputs a [P, R, S, I], without the bias's, and output gradients g [P, R, S, O] of one call of the layer.

        Args:
            value: the call's input, with a row for each example on the first axis.
            gradient: the gradient of the summed loss with respect to the call's output, likewise.
        """

    def positions(self, shape: torch.Size) -> int:
        """About how many positions an example has, from the shape of the layer's input for two examples."""
        return max(1, shape.numel() // (2 * shape[-1]))

    @property
    def uses(self) -> tuple[TrackedLayer, ...]:
        """The calls that make up the gradient: those of this layer; of a tied tensor, those of all of its modules."""
        return (self,)

    @property
    def parts(self) -> int:
        """P: the number of groups of a convolution, 1 elsewhere."""
        return 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """[P, O, I], the shape of the layer's gradient; the bias is the last input."""
        weight = self.parameters[0]
        outputs = weight.shape[0] // self.parts
        return self.parts, outputs, weight.shape[1:].numel() + int(self.has_bias)

    @property
    def size(self) -> int:
        """The number of attributed parameters."""
        parts, outputs, inputs = self.shape
        return parts * outputs * inputs

    @property
    def diagonal_inputs(self) -> bool:
        """Whether the input side of the curvature is diagonal."""
        return self.shape[2] > self.sizes.side

    @property
    def diagonal_outputs(self) -> bool:
        """Whether the output side of the curvature is diagonal."""
        return self.shape[1] > self.sizes.side

    @property
    def parameter_names(self) -> list[str]:
        """The model's names of the weight, and of the bias if it is part of the block."""
        return list(self.names)

    @property
    def parameters(self) -> list[Tensor]:
        """The weight, and the bias if it is part of the block."""
        names = ("weight", "bias") if self.has_bias else ("weight",)
        return [self.module.get_parameter(name) for name in names]

    def tokens(self, value: Tensor, gradient: Tensor, dtype: torch.dtype, rows: int = 1) -> Tokens:
        """Tokens of one call of the layer; see `sides` for the arguments. rows: how many each example has."""
        value = value.detach().to(dtype) if value.is_floating_point() else value.detach()
        a, g = self.sides(value, gradient.detach().to(dtype))
        if self.has_bias and isinstance(a, Tensor):
            a = functional.pad(a, (0, 1), value=1.0)
        return regrouped(Tokens(a, g), rows) if rows > 1 else Tokens(a, g)

    def together(self, tokens: Tokens) -> Tokens:
        """The tokens of all calls, which are joined along the positions, as the block has them."""
        return tokens

    def gradient_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """[P, O, I] from tensors shaped as the parameters: the layout of everything segflow computes."""
        return self.gradient_matrices([tensor[None] for tensor in tensors])[0]

    def gradient_matrices(self, tensors_Q: Sequence[Tensor]) -> Tensor:
        """[Q, P, O, I] from Q tensors shaped as each of the parameters."""
        matrix = rearrange(tensors_Q[0], "q (p o) ... -> q p o (...)", p=self.parts)
        if not self.has_bias:
            return matrix
        return torch.cat([matrix, rearrange(tensors_Q[1], "q (p o) -> q p o 1", p=self.parts)], -1)

    def by_parameter(self, gradient_QPOI: Tensor) -> list[Tensor]:
        """[Q, ...] shaped as each of the parameters: the inverse of `gradient_matrices`."""
        weight, Q = self.parameters[0], len(gradient_QPOI)
        inputs = self.shape[2] - int(self.has_bias)
        tensors = [gradient_QPOI[..., :inputs].reshape(Q, *weight.shape)]
        return [*tensors, gradient_QPOI[..., inputs].reshape(Q, -1)] if self.has_bias else tensors


@dataclass(frozen=True)
class VectorLayer(TrackedLayer):
    """A block of one tensor by itself, of D numbers: [1, D, 1], with the whole gradient of an example as one token.

    Its curvature is the second moment of the examples' gradients, dense up to `sizes.vector` numbers, diagonal beyond.

    attribute: the tensor's name in the module. each_position: whether a sequence's positions are kept apart, as one
    token each, which is of use where they are scored one by one.
    """

    attribute: str = ""
    each_position: bool = field(default=False, kw_only=True)
    exact_P: ClassVar[bool] = True

    @abstractmethod
    def vectors(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The gradient [R, D] of each row of one call; see `sides` for the arguments."""

    def sides(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """A single input that is 1, and the gradient."""
        R, positions, last = len(gradient), 1, gradient.ndim - self.parameters[0].ndim  # the first of the vector's axes
        if self.each_position and self.counts_last and value.shape[:last] == gradient.shape[:last]:
            value, gradient = (side.reshape(-1, 1, *side.shape[last:]) for side in (value, gradient))
            positions = len(gradient) // R
        g_RSD = self.vectors(value, gradient).reshape(R, positions, -1)
        return g_RSD.new_ones(1, R, positions, 1), g_RSD[None]

    @property
    def counts_last(self) -> bool:
        """Whether it is the last axes of an output that count the vector's numbers."""
        return False

    def tokens(self, value: Tensor, gradient: Tensor, dtype: torch.dtype, rows: int = 1) -> Tokens:
        """One token for each example, summed over its rows."""
        tokens = super().tokens(value, gradient, dtype, rows)
        return tokens if self.each_position else one_token(tokens)

    def together(self, tokens: Tokens) -> Tokens:
        """One token, summed over the calls."""
        return tokens if self.each_position else one_token(tokens)

    def positions(self, _shape: torch.Size) -> int:
        """One."""
        return 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """[1, D, 1]."""
        return 1, self.parameters[0].numel(), 1

    @property
    def diagonal_inputs(self) -> bool:
        """There is one input."""
        return True

    @property
    def diagonal_outputs(self) -> bool:
        """Whether the second moment is diagonal."""
        return self.shape[1] > self.sizes.vector

    @property
    def parameters(self) -> list[Tensor]:
        """The tensor."""
        return [self.module.get_parameter(self.attribute)]

    def gradient_matrices(self, tensors_Q: Sequence[Tensor]) -> Tensor:
        """[Q, 1, D, 1]."""
        return tensors_Q[0].reshape(-1, *self.shape)

    def by_parameter(self, gradient_QPOI: Tensor) -> list[Tensor]:
        """[Q, ...], shaped as the tensor."""
        return [gradient_QPOI.reshape(len(gradient_QPOI), *self.parameters[0].shape)]


@dataclass(frozen=True)
class BiasLayer(VectorLayer):
    """What is added to a call's output: its gradient is the output's, summed over the positions.

    axis: that of the output which counts the tensor's numbers, 1 or the last ones.
    """

    axis: int = -1
    first: bool = False

    @classmethod
    def of(cls, owner: Owner, attribute: str, axis: int, examples_first: bool) -> BiasLayer:
        """The block of a module's bias."""
        names = (owner.names[attribute],)
        of_owner = (owner.within(attribute), owner.module, False, names, owner.sizes, attribute)
        return cls(*of_owner, axis, examples_first)

    @property
    def examples_first(self) -> bool:  # type: ignore[override]
        """As the layer that the bias is of."""
        return self.first

    @property
    def counts_last(self) -> bool:
        """But for convolutions'."""
        return self.axis == -1

    def vectors(self, _value: Tensor, gradient: Tensor) -> Tensor:
        """The output's gradient, summed over the positions."""
        return summed_to(gradient, self.parameters[0].ndim, self.axis)


def one_token(tokens: Tokens) -> Tokens:
    """Tokens of a vector, summed over their positions."""
    if tokens.positions == 1:
        return tokens
    g = tokens.g_PBSO.sum(2, keepdim=True)
    return Tokens(g.new_ones(1, g.shape[1], 1, 1), g)


def summed_to(gradient_R: Tensor, dimensions: int, axis: int) -> Tensor:
    """[R, D]: summed over all axes but the first, and those of a tensor that so many last axes, or axis 1, count."""
    last = gradient_R if axis == -1 else gradient_R.movedim(axis, -1)
    kept = last.shape[last.ndim - dimensions :]
    return last.reshape(len(last), -1, kept.numel()).sum(1)
