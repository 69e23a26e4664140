"""What is left of sizes after coupling: whole classes against random tenths, with and without batch normalisation.

python -m benchmarks.fidelity.classes    trains, scores, writes results/fidelity-classes.json; a few minutes

Digits, SGD, converged, 800 examples. Each class, and each of ten random tenths, is left out in turn and the network is
retrained ten times; SOURCE predicts the change from one recorded run. The slope is that of real on predicted changes.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.evaluation import Bank, BatchedTraining, Stage, slope_of_change

from ..downloads import CACHE
from ..result_files import FOLDER, made, write_result
from .rows import CHECKPOINTS, ROWS, margin_and_loss

ROW = ROWS["digits-sgd-converged-clean"]
RESULT = FOLDER / "fidelity-classes.json"
METHODS = {
    "SOURCE": sf.Source(),
    "SOURCE, layers apart, final query": sf.Source(layers="apart", query_points="final"),
    "SOURCE, exactly coupled": sf.Source(curvature="coupled"),
}
REPETITIONS = 10


def network(normalised: bool) -> nn.Sequential:
    """The row's network, with batch normalisation before each ReLU where asked for."""
    first, second, third = (nn.Linear(*pair) for pair in ((64, 64), (64, 64), (64, 10)))
    norms = [[nn.BatchNorm1d(64)] if normalised else [] for _ in range(2)]
    return nn.Sequential(first, *norms[0], nn.ReLU(), second, *norms[1], nn.ReLU(), third)


def groupings() -> dict[str, sf.Groups]:
    """The classes of the training images, and as many random groups."""
    [(inputs, labels)] = ROW.load().stages
    return {"whole classes": sf.Groups.by(labels), "random tenths": sf.Groups.random(len(inputs), len(inputs) // 10)}


def slopes(normalised: bool) -> dict[str, dict[str, Any]]:
    """The slope of each method on each grouping."""
    groups = groupings()
    scores = _scores(normalised, groups)
    found: dict[str, dict[str, Any]] = {}
    for kind, of in groups.items():
        kept = np.ones((len(of), len(ROW.load().stages[0][0])), dtype=bool)
        for place, members in enumerate(of.members):
            kept[place, members] = False
        folder = CACHE / "classes" / f"{kind.replace(' ', '-')}-{'normalised' if normalised else 'plain'}"
        measured = Bank(folder, _training(normalised), kept, REPETITIONS).run()[:, :, 0].mean(1)
        for method, by_kind in scores.items():
            slope = slope_of_change(by_kind[kind], ~np.eye(len(of), dtype=bool), measured)
            figures = {"value": slope.value, "low": slope.low, "high": slope.high}
            found.setdefault(method, {})[kind] = figures
            print(
                f"{'batch norm' if normalised else 'plain':10s} {kind:14s} {method:34s} {slope.value:.3f}", flush=True
            )
    return found


def _training(normalised: bool) -> BatchedTraining:
    [(inputs, labels)], [recipe] = ROW.load().stages, ROW.recipes
    stage = Stage(inputs, labels, ROW.loss, partial(recipe.make, fused=True), recipe.epochs, recipe.batch_size)
    return BatchedTraining(partial(network, normalised), [stage], *ROW.load().query, margin_and_loss, together=1)


def _scores(normalised: bool, groups: dict[str, sf.Groups]) -> dict[str, dict[str, sf.Scores]]:
    """Scores of one recorded run by each method, of each grouping."""
    [(inputs, labels)], [recipe] = ROW.load().stages, ROW.recipes
    train, query = TensorDataset(inputs, labels), TensorDataset(*ROW.load().query)
    torch.manual_seed(0)
    model, generator = network(normalised), torch.Generator().manual_seed(0)
    optimizer = recipe.make(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        steps = recipe.epochs * -(-len(inputs) // recipe.batch_size)
        run = Path(folder) / "run"
        with sf.record(model, optimizer, run, dataset_size=len(inputs), total_steps=steps, checkpoints=CHECKPOINTS):
            for _ in range(recipe.epochs):
                for batch in torch.randperm(len(inputs), generator=generator).split(recipe.batch_size):
                    optimizer.zero_grad()
                    ROW.loss(model(inputs[batch]), labels[batch]).backward()
                    optimizer.step()
        model.eval()
        task, trajectory = sf.tasks.Classification("margin"), sf.Trajectory.load(run)
        found: dict[str, dict[str, sf.Scores]] = {}
        for name, method in METHODS.items():
            store = Path(folder) / "store"
            analyzer = sf.Analyzer(model, task, trajectory, store=store, method=method, progress=False)
            analyzer.fit(train, batch_size=256)
            found[name] = {kind: analyzer.score(of, train, query, batch_size=256) for kind, of in groups.items()}
        return found


def main() -> None:
    """Measure and write the result."""
    torch.set_num_threads(1)
    found = {("batch normalisation" if normalised else "plain"): slopes(normalised) for normalised in (False, True)}
    print(write_result(RESULT, {"row": ROW.name, "made": made(), "repetitions": REPETITIONS, "slopes": found}))


if __name__ == "__main__":
    main()
