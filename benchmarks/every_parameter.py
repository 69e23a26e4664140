"""What attributing every parameter of a GPT costs, and what a diagonal output side of its head changes.

    python benchmarks/every_parameter.py

A GPT-2 of random weights with an untied head and one with a tied one, briefly trained with AdamW (no weight decay on
biases and norms) on synthetic text. `fit` of its linear layers alone (the head among them), and of everything, take
turns on one thread, in process time; a plain epoch of training is timed beside them. Then scores of SOURCE and of
influence functions with a dense output side of the head are compared with those with a diagonal one, on a smaller GPT-2
that is trained for longer. Writes results to every_parameter.json beside this file, and exits with 3 if everything
costs more than 15% above the linear layers alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import segflow as sf

BOUND, BOUND_MISSED = 0.15, 3
LINEAR = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight", "lm_head")
LENGTH, BATCH = 128, 8


class NextToken(sf.Task):
    """The token mean of the next token's negative log-likelihood, summed over the batch."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The loss, of sampled labels times the root of the weight."""
        logits, labels = model(input_ids=batch[0]).logits[:, :-1], batch[0][:, 1:]
        if sample:
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        weight = 1 / losses.shape[1]
        return ((weight**0.5 if sample else weight) * losses).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The training loss."""
        return self.compute_train_loss(batch, model)


def text(count: int, vocabulary: int, seed: int) -> TensorDataset:
    """Sequences in which each token depends on the one before."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(count, LENGTH, dtype=torch.long)
    rows[:, 0] = torch.randint(0, vocabulary, (count,), generator=generator)
    for place in range(1, LENGTH):
        steps = torch.randint(0, 8, (count,), generator=generator).square()
        rows[:, place] = (3 * rows[:, place - 1] + steps) % vocabulary
    return TensorDataset(rows)


def network(width: int, layers: int, vocabulary: int, tied: bool) -> GPT2LMHeadModel:
    """A GPT-2, always with the same weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": max(1, width // 64), "n_positions": LENGTH}
    tokens: dict[str, Any] = {
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": tied,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens))


def trained(model: nn.Module, data: TensorDataset, folder: Path, epochs: int, rate: float = 3e-4) -> float:
    """Train and record; the seconds of an epoch."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer, steps = torch.optim.AdamW(groups, lr=rate), epochs * (len(data) // BATCH)
    seconds = []
    with sf.record(model, optimizer, folder, dataset_size=len(data), total_steps=steps, checkpoints=1):
        for _ in range(epochs):
            start = time.process_time()
            for rows in data.tensors[0].split(BATCH):
                optimizer.zero_grad()
                (NextToken().compute_train_loss((rows,), model) / len(rows)).backward()
                optimizer.step()
            seconds.append(time.process_time() - start)
    return min(seconds)


def in_turn(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median of each one's process seconds, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.process_time()
            work()
            taken[name].append(time.process_time() - start)
    return {name: median(of) for name, of in taken.items()}


def cost(width: int, layers: int, vocabulary: int, examples: int, rounds: int) -> dict[str, Any]:
    """What `fit` takes of the linear layers alone, the head among them, and of everything, the head untied or tied."""
    models = {tied: network(width, layers, vocabulary, tied) for tied in (False, True)}
    data, number = text(examples, vocabulary, 0), iter(range(10**6))
    with tempfile.TemporaryDirectory() as folder:
        epochs = {tied: trained(model, data, Path(folder) / f"run{tied}", 2) for tied, model in models.items()}

        def fit(tied: bool, **options: Any) -> None:
            run, store = sf.Trajectory.load(Path(folder) / f"run{tied}"), Path(folder) / f"store{next(number)}"
            method = sf.Source(segments=1)
            analyzer = sf.Analyzer(
                models[tied], NextToken(), run, store=store, method=method, progress=False, **options
            )
            analyzer.fit(data, batch_size=BATCH)

        works = {
            "linear layers": lambda: fit(False, layers=LINEAR),
            "everything": lambda: fit(False),
            "everything, tied head": lambda: fit(True),
        }
        seconds = in_turn(works, rounds)
    return {
        "model": f"{layers} layers of width {width}, {vocabulary:,} tokens",
        "parameters": sum(p.numel() for p in models[False].parameters()),
        "examples": examples,
        "epoch": epochs[False],
        "seconds": seconds,
        "added": seconds["everything"] / seconds["linear layers"] - 1,
        "added, tied head": seconds["everything, tied head"] / seconds["linear layers"] - 1,
    }


def wide_head(method: sf.Method, vocabulary: int, tied: bool, examples: int) -> dict[str, Any]:
    """How scores with a diagonal output side of the head agree with those with a dense one, after thorough training."""
    model, data, query = network(64, 2, vocabulary, tied), text(examples, vocabulary, 0), text(16, vocabulary, 1)
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        trained(model, data, Path(folder) / "run", 20, 3e-3)
        for name, side in (("dense", 8192), ("diagonal", vocabulary - 1)):
            analyzer = sf.Analyzer(
                model,
                NextToken(),
                sf.Trajectory.load(Path(folder) / "run"),
                store=Path(folder) / name,
                method=method,
                progress=False,
                block_sizes=sf.BlockSizes(side=side),
            )
            analyzer.fit(data, batch_size=BATCH)
            groups = sf.Groups.singletons(len(data))
            scores = analyzer.score(groups, data, query, batch_size=BATCH, keep="layer")
            values[name] = {"all": scores.values, "head": scores.by_layer["lm_head"]}
    found: dict[str, Any] = {
        "method": type(method).__name__,
        "vocabulary": vocabulary,
        "head": "tied" if tied else "untied",
    }
    for part in ("all", "head"):
        dense, diagonal = (torch.as_tensor(values[name][part]).double().flatten() for name in ("dense", "diagonal"))
        found[f"correlation, {part}"] = torch.corrcoef(torch.stack([dense, diagonal]))[0, 1].item()
        found[f"slope, {part}"] = (dense @ diagonal / (dense @ dense)).item()
    return found


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "segflow attributes")  # the linear layers are a part, as is meant
    costs = cost(384, 3, 2000, options.examples, options.rounds)
    methods = (sf.Source(segments=1), sf.InfluenceFunction())
    heads = [wide_head(method, 1000, tied, options.examples) for method in methods for tied in (False, True)]
    for row in (costs, *heads):
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    written = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "cost": costs, "wide heads": heads}
    Path(__file__).with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
    return BOUND_MISSED if max(costs["added"], costs["added, tied head"]) > BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
