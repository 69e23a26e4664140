"""What was changed between two runs in one store, and what became of the numbers: reused, refused, or made anew.

Each row fits and scores in a store with a first setting, then in the same store with a second, and with the second in a
store of its own: whenever the store does not refuse, its numbers are those of the fresh store.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

import segflow as sf
from segflow.store.store import Store

from ..support.helpers import perturbed_states, trajectory_of, vectors

N = 20
UNPROBED = 12  # an example that no probe reads
USER_CODE = '''
import functools

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import segflow as sf

GLOBAL = 1.0


def helper(loss):
    return loss * 1.0  # of the helper


def of_measurement(value):
    return value * 1.0  # of the measurement's helper


def closed(by):
    def inside(loss):
        return loss * by
    return inside


class Settings:
    def __init__(self, size):
        self.size = size

    def sized(self, loss):
        return loss * self.size * 1.0  # of the nested object


class Base(sf.Task):
    def inherited(self, loss):
        return loss * 1.0  # of the base class

    @property
    def halved(self):
        return self.twice / 2


class Task(Base):
    draws_labels = False
    measurement_options = ("sign",)
    of_class = 1.0

    def __init__(self, factor=1.0, weights=(1.0, 1.0, 1.0), size=1.0, by=1.0, power=1.0, twice=2.0, sign=1.0,
                 smoothing=0.1, report=1.0, tracked=None, unused=0):
        self.factor, self.twice, self.sign, self.report, self.unused = factor, twice, sign, report, unused
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.settings, self.closed = Settings(size), closed(by)
        self.partial = functools.partial(torch.mul, other=power)
        self.criterion = nn.CrossEntropyLoss(reduction="sum", label_smoothing=smoothing)
        self.tracked, self.calls, self.seen, self.log = tracked, 0, {}, []

    def _losses(self, batch, model, sample, least=1.0):
        self.calls += 1
        self.seen[self.calls] = self.factor
        log = self.log
        log.append(self.calls)
        inputs, labels = batch
        logits = model(inputs.to(model[0].weight.dtype))
        labels = (inputs.sum(1).abs() * 1000).long() % 3 if sample else labels
        loss = cross_entropy(logits, labels, weight=self.weights.to(logits.dtype), reduction="sum")
        loss = loss + self.criterion(logits, labels)
        loss = self.partial(self.closed(helper(self.inherited(self.settings.sized(loss)))))
        return loss * self.factor * self.halved * self.of_class * GLOBAL * least

    def compute_train_loss(self, batch, model, sample=False):
        """The loss."""
        return self._losses(batch, model, sample)

    def compute_measurement(self, batch, model):
        inputs, labels = batch
        value = cross_entropy(model(inputs.to(model[0].weight.dtype)), labels, reduction="sum")
        return self.sign * self.report * of_measurement(value)

    def compute_output(self, batch, model):
        return model(batch[0].to(model[0].weight.dtype))[:, 0].square().sum() * 1.0  # of the output function

    def get_influence_tracked_modules(self):
        return self.tracked


class Rate(sf.properties.Property):
    def __init__(self, data, weights=(1.0, 1.0, 1.0), power=1.0, **options):
        super().__init__(data, **options)
        self.weights, self.power = torch.tensor(weights, dtype=torch.float64), power

    def value(self, outputs, targets):
        return of_measurement((outputs.softmax(1) @ self.weights).pow(self.power + 1).mean())


def collate(examples, scale=1.0):
    inputs, labels = zip(*examples)
    return torch.stack(inputs) * scale * 1.0, torch.stack(labels)  # of the collate function
'''


class Change(NamedTuple):
    """A row: what the second setting has instead of the first's, and the outcome that is right.

    outcome: "reused" (nothing is made), "scores" (only scores are made anew), "anew" (factors too) or "refused".
    second, first: options of `run`, `edit` among them: (old, new) texts in the user's code. matters: whether fresh
    numbers of the two settings differ.
    """

    outcome: str
    second: Mapping[str, Any]
    first: Mapping[str, Any] = {}
    matters: bool = True


class User:
    """A user who runs the same script, changed here and there, in folders below one."""

    def __init__(self, folder: Path):
        self.folder = folder

    def code(self, name: str, edit: tuple[str, str] | None) -> ModuleType:
        """The user's module, edited and imported anew."""
        assert edit is None or edit[0] in USER_CODE
        path = self.folder / name / "user_code.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(USER_CODE.replace(*edit) if edit else USER_CODE)
        spec = spec_from_file_location("user_code", path)
        assert spec is not None and spec.loader is not None
        module = sys.modules["user_code"] = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def run(
        self,
        script: str,
        store: str,
        *,
        edit: tuple[str, str] | None = None,
        task: Mapping[str, Any] | Callable[[], Any] | None = None,
        model: Callable[[], nn.Module] | None = None,
        states: int = 2,
        perturbed: float = 0.3,
        recipe: Mapping[str, Any] | None = None,
        train: Any = None,
        query: Any = None,
        groups: sf.Groups | None = None,
        members: int = 1,
        collate: Mapping[str, Any] | None = None,
        batch_size: int = 8,
        keep: tuple[str, ...] = (),
        **options: Any,
    ) -> Tensor:
        """The scores that a script prints, with a store; see Change for `edit`, all else is what a user gives."""
        code = self.code(script, edit)
        network, data = model() if model else small(), vectors(N) if train is None else train
        runs = [
            trajectory_of(
                self.folder / script / f"run-{number}",
                perturbed_states(network, states + number, perturbed)[number:],
                len(data),
                **recipe or {},
            )
            for number in range(members)
        ]
        options.setdefault("method", sf.InfluenceFunction(0.01))
        if collate is not None:
            options["collate_fn"] = lambda examples: code.collate(examples, **collate)
        given = task() if callable(task) else code.Task(**task or {})
        torch.seed()  # another process has another random state
        run = runs if members > 1 else runs[0]
        analyzer = sf.Analyzer(network, given, run, store=self.folder / store, **{"progress": False, **options})
        analyzer.fit(data, batch_size)
        asked = query(code) if callable(query) else vectors(3, seed=9) if query is None else query
        whole = sf.Groups.random(len(data), 5) if groups is None else groups
        return analyzer.score(whole, data, asked, batch_size=batch_size, keep=keep).values

    def committed(self, store: str) -> dict[str, str]:
        """The digest of each unit's file."""
        units = Store(self.folder / store)
        return {name: entry.sha256 for name in units.names() if (entry := units.entry(name)) is not None}


