"""Kronfluence 1.0.1 on the benchmark's model and data; run by mlp.py in Kronfluence's own environment.

Prints one JSON object: for each figure, its runs and the plain epochs measured in between, each
(process seconds, wall seconds), and "version". Every example counts: nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.task import Task
from setting import BATCH, Figure, examples, interleaved, mlp, plain_epoch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset


class Classification(Task):  # type: ignore[misc]
    """What segflow.tasks.Classification computes."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        logits = model(inputs)
        if sample:
            labels = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
        return functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def stages(folder: str, train: TensorDataset, query: TensorDataset) -> dict[str, Callable[[], object]]:
    """The four stages of per-example attribution, each needing the one before."""
    task = Classification()
    analyzer = Analyzer(
        "mlp", prepare_model(mlp(), task), task, cpu=True, log_level=logging.ERROR, disable_tqdm=True, output_dir=folder
    )
    options: dict[str, Any] = {"factors_name": "ekfac", "overwrite_output_dir": True}
    train_options = options | {"dataset": train, "per_device_batch_size": BATCH}
    return {
        "covariance": lambda: analyzer.fit_covariance_matrices(**train_options),
        "eigendecomposition": lambda: analyzer.perform_eigendecomposition(**options),
        "eigenvalues": lambda: analyzer.fit_lambda_matrices(**train_options),
        "scores": lambda: analyzer.compute_pairwise_scores(
            scores_name="scores",
            query_dataset=query,
            train_dataset=train,
            per_device_query_batch_size=len(query),  # one walk over the training data: the kindest choice
            per_device_train_batch_size=BATCH,
            **options,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("threads", "examples", "queries", "repetitions"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train, query = examples(given.examples, seed=1), examples(given.queries, seed=2)
    epoch = plain_epoch(mlp(), train)
    figures: dict[str, Figure] = {}
    with TemporaryDirectory() as folder:
        stages(f"{folder}/warm-up", examples(BATCH, seed=3), query)["covariance"]()
        for name, context in stages(folder, train, query).items():
            figures |= interleaved(epoch, {name: context}, given.repetitions)
        scores = Analyzer.load_file(Path(folder) / "mlp" / "scores_scores" / "pairwise_scores.safetensors")
        assert scores["all_modules"].shape == (given.queries, given.examples)
    answer = {name: figure.as_lists() for name, figure in figures.items()}
    print(json.dumps({"version": version("kronfluence"), "torch": torch.__version__, "figures": answer}))


if __name__ == "__main__":
    main()
