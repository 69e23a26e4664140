"""What segflow's passes cost, in plain forward+backward epochs of the same model, beside their bounds.

    python benchmarks/mlp.py --threads 1,2
    python benchmarks/mlp.py --threads 1 --kronfluence --kronfluence-python PATH/bin/python

An MLP 784-512-512-10 with 4,000 examples in batches of 128. Each thread count runs in a process of its own; there,
every figure is measured in turn with the epoch that it is compared with. Exits with 3 unless every bound surely holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result_files import FOLDER, made, write_result
from setting import BATCH, HERE, Figure, examples, in_own_process, interleaved, mlp, plain_epoch
from torch import Tensor

from segflow.curvature.kronecker import Eigenbasis, eigenvectors, mean_over
from segflow.curvature.passes import corrected_eigenvalues, covariances
from segflow.data.batches import in_order
from segflow.data.readers import Reader, batches
from segflow.groups.groups import Groups
from segflow.model.finite_check import FiniteCheck
from segflow.model.layers import choose_layers
from segflow.model.make_view import make_loss_view
from segflow.model.observing import observing
from segflow.runtime.ranks import Ranks
from segflow.scoring.group_gradients import GroupGradients, tile_scores
from segflow.scoring.meeting import MetQueries
from segflow.scoring.outer_products import Stacks, formed
from segflow.scoring.query_gradients import query_gradients
from segflow.scoring.tiles import shares, tiles
from segflow.tasks import Classification

PEER_QUERIES = 200
BOUND_MISSED = 3  # the exit status; 1 and 2 are those of a crash and of wrong arguments
ALONE = Ranks()
BUDGET = 2**28  # bytes for temporaries, as an Analyzer with 2 GiB of memory would pass on
KINDS = ("process", "wall")
DISTURBED = 1.5
Works = dict[str, Callable[[], object]]
Figures = Mapping[str, Figure]


class Ours:
    """segflow's passes at one checkpoint, called as Analyzer.fit and Analyzer.score call them."""

    def __init__(self, train_size: int, query_count: int):
        self.model, self.train = mlp(), examples(train_size, seed=1)
        self.query = examples(query_count, seed=2)
        self.layers = choose_layers(self.model).tracked
        with observing(self.model):
            self.sample, self.plain, self.measurement = (
                make_loss_view(self.model, Classification(), kind, self.layers, Reader(data))
                for kind, data in (("sample", self.train), ("train", self.train), ("measurement", self.query))
            )
        self.sums = self.covariance()
        self.bases = self.make_bases()
        self.queries = self.query_side()

    def walk(self, data: Any, lists: Any) -> Any:
        return batches(data, lists, None, self.plain.device)

    def covariance(self) -> Any:
        with observing(self.model):
            data = self.walk(self.train, in_order(len(self.train), BATCH))
            return covariances(self.sample, data, ALONE, "the benchmark")

    def make_bases(self) -> dict[str, Eigenbasis]:
        def side(total: Tensor, rows: Tensor, name: str) -> Tensor:
            return eigenvectors(mean_over([(total, rows)], (1.0,)), name).float()

        return {
            name: Eigenbasis(side(sums.a_PII, sums.a_rows, name), side(sums.g_POO, sums.g_rows, name))
            for name, sums in self.sums.items()
        }

    def eigenvalues(self) -> Any:
        with observing(self.model):
            data = self.walk(self.train, in_order(len(self.train), BATCH))
            return corrected_eigenvalues(self.sample, data, self.bases, ALONE, "the benchmark", BUDGET)

    def query_side(self) -> Stacks:
        """Every query's gradient under an influence function's operator, in the eigenbasis."""
        with observing(self.model):
            data = self.walk(self.query, in_order(len(self.query), BATCH))
            gradients = query_gradients(self.measurement, data, self.bases, ALONE, "the benchmark")
        return {name: g * (torch.ones(g.shape[1:]) + 0.1).reciprocal() for name, g in gradients.items()}

    def scores(self, groups: Groups, queries: Stacks, bases: Mapping[str, Eigenbasis]) -> Tensor:
        """bases: the eigenbases that the queries stand in, into which training tokens are rotated; or none."""
        with observing(self.model):
            [pieces] = shares(groups, 1)
            [tile] = tiles(pieces, BATCH, len(groups))
            data = self.walk(self.train, [batch.examples for batch in tile.batches])
            met = MetQueries(queries, bases, 1, ALONE)
            gradients = GroupGradients(met, len(groups), BUDGET)
            return tile_scores(self.plain, data, tile, gradients, FiniteCheck("the benchmark"))

    def product(self, count: int) -> Callable[[], object]:
        """All queries [Q, D] times `count` summed gradients [K, D], for each layer; in slices of at most 128."""
        slices = [min(BATCH, count - start) for start in range(0, count, BATCH)]
        sums = {name: torch.randn(slices[0], layer.size) for name, layer in self.layers.items()}
        values = {name: formed(queries).flatten(1) for name, queries in self.queries.items()}

        def run() -> None:
            for rows in slices:
                for name, queries in values.items():
                    _ = queries @ sums[name][:rows].mT

        return run


