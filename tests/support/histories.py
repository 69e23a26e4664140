"""Trajectories whose parameter groups have histories that a test writes down: rates, decay, moments, ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import segflow as sf


class History(sf.Trajectory):
    """A trajectory whose steps [steps, parameter groups] and whose groups are as `given` says, by name.

    rates: times the data's gradient; decays: times the parameter; coupled, has_moments, kinds, ceilings: of the groups;
    clip_squares: of each checkpoint and group.
    """

    given: Mapping[str, Any]

    def lr_steps(self, start: int, end: int) -> tuple[float, ...]:
        return tuple(self.given["rates"][start:end].sum(0).tolist())

    def decay_steps(self, start: int, end: int) -> tuple[float, ...]:
        return tuple(self.given["decays"][start:end].sum(0).tolist())

    def clip_squares(self, index: int) -> tuple[float, ...]:
        return self.given["clip_squares"][index]

    coupled = property(lambda self: self.given["coupled"])
    has_moments = property(lambda self: self.given["has_moments"])
    preconditioned = property(lambda self: any(self.given["has_moments"]))
    ceilings = property(lambda self: self.given["ceilings"])


def history(
    made: sf.Trajectory,
    groups: Mapping[str, int],
    rates: Tensor,
    *,
    optimizer: Any = None,
    moments: Any = None,
    **given: Any,
) -> History:
    """The trajectory `made` with other histories; groups: of the parameters; moments: a file for each checkpoint."""
    count = rates.shape[1]
    trajectory = History(
        made.checkpoints, made.steps, rates.nan_to_num(), made.dataset_size, optimizer, groups, second_moments=moments
    )
    trajectory.given = {
        "rates": rates,
        "decays": torch.zeros_like(rates),
        "coupled": (False,) * count,
        "has_moments": (trajectory.optimizer.name != "SGD",) * count,
        "kinds": (trajectory.optimizer.name,) * count,
        "ceilings": (1.0,) * count,
        "clip_squares": ((1.0,) * count,) * len(made.steps),
        **given,
    }
    trajectory.kinds = trajectory.given["kinds"]
    return trajectory


def by_span(*spans: tuple[int, Sequence[float]]) -> Tensor:
    """[steps, parameter groups]: so many steps with these numbers, then so many with those."""
    rows = [list(numbers) for count, numbers in spans for _ in range(count)]
    return torch.tensor(rows, dtype=torch.float64)


def moment_files(folder: Path, model: nn.Module, count: int, missing: Mapping[int, str] | None = None) -> list[Path]:
    """Files of second moments of no particular form; missing: {checkpoint: prefix of the parameters it has none of}."""
    generator, paths = torch.Generator().manual_seed(11), []
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        values = {
            name: 0.02 * torch.rand(value.shape, generator=generator, dtype=torch.float64) + 1e-6
            for name, value in model.named_parameters()
        }
        without = (missing or {}).get(index)
        kept = {name: value for name, value in values.items() if without is None or not name.startswith(without)}
        paths.append(folder / f"moments-{index}.safetensors")
        save_file(kept, paths[-1])
    return paths
