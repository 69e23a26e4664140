"""A bank never gives numbers of another recipe: whatever its functions reach or compute is compared.

Each row changes one setting of a recipe that a bank was filled with. The bank is then refused, by the name of what
changed; the same recipe, made anew, is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, StepLR

from segflow.errors import ScoreError
from segflow.evaluation import Bank, BatchedTraining, FunctionTraining, Stage, random_subsets

SUBSETS = random_subsets(2, 12)
SETTINGS: dict[str, Any] = {}  # of a module, as a script has them
GENERATOR = torch.Generator().manual_seed(0)
X, QX = torch.randn(12, 4, generator=GENERATOR).double(), torch.randn(7, 4, generator=GENERATOR).double()
Y, QY = torch.randint(0, 3, (12,), generator=GENERATOR), torch.randint(0, 3, (7,), generator=GENERATOR)


class Net(nn.Module):
    def __init__(self, width: int = 5, frozen: bool = False, slope: float = 1.0):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3)
        self.slope = slope
        self.first.requires_grad_(not frozen)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        return self.last(torch.tanh(self.slope * (h - h.detach()) + h.detach()))


class Loss:
    """A loss that is an object, which counts its calls, as running it may."""

    def __init__(self, **options: Any):
        self.options, self.calls = options, 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        loss = functional.cross_entropy(outputs, targets, **self.options.get("torch", {}))
        return loss + self.options.get("penalty", 0.0) * outputs.square().mean() + SETTINGS.get("offset", 0.0)


def _optimizer(
    parameters: Sequence[nn.Parameter],
    kind: Any = torch.optim.SGD,
    groups: Mapping[str, Any] | None = None,
    rates: Mapping[int, float] | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Parameters by their number of axes, each kind with options of its own."""
    split = [
        {"params": [p for p in parameters if p.ndim == axes], **(groups or {}), "lr": (rates or {}).get(axes, 0.1)}
        for axes in (1, 2)
    ]
    return kind(split, **{"lr": 1e-3, **options})


def _measure(outputs: Tensor, targets: Tensor, weights: Any = None, extra: float = 0.0) -> Tensor:
    weights = torch.ones(7) if weights is None else torch.as_tensor(weights)
    return weights * functional.cross_entropy(outputs, targets, reduction="none") + extra


def _training(
    build: Any = Net, measure: Any = _measure, queries: Any = None, stages: int = 1, **stage: Any
) -> BatchedTraining:
    of_stage: dict[str, Any] = {"loss": Loss(), "optimizer": partial(_optimizer), "epochs": 2, "batch_size": 4} | stage
    data = {"inputs": X, "targets": Y} | {key: of_stage.pop(key) for key in ("inputs", "targets") if key in of_stage}
    one = Stage(**data, **of_stage)
    return BatchedTraining(build, (one,) * stages, QX if queries is None else queries, QY, measure)


