"""Whole tensors of models whose parameters are spread over ranks, and the wrappers that hide a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor, nn


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in a nested batch (tuples, lists, mappings) to `device`."""
    return send_to_device(batch, device)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module behind DistributedDataParallel or torch.compile wrappers."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=True)


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

    present, spread = model.state_dict(), dict(state)
    for name, tensor in state.items():
        like: Any = present.get(name)
        if _sharded(like):
            place = (like.device_mesh, like.placements)
            spread[name] = distribute_tensor(tensor.to(like.device), *place, src_data_rank=None)
    return spread


def _sharded(tensor: object) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, told without importing its module
