"""One process or many: the only module that talks to accelerate and torch.distributed."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device

from .errors import SegflowError


def require_one_process() -> None:
    """Refuse to run as one of several processes, where every process would silently do all the work."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
    if size > 1:
        raise SegflowError(
            f"segflow runs in one process so far, and this is one of {size}. "
            "Start the script with plain `python` instead of `accelerate launch` or `torchrun`."
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in a nested batch (tuples, lists, mappings) to `device`."""
    return send_to_device(batch, device)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The user's own module behind DistributedDataParallel or torch.compile wrappers."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=True)
