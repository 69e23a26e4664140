"""A million examples in a thousand groups: seconds and peak memory, each measured in a fresh process."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import segflow as sf

from ..result_files import made, write_result
from .detect import RESULTS
from .runs import one_thread, say

SIZES = (250_000, 500_000, 1_000_000)
TINY = (2_000, 4_000)
GROUPS, FEATURES, CLASSES, QUERIES, BATCH = 1_000, 64, 10, 100, 1_024
BOUND = 4.0  # GiB
STEPS = {
    "data": "the data and the model alone",
    "k-means": "k-means, 1,000 clusters",
    "scoring": "scoring, 1,000 groups and 100 queries",
}
PICTURE = Path(__file__).parents[2] / "docs" / "million.png"


def million(tiny: bool = False, picture: Path = PICTURE) -> Path:
    """Run every step at every size in a process of its own; write million.json and the picture."""
    found: list[dict[str, Any]] = []
    for size in TINY if tiny else SIZES:
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.groups.million", "--size", str(size), "--step", step]
            root = Path(__file__).parents[2]
            done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{size:,} examples, {step}: {found[-1]['seconds']:.1f} s, peak {found[-1]['GiB']:.2f} GiB")
    settings = {"groups": GROUPS, "features": FEATURES, "classes": CLASSES, "queries": QUERIES, "batch": BATCH}
    path = RESULTS / ("million-tiny.json" if tiny else "million.json")
    write_result(path, {"made": made()} | settings | {"bound": BOUND, "found": found})
    draw(found).savefig(picture, dpi=120)
    return path


def draw(found: list[dict[str, Any]]) -> Any:
    """Seconds and peak memory against the number of examples; dashed lines go on in proportion from the smallest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for step, title in STEPS.items():
        rows = [row for row in found if row["step"] == step]
        sizes = [row["examples"] / 1e6 for row in rows]
        if step != "data":
            [line] = left.plot(sizes, [row["seconds"] for row in rows], "o-", label=title)
            ideal = [rows[0]["seconds"] * size / sizes[0] for size in sizes]
            left.plot(sizes, ideal, "--", color=line.get_color(), alpha=0.5)
        right.plot(sizes, [row["GiB"] for row in rows], "o-", label=title, color="grey" if step == "data" else None)
    right.axhline(BOUND, color="black", linestyle=":", label=f"bound, {BOUND:g} GiB")
    for axis, name in ((left, "seconds"), (right, "peak memory of the process, GiB")):
        axis.set(xlabel="million examples", ylabel=name, ylim=(0, None))
        axis.legend(fontsize=8)
    return figure


def run(size: int, step: str) -> dict[str, Any]:
    """One step in this process: seconds (data and training apart), and the process's peak memory."""
    one_thread()
    train, query = _examples(size, 0), _examples(QUERIES, 1)
    model = nn.Linear(FEATURES, CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        _train(model, train, size, Path(folder) / "run")
        trajectory = sf.Trajectory.load(Path(folder) / "run")
        began = time.perf_counter()
        if step == "k-means":
            sf.Groups.kmeans(train[0], count=min(GROUPS, size // 4))
        elif step == "scoring":
            groups = sf.Groups.random(size, max(size // GROUPS, 1))
            task, store = sf.tasks.Classification(), Path(folder) / "store"
            analyzer = sf.Analyzer(model, task, trajectory, store=store, method=sf.TracIn(), progress=False)
            analyzer.score(groups, TensorDataset(*train), TensorDataset(*query), batch_size=BATCH)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"examples": size, "step": step, "seconds": seconds, "GiB": peak / 2**30}


def _examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around the centres of ten classes, the same centres for every seed."""
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(100))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    inputs = torch.randn(count, FEATURES, generator=generator)
    return inputs.add_(centres[labels], alpha=0.5), labels


def _train(model: nn.Module, train: tuple[Tensor, Tensor], size: int, folder: Path) -> None:
    """A few steps, so that there is one checkpoint to score at."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sf.record(model, optimizer, folder, dataset_size=size, total_steps=50, checkpoints=1):
        for step in range(50):
            batch = slice(step * 32 % size, step * 32 % size + 32)
            optimizer.zero_grad()
            functional.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
            optimizer.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--step", choices=list(STEPS), required=True)
    given = parser.parse_args()
    print(json.dumps(run(given.size, given.step)))
