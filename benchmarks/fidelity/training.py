"""The ground truth of a row (its banks of retrained models), and its recorded full runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import segflow as sf
from segflow.evaluation import Bank, BatchedTraining, Stage, random_subsets, read_bank

from ..downloads import CACHE
from .rows import CHECKPOINTS, REMOVED, STAGE_NAMES, SUBSETS, Row, network

_BANK_SEED = 1000  # retrainings share no initialisation with the full runs, whose seeds are 0, 1, ...


def folder_of(row: Row) -> Path:
    """Where the row's banks, runs and stores are."""
    return CACHE / "rows" / row.name


def bank_names(row: Row) -> tuple[str, ...]:
    """The row's banks: halves, and small groups, of each stage; and one for the estimator fitted to retrainings."""
    stages = ("",) if len(row.recipes) == 1 else tuple(f"-{name}" for name in STAGE_NAMES)
    banks = tuple(f"{kind}{stage}" for kind in ("bank", *REMOVED) for stage in stages)
    return (*banks, "extra") if row.extra else banks


def bank_of(row: Row, name: str) -> Bank:
    """A bank of the row: subsets of one stage's examples; those of other stages stay whole."""
    kind, _, stage = name.partition("-")
    count, repetitions = {"bank": (SUBSETS, row.repetitions), "extra": (row.extra, 1)}.get(kind, row.removals)
    sizes = [len(inputs) for inputs, _ in row.load().stages]
    columns = np.ones((count, sum(sizes)), dtype=bool)
    varied = STAGE_NAMES.index(stage) if stage else 0
    start, seed = sum(sizes[:varied]), ("bank", "extra", *REMOVED).index(kind)
    kept = 1 - REMOVED.get(kind, 0.5)
    columns[:, start : start + sizes[varied]] = random_subsets(count, sizes[varied], kept, seed=seed)
    return Bank(folder_of(row) / name, _training(row), columns, repetitions, _BANK_SEED * (1 + 100 * seed))


def fill(row: Row) -> None:
    """Retrain what is missing of the row's banks, and run what is missing of its full runs."""
    for seed in range(row.runs):
        record_run(row, seed)
    for name in bank_names(row):
        bank_of(row, name).run()


def ground_truth(row: Row, bank: str | None = None, measurement: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A finished bank's subsets [M, K] and measurements [M, R, Q]; by default the first of the row's of each."""
    subsets, measured_MRPQ = read_bank(folder_of(row) / (bank or bank_names(row)[0]))
    return subsets, measured_MRPQ[:, :, row.measurements.index(measurement or row.measurements[0])]


def run_folder(row: Row, seed: int) -> Path:
    """Where the full run of that seed is recorded."""
    return folder_of(row) / f"run-{seed}"


def record_run(row: Row, seed: int) -> None:
    """One full run under `sf.record`, an ordinary loop; nothing if it is there."""
    folder = run_folder(row, seed)
    if (folder / "done").exists():
        return
    torch.manual_seed(seed)
    model, generator = row.build(), torch.Generator().manual_seed(seed)
    for number, (recipe, (inputs, targets)) in enumerate(zip(row.recipes, row.load().stages, strict=True)):
        optimizer = recipe.make(model.parameters())
        steps = recipe.epochs * -(-len(inputs) // recipe.batch_size)
        options: dict[str, Any] = {"stage": STAGE_NAMES[number]} if len(row.recipes) > 1 else {}
        count = CHECKPOINTS // len(row.recipes)
        with sf.record(
            model, optimizer, folder, dataset_size=len(inputs), total_steps=steps, checkpoints=count,
            overwrite=number == 0, **options,
        ):  # fmt: skip
            for _ in range(recipe.epochs):
                for batch in torch.randperm(len(inputs), generator=generator).split(recipe.batch_size):
                    optimizer.zero_grad()
                    row.loss(model(inputs[batch]), targets[batch]).backward()
                    optimizer.step()
    (folder / "done").touch()


def load_run(row: Row, seed: int) -> tuple[nn.Module, sf.Trajectory]:
    """A model of the row's shape, and the trajectory of the full run of that seed."""
    torch.manual_seed(seed)
    return row.build(), sf.Trajectory.load(run_folder(row, seed))


def _training(row: Row) -> BatchedTraining:
    data = row.load()
    stages = [
        Stage(inputs, targets, row.loss, partial(recipe.make, fused=True), recipe.epochs, recipe.batch_size)
        for recipe, (inputs, targets) in zip(row.recipes, data.stages, strict=True)
    ]
    return BatchedTraining(partial(network, row.widths), stages, *data.query, row.measure, row.together)
