"""Whether models that are trained together do as each does alone: their first gradients, and their last outputs.

Axis letters: J models, B examples of a batch, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .carry import refusal
from .stage import Stage, loss_of

Gradients = Mapping[str, Tensor | None]
_HIDDEN = "it depends on more than its registered parameters, such as tensors, numbers or code that differ by seed"
_EMBEDDING_OPTIONS = ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")
_EMBEDDING: dict[Any, tuple[str, ...]] = {  # the order in which torch's own functions take them; -1 is no padding
    torch.embedding: ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"),
    torch.embedding_bag: (
        *("weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse"),
        *("per_sample_weights", "include_last_offset", "padding_idx"),
    ),
}


def gradients_alone(models: Sequence[nn.Module], stage: Stage, batch_JB: Tensor) -> list[Gradients]:
    """The gradient of each real model's loss by parameter, None for those that the loss does not reach."""
    found: list[Gradients] = []
    for model, batch_B in zip(models, batch_JB, strict=True):
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        with OnlyStackable():
            loss = loss_of(stage)(model(stage.inputs[batch_B]), stage.targets[batch_B])
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        found.append(dict(zip(trained, gradients, strict=True)))
    return found


def check_gradients(
    alone: Sequence[Gradients], stacked: Mapping[str, Tensor], seeds: Sequence[int], every: bool
) -> None:
    """ScoreError unless the stacked parameters have the gradients of the models alone.

    every: whether each model must agree; else it is enough that one does, for some may be close to diverging, where
    rounding decides.
    """
    differing = [_differing(of_one, stacked, number) for number, of_one in enumerate(alone)]
    wrong = [number for number, name in enumerate(differing) if name is not None]
    if wrong and (every or len(wrong) == len(alone)):
        number = wrong[0]
        raise refusal(
            f"the model of seed {seeds[number]} has another gradient of parameter {differing[number]} alone: {_HIDDEN}"
        )


def check_outputs(alone: Sequence[Any], stacked: Any, parameters: Mapping[str, Tensor]) -> None:
    """ScoreError unless a model that was called alone gives the outputs [Q, ...] that it gives stacked [J, Q, ...].

    One of them is enough: others may be close to diverging, where rounding decides.
    """
    of_all = _tensors_of(stacked)
    precision = _precision([*parameters.values(), *of_all])
    for number, outputs in enumerate(alone):
        of_one = _tensors_of(outputs)
        if all(_close(one, tensor[number], precision) for one, tensor in zip(of_one, of_all, strict=True)):
            return
    raise refusal(
        "the trained model gives other outputs alone: it keeps what is no parameter, such as a count of its calls"
    )


def _differing(alone: Gradients, stacked: Mapping[str, Tensor], number: int) -> str | None:
    """The first parameter whose gradient is another one, if there is any."""
    precision = _precision(stacked.values())
    size = sum(float(g.double().square().sum()) for g in alone.values() if g is not None) ** 0.5
    for name, gradient in alone.items():
        other = stacked[name].grad
        if gradient is None or other is None:
            if gradient is not other:
                return name
        elif not _close(gradient, other[number], precision, size):
            return name
    return None


def _close(alone: Tensor, stacked: Tensor, precision: float, size: float = 0.0) -> bool:
    """Whether two results of one formula agree up to rounding; what has diverged is not compared.

    size: of what they are a part of, whose rounding they share.
    """
    alone, stacked = alone.detach(), stacked.detach()
    if not (alone.is_floating_point() and alone.isfinite().all() and stacked.isfinite().all()):
        return True
    distance, own = float((alone - stacked).double().norm()), float(alone.double().norm())
    return distance <= precision**0.5 * own + 100 * precision * max(size, own)


def _precision(tensors: Iterable[Tensor]) -> float:
    """The coarsest of the tensors: a result in double precision may come from parameters in single precision."""
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def _tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors in a model's outputs, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_of(part)]


class OnlyStackable(TorchFunctionMode):
    """Inside, what does otherwise for stacked parameters without an error is refused.

    That is a hook put on a tensor, such as an activation, and options of embeddings: torch.func.vmap honours
    `padding_idx` in the first model only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("register_hook", "register_post_accumulate_grad_hook"):
            raise refusal("the model or the loss puts a hook on a tensor")
        if name in ("embedding", "embedding_bag"):
            options = dict(zip(_EMBEDDING.get(func, ()), args, strict=False)) | kwargs
            if func in _EMBEDDING and options.get("padding_idx") == -1:
                del options["padding_idx"]
            for option in _EMBEDDING_OPTIONS:
                value = options.get(option)
                if value is not None and value is not False:
                    raise refusal(f"the model or the loss calls {name} with {option}={value}")
        return func(*args, **kwargs)


class Untouched(TorchFunctionMode):
    """Inside, whatever reads or changes one of the tensors, or another view of its memory, is refused."""

    def __init__(self, what: str, tensors: Iterable[Tensor]):
        super().__init__()
        self._what, self._places = what, {_place(tensor) for tensor in tensors if tensor.numel()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(_place(tensor) in self._places for tensor in _tensors_of([args, kwargs])):
            raise refusal(f"{self._what} reads or changes a parameter ({getattr(func, '__name__', func)})")
        return func(*args, **kwargs)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
