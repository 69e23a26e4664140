"""What groups save: scoring by group size, Grad-K-Means, and Kronfluence's pairwise scores, on one CPU.

    python benchmarks/group_speed.py --threads 1
    python benchmarks/group_speed.py --threads 1 --kronfluence

The MLP 784-512-512-10 of benchmarks/mlp.py, 4,000 examples. Group scoring is `Analyzer.score` as a user calls it, with
influence functions at one checkpoint: query gradients, operators, training gradients, products, and the store. Singles
are our own vectorised ones by the same call. Every figure is measured in turn with one plain epoch.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result_files import FOLDER, made, write_result
from safetensors.torch import save_file
from setting import HERE, Figure, examples, in_own_process, interleaved, mlp, plain_epoch

import segflow as sf

SIZES = (1, 16, 64, 256, 1024)
QUERIES = (100, 1000)
GROUP_BATCH = 512  # groups and singles alike; the epoch has batches of 128
Works = dict[str, Callable[[], Any]]


def prepared(folder: Path, train: Any) -> Callable[[Path, Any], sf.Analyzer]:
    """A fitted store, and what makes an analyzer on a copy of it."""
    model = mlp()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "end.safetensors")
    trajectory = sf.Trajectory([folder / "end.safetensors"], [100], 0.05, len(train))

    def analyzer(store: Path, method: Any = None) -> sf.Analyzer:
        method = method or sf.InfluenceFunction()
        task = sf.tasks.Classification()
        return sf.Analyzer(model, task, trajectory, store=store, method=method, memory=8 << 30, progress=False)

    analyzer(folder / "fitted").fit(train, GROUP_BATCH)
    return analyzer


def scoring(folder: Path, analyzer: Any, train: Any, size: int, count: int) -> Callable[[], Any]:
    """Score groups of a size against so many queries, from a store that holds the factors and no scores."""
    queries, groups = examples(count, seed=2), sf.Groups.random(len(train), size)

    def run() -> None:
        own = Path(tempfile.mkdtemp(dir=folder))
        shutil.copytree(folder / "fitted", own / "store")
        analyzer(own / "store").score(groups, train, queries, batch_size=GROUP_BATCH)
        shutil.rmtree(own)

    return run


def worker(threads: int, size: int, rounds: int) -> dict[str, Figure]:
    torch.set_num_threads(threads)
    train = examples(size, seed=1)
    epoch = plain_epoch(mlp(), train)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        analyzer = prepared(folder, train)
        features = analyzer(folder / "fitted", sf.GradientDot()).features(train)
        quick: Works = {
            f"{count} queries, groups of {size}": scoring(folder, analyzer, train, size, count)
            for count in QUERIES
            for size in SIZES[1:]
        }
        quick["Grad-K-Means, features"] = lambda: analyzer(folder / "fitted", sf.GradientDot()).features(train)
        for group in (64, 256):
            quick[f"Grad-K-Means, clustering into groups of {group}"] = lambda group=group: sf.Groups.kmeans(  # type: ignore[misc]
                features, size=group
            )
        slow: Works = {f"{count} queries, groups of 1": scoring(folder, analyzer, train, 1, count) for count in QUERIES}
        return interleaved(epoch, quick, rounds) | interleaved(epoch, slow, 1)


def report(figures: dict[str, Figure]) -> None:
    print(f"{'':46}{'wall s':>9}{'epochs':>9}{'faster than singles':>22}")
    for name, figure in figures.items():
        count = name.split(" queries")[0]
        single = figures.get(f"{count} queries, groups of 1")
        times = f"{single.seconds('wall') / figure.seconds('wall'):.1f}x" if single else ""
        print(f"{name:46}{figure.seconds('wall'):>9.3f}{figure.ratio('wall'):>9.2f}{times:>22}")


def saved_rows(figures: dict[str, Figure]) -> dict[str, list[float]]:
    """By group size, for each number of queries: seconds on the clock, and how often that goes into singles' time."""
    found: dict[str, list[float]] = {}
    for size in SIZES:
        for count in QUERIES:
            taken, single = (figures[f"{count} queries, groups of {n}"].seconds("wall") for n in (size, 1))
            found.setdefault(str(size), []).extend([taken] if size == 1 else [taken, single / taken])
    return found


def report_peer(figures: dict[str, Figure], count: int, answer: dict[str, Any]) -> None:
    theirs = Figure.from_lists(answer["figures"]["scores"])
    print(
        f"\nKronfluence {answer['version']}: pairwise scores, {count} queries: {theirs.seconds('wall'):.1f} s, "
        f"{theirs.ratio('wall'):.0f} epochs"
    )
    for size in SIZES:
        figure = figures[f"{count} queries, groups of {size}"]
        print(f"  segflow, groups of {size}: {theirs.seconds('wall') / figure.seconds('wall'):.0f}x faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/speed/group_speed.json")
    parser.add_argument("--kronfluence", action="store_true", help="run Kronfluence on the same queries (minutes)")
    parser.add_argument(
        "--kronfluence-python", default=str(HERE / ".venv-kronfluence" / "bin" / "python"), help="its interpreter"
    )
    given = parser.parse_args()
    figures = worker(given.threads, given.examples, given.repetitions)
    print(f"MLP 784-512-512-10, {given.examples} examples, {given.threads} thread(s), medians of {given.repetitions}")
    report(figures)
    if given.save:
        about = {"made": made(), "examples": given.examples, "threads": given.threads}
        print(write_result(FOLDER / "speed" / "group_speed.json", about | {"rows": saved_rows(figures)}))
    sys.stdout.flush()
    for count in QUERIES if given.kronfluence else ():
        shape = ["--examples", str(given.examples), "--queries", str(count), "--repetitions", "1"]
        answer = in_own_process(given.kronfluence_python, "kronfluence_side.py", given.threads, shape)
        report_peer(figures, count, answer)


if __name__ == "__main__":
    main()
