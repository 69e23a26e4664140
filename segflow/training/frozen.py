"""The part of a model that training leaves as it is: stored once, and watched."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.ranks import current
from ..runtime.sharding import local


class FrozenPart:
    """Parameters that need no place in every checkpoint, for they are frozen and have not changed so far.

    `names`: of these parameters. `entry`: what the recording says of the file that holds them, None without one.
    """

    def __init__(self, model: nn.Module, held: Collection[str]):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.entry: dict[str, Any] | None = None
        self._parameters = parameters
        self._unheld = {name for name in parameters if name not in held}
        self.names = {name for name, parameter in parameters.items() if not parameter.requires_grad} & _stored(model)
        self._begin = _sketches({name: parameters[name] for name in self._unheld | self.names})

    def keep(self, stored: Collection[str]) -> None:
        """Of a recording that goes on: those that it has stored, as far as they are frozen still."""
        self.names &= set(stored)

    def forget_moved(self, moved: Collection[str]) -> None:
        """Take out what has moved, is to be trained now, or changed otherwise, on any rank."""
        changed = {name for of_rank in current().gather(sorted(self.changed())) for name in of_rank}
        thawed = {name for name in self.names if self._parameters[name].requires_grad}
        self.names -= set(moved) | thawed | changed

    def changed(self) -> set[str]:
        """Those that no optimizer holds, or that are frozen, and that are not what they were at the beginning."""
        now = _sketches({name: self._parameters[name] for name in self._begin})
        return {name for name, sketch in self._begin.items() if now[name] != sketch}


def _stored(model: nn.Module) -> set[str]:
    return set(model.state_dict())


def _sketches(parameters: Mapping[str, Tensor]) -> dict[str, float | int]:
    """A number for each tensor that changes with nearly any change of it; read from the device all at once."""
    real = {name: local(p.detach()) for name, p in parameters.items() if p.is_floating_point()}
    other = {name: local(p.detach()) for name, p in parameters.items() if not p.is_floating_point()}
    by_device: dict[Any, list[str]] = {}
    for name, tensor in real.items():
        by_device.setdefault((tensor.device, tensor.dtype), []).append(name)
    sketches: dict[str, float | int] = {}
    for names in by_device.values():
        norms = torch.stack(torch._foreach_norm([real[name] for name in names])).tolist()
        sketches |= dict(zip(names, norms, strict=True))
    return sketches | {name: int(tensor.sum(dtype=torch.int64)) for name, tensor in other.items()}