def small(width: int = 4, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def changed(index: int = UNPROBED, by: float = 1.0, label: int = 0) -> TensorDataset:
    """The training data with another input or label of one example."""
    inputs, labels = (tensor.clone() for tensor in vectors(N).tensors)
    inputs[index] += by
    labels[index] = (labels[index] + label) % 3
    return TensorDataset(inputs, labels)


def source(**options: Any) -> sf.Source:
    return sf.Source(**{"segments": 2, **options})


class Example:
    """One example as an object that only the user's collate function understands."""

    def __init__(self, pair: tuple[Tensor, Tensor]):
        self.pair = pair


def objects(by: float = 0.0) -> list[Example]:
    return [Example(pair) for pair in changed(by=by)]


class Augmented(Dataset[Any]):
    """Examples with noise that is drawn at each reading."""

    def __init__(self, noise: float):
        self.noise = noise

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = vectors(N)[index]
        return inputs + self.noise * torch.randn(inputs.shape).double(), label


class Mixing(sf.tasks.Classification):
    """Its pseudo-labels are drawn for those examples alone that the model is unsure of."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits, labels = self._logits(batch, model)
        if sample:
            unsure = logits.detach().softmax(1).max(1).values < 0.5
            labels = logits.detach().argmax(1)
            labels[unsure] = torch.randint(3, (int(unsure.sum()),))
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


class Environed(sf.tasks.Classification):
    """Reads, where no reading of code sees it, how much its loss and its measurement count."""

    draws_labels = False

    def __init__(self, loss: float, measurement: float = 1.0):
        super().__init__()
        os.environ["SEGFLOW_TEST_LOSS"], os.environ["SEGFLOW_TEST_MEASUREMENT"] = str(loss), str(measurement)

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        labels = (inputs.sum(1).abs() * 1000).long() % 3 if sample else labels
        loss = super().compute_train_loss((inputs, labels), model)
        return loss * float(os.environ["SEGFLOW_TEST_LOSS"])

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return super().compute_measurement(batch, model) * float(os.environ["SEGFLOW_TEST_MEASUREMENT"])


def _adam(size: float = 1.0, eps: float = 1e-3) -> dict[str, Any]:
    moments = {name: torch.full_like(value, size) for name, value in small().state_dict().items()}
    return {"second_moments": [moments] * 2, "name": "Adam", "eps": eps}


def edited(outcome: str, old: str, new: str, **more: Any) -> Change:
    return Change(outcome, {"edit": (old, new), **more}, more)


def optioned(outcome: str, matters: bool = True, **options: Any) -> Change:
    return Change(outcome, {"task": options}, matters=matters)


SAMPLED = {"task": sf.tasks.Classification}
AS_OBJECTS = {"collate_fn": lambda examples: default_collate([getattr(e, "pair", e) for e in examples])}
RATE = {"query": lambda code: code.Rate(vectors(6, seed=4), weights=(1.0, 2.0, 1.0))}
SOURCE = {"method": source()}
OUTPUT = {"method": sf.TRAK(8)}

CHANGES = {
    # the analyzer's options
    "seed": Change("refused", {"seed": 1, **SAMPLED}, SAMPLED),
    "memory": Change("reused", {"memory": 1 << 20}, matters=False),
    "batch size": Change("reused", {"batch_size": 5}, matters=False),
    "progress": Change("reused", {"progress": None}, matters=False),
    "curvature of some examples, then of all": Change("refused", {}, {"curvature_examples": 5}),
    "curvature of all examples, then of some": Change("refused", {"curvature_examples": 5}),
    "curvature of as many examples as there are": Change("reused", {"curvature_examples": N}, matters=False),
    # methods
    "damping": Change("scores", {"method": sf.InfluenceFunction(0.1)}),
    "kind of curvature": Change("anew", {"method": sf.InfluenceFunction(0.01, "kfac")}),
    "number of segments": Change("anew", {"method": source(segments=1)}, SOURCE),
    "projection": Change("anew", {"method": sf.ProjectedFisher(6)}, {"method": sf.ProjectedFisher(5)}),
    # data
    "input of one example": Change("refused", {"train": changed()}),
    "label of one example": Change("refused", {"train": changed(by=0, label=1)}),
    "order of examples": Change("refused", {"train": TensorDataset(*(t.flip(0) for t in vectors(N).tensors))}),
    "number of examples": Change("refused", {"train": vectors(N + 1)}),
    "dtype of inputs": Change(
        "refused",
        {"train": TensorDataset(vectors(N).tensors[0].float(), vectors(N).tensors[1])},
        {"train": TensorDataset(vectors(N).tensors[0].float().double(), vectors(N).tensors[1])},
        matters=False,
    ),
    "queries": Change("scores", {"query": vectors(3, seed=8)}),
    "groups": Change("scores", {"groups": sf.Groups.random(N, 5, seed=3)}),
    "code of collating": edited("refused", "* 1.0, torch", "* 1.5, torch", collate={}),
    "default of collating": edited("refused", "scale=1.0", "scale=1.5", collate={}),
    "closure of collating": Change("refused", {"collate": {"scale": 1.5}}, {"collate": {}}),
    # training
    "checkpoints": Change("refused", {"perturbed": 0.4}),
    "learning rate": Change("scores", {"recipe": {"lr": 0.2}, **SOURCE}, SOURCE),
    "weight decay": Change("scores", {"recipe": {"weight_decay": 0.1}, **SOURCE}, SOURCE),
    "momentum": Change("scores", {"recipe": {"momentum": 0.9}, **SOURCE}, SOURCE),
    "example weights": Change("refused", {"recipe": {"example_weights": [[1.0] * 10 + [3.0] * 10] * 2}}),
    "model's width": Change("refused", {"model": lambda: small(6)}),
    "model's dtype": Change("refused", {"model": lambda: small(dtype=torch.float32)}),
    "number of checkpoints": Change("refused", {"states": 3, **SOURCE}, SOURCE),
    "second moments": Change("refused", {"recipe": _adam(2.0), **SOURCE}, {"recipe": _adam(), **SOURCE}),
    "Adam's eps": Change("refused", {"recipe": _adam(eps=1e-5), **SOURCE}, {"recipe": _adam(eps=3e-5), **SOURCE}),
    # examples that are objects of the user's, and data that reads differently each time
    "object among the examples": Change(
        "refused", {"train": objects(1.0), **AS_OBJECTS}, {"train": objects(), **AS_OBJECTS}
    ),
    "noise of data that reads differently": Change("refused", {"train": Augmented(1.0)}, {"train": Augmented(0.1)}),
    "batch size, of data that reads differently": Change(
        "reused", {"train": Augmented(0.1), "batch_size": 5}, {"train": Augmented(0.1)}, matters=False
    ),
    "nothing, of data that reads differently": Change(
        "reused", {"train": Augmented(0.1)}, {"train": Augmented(0.1)}, matters=False
    ),
    "views of data that reads differently": Change(
        "refused", {"train": Augmented(0.1), "views": 2}, {"train": Augmented(0.1)}
    ),
    "number of workers": Change(
        "reused", {"train": Augmented(0.1), "num_workers": 1}, {"train": Augmented(0.1)}, matters=False
    ),
    # the task
    "batch size of pseudo-labels that mix examples": Change(
        "refused", {"task": Mixing, "batch_size": 5}, {"task": Mixing}
    ),
    "environment variable that the loss reads": Change(
        "refused", {"task": lambda: Environed(2.0)}, {"task": lambda: Environed(1.0)}
    ),
    "environment variable that the measurement reads": Change(
        "scores", {"task": lambda: Environed(1.0, 2.0)}, {"task": lambda: Environed(1.0, 1.0)}
    ),
    "tracked modules": optioned("refused", tracked=["0"]),
    "option": optioned("refused", factor=2.0),
    "weights in a tensor": optioned("refused", weights=(1.0, 2.0, 3.0)),
    "attribute of a nested object": optioned("refused", size=2.0),
    "value in a closure": optioned("refused", by=2.0),
    "keyword of a partial": optioned("refused", power=2.0),
    "what a property of the class reads": optioned("refused", twice=3.0),
    "option of a torch module": optioned("refused", smoothing=0.5),
    "option that nothing reads": optioned("reused", matters=False, unused=1),
    "option of the measurement": optioned("scores", sign=-1.0),
    "attribute that the measurement alone reads": optioned("scores", report=2.0),
    "code of the loss": edited("refused", "return loss * self.factor", "return 2 * loss * self.factor"),
    "helper": edited("refused", "1.0  # of the helper", "2.0"),
    "method of a base class": edited("refused", "1.0  # of the base", "2.0  # of the base"),
    "method of a nested object": edited("refused", "1.0  # of the nested", "2.0  # of the nested"),
    "attribute of the class": edited("refused", "of_class = 1.0", "of_class = 2.0"),
    "global": edited("refused", "GLOBAL = 1.0", "GLOBAL = 2.0"),
    "default argument": edited("refused", "least=1.0", "least=2.0"),
    "helper of the measurement": edited("scores", "1.0  # of the measurement's", "2.0  # of"),
    "output function": edited("refused", "1.0  # of the output", "2.0  # of the output", **OUTPUT),
    "comment": Change("reused", {"edit": ("# of the helper", "# another word")}, matters=False),
    "docstring": Change("reused", {"edit": ("The loss.", "Another word.")}, matters=False),
    "docstring that was not there": Change(
        "reused", {"edit": ("def helper(loss):", 'def helper(loss):\n    """Help."""\n')}, matters=False
    ),
    "name of a local variable": Change("reused", {"edit": ("logits", "scores")}, matters=False),
    "name of an attribute": Change("refused", {"edit": ("self.factor", "self.times")}, matters=False),
    "order of functions": Change(
        "reused", {"edit": ("\nGLOBAL", "\ndef before(x):\n    return x\n\n\nGLOBAL")}, matters=False
    ),
    # properties
    "property's data": Change(
        "scores", {"query": lambda code: code.Rate(vectors(6, seed=5), weights=(1.0, 2.0, 1.0))}, RATE
    ),
    "property's option": Change(
        "scores", {"query": lambda code: code.Rate(vectors(6, seed=4), weights=(1.0, 2.0, 1.0), power=2.0)}, RATE
    ),
    "property's weights": Change(
        "scores", {"query": lambda code: code.Rate(vectors(6, seed=4), weights=(1.0, 2.0, 3.0))}, RATE
    ),
    "property's helper": edited("scores", "1.0  # of the measurement's", "2.0  # of", **RATE),
    "property's name": Change(
        "reused",
        {"query": lambda code: code.Rate(vectors(6, seed=4), weights=(1.0, 2.0, 1.0), name="rate")},
        RATE,
        matters=False,
    ),
    "measurement beside a property": Change("reused", {"task": {"sign": -1.0}, **RATE}, RATE, matters=False),
    # several runs
    "members of an ensemble": Change("anew", {"members": 3}, {"members": 2}),
    "one run, then an ensemble": Change("anew", {"members": 2}),
}


def staged(user: User, script: str, store: str, **given: Any) -> Tensor:
    """The scores of the first of two stages; given: what is otherwise, by stage and kind, such as `late_lr`."""

    def of(kind: str, usual: tuple[Any, Any]) -> dict[str, Any]:
        return {stage: given.get(f"{stage}_{kind}", value) for stage, value in zip(STAGES, usual, strict=True)}

    data, states = of("data", (vectors(N), vectors(15, seed=3))), perturbed_states(small(), 4, 0.3)
    tasks = of("task", (sf.tasks.Classification("margin"), sf.tasks.Classification("margin")))
    lr, decay = of("lr", (0.1, 0.05)), of("decay", (0.0, 0.01))
    collates = of("collate", (default_collate, default_collate))
    runs = []
    for place, stage in enumerate(STAGES):
        folder = user.folder / script / stage
        made = trajectory_of(folder, states[2 * place : 2 * place + 2], len(data[stage]), lr=lr[stage])
        constants = sf.OptimizerConstants(weight_decay=decay[stage])
        runs.append(sf.Trajectory(made.checkpoints, made.steps, lr[stage], len(data[stage]), constants, stage=stage))
    options: dict[str, Any] = {"store": user.folder / store, "collate_fn": collates, "progress": False}
    analyzer = sf.Analyzer(small(), tasks, runs[1].after(runs[0]), method=source(), **options)
    analyzer.fit(data)
    return analyzer.score(sf.Groups.random(N, 5), data, vectors(3, seed=9), stage="early").values


class Doubled(sf.tasks.Classification):
    """Twice the loss, and the usual measurement."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return 2 * super().compute_train_loss(batch, model, sample)


def halving(examples: list[Any]) -> Any:
    inputs, labels = default_collate(examples)
    return inputs / 2, labels


STAGES = ("early", "late")
STAGE_CHANGES = {
    "early stage's task": Change("refused", {"early_task": Doubled("margin")}),
    "late stage's task": Change("refused", {"late_task": Doubled("margin")}),
    "late stage's measurement": Change("scores", {"late_task": sf.tasks.Classification("loss")}),
    "early stage's measurement": Change("reused", {"early_task": sf.tasks.Classification("loss")}, matters=False),
    "early stage's data": Change("refused", {"early_data": changed()}),
    "late stage's data": Change("refused", {"late_data": vectors(15, seed=4)}),
    "early stage's rate": Change("scores", {"early_lr": 0.2}),
    "late stage's rate": Change("scores", {"late_lr": 0.1}),
    "late stage's weight decay": Change("scores", {"late_decay": 0.2}),
    "early stage's collating": Change("refused", {"early_collate": halving}),
    "late stage's collating": Change("refused", {"late_collate": halving}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_reused_refused_or_made_anew(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGFLOW_TEST_LOSS", "1")  # put back afterwards
    monkeypatch.setenv("SEGFLOW_TEST_MEASUREMENT", "1")
    _check_row(CHANGES[name], User(tmp_path), lambda user, *folders, **given: user.run(*folders, **given))


@pytest.mark.parametrize("name", STAGE_CHANGES)
def test_what_was_changed_of_a_stage_is_reused_refused_or_made_anew(tmp_path: Path, name: str) -> None:
    _check_row(STAGE_CHANGES[name], User(tmp_path), staged)


def _check_row(change: Change, user: User, run: Callable[..., Tensor]) -> None:
    first = run(user, "first", "store", **change.first)
    before = user.committed("store")
    fresh = run(user, "second", "fresh", **change.second)
    same = first.shape == fresh.shape and torch.allclose(first.double(), fresh.double(), rtol=1e-6, atol=0)
    assert same != change.matters, "the row is vacuous" if change.matters else "the row matters"
    try:
        again = run(user, "second", "store", **change.second)
    except sf.StoreError as problem:
        assert "was made from something else" in str(problem)
        outcome = "refused"
    else:
        torch.testing.assert_close(again, fresh)
        outcome = _outcome(before, user.committed("store"))
    assert outcome == change.outcome


def _outcome(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    made = {name for name, sha256 in after.items() if before.get(name) != sha256}
    return "anew" if any("scores/" not in name for name in made) else "scores" if made else "reused"
