"""The settings: which model is trained on which data, how, and how much is made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

import segflow as sf

from ..fidelity.rows import Recipe, network
from .data import CLASSES, LOADERS, NOISE, Data
from .models import padding_mask, pretrained_head, resnet

SIZES = (1, 4, 16, 64, 256, 1024)
GROUPINGS = ("random", "raw", "representation", "gradient", "weight gradient")  # after the first, k-means on these
TITLES = {kind: f"{kind} k-means" for kind in GROUPINGS[1:]}


@dataclass(frozen=True)
class Setting:
    """One row: a data set, a model, a recipe.

    model: what the table calls it; retrained: whether removal and pruning are measured, by retraining `together` models
    at a time; runs: recorded training runs; repetitions: retrainings of each subset and run; dimension: of projections;
    rounds: measurements of each time; examples, queries: 0 for all; few: examples that curvature is fitted to.
    """

    name: str
    data: str
    model: str
    build: Callable[[], nn.Module]
    recipe: Recipe
    retrained: bool = False
    together: int = 1
    runs: int = 3
    repetitions: int = 3
    dimension: int = 512
    rounds: int = 3
    examples: int = 0
    queries: int = 0
    few: int | None = None

    def load(self, variant: str) -> Data:
        """The data with its labels as given ("clean") or with wrong ones ("noisy")."""
        data = _load(self.data, variant)
        return data.cut(self.examples or len(data.inputs), self.queries or len(data.query_inputs))

    def task(self) -> sf.Task:
        """Cross-entropy, in training and as the measurement."""
        return Padded() if self.data == "polarity" else sf.tasks.Classification()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of groups, below half of the examples."""
        half = len(self.load("noisy").inputs) / 2
        return tuple(size for size in SIZES if size < half)

    def methods(self) -> dict[str, Any]:
        """The methods by name; projections and the exact Hessian only for small networks, others would take hours."""
        found = {
            "SOURCE": sf.Source(),
            "influence function": sf.InfluenceFunction(),
            "TracIn": sf.TracIn(),
            "TRAK": sf.TRAK(self.dimension),
            "projected Fisher": sf.ProjectedFisher(self.dimension),
            "batched Fisher": sf.ProjectedFisher(self.dimension, fisher_batch=64),
            "LiSSA": sf.LiSSA(),
            "gradient dot": sf.GradientDot(),
        }
        return {name: found[name] for name in found if self.retrained or name in _LARGE}

    def tiny(self) -> Setting:
        """The same at a size that takes seconds, to see that everything works."""
        return replace(
            self,
            name=f"{self.name}-tiny",
            recipe=replace(self.recipe, epochs=1),
            runs=2,
            repetitions=2,
            dimension=16,
            rounds=1,
            examples=160,
            queries=20,
        )


_LARGE = ("SOURCE", "influence function", "TracIn", "gradient dot")  # methods of the large models


class Padded(sf.tasks.Classification):
    """Classification of hidden states, zero where there is padding."""

    def get_attention_mask(self, batch: Any) -> Tensor:
        """[B, S]."""
        return padding_mask(batch[0])


@cache
def _load(name: str, variant: str) -> Data:
    return LOADERS[name]() if variant == "clean" else _load(name, "clean").with_wrong_labels(NOISE, CLASSES[name])


def _credit(name: str, widths: tuple[int, ...], rate: float, together: int) -> Setting:
    recipe = Recipe("sgd", rate, 1e-3, 64, 10)
    title = "logistic regression" if len(widths) == 2 else f"MLP {'-'.join(map(str, widths[1:-1]))}"
    return Setting(name, "credit", title, partial(network, widths), recipe, retrained=True, together=together)


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            "mnist",
            "mnist",
            "MLP 784-150-150-150-10",
            partial(network, (784, 150, 150, 150, 10)),
            Recipe("sgd", 0.03, 1e-3, 64, 8),
            retrained=True,
        ),
        Setting(
            "cifar10", "cifar10", "ResNet-8", resnet, Recipe("sgd", 0.05, 1e-3, 64, 20), runs=2, rounds=1, few=1024
        ),
        _credit("credit-lr", (32, 2), 0.01, 64),
        _credit("credit-mlp-50-50", (32, 50, 50, 2), 0.03, 16),
        _credit("credit-mlp-200-50", (32, 200, 50, 2), 0.03, 8),
        Setting(
            "polarity",
            "polarity",
            "MiniLM-L6, last layer, pooler and classifier trained",
            pretrained_head,
            Recipe("adamw", 1e-4, 1e-2, 32, 3),
            runs=2,
            rounds=1,
            few=1024,
        ),
    )
}
