"""Tracked layers: each turns its (input, output gradient) into tokens whose product is the weight's gradient.

Axes: B examples, S positions, P parts (the groups of a grouped convolution; 1 elsewhere), I inputs of a part
(with the bias as a last input that is always 1), O outputs of a part. The gradient of example b is, for each part,
sum_s g_PBSO[p,b,s,o] a_PBSI[p,b,s,i] (Eschenhagen et al. 2023, "expand").
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..errors import LayerError
from .tokens import Tokens

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SUPPORTED = (nn.Linear, *_CONVOLUTIONS)


@dataclass(frozen=True)
class TrackedLayer:
    """One layer to attribute: its weight, and its bias as one more input.

    has_bias is False for a layer without bias, or whose bias was not trained.
    """

    name: str
    module: nn.Module
    has_bias: bool

    @property
    def parts(self) -> int:
        """P: groups of a convolution, 1 for a linear layer."""
        return self.module.groups if isinstance(self.module, _CONVOLUTIONS) else 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """[P, O, I] of the layer's gradient, the bias being the last input."""
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
        """Tokens of one call of the layer.

        value: the call's input; gradient: of the summed loss with respect to its output; axis: where both count
        the examples (0 for a convolution).
        """
        value, gradient = value.detach().to(dtype), gradient.detach().to(dtype)
        if isinstance(self.module, _CONVOLUTIONS):
            a, g = _patches(self.module, value), _channels(self.module, gradient)
        else:
            a, g = (_rows(tensor, axis).unsqueeze(0) for tensor in (value, gradient))
        if self.has_bias:
            a = functional.pad(a, (0, 1), value=1.0)
        return Tokens(a, g)

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
        parts = [gradient_QPOI[..., :inputs].reshape(Q, *weight.shape)]
        return [*parts, gradient_QPOI[..., inputs].reshape(Q, -1)] if self.has_bias else parts


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """[B, S, features] from a tensor with the examples on `axis`, the features last, positions elsewhere."""
    return rearrange(tensor.movedim(axis, 0), "b ... i -> b (...) i")


def _patches(convolution: nn.Module, value_BC: Tensor) -> Tensor:
    """The receptive field of every output position, [P, B, S, C/P * kernel]."""
    padding: Any = convolution._reversed_padding_repeated_twice
    if convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str):
        padding = [side for sides in reversed(convolution.padding) for side in (sides, sides)]  # type: ignore[arg-type]
    mode = "constant" if convolution.padding_mode == "zeros" else str(convolution.padding_mode)
    padded = functional.pad(value_BC, tuple(padding), mode=mode)
    kernel = convolution.get_parameter("weight").shape[2:]
    geometry: Any = zip(kernel, convolution.dilation, convolution.stride, strict=True)  # type: ignore[arg-type]
    for axis, (size, dilation, stride) in enumerate(geometry, start=2):
        padded = padded.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    positions, taps = {1: ("x", "u"), 2: ("x y", "u v"), 3: ("x y z", "u v w")}[len(kernel)]
    return rearrange(padded, f"b (p c) {positions} {taps} -> p b ({positions}) (c {taps})", p=convolution.groups)


def _channels(convolution: nn.Module, gradient_BC: Tensor) -> Tensor:
    """Output gradients as [P, B, S, O/P]."""
    return rearrange(gradient_BC, "b (p o) ... -> p b (...) o", p=convolution.groups)


class LayerChoice(NamedTuple):
    """The tracked layers by name, and why every other parametrised module is not attributed."""

    tracked: dict[str, TrackedLayer]
    skipped: dict[str, str]


