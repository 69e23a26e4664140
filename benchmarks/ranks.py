"""What a second process saves: fit and score by 1 and by 2 processes of one thread each.

    python benchmarks/ranks.py --processes 1,2

The MLP 784-512-512-10 of benchmarks/mlp.py, two checkpoints, SOURCE with one segment. The launches are made in turn;
each measures the stages inside its own first process, from a store of its own, and how much of that the store took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from setting import BATCH, examples, mlp

import segflow as sf
from segflow.store.store import Store

STAGES = ("fit", "score")


def worker(folder: Path, train_size: int, query_count: int) -> None:
    """One process of a launch: run both stages; the first process writes what they took."""
    train, query = examples(train_size, seed=1), examples(query_count, seed=2)
    files = sorted(folder.glob("*.safetensors"))
    trajectory = sf.Trajectory(files, [50, 100], 0.05, train_size)
    spent = _timed_store()
    analyzer = sf.Analyzer(
        mlp(), sf.tasks.Classification(), trajectory, store=folder / "store", method=sf.Source(segments=1)
    )
    groups = sf.Groups.random(train_size, size=64)
    stages: dict[str, Callable[[], Any]] = {
        "fit": lambda: analyzer.fit(train, BATCH),
        "score": lambda: analyzer.score(groups, train, query, batch_size=BATCH),
    }
    found = {}
    for name, stage in stages.items():
        spent.clear()
        begin = time.perf_counter()
        stage()
        found[name] = (time.perf_counter() - begin, sum(spent))
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "found.json").write_text(json.dumps(found))


def _timed_store() -> list[float]:
    """Seconds that the store's calls take, as they are made."""
    spent: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                spent.append(time.perf_counter() - begin)

        return run

    for name in ("write", "open", "holds"):
        setattr(Store, name, timed(getattr(Store, name)))
    return spent


def launched(processes: int, train_size: int, query_count: int) -> dict[str, list[float]]:
    """{stage: [seconds, of which in the store]} of one launch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(2):
            state = mlp().state_dict()
            save_file(
                {key: value * (1 + 0.05 * index) for key, value in state.items()}, folder / f"{index}.safetensors"
            )
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        command += [__file__, "--worker", str(folder), f"--examples={train_size}", f"--queries={query_count}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "SEGFLOW_QUIET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        return dict(json.loads((folder / "found.json").read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2", help="process counts to compare (default 1,2)")
    parser.add_argument("--examples", type=int, default=16000, help="training examples (default 16000)")
    parser.add_argument("--queries", type=int, default=100, help="queries (default 100)")
    parser.add_argument("--repetitions", type=int, default=3, help="launches of each count, in turn (default 3)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.worker:
        worker(given.worker, given.examples, given.queries)
        return 0
    counts = [int(count) for count in given.processes.split(",")]
    runs: dict[int, list[dict[str, list[float]]]] = {count: [] for count in counts}
    for _ in range(given.repetitions):
        for count in counts:
            runs[count].append(launched(count, given.examples, given.queries))
    print(f"{'stage':8}{'processes':>10}{'seconds':>10}{'faster':>9}{'in the store':>14}")
    for stage in STAGES:
        base = median(run[stage][0] for run in runs[counts[0]])
        for count in counts:
            seconds = median(run[stage][0] for run in runs[count])
            share = median(run[stage][1] / run[stage][0] for run in runs[count])
            print(f"{stage:8}{count:>10}{seconds:>10.2f}{base / seconds:>8.2f}x{share:>13.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
