"""What `sf.record` costs of a training step: steps with and without it, in turn, in one process.

    python benchmarks/recording.py

MLPs of two widths (784-256-128-10, and 784-512-512-10 as in `mlp.py`) with batches of 128 on one thread, by optimizer,
with and without clipping by norm. Blocks of
steps with and without recording take turns; a figure is the median over blocks of (with - without) / without, by
process time. Checkpoints are not counted: they are written at the steps asked for. Writes results to recording.json
beside this file, and exits with 3 if a share is above 2%.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import segflow as sf

BOUND, BOUND_MISSED = 0.02, 3
BATCH = 128
WIDTHS = ((256, 128), (512, 512))
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
}


def network(widths: tuple[int, int]) -> nn.Module:
    """An MLP with two hidden layers, always with the same weights."""
    torch.manual_seed(0)
    first, second = widths
    return nn.Sequential(nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, clips: bool, x: torch.Tensor, y: torch.Tensor) -> None:
    """One step of a plain training loop."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    if clips:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def seconds(work: Callable[[], None], steps: int) -> float:
    """Process seconds of a step."""
    start = time.process_time()
    for _ in range(steps):
        work()
    return (time.process_time() - start) / steps


def measured(
    widths: tuple[int, int], make: Callable[[Any], torch.optim.Optimizer], clips: bool, blocks: int, steps: int
) -> dict[str, float]:
    """Microseconds of a step without recording, and what recording adds: microseconds, and its share."""
    x, y = torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,))
    plain, added = [], []
    for _ in range(blocks):
        model = network(widths)
        optimizer = make(model.parameters())

        def work(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            step(model, optimizer, clips, x, y)

        work()
        without = seconds(work, steps)
        model = network(widths)
        optimizer = make(model.parameters())
        with (
            tempfile.TemporaryDirectory() as folder,
            sf.record(
                model, optimizer, folder, dataset_size=BATCH, total_steps=steps + 1, checkpoints=[1], progress=False
            ),
        ):
            work(model, optimizer)
            recorded = seconds(lambda m=model, o=optimizer: work(m, o), steps)  # type: ignore[misc]
        plain.append(without)
        added.append(recorded - without)
    share = median(more / without for more, without in zip(added, plain, strict=True))
    return {"step_us": median(plain) * 1e6, "added_us": median(added) * 1e6, "share": share}


def main() -> int:
    """Measure, print and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        f"{widths[0]}-{widths[1]}, {name}{', clipping' if clips else ''}": measured(
            widths, make, clips, arguments.blocks, arguments.steps
        )
        for widths in WIDTHS
        for name, make in OPTIMIZERS.items()
        for clips in (False, True)
    }
    for name, figure in figures.items():
        plain, added = f"{figure['step_us']:8.0f} us a step", f"recording adds {figure['added_us']:6.1f} us"
        print(f"{name:40} {plain}, {added}, {figure['share']:.1%}")
    Path(__file__).with_suffix(".json").write_text(json.dumps({"torch": torch.__version__, **figures}, indent=1) + "\n")
    return BOUND_MISSED if any(figure["share"] > BOUND for figure in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