def _closure(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: factor * functional.cross_entropy(outputs, targets)


def _other_code(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets) + 1e-9


def _row(place: int, tensor: Tensor, value: float = 1.0) -> Tensor:
    changed = tensor.clone()
    changed[place] += value
    return changed


BATCHED: dict[str, tuple[Callable[[], BatchedTraining], Callable[[], BatchedTraining]]] = {
    name: (partial(_training, **before), partial(_training, **after))
    for name, before, after in [
        ("a group's rate", {}, {"optimizer": partial(_optimizer, rates={2: 0.2})}),
        ("a group's rate, slightly", {}, {"optimizer": partial(_optimizer, rates={1: 0.1 + 1e-12})}),
        ("a group's decay", {}, {"optimizer": partial(_optimizer, groups={"weight_decay": 0.1})}),
        ("the optimizer's momentum", {}, {"optimizer": partial(_optimizer, momentum=0.9)}),
        ("the optimizer's kind", {}, {"optimizer": partial(_optimizer, kind=torch.optim.Adagrad)}),
        ("a rate in a closure", {"optimizer": lambda p: torch.optim.SGD(p, lr=SETTINGS.get("rate", 0.1))},
         {"optimizer": lambda p: torch.optim.SGD(p, lr=SETTINGS.get("rate", 0.1) * 2)}),
        ("the schedule", {"schedule": partial(StepLR, step_size=1, gamma=0.5)},
         {"schedule": partial(StepLR, step_size=1, gamma=0.4)}),
        ("a schedule's function", {"schedule": partial(LambdaLR, lr_lambda=lambda step: 0.9**step)},
         {"schedule": partial(LambdaLR, lr_lambda=lambda step: 0.8**step)}),
        ("no schedule", {"schedule": partial(StepLR, step_size=1)}, {}),
        ("the epochs", {}, {"epochs": 3}),
        ("the batch size", {}, {"batch_size": 3}),
        ("a second stage", {"inputs": X[:6], "targets": Y[:6], "stages": 2}, {}),
        ("one input of the last example", {}, {"inputs": _row(11, X)}),
        ("the last label", {}, {"targets": _row(11, Y, 1 if Y[11] < 2 else -1).long()}),
        ("one query", {}, {"queries": _row(6, QX)}),
        ("a coefficient of the loss", {"loss": Loss(penalty=0.0)}, {"loss": Loss(penalty=1e-3)}),
        ("a tiny coefficient", {"loss": Loss(penalty=0.0)}, {"loss": Loss(penalty=1e-12)}),
        ("a factor in a closure", {"loss": _closure(1.0)}, {"loss": _closure(1.0 + 1e-9)}),
        ("the code of the loss", {"loss": functional.cross_entropy}, {"loss": _other_code}),
        ("label smoothing", {"loss": Loss(torch={})}, {"loss": Loss(torch={"label_smoothing": 0.1})}),
        ("class weights", {"loss": Loss(torch={"weight": torch.ones(3).double()})},
         {"loss": Loss(torch={"weight": torch.tensor([1.0, 1.0, 1.0001]).double()})}),
        ("weights of torch's own loss", {"loss": nn.CrossEntropyLoss(weight=torch.ones(3).double())},
         {"loss": nn.CrossEntropyLoss(weight=_row(2, torch.ones(3).double()))}),
        ("the measure of two queries", {"measure": partial(_measure, weights=[1.0] * 7)},
         {"measure": partial(_measure, weights=[1.0] * 5 + [-1.0] * 2)}),
        ("an offset of the measure", {}, {"measure": partial(_measure, extra=1e-9)}),
        ("the width of the model", {}, {"build": partial(Net, width=6)}),
        ("a frozen layer", {}, {"build": partial(Net, frozen=True)}),
        ("a slope that no loss shows", {}, {"build": partial(Net, slope=0.5)}),
        ("how the model begins", {}, {"build": lambda: nn.Sequential(Net())}),
    ]
}  # fmt: skip


@pytest.mark.parametrize("change", BATCHED)
def test_a_bank_of_a_batched_training_is_refused_when_its_recipe_changed(tmp_path: Path, change: str) -> None:
    before, after = BATCHED[change]
    subsets = random_subsets(2, before().examples)
    subsets[:, [0, -1]] = True
    filled = Bank(tmp_path, before(), subsets, 1).run(progress=False)
    assert np.array_equal(Bank(tmp_path, before(), subsets, 1).run(progress=False), filled), "the same recipe"
    _require_refused(tmp_path, after(), subsets if after().examples == subsets.shape[1] else subsets[:, :12])


def _require_refused(folder: Path, training: Any, subsets: np.ndarray = SUBSETS) -> None:
    files = {path: path.read_bytes() for path in folder.iterdir()}
    for call in (lambda bank: bank.run(progress=False), lambda bank: bank.missing, lambda bank: bank.check()):
        with pytest.raises(ScoreError, match=r"bank\.json: this bank was made with something else \(.*stored .*, now "):
            call(Bank(folder, training, subsets, 1))
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


# ---- any function ----

TENSOR, OBJECT = torch.zeros(3), SimpleNamespace(rate=0.1, inner={"decay": [0.0, 0.1]})


def _helper() -> float:
    return float(SETTINGS.get("rate", 0.1))


def _train(kept: np.ndarray, seed: int, rate: float = 0.1) -> list[float]:
    return [rate * len(kept) + _helper() + float(TENSOR.sum()) + OBJECT.rate + OBJECT.inner["decay"][1]]


def _in_a_closure(*held: Any) -> Callable[[np.ndarray, int], list[float]]:
    return lambda kept, seed: [float(sum(np.sum(one) for one in held))]


class Trainer:
    def __init__(self, rate: float):
        self.rate = rate

    def train(self, kept: np.ndarray, seed: int) -> list[float]:
        return [self.rate]


def _other_helper() -> float:
    return float(SETTINGS.get("rate", 0.1)) + 1.0


FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "a default": (_train, partial(_train, rate=0.2)),
    "an argument": (partial(_train, rate=0.1), partial(_train, rate=0.2)),
    "a number in a closure": (_in_a_closure(1.0), _in_a_closure(2.0)),
    "an array in a closure": (_in_a_closure(np.zeros(5)), _in_a_closure(np.arange(5) == 4)),
    "a list in a closure": (_in_a_closure([1, 2, 3]), _in_a_closure([1, 2, 4])),
    "an attribute of an object": (Trainer(0.1).train, Trainer(0.2).train),
    "the code": (lambda kept, seed: [1.0], lambda kept, seed: [2.0]),
}


@pytest.mark.parametrize("change", FUNCTIONS)
def test_a_bank_of_a_function_is_refused_when_what_it_reaches_changed(tmp_path: Path, change: str) -> None:
    before, after = (FunctionTraining(function, {"recipe": 1}, processes=1) for function in FUNCTIONS[change])
    assert np.array_equal(*(Bank(tmp_path, before, SUBSETS, 1).run(progress=False) for _ in range(2)))
    _require_refused(tmp_path, after)
    _require_refused(tmp_path, FunctionTraining(FUNCTIONS[change][0], {"recipe": 2}, processes=1))


EDITS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a global": lambda patch: patch.setitem(SETTINGS, "rate", 0.2),
    "a global tensor": lambda patch: patch.setitem(globals(), "TENSOR", torch.tensor([0.0, 0.0, 1.0])),
    "an object's attribute": lambda patch: patch.setattr(OBJECT, "rate", 0.2),
    "a number deep in an object": lambda patch: patch.setitem(OBJECT.inner, "decay", [0.0, 0.2]),
    "a helper": lambda patch: patch.setitem(globals(), "_helper", _other_helper),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_between_two_runs_of_one_bank_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: str
) -> None:
    training = FunctionTraining(_train, {}, processes=1)
    bank = Bank(tmp_path, training, SUBSETS, 1)
    filled = bank.run(progress=False)
    EDITS[edit](monkeypatch)
    with pytest.raises(ScoreError, match="this bank was made with something else"):
        bank.run(progress=False)
    monkeypatch.undo()
    assert np.array_equal(bank.run(progress=False), filled)


def test_what_running_a_function_changes_is_no_edit(tmp_path: Path) -> None:
    log: list[int] = []

    def train(kept: np.ndarray, seed: int) -> list[float]:
        log.append(seed)
        return [float(len(kept))]

    training = FunctionTraining(train, {}, processes=1, each=1)
    Bank(tmp_path, training, SUBSETS, 1).run(progress=False)
    Bank(tmp_path, training, SUBSETS, 3).run(progress=False)
    assert len(log) == 6
