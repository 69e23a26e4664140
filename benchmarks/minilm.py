"""Fine-tuning MiniLM: do scores agree with retraining where a pretrained encoder is fine-tuned with AdamW?

    python -m benchmarks.minilm             what is missing of everything, then results/minilm.json
    python -m benchmarks.minilm fill        the recorded runs and the retrainings alone
    python -m benchmarks.minilm score       with the retrainings that are there ; --runs 1: one run

The last two of MiniLM-L6's layers, a pooler and a classifier are fine-tuned on snippets of film reviews, with linear
warm-up and decay and without dropout; the layers below are frozen, and what they give is computed once. Retrained are
random halves of the snippets, each several times. It goes on where it was stopped: half an hour of one core for the
retrainings and as much for the scores of each run; scoring takes 10 GB of memory.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import segflow as sf
from segflow.evaluation import Bank, FunctionTraining, random_subsets, read_bank

from .downloads import CACHE
from .fidelity.blocks import shown_methods
from .fidelity.figures import agreement, ceiling, over_reference
from .fidelity.methods import BEST, EKFAC, METHODS, REFERENCE, TRACIN, Entry
from .fidelity.rows import margin_and_loss
from .fidelity.scoring import clear_stale, code_digest, trajectory_digest
from .groups.data import Data, polarity
from .groups.models import EncoderHead, padding_mask, pretrained_head
from .groups.settings import Padded
from .groups.text import LAYER
from .result_files import FOLDER, made, read_result, shown_estimate, write_result

TRAIN, QUERIES, LAYERS = 1024, 100, 2
RECIPE = {"rate": 2e-4, "weight decay": 0.01, "batch": 32, "epochs": 3, "warm-up": 0.1}
HALVES, REPETITIONS, RUNS, CHECKPOINTS = 40, 3, 2, 6
MEMORY = 12 << 30  # bytes: the gradients of all queries at a time, so that training gradients are made once for all
MEASUREMENT = "margin"  # the first of what is measured
WORK, RESULT = CACHE / "minilm", FOLDER / "minilm.json"
COMPARED = (REFERENCE, EKFAC, TRACIN, "gradient dot product")


@dataclass(frozen=True)
class Problem:
    """Snippets and queries of other films, as hidden states, and the weights of the pretrained layers."""

    data: Data
    layers: dict[str, Tensor]

    def new(self, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The pretrained layers with a new pooler and classifier, and the optimizer."""
        torch.manual_seed(seed)
        model = EncoderHead(LAYERS)
        model.layers.load_state_dict(self.layers)
        return model, torch.optim.AdamW(model.parameters(), lr=RECIPE["rate"], weight_decay=RECIPE["weight decay"])

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, kept: Tensor, seed: int) -> None:
        """An ordinary loop over shuffled batches of like length, each cut to its longest snippet."""
        inputs, labels = self.data.inputs, self.data.labels
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, steps_of(len(kept))))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(int(RECIPE["epochs"])):
            for batch in batches(kept, padding_mask(inputs[kept]).sum(1), generator):
                optimizer.zero_grad()
                functional.cross_entropy(model(cut(inputs[batch])), labels[batch]).backward()
                optimizer.step()
                scheduler.step()

    def measure(self, model: nn.Module) -> np.ndarray:
        """[2, Q]: the queries' margins and losses."""
        with torch.no_grad():
            logits = model(cut(self.data.query_inputs))
        found: np.ndarray = margin_and_loss(logits, self.data.query_labels).numpy()
        return found


@cache
def problem() -> Problem:
    """The data and the pretrained layers."""
    first = LAYER + 1 - LAYERS
    return Problem(polarity(first).cut(TRAIN, QUERIES), pretrained_head(first).layers.state_dict())


def batches(kept: Tensor, lengths: Tensor, generator: torch.Generator) -> list[Tensor]:
    """One epoch: shuffled, sorted by length within eight batches at a time, and the batches shuffled."""
    size, found = int(RECIPE["batch"]), []
    for places in torch.randperm(len(kept), generator=generator).split(8 * size):
        found += kept[places[lengths[places].argsort(stable=True)]].split(size)
    return [found[place] for place in torch.randperm(len(found), generator=generator).tolist()]