def worker(threads: int, train_size: int, query_count: int, repetitions: int, peer: bool) -> dict[str, Figure]:
    """Every figure at one thread count, in this process."""
    torch.set_num_threads(threads)
    ours = Ours(train_size, query_count)
    epoch = plain_epoch(ours.model, ours.train)
    groups, singletons = Groups.random(train_size, size=64), Groups.singletons(train_size)
    quick: Works = {
        "covariance": ours.covariance,
        "eigenvalues": ours.eigenvalues,
        "groups": lambda: ours.scores(groups, ours.queries, {}),
        "groups, rotated": lambda: ours.scores(groups, ours.queries, ours.bases),
        "groups: product": ours.product(len(groups)),
        "eigendecomposition": ours.make_bases,
        "query side": ours.query_side,
    }
    slow: Works = {
        "singletons": lambda: ours.scores(singletons, ours.queries, ours.bases),
        "singletons: product": ours.product(train_size),
    }
    figures = interleaved(epoch, quick, repetitions) | interleaved(epoch, slow, repetitions)
    if peer:
        ours = Ours(train_size, PEER_QUERIES)
        context: Works = {"peer: singletons": lambda: ours.scores(singletons, ours.query_side(), ours.bases)}
        figures |= interleaved(epoch, context, min(repetitions, 3))
    return figures


@dataclass(frozen=True)
class Row:
    """One line of the table; `minus` is a figure that is taken off before the ratio is compared with the bound."""

    title: str
    figure: str
    minus: str | None = None
    bound: float | None = None

    def ratio(self, figures: Figures, kind: str) -> float:
        figure = figures[self.figure]
        if self.minus is None:
            return figure.ratio(kind)
        # each round's own product is taken off each round's own pass
        pairs = zip(figure.runs, figures[self.minus].runs, figure.epochs, strict=True)
        return median((getattr(a, kind) - getattr(b, kind)) / getattr(e, kind) for a, b, e in pairs)

    def seconds(self, figures: Figures, kind: str) -> float:
        taken_off = figures[self.minus].seconds(kind) if self.minus else 0.0
        return figures[self.figure].seconds(kind) - taken_off

    def verdict(self, figures: Figures) -> str:
        """ok, over, or unsure where the epochs were disturbed: a slow epoch would let any pass look cheap."""
        if self.bound is None:
            return ""
        over = [kind for kind in KINDS if self.ratio(figures, kind) > self.bound]
        if over:
            return f"over ({' and '.join(over)} time)"
        slowed = max(self.disturbance(figures, kind) for kind in KINDS)
        return f"unsure: the median epoch took {slowed:.1f}x the fastest" if slowed > DISTURBED else "ok"

    def disturbance(self, figures: Figures, kind: str) -> float:
        """The median epoch beside this figure over the fastest of the whole run; medians bear a few slow ones."""
        fastest = min(getattr(epoch, kind) for figure in figures.values() for epoch in figure.epochs)
        return figures[self.figure].epoch(kind) / fastest


ROWS = (
    Row("covariance pass", "covariance", bound=2.5),
    Row("corrected-eigenvalue pass", "eigenvalues", bound=3.0),
    Row("groups of 64, all", "groups"),
    Row("  of which query products", "groups: product"),
    Row("  the rest", "groups", minus="groups: product", bound=3.0),
    Row("  the rest, in the eigenbasis", "groups, rotated", minus="groups: product", bound=3.0),
    Row("singletons, all", "singletons"),
    Row("  of which query products", "singletons: product"),
    Row("  the rest", "singletons", minus="singletons: product"),
    Row("eigendecompositions", "eigendecomposition"),
    Row("query side, one operator", "query side"),
)
PEER_ROWS = (
    ("covariance pass", "covariance", "covariance"),
    ("corrected-eigenvalue pass", "eigenvalues", "eigenvalues"),
    (f"per-example scores, {PEER_QUERIES} queries, query side included", "peer: singletons", "scores"),
)


def report(threads: int, figures: Figures) -> bool:
    """Print one thread count's table; True if every bound holds."""
    some = figures["covariance"]
    spread = [f"{min(values):.3f}..{max(values):.3f}" for values in zip(*(f for f in some.epochs), strict=True)]
    print(f"\n{threads} thread(s), {len(some.runs)} repetitions; one plain epoch: ", end="")
    print(f"{some.epoch('process'):.3f} s process ({spread[0]}), {some.epoch('wall'):.3f} s wall ({spread[1]})")
    print(f"{'':40}{'process s':>10}{'ratio':>8}{'wall s':>9}{'ratio':>8}{'bound':>8}")
    for row in ROWS:
        numbers = "".join(
            f"{row.seconds(figures, kind):>{width}.3f}{row.ratio(figures, kind):>8.2f}"
            for kind, width in (("process", 10), ("wall", 9))
        )
        bound = "" if row.bound is None else f"{row.bound:.1f}"
        print(f"{row.title:40}{numbers}{bound:>8}  {row.verdict(figures)}")
    return all(row.verdict(figures) in ("", "ok") for row in ROWS)


