"""Whole tensors of models whose parameters are spread over ranks, and the wrappers that hide a model.

A wrapper inside a model holds a module under a name of its own, which then stands in the names of the module's
parameters. Everywhere in segflow a module and a tensor go by their names without it, so that a model has the same names
wrapped and bare.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor, nn

_INSIDE = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})  # of torch.compile, of torch's checkpoint_wrapper
_PARALLEL = "module."  # of DistributedDataParallel and DataParallel, in front of every name


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in a nested batch (tuples, lists, mappings) to `device`."""
    return send_to_device(batch, device)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module behind torch.compile, DistributedDataParallel, DataParallel and the like, in any order."""
    inner: Any = model._modules.get("_orig_mod")
    if inner is None and isinstance(model, nn.DataParallel):
        inner = model.module
    if inner is None:
        inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    return model if inner is model else unwrap(inner)


def plain_name(name: str) -> str:
    """A module's or a tensor's name without those that wrappers inside the model add."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """The model's modules by their plain names, in torch's order; of a wrapper the module in it."""
    return {plain_name(name): module for name, module in model.named_modules(remove_duplicate=remove_duplicate)}


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """The model's parameters by their plain names, in torch's order."""
    return {plain_name(name): value for name, value in model.named_parameters(remove_duplicate=remove_duplicate)}


def state_of(model: nn.Module) -> dict[str, Any]:
    """The model's state_dict by plain names."""
    return {plain_name(name): value for name, value in model.state_dict().items()}


def parallel_prefix(names: Collection[str], known: Collection[str] = ()) -> str:
    """What a parallel wrapper put in front of every name: "module.", or nothing.

    known: the model's names without a wrapper, none of which is then among the names.
    """
    found = bool(names) and all(name.startswith(_PARALLEL) for name in names) and not set(names) & set(known)
    return _PARALLEL if found else ""


def is_sharded(model: nn.Module) -> bool:
    """True if some parameter is spread over ranks (torch's `fully_shard`, tensor parallelism)."""
    return any(map(_sharded, model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over ranks; every rank must call it."""
    return tensor.full_tensor() if _sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be spread over ranks."""
    return tensor.to_local() if _sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def laid_out(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of whole tensors, each spread over the ranks as the model's is; nothing is communicated."""
    if not is_sharded(model):
        return dict(state)
    from torch.distributed.tensor import distribute_tensor

    present, spread = state_of(model), dict(state)
    for name, tensor in state.items():
        like: Any = present.get(name)
        if _sharded(like):
            place = (like.device_mesh, like.placements)
            spread[name] = distribute_tensor(tensor.to(like.device), *place, src_data_rank=None)
    return spread


def _sharded(tensor: object) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, told without importing its module
