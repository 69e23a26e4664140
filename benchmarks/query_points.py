"""What SOURCE's default costs: queries along the run against the final query, coupled layers against layers apart.

    python benchmarks/query_points.py           one thread; about three minutes

The MLP 784-512-512-10 of benchmarks/mlp.py, 4,000 examples, six checkpoints, groups of 64. `Analyzer.score` as a user
calls it, from a store that holds the factors; every figure, in CPU seconds, is measured in turn with one plain epoch.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result_files import FOLDER, made, write_result
from safetensors.torch import save_file
from setting import examples, interleaved, mlp, plain_epoch

import segflow as sf

CHECKPOINTS, GROUP, BATCH = 6, 64, 512
METHODS = {
    "the default": sf.Source(),
    "final query": sf.Source(query_points="final"),
    "layers apart, final query": sf.Source(layers="apart", query_points="final"),
}


def trajectory_in(folder: Path, count: int) -> sf.Trajectory:
    """Six checkpoints that differ by noise, as what is timed does not depend on numbers."""
    files, generator = [], torch.Generator().manual_seed(0)
    for place in range(CHECKPOINTS):
        files.append(folder / f"{place}.safetensors")
        noisy = {n: v + 0.01 * torch.randn(v.shape, generator=generator) for n, v in mlp().state_dict().items()}
        save_file(noisy, files[-1])
    return sf.Trajectory(files, [20 * (place + 1) for place in range(CHECKPOINTS)], 0.05, count)


def scoring(folder: Path, method: Any, trajectory: sf.Trajectory, train: Any, count: int) -> Callable[[], Any]:
    """Score groups of 64 against so many queries, from a store that holds the factors and no scores."""
    queries, groups, task = examples(count, seed=2), sf.Groups.random(len(train), GROUP), sf.tasks.Classification()

    def run() -> None:
        own = Path(tempfile.mkdtemp(dir=folder))
        shutil.copytree(folder / "fitted", own / "store")
        options: dict[str, Any] = {"store": own / "store", "memory": 8 << 30, "progress": False}
        sf.Analyzer(mlp(), task, trajectory, method=method, **options).score(groups, train, queries, batch_size=BATCH)
        shutil.rmtree(own)

    return run


def main() -> None:
    """Time every method with few and many queries; print and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    train = examples(4000, seed=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trajectory = trajectory_in(folder, len(train))
        task, store = sf.tasks.Classification(), folder / "fitted"
        sf.Analyzer(mlp(), task, trajectory, store=store, memory=8 << 30, progress=False).fit(train, BATCH)
        works = {
            f"{count} queries, {label}": scoring(folder, method, trajectory, train, count)
            for count in (100, 1000)
            for label, method in METHODS.items()
        }
        figures = interleaved(plain_epoch(mlp(), train), works, rounds)
    rows = {label: [figure.seconds("process"), figure.ratio("process")] for label, figure in figures.items()}
    for label, (seconds, epochs) in rows.items():
        print(f"{label:50s} {seconds:.2f} s, {epochs:.1f} plain epochs")
    print(write_result(FOLDER / "speed" / "query_points.json", {"made": made(), "rounds": rounds, "rows": rows}))


if __name__ == "__main__":
    main()