def saved_rows(by_threads: dict[int, Figures]) -> dict[str, list[float]]:
    """Ratios of process time, one for each thread count, by the titles of the table and of what they are part of."""
    found: dict[str, list[float]] = {}
    whole = ""
    for row in ROWS:
        whole = whole if row.title.startswith(" ") else row.title
        title = f"{whole}: {row.title.strip()}" if row.title.startswith(" ") else row.title
        found[title] = [row.ratio(figures, "process") for figures in by_threads.values()]
    return found


def report_peer(threads: int, ours: Figures, answer: dict[str, Any]) -> None:
    """Print Kronfluence's ratios beside ours, each to the epochs of its own process."""
    theirs = {name: Figure.from_lists(lists) for name, lists in answer["figures"].items()}
    runs = len(theirs["scores"].runs)
    print(f"\nKronfluence {answer['version']} (torch {answer['torch']}), {threads} thread(s), {runs} repetition(s), ")
    print("all examples; epochs of process time (wall time in brackets)")
    print(f"{'':60}{'segflow':>18}{'Kronfluence':>20}{'times':>8}")
    for title, mine, other in PEER_ROWS:
        mine_is, other_is = (f"{f.ratio('process'):.2f} ({f.ratio('wall'):.2f})" for f in (ours[mine], theirs[other]))
        times = theirs[other].ratio("process") / ours[mine].ratio("process")
        print(f"{title:60}{mine_is:>18}{other_is:>20}{times:>7.1f}x")
    alone = theirs["eigendecomposition"]
    print(f"Kronfluence's eigendecompositions alone: {alone.ratio('process'):.2f} epochs ({alone.ratio('wall'):.2f})")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2", help="thread counts, each in a process of its own (default 1,2)")
    parser.add_argument("--examples", type=int, default=4000, help="training examples (default 4000)")
    parser.add_argument("--queries", type=int, default=100, help="queries (default 100)")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions of every figure (default 5)")
    parser.add_argument("--kronfluence", action="store_true", help="run Kronfluence beside segflow (minutes)")
    parser.add_argument(
        "--kronfluence-python",
        default=str(HERE / ".venv-kronfluence" / "bin" / "python"),
        help="the interpreter of Kronfluence's environment (default benchmarks/.venv-kronfluence/bin/python)",
    )
    parser.add_argument("--kronfluence-repetitions", type=int, default=1, help="of Kronfluence's figures (default 1)")
    parser.add_argument("--save", action="store_true", help="write the ratios to benchmarks/results/speed/mlp.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if given.worker:
        figures = worker(int(given.threads), given.examples, given.queries, given.repetitions, given.kronfluence)
        print(json.dumps({name: figure.as_lists() for name, figure in figures.items()}))
        return 0
    if given.kronfluence and not Path(given.kronfluence_python).exists():
        sys.exit(f"--kronfluence: no interpreter at {given.kronfluence_python}. See benchmarks/README.md.")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"MLP 784-512-512-10, {given.examples} examples, batches of {BATCH}, {given.queries} queries, float32")
    print("ratio: to one plain forward+backward epoch of the same model in the same process, medians")
    within = True
    by_threads: dict[int, Figures] = {}
    for threads in map(int, given.threads.split(",")):
        shape = ["--examples", str(given.examples)]
        ours = [*shape, "--queries", str(given.queries), "--repetitions", str(given.repetitions), "--worker"]
        answer = in_own_process(sys.executable, "mlp.py", threads, ours + ["--kronfluence"] * given.kronfluence)
        figures = {name: Figure.from_lists(lists) for name, lists in answer.items()}
        by_threads[threads] = figures
        within &= report(threads, figures)
        if given.kronfluence:
            theirs = [*shape, "--queries", str(PEER_QUERIES), "--repetitions", str(given.kronfluence_repetitions)]
            peer = in_own_process(given.kronfluence_python, "kronfluence_side.py", threads, theirs)
            report_peer(threads, figures, peer)
    if given.save:
        about: dict[str, Any] = {"made": made(), "examples": given.examples, "threads": list(by_threads)}
        print(write_result(FOLDER / "speed" / "mlp.json", about | {"rows": saved_rows(by_threads)}))
    return 0 if within else BOUND_MISSED


if __name__ == "__main__":
    sys.exit(main())
