"""How data is read: alike every time, whatever is drawn at random, with any number of workers, and not too often."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

import segflow as sf
from segflow.data.readers import Reader
from segflow.data.reading import Request
from segflow.runtime.ranks import Ranks

from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N, CPU = 20, torch.device("cpu")


class Drawn(Dataset):
    """Examples of five numbers and a class, to which something drawn at random is added; counts its readings."""

    def __init__(self, draw: Callable[[], float], own: Any = None):
        self.data, self.draw, self.own, self.reads = vectors(N), draw, own, 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        x, y = self.data[index]
        return x + self.draw(), y


def _of_numpy() -> float:
    return float(np.random.rand())  # noqa: NPY002


def _of_torch() -> float:
    return torch.rand(()).item()


def _drawn_from(generator: np.random.Generator) -> float:
    return float(generator.random())


def _own_torch(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


OWN = np.random.default_rng(3), torch.Generator(), random.Random(5)
DRAWS = {
    "python": random.random,
    "numpy": _of_numpy,
    "torch": _of_torch,
    "numpy's generator": partial(_drawn_from, OWN[0]),
    "torch's generator": partial(_own_torch, OWN[1]),
    "python's generator": OWN[2].random,
}


def _batches(reader: Reader, lists: list[list[int]], views: int = 1) -> dict[tuple[int, int], Tensor]:
    """What was read of each example in each view."""
    read: dict[tuple[int, int], Tensor] = {}
    for place, batch in enumerate(reader.batches(lists, CPU, views=views)):
        read |= {(index, place % views): row for index, row in zip(batch.examples, batch.content[0], strict=True)}
    return read


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_reading_draws_depends_on_the_seed_the_view_and_the_example_alone(draw: Callable[[], float]) -> None:
    alone = _batches(Reader(Drawn(draw)), [[index] for index in range(N)])
    data = vectors(N).tensors[0]
    added = torch.stack([alone[index, 0][0] - data[index][0] for index in range(N)])
    assert added.unique().numel() == N and 0.1 < added.std() < 0.5
    torch.rand(3)
    others = _batches(Reader(Drawn(draw)), [[3, 1, 7], [0, 19, 18, 17], [4]], views=3)
    for index in (3, 1, 7, 0, 19, 4):
        assert torch.equal(others[index, 0], alone[index, 0])
        assert not torch.equal(others[index, 1], others[index, 0])
        assert not torch.equal(others[index, 2], others[index, 1])
    seeded = _batches(Reader(Drawn(draw), seed=1), [[3, 1, 7]])
    assert not torch.equal(seeded[3, 0], alone[3, 0])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_reading_leaves_every_generator_where_it_was(draw: Callable[[], float]) -> None:
    def stand() -> list[Any]:
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
        own = [OWN[0].bit_generator.state, OWN[1].get_state().tolist(), OWN[2].getstate()]
        return [random.getstate(), numpy_state, torch.get_rng_state().tolist(), *own]

    def failing() -> float:
        return draw() / 0

    before, reader = stand(), Reader(Drawn(draw), digesting=True)
    with pytest.raises(sf.TaskError, match="ZeroDivisionError"):
        list(Reader(Drawn(failing)).batches([[1, 2]], CPU))
    list(reader.batches([[1, 2], [3]], CPU, views=2))
    reader.fingerprint(Ranks())
    assert stand() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_what_one_process_reads(workers: int) -> None:
    lists = [[0, 5, 2], [1], [19, 3], [7, 8, 9], [11]]
    read = []
    for count in (0, workers):
        reader = Reader(Drawn(_of_numpy), _masking, workers=count, digesting=True)
        contents = [batch.content for batch in reader.batches(lists, CPU, views=2)]
        read.append((contents, reader.fingerprint(Ranks())))
    for one, other in zip(read[0][0], read[1][0], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert read[0][1] == read[1][1]


def _masking(items: list[Any]) -> list[Tensor]:
    """A collate function that masks and replaces inputs at random, as those of masked language models do."""
    x, y = default_collate(items)
    masked = torch.bernoulli(torch.full(x.shape, 0.5)).bool()
    return [torch.where(masked, torch.randint(1000, x.shape).double(), x), y]


def test_what_a_collate_function_draws_depends_on_the_example_and_not_on_its_batch() -> None:
    alone = _batches(Reader(vectors(N), _masking), [[index] for index in range(N)])
    whole = _batches(Reader(vectors(N), _masking), [list(range(N))[::-1]])
    assert all(torch.equal(alone[key], whole[key]) for key in alone)
    masked = torch.stack([alone[index, 0] >= 1 for index in range(N)])
    assert 0.3 < masked.double().mean() < 0.8
    assert len({tuple(row.tolist()) for row in masked}) > N / 2


def test_a_collate_functions_own_generator_is_tied_to_examples_too() -> None:
    class Collator:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __call__(self, items: list[Any]) -> Any:
            x, y = default_collate(items)
            return x + torch.rand(x.shape, generator=self.generator), y

    alone = _batches(Reader(vectors(N), Collator()), [[index] for index in range(N)])
    whole = _batches(Reader(vectors(N), Collator()), [list(range(N))])
    assert all(torch.equal(alone[key], whole[key]) for key in alone)


def _rarely() -> float:
    return -1.0 if torch.rand(()) < 0.05 else 1.0


def _of_a_shape_without_examples() -> float:
    return torch.rand(3).sum().item()


@pytest.mark.parametrize("draw", [random.random, _of_numpy, _rarely, _of_a_shape_without_examples])
def test_a_collate_function_whose_draws_belong_to_a_batch_is_refused(draw: Callable[[], float]) -> None:
    reader = Reader(vectors(N), lambda items: draw() * default_collate(items)[0], "training")
    with pytest.raises(sf.TaskError, match="the training data's collate_fn draws random numbers for a batch at"):
        list(reader.batches([[0, 1]], CPU))


def _entropy() -> float:
    return float(np.random.default_rng().random())


def test_data_that_no_seed_makes_repeatable_is_refused_by_the_name_of_an_example(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 1, 0.3), N)
    analyzer, data = analyzer_of(mlp(), trajectory, tmp_path / "store", method=sf.TracIn()), Drawn(_entropy)
    score = partial(analyzer.score, sf.Groups.random(N, 5))
    for call in (partial(score, query=vectors(3)), analyzer.check, analyzer.features):
        with pytest.raises(sf.TaskError, match="example 0 of the training data is another each time it is read"):
            call(train=data)  # type: ignore[operator]
    for query in (partial(score, train=vectors(N)), partial(analyzer.check, vectors(N))):
        with pytest.raises(sf.TaskError, match="example 0 of the query data is another each time it is read"):
            query(query=Drawn(_entropy))  # type: ignore[operator]


@pytest.mark.parametrize("method", [sf.TracIn(), sf.Source()], ids=repr)
def test_an_example_that_no_probe_reads_and_no_seed_makes_repeatable_is_named_too(tmp_path: Path, method: Any) -> None:
    class Rare(Drawn):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> Any:
            x, y = vectors(100)[index]
            return x + (_entropy() if index == 51 else 0.0), y

    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2, 0.3), 100)
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", method=method)
    with pytest.raises(sf.StoreError, match="example 51 of the training data is not what it was"):
        analyzer.fit(Rare(float))
        analyzer.score(sf.Groups.random(100, 9), Rare(float), vectors(3, seed=9))


class Held:
    """A transform with a generator, which it may make when it is asked first."""

    shared = np.random.default_rng(4)
    __slots__ = ("_made", "rows")

    def __init__(self, rows: Any = None):
        self._made, self.rows = None, rows

    def lazily(self) -> float:
        self._made = np.random.default_rng() if self._made is None else self._made
        return float(self._made.random())

    def of_the_class(self) -> float:
        return float(self.shared.random())


MODULE = np.random.default_rng(2)
PCG = np.random.RandomState(np.random.PCG64(0))


def _of_the_module() -> float:
    return float(MODULE.random())


FOUND = {
    "made at the first reading": Held().lazily,
    "of the class": Held().of_the_class,
    "of the module": _of_the_module,
    "beside many rows": Held([{"a": i, "b": i} for i in range(3000)]).lazily,
    "older, of another kind": partial(PCG.uniform),
}


@pytest.mark.parametrize("draw", FOUND.values(), ids=FOUND)
def test_generators_are_found_wherever_the_dataset_reaches_them(draw: Callable[[], float]) -> None:
    reader = Reader(Drawn(draw, random.SystemRandom()), digesting=True)
    reader.check_steady(Ranks())
    alone, whole = (_batches(reader, lists) for lists in ([[3], [1], [7]], [[7, 3, 1]]))
    assert all(torch.equal(alone[key], whole[key]) for key in alone)


def test_data_that_keeps_what_it_drew_first_does_not_depend_on_the_callers_random_state() -> None:
    def read(seed: int) -> dict[tuple[int, int], Tensor]:
        class Caching(Drawn):
            kept: dict[int, Any] = {}  # noqa: RUF012

            def __getitem__(self, index: int) -> Any:
                if index not in self.kept:
                    self.kept[index] = super().__getitem__(index)
                return self.kept[index]

        torch.manual_seed(seed)
        reader = Reader(Caching(_of_torch), digesting=True)
        Caching.kept.clear()
        reader.probes([[0, 0]], CPU)
        reader.check_steady(Ranks())
        return _batches(reader, [list(range(N))])

    first, second = read(0), read(1)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_collate_function_that_changes_examples_in_place_changes_each_once() -> None:
    class Fresh(Drawn):
        def __getitem__(self, index: int) -> Any:
            return Record(vectors(N)[index][0].clone(), 0)

    def doubling(records: list[Record]) -> list[Tensor]:
        for record in records:
            record.x.mul_(2)
        return [_of_records(records)]

    reader = Reader(Fresh(float), doubling, digesting=True)
    reader.check_steady(Ranks())
    expected = 2 * vectors(N).tensors[0]
    for _ in range(2):
        [probe] = reader.probes([[0, 1]], CPU)
        assert torch.equal(probe.content[0], expected[:2])
        walked = _batches(reader, [[0, 1], [2]])
        assert all(torch.equal(walked[index, 0], expected[index]) for index in (0, 1, 2))


def test_rows_read_at_once_that_are_not_one_for_each_are_read_one_by_one() -> None:
    class Columns(Drawn):
        def __getitems__(self, indices: list[int]) -> Any:
            return {"x": 0, "y": 1}

    read = _batches(Reader(Columns(float)), [[4, 5]])
    assert torch.equal(read[4, 0], vectors(N).tensors[0][4])


def test_an_error_in_a_worker_is_the_error_without_its_traceback() -> None:
    class Failing(Drawn):
        def __getitem__(self, index: int) -> Any:
            return vectors(N)[index] if index != 13 else {}["lost"]

    reader = Reader(Failing(float), role="training", workers=1)
    with pytest.raises(sf.TaskError, match=r"^example 13 of the training data cannot be read \(KeyError: 'lost'\)"):
        list(reader.batches([[index] for index in range(N)], CPU))


def test_examples_that_cannot_be_read_or_joined_are_named() -> None:
    def failing(index: int) -> Any:
        return {}["lost"] if index == 13 else torch.zeros(index % 2 + 1)

    class Failing(Drawn):
        def __getitem__(self, index: int) -> Any:
            return failing(index)

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [failing(index) for index in indices]

    reader = Reader(Failing(lambda: 0.0), role="query")
    with pytest.raises(sf.TaskError, match=r"example 13 of the query data cannot be read \(KeyError: 'lost'\)"):
        list(reader.batches([[11, 13]], CPU))
    with pytest.raises(sf.TaskError, match=r"examples \[4, 5\] of the query data cannot be joined into a batch"):
        list(reader.batches([[4, 5]], CPU))


def test_a_collate_function_may_take_entries_out_of_an_example() -> None:
    examples = [{"x": torch.full((2,), float(i)), "y": i} for i in range(N)]

    def popping(items: list[dict[str, Any]]) -> Any:
        labels = torch.tensor([item.pop("y") for item in items])
        return torch.stack([item["x"] for item in items]), labels

    class Fresh(Drawn):
        def __getitem__(self, index: int) -> Any:
            return dict(examples[index])

    reader = Reader(Fresh(lambda: 0.0), popping, digesting=True)
    reader.check_steady(Ranks())
    [batch] = reader.probes([[0, N - 1]], CPU)
    assert batch.content[1].tolist() == [0, N - 1]
    [batch] = reader.batches([[0, 3]], CPU)
    assert batch.content[1].tolist() == [0, 3] and reader.fingerprint(Ranks())["length"] == N


class Record:
    """A plain object, whose content default collation does not know."""

    def __init__(self, x: Tensor, note: Any):
        self.x, self.note = x, note


def _of_records(records: list[Record]) -> Tensor:
    return torch.stack([record.x for record in records])


def test_a_digest_is_of_what_batches_hold() -> None:
    def of(records: list[Any], collate: Any = _of_records) -> Any:
        return Reader(records, collate).fingerprint(Ranks())["examples"]

    records = [Record(torch.full((2,), float(i)), i) for i in range(N)]
    changed = [*records[:7], Record(torch.full((2,), 7.5), 7), *records[8:]]
    noted = [*records[:7], Record(torch.full((2,), 7.0), "another note"), *records[8:]]
    assert of(records) == of(list(records)) == of(noted)
    assert of(records) != of(changed)
    assert of(records) != of(records, lambda items: 2 * _of_records(items))
    assert of(records, lambda items: items) != of(noted, lambda items: items)
    assert of(records, lambda items: items) == of(list(records), lambda items: items)


def test_content_that_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(sf.TaskError, match="example 0 of the given data: it holds a generator, whose content cannot"):
        Reader([0, 1], lambda items: (item for item in items)).fingerprint(Ranks())


def test_an_example_that_changed_between_two_calls_is_named() -> None:
    examples = [torch.full((2,), float(i)) for i in range(N)]
    reader = Reader(examples, role="training", digesting=True)
    before = reader.fingerprint(Ranks())
    reader.begin(True)
    assert reader.fingerprint(Ranks()) == before
    reader.confirm(Ranks())
    examples[7] += 1
    reader.begin(True)
    assert reader.fingerprint(Ranks()) == before  # what is known is believed until the call ends, or a pass reads it
    with pytest.raises(sf.StoreError, match="example 7 of the training data is not what it was when this Analyzer"):
        list(reader.read([Request([6, 7])], CPU))
    reader.begin(True)
    reader.fingerprint(Ranks())
    with pytest.raises(sf.StoreError, match="example 7 of the training data is not what it was"):
        reader.confirm(Ranks())


METHODS = {
    "SOURCE": (sf.Source(), 8, 4),
    "influence": (sf.InfluenceFunction(0.01), 2, 1),
    "dot": (sf.GradientDot(), 0, 1),
}
PROBES = 100


@pytest.mark.parametrize("name", METHODS)
def test_no_example_is_read_more_often_than_the_walks_need(tmp_path: Path, name: str) -> None:
    method, fits, scores = METHODS[name]
    size = 600

    class Counting(Dataset):
        reads = 0

        def __len__(self) -> int:
            return size

        def __getitem__(self, index: int) -> Any:
            Counting.reads += 1
            return data[index]

    def reads(call: Callable[[], Any]) -> int:
        Counting.reads = 0
        call()
        return Counting.reads

    data, train = vectors(size), Counting()
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 4, 0.3), size)
    analyzer = analyzer_of(mlp(), trajectory, tmp_path / "store", method=method)
    score = partial(analyzer.score, sf.Groups.random(size, 20), train, vectors(3, seed=9))
    verifying = 1 if fits else 0  # a fit that has something to look for in the store reads the data once
    assert fits * size <= reads(lambda: analyzer.fit(train)) <= fits * size + PROBES
    assert reads(lambda: analyzer.fit(train)) <= verifying * size + PROBES
    first = reads(score)
    assert scores * size <= first <= (scores + 1 - verifying) * size + PROBES
    assert reads(score) <= size + PROBES