def choose_layers(
    model: nn.Module, names: Collection[str] | None = None, is_trained: Callable[[str], bool] | None = None
) -> LayerChoice:
    """The layers to attribute.

    Args:
        names: the modules asked for; None takes every supported one.
        is_trained: tells for a parameter's name whether training changed it; None asks `requires_grad`.

    Raises:
        LayerError: a module asked for is unknown or not supported, or nothing is left to attribute.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    _check_names(names, modules)
    first_name = {module: name for name, module in reversed(modules.items())}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = is_trained or (lambda name: parameters[name].requires_grad)
    wanted = None if names is None else {first_name[modules[name]] for name in names}
    owners = _owners(model)
    tracked, skipped = {}, {}
    for name, module in model.named_modules():
        if not _has_parameters(module):
            continue
        prefix = f"{name}." if name else ""
        reason = _why_not(module, name, modules, prefix, trained) or _shared(module, name, owners)
        if wanted is not None and name not in wanted:
            reason = "not among the tracked modules that the task names"
        elif wanted is not None and reason:
            raise LayerError(f"module {name!r} ({type(module).__name__}) cannot be attributed: {reason}.")
        if reason:
            skipped[name] = reason
        else:
            has_bias = module.bias is not None and trained(f"{prefix}bias")
            tracked[name] = TrackedLayer(name, module, has_bias)
    if not tracked:
        found = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "no module has parameters"
        raise LayerError(f"no layer can be attributed ({found}). Supported: Linear, Conv1d, Conv2d, Conv3d.")
    return LayerChoice(tracked, skipped)


def _check_names(names: Collection[str] | None, modules: dict[str, nn.Module]) -> None:
    for name in names or ():
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3)
            raise LayerError(f"the model has no module {name!r}. Did you mean one of {close or sorted(modules)[1:9]}?")
        if not _has_parameters(modules[name]):
            inside = [inner for inner in modules if inner.startswith(f"{name}.")][:4]
            advice = f"Name the layers inside it: {inside}" if inside else "There is nothing in it to attribute"
            raise LayerError(f"module {name!r} has no parameters of its own. {advice}.")
    if names is not None and not names:
        raise LayerError("get_influence_tracked_modules() returned no names. Return None to track every layer.")


def _has_parameters(module: nn.Module) -> bool:
    """Whether the module has parameters of its own, or computes its own from others (a parametrization)."""
    return isinstance(module, _SUPPORTED) or any(p is not None for p in module._parameters.values())


def _why_not(
    module: nn.Module, name: str, modules: dict[str, nn.Module], prefix: str, trained: Callable[[str], bool]
) -> str | None:
    """Why this module cannot be tracked, judged by itself; None if it can."""
    kind = next((kind for kind in _SUPPORTED if isinstance(module, kind)), None)
    if kind is None:
        return f"{type(module).__name__} is not supported"
    own = type(module)
    methods = ("forward", "_conv_forward", "__call__")
    overridden = [m for m in methods if m in vars(module) or getattr(own, m, 0) is not getattr(kind, m, 0)]
    extra = sorted(set(module._parameters) - {"weight", "bias"})
    weight = module._parameters.get("weight")
    reasons = {
        f"{own.__name__} is a {kind.__name__} with its own {''.join(overridden[:1])}()": bool(overridden),
        "nn.MultiheadAttention uses its weight without calling it": isinstance(
            modules.get(name.rpartition(".")[0]), nn.MultiheadAttention
        ),
        "its weight is computed from other tensors (a parametrization, weight norm, ...)": weight is None
        or "bias" not in module._parameters,
        f"it has extra parameters {extra}": bool(extra),
        "it is lazy and not initialised yet": isinstance(weight, nn.UninitializedParameter),
    }
    first = next((reason for reason, holds in reasons.items() if holds), None)
    return first or (None if trained(f"{prefix}weight") else "its weight was not trained")


def _identity(parameter: nn.Parameter) -> Hashable:
    """Equal for parameters that share memory (also under two Parameter objects)."""
    if isinstance(parameter, nn.UninitializedParameter) or parameter.data_ptr() == 0:
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _owners(model: nn.Module) -> dict[Hashable, list[str]]:
    """The modules that hold each parameter, by the parameter's identity."""
    owners: dict[Hashable, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in filter(lambda p: p is not None, module._parameters.values()):
            owners.setdefault(_identity(parameter), []).append(name)
    return owners


def _shared(module: nn.Module, name: str, owners: dict[Hashable, list[str]]) -> str | None:
    """Names another module that holds one of this module's parameters, if there is one."""
    held = [_identity(p) for p in module._parameters.values() if p is not None]
    others = [other for key in held for other in owners[key] if other != name]
    if not others:
        return None
    other = others[0] or "the model itself"
    return f"it shares a tensor with {other!r}, so its own calls do not make up the tensor's gradient"
