"""What a unit is made of: asked with another setting, a store refuses; its numbers are never those of the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf

from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N = 20
METHODS = {
    "ekfac": sf.InfluenceFunction(0.01),
    "kfac": sf.InfluenceFunction(0.01, "kfac"),
    "diagonal": sf.InfluenceFunction(0.01, "diagonal"),
    "kernel": sf.ProjectedFisher(8),
    "automatic": sf.Source(segments="auto"),
}


@pytest.mark.parametrize("first", [5, None])
@pytest.mark.parametrize("name", METHODS)
def test_curvature_of_some_examples_never_passes_for_that_of_all(tmp_path: Path, name: str, first: int | None) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 3, 0.3), N)

    def score(store: str, examples: int | None) -> Tensor:
        options: dict[str, Any] = {"method": METHODS[name], "curvature_examples": examples}
        analyzer = analyzer_of(mlp(), trajectory, tmp_path / store, **options)
        analyzer.fit(vectors(N))
        return analyzer.score(sf.Groups.random(N, 5), vectors(N), vectors(3, seed=9)).values

    second = None if first else 5
    differ = [score("first", first), score("second", second)]
    assert not torch.allclose(*differ)
    with pytest.raises(sf.StoreError, match=r"curvature examples: stored (5|None), now (5|None)"):
        score("first", second)


class Weighted(sf.tasks.Classification):
    """Class weights in a tensor."""

    draws_labels = False

    def __init__(self, weights: list[float]):
        super().__init__()
        self.weights = torch.tensor(weights).double()

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits, labels = self._logits(batch, model)
        labels = logits.detach().argmax(1) if sample else labels
        return nn.functional.cross_entropy(logits, labels, weight=self.weights, reduction="sum")


@pytest.mark.parametrize("scale", [1.0, 2000.0])
def test_changed_class_weights_are_noticed_however_small_the_losses_are(tmp_path: Path, scale: float) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(5, 3).double(), vectors(N).tensors[0]
    with torch.no_grad():
        model.weight.mul_(scale)
        train = TensorDataset(inputs, model(inputs).argmax(1))
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)

    def fit(weights: list[float]) -> None:
        task = Weighted(weights)
        analyzer_of(model, trajectory, tmp_path / "store", task, method=sf.InfluenceFunction(0.01)).fit(train)

    fit([1.0, 1.0, 1.0])
    with pytest.raises(sf.StoreError, match="was made from something else"):
        fit([7.0, 5.0, 9.0])
