"""What a task is: what its functions reach, told alike in every process, and apart wherever it matters."""

from __future__ import annotations

import array
import contextvars
import functools
import logging
import operator
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.data.changing import Reached, one_call, settled
from segflow.data.code_identity import measurement_fingerprint, task_fingerprint

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


def _context_variable(value: float) -> Any:
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("variable", default=1.0)
    variable.set(value)
    return variable


def _graph(value: float) -> list[Node]:
    nodes = [Node(value if number == 3 else None) for number in range(6)]
    for number, node in enumerate(nodes):
        node.other = {nodes[number - 1], nodes[number - 2]}
    return nodes


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
    "array of the standard library": lambda value: array.array("d", [1.0, value]),
    "bytes that can change": lambda value: bytearray([1, int(value)]),
    "view of memory": lambda value: memoryview(bytes([1, 2, int(value)]))[::2],
    "getter of items": lambda value: operator.itemgetter(int(value)),
    "packing": lambda value: struct.Struct(f"{int(value)}i"),
    "variable of a context": _context_variable,
    "large mapping": lambda value: {f"w{number}": (number, value) for number in range(11_000)},
    "large set": lambda value: {*range(200), value + 0.5},
    "set of objects": lambda value: {Node(value), Node(5.0)},
    "set of objects alike": lambda value: {Node(None, Node(value)), Node(None, Node(5.0))},
    "graph of objects": _graph,
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


def test_a_module_that_shares_a_tensor_with_the_analysed_model_counts_by_its_other_tensors() -> None:
    model = mlp()
    one, other = (nn.ParameterDict({"shared": model[0].weight, "own": torch.full((2,), value)}) for value in (1.0, 2.0))
    found = task_fingerprint(Loss(one), model)
    assert found != task_fingerprint(Loss(other), model)
    with torch.no_grad():
        model[0].weight += 1
    assert task_fingerprint(Loss(one), model) == found


def test_loggers_count_by_their_name() -> None:
    found = task_fingerprint(Loss(logging.getLogger("segflow.tests.one")))
    logging.getLogger("segflow.tests.one").debug("fills a cache")
    logging.getLogger("segflow.tests.one.below").setLevel(logging.ERROR)
    assert task_fingerprint(Loss(logging.getLogger("segflow.tests.one"))) == found
    assert task_fingerprint(Loss(logging.getLogger("segflow.tests.two"))) != found


class Named(Loss):
    """Computes the name of what it calls."""

    kind = "one"

    def weight_one(self) -> float:
        return 1.0

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return torch.ones(()) * getattr(self, "weight_" + self.kind)()


class Spelled(Named):
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return torch.ones(()) * getattr(self, "weight_one")() * import_module("tests.support.helpers").vectors(2)  # noqa: B009


def test_attributes_and_modules_that_are_asked_for_by_name_count() -> None:
    found = task_fingerprint(Named()), task_fingerprint(Spelled(unread=1))
    assert "weight_one()" in found[0]
    assert "weight_one()" in found[1] and "vectors()" in found[1] and "self.unread" not in found[1]


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
        return torch.zeros(()) * self.held.value


def _settled(task: Loss) -> Reached:
    """What the task reaches, its loss having run a few times."""

    def run() -> None:
        task.compute_train_loss((torch.zeros(2, 5), torch.tensor([0, 1])), mlp())

    return settled(lambda: task_fingerprint(task), run, run)[0]


def test_what_running_changes_does_not_count() -> None:
    fresh, used = Counting(), Counting()
    for _ in range(3):
        used.compute_train_loss(None, mlp())
    used.seen.clear()
    found = _settled(fresh)
    assert _settled(used) == found == task_fingerprint(fresh)
    assert not {"self.calls", "self.log", "self.mean", "CALLS"} & set(found)
    for holder, name in [(fresh, "held"), (fresh.node, "other"), (fresh.by_key["a"], "other")]:
        setattr(holder, name, Node(7))
        assert task_fingerprint(fresh) != found, name
        setattr(holder, name, Node(0) if name == "held" else None)
        assert task_fingerprint(fresh) == found


