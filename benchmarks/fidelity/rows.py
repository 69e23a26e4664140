"""The rows of the table: what is trained on what, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from .data import LOADERS, Data

Function = Callable[[Tensor, Tensor], Tensor]
SUBSETS, REPETITIONS, RUNS, CHECKPOINTS = 100, 5, 5, 6
REMOVED = {"tenth": 0.1, "hundredth": 0.01}  # shares of the examples that banks of small groups leave out
STAGE_NAMES = ("pretrain", "finetune")  # of a row of two stages


@dataclass(frozen=True)
class Recipe:
    """One stage's training: optimizer "sgd" (momentum 0.9) or "adamw", at a constant learning rate."""

    optimizer: str
    learning_rate: float
    weight_decay: float
    batch_size: int
    epochs: int

    def make(self, parameters: Iterable[Tensor], fused: bool = False) -> torch.optim.Optimizer:
        """The optimizer, as a user would make it (`fused`: by torch's faster code for the same numbers)."""
        rate, decay = self.learning_rate, self.weight_decay
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay, fused=fused)
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)


@dataclass(frozen=True)
class Row:
    """One row.

    data, noisy: the loader's name and the share of wrong targets; widths: of the ReLU network; recipes: one for each
    stage; together: models that are retrained at a time; extra: subsets of a second bank, for the estimator that is
    fitted to retrainings (0: it is fitted to half of the first bank's subsets, and compared on the others);
    repetitions: retrainings of each half; runs: recorded runs; removals: (subsets, retrainings of each) of the banks
    that leave out a tenth, or a hundredth, of the examples.
    """

    name: str
    data: str
    noisy: float
    widths: tuple[int, ...]
    recipes: tuple[Recipe, ...]
    together: int = 100
    extra: int = 0
    repetitions: int = REPETITIONS
    runs: int = RUNS
    removals: tuple[int, int] = (100, 5)

    @property
    def is_regression(self) -> bool:
        return self.widths[-1] == 1

    @property
    def measurements(self) -> tuple[str, ...]:
        """What is measured after each retraining; the first is what the table compares."""
        return ("loss",) if self.is_regression else ("margin", "loss")

    def load(self) -> Data:
        """The row's data."""
        return _load(self.data, self.noisy)  # the same tensors each time

    def datasets(self) -> tuple[tuple[TensorDataset, ...], TensorDataset]:
        """The training dataset of each stage, and the queries."""
        data = self.load()
        return tuple(TensorDataset(*stage) for stage in data.stages), TensorDataset(*data.query)

    def build(self) -> nn.Module:
        """A freshly initialised network."""
        return network(self.widths)

    @property
    def loss(self) -> Function:
        """The mean loss of a batch, which training minimises."""
        return functional.mse_loss if self.is_regression else functional.cross_entropy

    @property
    def measure(self) -> Function:
        """(outputs, targets) -> the measurements [P, Q]."""
        return squared_error if self.is_regression else margin_and_loss


def network(widths: tuple[int, ...]) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def margin_and_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """[2, Q]: the log-odds of the true class (log p - log(1 - p), Park et al. 2023), and the cross-entropy."""
    own = logits.gather(-1, labels[:, None]).squeeze(-1)
    others = logits.scatter(-1, labels[:, None], -torch.inf).logsumexp(-1)
    return torch.stack([own - others, functional.cross_entropy(logits, labels, reduction="none")])


def squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """[1, Q]: the squared error."""
    return (predictions - targets).square().mean(-1)[None]


@cache
def _load(name: str, noisy: float) -> Data:
    loader = LOADERS[name]
    return loader(noisy) if noisy else loader()


def _digits(optimizer: str, epochs: int, noisy: float, ending: str) -> Row:
    recipe = {"sgd": Recipe("sgd", 0.03, 1e-3, 50, epochs), "adamw": Recipe("adamw", 1e-3, 1e-2, 50, epochs)}
    name = f"digits-{optimizer}-{ending}-{'relabelled' if noisy else 'clean'}"
    return Row(name, "digits", noisy, (64, 64, 64, 10), (recipe[optimizer],), extra=1000)


def _fashion_mnist(name: str, noisy: float, recipe: Recipe, removals: tuple[int, int] = (30, 3)) -> Row:
    widths = (784, 512, 256, 128, 10)
    return Row(name, "fashion-mnist", noisy, widths, (recipe,), 1, repetitions=10, runs=2, removals=removals)


_CONCRETE = (Recipe("sgd", 3e-2, 1e-5, 32, 20),)

# Options are explored, and chosen, on the rows of digits, and on no others.
TUNING = "digits-"

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _digits("sgd", 20, 0.0, "converged"),
        _digits("sgd", 3, 0.0, "early"),
        _digits("sgd", 40, 0.3, "converged"),
        _digits("sgd", 3, 0.3, "early"),
        _digits("adamw", 20, 0.0, "converged"),
        _digits("adamw", 5, 0.0, "early"),
        _digits("adamw", 40, 0.3, "converged"),
        _digits("adamw", 5, 0.3, "early"),
        Row("concrete", "concrete", 0.0, (8, 128, 128, 128, 1), _CONCRETE, together=16),
        Row("concrete-noisy", "concrete", 0.3, (8, 128, 128, 128, 1), _CONCRETE, together=16),
        Row(
            "rotated-mnist-two-stage",
            "rotated-mnist",
            0.0,
            (784, 128, 64, 10),
            (Recipe("sgd", 3e-2, 1e-3, 50, 10), Recipe("sgd", 1e-2, 1e-3, 50, 5)),
            together=4,
        ),
        _fashion_mnist("fashion-mnist-noisy", 0.3, Recipe("sgd", 1e-2, 3e-5, 64, 3)),
        _fashion_mnist("fashion-mnist", 0.0, Recipe("sgd", 3e-2, 1e-3, 64, 20)),
        _fashion_mnist("fashion-mnist-adamw", 0.0, Recipe("adamw", 1e-3, 1e-2, 64, 20), (30, 1)),
    )
}
