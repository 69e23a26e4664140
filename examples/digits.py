"""Which training images made a digit classifier behave as it does, and does retraining agree?

A tutorial to read from top to bottom. It trains a small MLP on scikit-learn's digits with 15% wrong labels, records the
run, scores groups of training images and single images against test images with three methods, retrains on random
half-subsets, and compares. Run it with `segflow demo`, or `python examples/digits.py`.
"""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.evaluation import found_among_lowest, linear_datamodeling_score, random_subsets, retrain
from segflow.report import influence_figure

TRAIN, QUERIES, WRONG_SHARE = 800, 100, 0.15
EPOCHS, BATCH = 20, 50
STEPS = EPOCHS * TRAIN // BATCH
GROUP_SIZE, HALVES = 10, 40

# ---- What you have anyway: data, a model, a training loop ----


def load_data() -> tuple[TensorDataset, TensorDataset, np.ndarray]:
    """Training images (some with a wrong label), test images, and which training labels are wrong."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[order])
    wrong = np.random.default_rng(1).random(TRAIN) < WRONG_SHARE
    shift = torch.tensor(np.random.default_rng(2).integers(1, 10, TRAIN)) * torch.tensor(wrong)
    train = TensorDataset(images[:TRAIN], (labels[:TRAIN] + shift) % 10)
    query = TensorDataset(images[TRAIN : TRAIN + QUERIES], labels[TRAIN : TRAIN + QUERIES])
    return train, query, wrong


def build_model(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small MLP and the optimizer that trains it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)


def train_model(model: nn.Module, optimizer: torch.optim.Optimizer, data: TensorDataset, seed: int) -> None:
    """An ordinary training loop: shuffled batches, the mean cross-entropy."""
    images, labels = data.tensors
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


# ---- What a comparison with retraining needs: one function that trains on some of the groups and measures ----


def retrain_without(groups: sf.Groups, kept: np.ndarray, seed: int) -> np.ndarray:
    """The test losses [Q] after training on the kept groups only."""
    train, query, _ = load_data()
    chosen = np.concatenate([groups.members[group] for group in kept])
    model, optimizer = build_model(seed)
    train_model(model, optimizer, TensorDataset(*train[chosen]), seed)
    images, labels = query.tensors
    with torch.no_grad():
        losses: np.ndarray = nn.functional.cross_entropy(model(images), labels, reduction="none").numpy()
    return losses


def compare(
    of_groups: sf.Scores, subsets: np.ndarray, measured: np.ndarray, single: sf.Scores, wrong: np.ndarray
) -> dict[str, float]:
    """One method's linear datamodeling score with its interval, and how many wrong labels its ranking finds."""
    agreement = linear_datamodeling_score(of_groups, subsets, measured)
    found = found_among_lowest(single.total().values[0], wrong, int(wrong.sum()))
    return {"mean": agreement.mean, "low": agreement.low, "high": agreement.high, "found": found}


def table(result: dict[str, Any]) -> str:
    """The comparison in Markdown, as README has it."""
    count, share = result["wrong"], result["wrong share"]
    lines = [
        f"| method | linear datamodeling score | wrong labels among the {count} most harmful |",
        "|---|---|---|",
    ]
    for name, one in result["methods"].items():
        agreement = f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        lines.append(f"| `{name}` | {agreement} | {one['found']:.0f} ({one['found'] / count:.0%}) |")
    return "\n".join([*lines, f"| chance | 0 | {count * share:.0f} ({share:.0%}) |"])


# ---- The study ----


def main(
    out: str = "demo-output", retrainings: int = 5, processes: int | None = None, progress: bool | None = None
) -> None:
    """Train, record, check, fit, score, retrain, compare; writes everything below `out`."""
    began, folder = time.perf_counter(), Path(out)
    train, query, wrong = load_data()

    # 1. Train as ever, inside record(): it saves checkpoints and every step's learning rate, and changes no number.
    model, optimizer = build_model(seed=0)
    with sf.record(model, optimizer, folder / "run", dataset_size=TRAIN, total_steps=STEPS, overwrite=True):
        train_model(model, optimizer, train, seed=0)
    trajectory = sf.Trajectory.load(folder / "run")

    # 2. Check the setting, fit curvature, score: groups for the comparison, single images for the figure. The three
    #    methods share one store, so that what one has fitted the next one finds.
    shutil.rmtree(folder / "influence", ignore_errors=True)  # the factors of an earlier demo
    groups = sf.Groups.random(TRAIN, size=GROUP_SIZE, seed=0)
    scores: dict[str, sf.Scores] = {}
    single: dict[str, sf.Scores] = {}
    for method in (sf.Source(segments=3), sf.InfluenceFunction(), sf.TracIn()):
        analyzer = sf.Analyzer(
            model,
            sf.tasks.Classification(),
            trajectory,
            store=folder / "influence",
            method=method,
            progress=progress,
        )
        if not scores:
            print(analyzer.check(train, query), end="\n\n")
        analyzer.fit(train)
        name = type(method).__name__
        scores[name] = analyzer.score(groups, train, query)
        single[name] = analyzer.score(sf.Groups.singletons(TRAIN), train, query, keep=("term",))

    # 3. Does retraining on random halves agree? A score predicts how a test loss changes without a group; summed over
    #    the groups that a half leaves out, it should rank the halves as retraining on them does.
    subsets = random_subsets(HALVES, len(groups))
    measured = retrain(
        partial(retrain_without, groups), subsets, repetitions=retrainings, processes=processes, progress=progress
    ).mean(1)
    result: dict[str, Any] = {
        "segflow": sf.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "halves": HALVES,
        "retrainings": retrainings,
        "wrong": int(wrong.sum()),
        "wrong share": WRONG_SHARE,
        "methods": {name: compare(scores[name], subsets, measured, single[name], wrong) for name in scores},
    }
    print(f"Agreement with retraining: {HALVES} random halves of {len(groups)} groups, {retrainings} trainings each.\n")
    print(table(result), end="\n\n")
    # 4. One figure: the query with the highest loss.
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(query.tensors[0]), query.tensors[1], reduction="none").numpy()
    chosen, labels = int(np.argmax(losses)), train.tensors[1]
    figure = influence_figure(
        single["Source"],
        chosen,
        query.tensors[0][chosen].reshape(8, 8).numpy(),
        train.tensors[0].reshape(-1, 8, 8).numpy(),
        caption=lambda r: f"label {labels[r.group]}" + (" (wrong)" if wrong[r.group] else ""),
        query_caption=f"label {query.tensors[1][chosen]}, loss {losses[chosen]:.2f}",
    )
    figure.savefig(folder / "influence.png", dpi=110)
    print(f"figure: {folder / 'influence.png'}   scores: {folder / 'scores.safetensors'}")
    scores["Source"].save(folder / "scores.safetensors")
    result["seconds"] = round(time.perf_counter() - began, 1)
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n")  # README's table is docs/demo.json's
    print(f"done in {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