class Meter:
    def __init__(self, **held: Any):
        vars(self).update(held)


class Changing(Loss):
    """Its loss does something to an attribute, or to one of that name elsewhere, which changes no weight."""

    def __init__(self, change: Any, held: Any):
        super().__init__(held)
        self.change, self.meter, self.log = change, Meter(held=0, weight=0), {"held": 0}

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return self.change(self)


class Holder(Node):
    def on(self, device: str) -> Holder:
        self.value = self.value.to(device)
        return self


def _moved(task: Any) -> None:
    task.held = task.held.to("cpu")


def _cast(task: Any) -> None:
    task.held = task.held.double()


def _listed(task: Any) -> None:
    task.held = torch.as_tensor(task.held)


def _normalised(task: Any) -> None:
    task.held = task.held / task.held.max()


def _popped(task: Any) -> None:
    task.held.pop("unused", None)
    task.held.setdefault("other", 1.0)
    task.held["calls"] = task.held.get("calls", 0) + 1
    task.log["held"] = 1


def _elsewhere(task: Any) -> None:
    task.meter.held += 1
    task.meter.weight += 1


def _requiring(task: Any) -> None:
    task.held.requires_grad_(True)


CHANGES: dict[str, tuple[Any, Callable[[float], Any]]] = {
    "moved": (_moved, lambda value: torch.tensor([1.0, value])),
    "cast": (_cast, lambda value: torch.tensor([1.0, value])),
    "made a tensor": (_listed, lambda value: [1.0, value]),
    "normalised": (_normalised, lambda value: torch.tensor([3.0, value])),
    "moved in a holder": (lambda task: task.held.on("cpu"), lambda value: Holder(torch.tensor([1.0, value]))),
    "criterion moved": (_moved, lambda value: nn.CrossEntropyLoss(weight=torch.tensor([1.0, value]))),
    "mapping filled": (_popped, lambda value: {"rare": value, "unused": 1}),
    "the same name elsewhere": (_elsewhere, lambda value: value),
    "the same name elsewhere, of a module": (_elsewhere, lambda value: nn.NLLLoss(weight=torch.tensor([1.0, value]))),
    "requires_grad_": (_requiring, lambda value: torch.tensor([1.0, value])),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_running_moves_or_converts_or_names_alike_counts(kind: str) -> None:
    change, held = CHANGES[kind]
    one, alike, other = (_settled(Changing(change, held(value))) for value in (1.0, 1.0, 2.0))
    assert one == alike
    assert one != other


def test_a_memo_of_another_name_does_not_count() -> None:
    class Aliased(Loss):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            memo = self.memo
            memo[len(memo)] = self.held
            return torch.zeros(())

    task = Aliased(1.0, memo={})
    before = task_fingerprint(task)
    found = _settled(task)
    assert found == before and found["self.held"] == "1.0"
    assert _settled(Aliased(2.0, memo={})) != found


def test_what_changes_within_a_call_is_not_read_again_and_what_is_edited_between_calls_is() -> None:
    task = Loss(1.0, seen=[])
    task.held = Node(1.0, [])
    with one_call():
        first = task_fingerprint(task)
        task.held.other.append("seen in an example that is rare")
        assert task_fingerprint(task) == first
    with one_call():
        assert task_fingerprint(task) == first
    task.held.value = 2.0
    with one_call():
        assert task_fingerprint(task) != first


SCRIPT = """
import functools, torch
from torch import nn
import segflow as sf
from segflow.data.code_identity import task_fingerprint

class Node:
    def __init__(self, number):
        self.number = number

class Held:
    def __init__(self):
        self.words, self.log = {"a", "b", "c", 1, (2, "d")}, __import__("logging").getLogger("a")
        nodes = [Node(number % 4) for number in range(12)]
        for number, node in enumerate(nodes):
            node.links = {nodes[(number + 1) % 12], nodes[(number * 3 + 1) % 12], *nodes[:2]}
        self.nodes, self.more = set(nodes), {f"w{number}": ({"a", "b"}, number) for number in range(99)}
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
