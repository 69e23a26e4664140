"""What a task is: what its functions reach, told alike in every process, and apart wherever it matters."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.data.code_identity import measurement_fingerprint, settled, task_fingerprint

from ..support.helpers import mlp


class Loss(sf.tasks.Classification):
    """A classification with an attribute that its loss reads."""

    def __init__(self, held: Any = None, **more: Any):
        super().__init__()
        self.held = held
        vars(self).update(more)

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return super().compute_train_loss(batch, model, sample) * self.held


class Node:
    def __init__(self, value: Any, other: Any = None):
        self.value, self.other = value, other

    def __call__(self, loss: Any) -> Any:
        return loss


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value


def _cyclic(value: float) -> Node:
    node = Node(value)
    node.other = Node([node])
    return node


def _adding(value: float) -> Callable[[float], float]:
    return lambda loss: loss + value


def _cached(value: float) -> Any:
    return functools.lru_cache(lambda loss: loss + value)


def _module(value: float) -> nn.Module:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.fill_(value)
        module.bias.fill_(1.0)
    return module


HELD: dict[str, Callable[[float], Any]] = {
    "number": lambda value: value,
    "tensor": lambda value: torch.tensor([value]),
    "array": lambda value: __import__("numpy").array([value]),
    "module": _module,
    "list of tensors": lambda value: [1, torch.tensor(value)],
    "mapping": lambda value: {"a": {"b": value}},
    "set": lambda value: {"x", value},
    "object": Node,
    "object with slots": Slotted,
    "objects in a circle": _cyclic,
    "closure": _adding,
    "two closures in a mapping": lambda value: {"a": _adding(value), "b": _adding(1.5)},
    "partial": lambda value: functools.partial(torch.mul, other=value),
    "bound method": lambda value: Node(value).__call__,
    "cached function": _cached,
    "function under no_grad": lambda value: torch.no_grad()(_adding(value)),
    "vectorised function": lambda value: torch.vmap(_adding(value)),
    "range": lambda value: range(int(value)),
    "dtype": lambda value: torch.float32 if value == 1 else torch.float64,
    "path": lambda value: Path(str(value)),
    "frame": lambda value: pandas.DataFrame({"a": [1.0, value]}),
    "names of a frame's columns": lambda value: pandas.DataFrame({str(value): [1.0]}),
    "column": lambda value: pandas.Series([1.0, value]),
    "function of torch": lambda value: torch.sin if value == 1 else torch.cos,
}


@pytest.mark.parametrize("kind", HELD)
def test_a_task_is_told_by_what_its_loss_reads(kind: str) -> None:
    one, alike, other = (task_fingerprint(Loss(HELD[kind](value))) for value in (1.0, 1.0, 2.0))
    assert one == alike
    assert one != other


def test_what_the_loss_never_reads_does_not_count() -> None:
    assert task_fingerprint(Loss(1.0, unread=1)) == task_fingerprint(Loss(1.0, unread=2))
    assert task_fingerprint(Loss(1.0)) == task_fingerprint(Loss(1.0, measurement="margin"))
    assert measurement_fingerprint(Loss(1.0)) != measurement_fingerprint(Loss(1.0, measurement="margin"))
    assert measurement_fingerprint(Loss(1.0)) == measurement_fingerprint(Loss(2.0))


def test_all_attributes_count_where_the_task_is_handed_on_as_a_whole() -> None:
    class Handed(Loss):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return sum(vars(self).values())

    assert task_fingerprint(Handed(1.0, added=1)) != task_fingerprint(Handed(1.0, added=2))


@pytest.mark.parametrize("holder", [lambda part: part, Node, lambda part: [part], _adding])
@pytest.mark.parametrize("part", [lambda model: model, lambda model: model[0], lambda model: model[0].weight])
def test_the_analysed_models_own_parameters_do_not_count(holder: Any, part: Any) -> None:
    model = mlp()
    task = Loss(holder(part(model)))
    before = task_fingerprint(task, model), task_fingerprint(task)
    with torch.no_grad():
        model[0].weight += 1
    assert task_fingerprint(task, model) == before[0]
    assert task_fingerprint(task) != before[1]


CALLS = 0


class Counting(Loss):
    """Changes of itself and its module what running changes."""

    def __init__(self) -> None:
        super().__init__(Node(0))
        self.calls, self.seen, self.log, self.mean = 0, {}, [], torch.zeros(2)
        self.node, self.by_key = Node(0), {"a": Node(0)}

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        global CALLS  # noqa: PLW0603
        CALLS += 1
        self.calls += 1
        self.seen[self.calls] = self.calls
        self.log.append(self.calls)
        self.mean.mul_(0.9).add_(1)
        self.node.value += 1
        self.by_key["a"].value += 1
        return torch.zeros(())


def test_what_running_changes_does_not_count() -> None:
    task, fresh = Counting(), task_fingerprint(Counting())
    for _ in range(3):
        task.compute_train_loss(None, mlp())
    assert task_fingerprint(task) == fresh
    task.held = Node(1)
    assert not {"self.calls", "self.seen", "self.log", "self.mean", "CALLS"} & set(fresh)


def test_what_is_seen_to_change_never_counts_again() -> None:
    class Aliased(Loss):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            memo = self.memo
            memo[len(memo)] = self.held
            return torch.zeros(())

    task, other = Aliased(1.0, memo={}), Aliased(1.0, memo={5: 5})
    before = task_fingerprint(task)
    task.compute_train_loss(None, mlp())
    assert task_fingerprint(task) != before
    found = settled(task, before, task_fingerprint(task))
    assert "self.memo" not in found and found["self.held"] == "1.0"
    assert task_fingerprint(task) == task_fingerprint(other) == found


SCRIPT = """
import functools, torch
from torch import nn
import segflow as sf
from segflow.data.code_identity import task_fingerprint

class Held:
    def __init__(self):
        self.words = {"a", "b", "c", 1, (2, "d")}
        self.generator, self.lock = torch.Generator(), __import__("threading").Lock()

def helper(loss, kinds=frozenset({"x", "y", "z"})):
    return loss if loss in {"p", "q", "r"} else loss

class Task(sf.Task):
    def __init__(self):
        self.held, self.function = Held(), functools.partial(helper, kinds=object())
        self.module, self.line = nn.CrossEntropyLoss(weight=torch.ones(3)), lambda x: helper(x)

    def compute_train_loss(self, batch, model, sample=False):
        return self.function(self.line(self.module(self.held)))

    def compute_measurement(self, batch, model):
        return self.held

print(sorted(task_fingerprint(Task()).items()))
"""


def test_an_identity_is_the_same_in_every_process(tmp_path: Path) -> None:
    found = set()
    for seed, folder in enumerate(("a", "b")):
        script = tmp_path / folder / "script.py"
        script.parent.mkdir()
        script.write_text(SCRIPT)
        environment = {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(sf.__file__).parents[1])}
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1 and "helper()" in found.pop()
