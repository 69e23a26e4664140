"""The part of a model that training leaves as it is: stored once, and watched."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.ranks import current
from ..runtime.sharding import local, named_parameters, state_of


class FrozenPart:
    """Parameters that need no place in every checkpoint, for they are frozen and have not changed so far.

    `names`: of these parameters. `changed`: those that are frozen, or that no optimizer holds, and that were not what
    they had been when a checkpoint was saved last. `entry`: what the recording says of the file that holds them, None
    without one.
    """

    def __init__(self, model: nn.Module, held: Collection[str]):
        parameters = named_parameters(model, remove_duplicate=False)
        self.entry: dict[str, Any] | None = None
        self.changed: set[str] = set()
        self._parameters = parameters
        frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        self.names = frozen & set(state_of(model))
        self._begin = _sketches({n: p for n, p in parameters.items() if n not in held or n in self.names})

    def keep(self, stored: Collection[str]) -> None:
        """Of a recording that goes on: those that it has stored, as far as they are frozen still."""
        self.names.intersection_update(stored)

    def forget_moved(self, moved: Collection[str]) -> None:
        """Take out what has moved, is to be trained now, or changed otherwise, on any rank."""
        now = _sketches({name: self._parameters[name] for name in self._begin})
        here = [name for name, sketch in self._begin.items() if now[name] != sketch]
        self.changed = {name for of_rank in current().gather(here) for name in of_rank}
        thawed = {name for name in self.names if self._parameters[name].requires_grad}
        self.names -= set(moved) | thawed | self.changed


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
