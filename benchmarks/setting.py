"""The model, the data and the clock that segflow's and Kronfluence's side of the benchmark share; needs torch only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

BATCH = 128
HERE = Path(__file__).parent


class Seconds(NamedTuple):
    """One measured run: CPU seconds of all threads of this process, and seconds on the clock."""

    process: float
    wall: float


@dataclass(frozen=True)
class Figure:
    """Runs of one piece of work, and of the plain epoch measured right before each: medians over the repetitions."""

    runs: tuple[Seconds, ...]
    epochs: tuple[Seconds, ...]

    def seconds(self, kind: str) -> float:
        return median(getattr(run, kind) for run in self.runs)

    def epoch(self, kind: str) -> float:
        return median(getattr(run, kind) for run in self.epochs)

    def ratios(self, kind: str) -> list[float]:
        return [getattr(a, kind) / getattr(b, kind) for a, b in zip(self.runs, self.epochs, strict=True)]

    def ratio(self, kind: str) -> float:
        """The median of the ratios to the epoch that was measured just before: slow drifts cancel."""
        return median(self.ratios(kind))

    def as_lists(self) -> list[list[Seconds]]:
        return [list(self.runs), list(self.epochs)]

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[Sequence[float]]]) -> Figure:
        runs, epochs = (tuple(Seconds(*pair) for pair in side) for side in lists)
        return cls(runs, epochs)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def examples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, 784, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    )


def batches_of(data: TensorDataset) -> Iterator[list[Tensor]]:
    """A plain loader: default collate, batches of BATCH in order."""
    lists = [list(range(start, min(start + BATCH, len(data)))) for start in range(0, len(data), BATCH)]
    yield from DataLoader(data, batch_sampler=lists)


def plain_epoch(model: nn.Module, data: TensorDataset) -> Callable[[], None]:
    """The unit of all ratios: one forward and backward through all parameters for each batch, no optimizer step."""

    def run() -> None:
        for inputs, labels in batches_of(data):
            functional.cross_entropy(model(inputs), labels, reduction="sum").backward()
            model.zero_grad()

    return run


def timed(context: Callable[[], object]) -> Seconds:
    process, wall = time.process_time(), time.perf_counter()
    context()
    return Seconds(time.process_time() - process, time.perf_counter() - wall)


def interleaved(
    epoch: Callable[[], object], contexts: dict[str, Callable[[], object]], rounds: int
) -> dict[str, Figure]:
    """Measure each work `rounds` times, an epoch before each: epoch, first, epoch, second, ..., epoch, first, ..."""
    runs: dict[str, list[Seconds]] = {name: [] for name in contexts}
    epochs: dict[str, list[Seconds]] = {name: [] for name in contexts}
    timed(epoch)  # warm up
    for _ in range(rounds):
        for name, context in contexts.items():
            epochs[name].append(timed(epoch))
            runs[name].append(timed(context))
    return {name: Figure(tuple(runs[name]), tuple(epochs[name])) for name in contexts}


def in_own_process(python: str, script: str, threads: int, arguments: list[str]) -> Any:
    """The JSON that a script prints, run with `threads` threads."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [python, str(HERE / script), "--threads", str(threads), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
