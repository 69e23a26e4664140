"""Kronfluence's own pairwise scores, in double precision throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FACTORS = ("activation_covariance", "gradient_covariance", "eigendecomposition", "per_sample_gradient", "lambda")
SCORES = ("per_sample_gradient", "precondition", "score")


def kronfluence_scores(
    folder: Path, task: Any, model: nn.Module, train: Any, query: Any, strategy: str, damping: float | None
) -> Tensor:
    """[Q, N]; folder: where Kronfluence writes; task: one of Kronfluence's; damping: None for its heuristic one."""
    import kronfluence
    from kronfluence.arguments import FactorArguments, ScoreArguments

    factors, scores = ({f"{name}_dtype": torch.float64 for name in names} for names in (FACTORS, SCORES))
    prepared = kronfluence.prepare_model(model, task)
    peer = kronfluence.Analyzer("peer", prepared, task, cpu=True, output_dir=str(folder), disable_tqdm=True)
    arguments = FactorArguments(strategy=strategy, use_empirical_fisher=False, **factors)
    peer.fit_all_factors("factors", train, per_device_batch_size=7, factor_args=arguments)
    peer.compute_pairwise_scores(
        "scores",
        "factors",
        query,
        train,
        per_device_query_batch_size=3,
        per_device_train_batch_size=6,
        score_args=ScoreArguments(damping_factor=damping, **scores),
    )
    found: Tensor = peer.load_pairwise_scores("scores")["all_modules"]
    return found