def share_of_rate(steps: int, step: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    rising = max(1, round(RECIPE["warm-up"] * steps))
    return (step + 1) / rising if step < rising else (steps - step) / (steps - rising + 1)


def steps_of(examples: int) -> int:
    """Optimizer steps of a whole training."""
    return int(RECIPE["epochs"]) * -(-examples // int(RECIPE["batch"]))


def cut(states: Tensor) -> Tensor:
    """The same without the positions that are padding in all of them."""
    return states[:, : int(padding_mask(states).sum(1).max())]


def retrain(about: Problem, kept: np.ndarray, seed: int) -> np.ndarray:
    """[2, Q]: the queries' margins and losses after training on the snippets kept."""
    model, optimizer = about.new(seed)
    about.train(model, optimizer, torch.from_numpy(kept), seed)
    return about.measure(model)


def bank() -> Bank:
    """The ground truth: every half, several times."""
    training = FunctionTraining(partial(retrain, problem()), RECIPE, processes=1, each=1)
    return Bank(WORK / "bank", training, random_subsets(HALVES, TRAIN, seed=0), REPETITIONS, seed=1000)


def record_run(seed: int) -> Path:
    """The folder of one recorded training on all snippets; nothing is trained if it is there."""
    folder = WORK / f"run-{seed}"
    if not (folder / "done").exists():
        model, optimizer = problem().new(seed)
        with sf.record(
            model, optimizer, folder, dataset_size=TRAIN, total_steps=steps_of(TRAIN), checkpoints=CHECKPOINTS,
            overwrite=True,
        ):  # fmt: skip
            problem().train(model, optimizer, torch.arange(TRAIN), seed)
        (folder / "done").touch()
    return folder


def fill() -> None:
    """Record the runs and retrain what is missing."""
    for seed in range(RUNS):
        record_run(seed)
    bank().run()


@dataclass(frozen=True)
class Retrained:
    """What was measured after retraining: the subsets [M, N] and one measurement [M, R, Q]."""

    subsets: np.ndarray
    measured: np.ndarray


def entries() -> list[Entry]:
    """The methods that are compared; influence functions with every damping."""
    return [entry for entry in METHODS if entry.name in COMPARED or entry.best_of == BEST]


def scores_of(entry: Entry, seed: int, reuse: bool) -> sf.Scores:
    """One method's scores of single snippets on one run; kept, and taken again if this code made them (or `reuse`)."""
    folder = record_run(seed)
    made_from = {"run": trajectory_digest(folder), "code": code_digest()}
    path = WORK / "scores" / f"{entry.slug}-{seed}.safetensors"
    if path.exists():
        kept = sf.Scores.load(path)
        found: Any = kept.provenance["made_from"]
        if found == made_from or (reuse and found["run"] == made_from["run"]):
            return kept
    store = WORK / "stores" / str(seed)
    clear_stale(store, made_from)
    train, query = problem().data.train, problem().data.query
    analyzer = sf.Analyzer(
        problem().new(seed)[0], Padded(MEASUREMENT), sf.Trajectory.load(folder), store=store, method=entry.make(),
        memory=MEMORY,
        progress=False,
    )  # fmt: skip
    analyzer.fit(train, batch_size=64)
    scores = analyzer.score(sf.Groups.singletons(TRAIN), train, query, batch_size=64)
    scores = replace(scores, provenance=dict(scores.provenance) | {"made_from": made_from})
    scores.save(path)
    return scores


def compare(about: Retrained, count: int, reuse: bool) -> dict[str, Any]:
    """Every method's agreement with retraining, of single runs and of the mean of as many."""
    methods: dict[str, Any] = {}
    reference: list[sf.Scores] = []
    for entry in sorted(entries(), key=lambda entry: entry.name != REFERENCE):
        runs = [scores_of(entry, seed, reuse) for seed in range(count)]
        reference = reference or runs
        figures = agreement(runs, about.subsets, about.measured)
        if entry.name != REFERENCE:
            figures |= over_reference(about, runs, reference)
        methods[entry.name] = figures | ({"best_of": entry.best_of} if entry.best_of else {})
        print(f"  {entry.name}: one {figures['one']['mean']:.3f}, all {figures['all']['mean']:.3f}", flush=True)
    return methods


def evaluate(count: int, reuse: bool) -> None:
    """Compare with the retrainings that are there, and write the result."""
    subsets, measured_MRPQ = read_bank(WORK / "bank")
    if measured_MRPQ.shape[1] < 2:
        raise SystemExit("one repetition of the retrainings is there: the noise ceiling takes two. Run `fill` on.")
    about = Retrained(subsets, measured_MRPQ[:, :, 0])
    found = {"made": made(), "train": TRAIN, "queries": QUERIES, "recipe": RECIPE, "runs": count}
    found |= {"measurement": MEASUREMENT, "halves": len(subsets), "repetitions": about.measured.shape[1]}
    found |= {"accuracy": float(np.mean([(margins_of(seed) > 0).mean() for seed in range(count)]))}
    path = write_result(RESULT, found | {"ceiling": ceiling(about.measured), "methods": compare(about, count, reuse)})
    print(path, table(read_result(path)), sep="\n\n")


def margins_of(seed: int) -> np.ndarray:
    """[Q]: the queries' margins at the end of a recorded run."""
    model, _ = problem().new(seed)
    trajectory = sf.Trajectory.load(record_run(seed))
    trajectory.load_into(model, len(trajectory) - 1)
    return problem().measure(model)[0]


def table(found: dict[str, Any]) -> str:
    """The comparison in Markdown, as docs/REAL_MODELS.md has it; with the mean over runs where there are several."""
    columns = {"one": "one run", "over_one": "over SOURCE"}
    if found["runs"] > 1:
        columns |= {"all": f"{found['runs']} runs averaged", "over_all": "over SOURCE"}
    rows = {name: [figures.get(key) for key in columns] for name, figures in shown_methods(found).items()}
    rows["*ceiling*"] = [found["ceiling"]] + [None] * (len(columns) - 1)
    lines = [f"| method | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows.items():
        shown = [shown_estimate(cell, "+" * key.startswith("over")) for key, cell in zip(columns, cells, strict=True)]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.minilm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("all", "fill", "score"), default="all")
    parser.add_argument("--runs", type=int, default=0, help="how many of the recorded runs are scored; 0: all")
    parser.add_argument("--reuse", action="store_true", help="take scores that another state of the code made")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command != "score":
        fill()
    if arguments.command != "fill":
        evaluate(arguments.runs or RUNS, arguments.reuse)


if __name__ == "__main__":
    main()
