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


def _sketches(parameters: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Numbers for each tensor that change with nearly any change of it: sum, norm, and how often torch wrote to it.

    They are summed in double precision, and read from each device all at once.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        tensor = local(parameter.detach())
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensor = tensor.view(torch.uint8)
        total = tensor.sum(dtype=torch.float64)
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64) if tensor.is_floating_point() else total
        by_device.setdefault(tensor.device, {})[name] = torch.stack([total, norm])
    sketches: dict[str, list[float]] = {}
    for of_device in by_device.values():
        sketches |= dict(zip(of_device, torch.stack(list(of_device.values())).tolist(), strict=True))
    return {name: [*sketches[name], float(parameters[name]._version)] for name in parameters}
