"""How often examples were drawn: counted at the sampler, made into weights, and right by retraining."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

import segflow as sf
from segflow.training.sampling import (
    check_example_weights,
    example_weights_by_checkpoint,
    nearest_bounds,
    weights_at_checkpoints,
)

from ..support import oracles
from ..support.gang import forkserver
from ..support.helpers import analyzer_of, trajectory_of
from ..support.linear import FEATURES, QUERY, TRAIN, Linear, N, losses, measure

INDICES = list(range(10))


def _random(seed: int = 3, **options: Any) -> RandomSampler:
    return RandomSampler(INDICES, generator=torch.Generator().manual_seed(seed), **options)


# ---- the sampler ----


@pytest.mark.parametrize(
    "make",
    [
        lambda: SequentialSampler(INDICES),
        _random,
        lambda: _random(replacement=True, num_samples=23),
        lambda: WeightedRandomSampler(torch.arange(10.0), 31, generator=torch.Generator().manual_seed(1)),
        lambda: BatchSampler(_random(), 3, drop_last=True),
        lambda: [[4, 2], [2], []],
        lambda: [torch.tensor(7), np.int64(7), 1],
        lambda: [torch.tensor([5, 5]), np.array([0, 9])],
    ],
)
def test_what_is_handed_out_stays_the_same_and_is_counted(make: Any) -> None:
    torch.manual_seed(0)
    plain, counted = make(), sf.CountedSampler(make())
    assert len(counted) == len(plain)
    given = []
    for _ in range(2):  # epochs add up
        expected, found = list(plain), list(counted)
        assert str(found) == str(expected)
        given += [int(index) for entry in found for index in np.asarray(entry).reshape(-1)]
    counts = counted.counts(10)
    assert counts.dtype == torch.int64
    assert counts.tolist() == np.bincount(given, minlength=10).tolist()
    assert counted.counts(12)[10:].tolist() == [0, 0]


def test_random_draws_of_the_global_generator_stay_the_same() -> None:
    loaders = []
    for wrap in (lambda sampler: sampler, sf.CountedSampler):
        torch.manual_seed(0)
        loader = DataLoader(INDICES, sampler=wrap(RandomSampler(INDICES)), batch_size=3)
        loaders.append([batch.tolist() for _ in range(3) for batch in loader] + [torch.rand(1).item()])
    assert loaders[0] == loaders[1]


def test_counts_are_those_of_what_was_handed_out_so_far() -> None:
    counted = sf.CountedSampler([3, 1, 3])
    assert counted.counts(4).tolist() == [0, 0, 0, 0]
    walk = iter(counted)
    next(walk)
    assert counted.counts(4).tolist() == [0, 0, 0, 1]
    next(walk), next(walk)
    before = counted.counts(4)
    list(counted)
    assert before.tolist() == [0, 1, 0, 2]  # what was given stays as it was
    assert counted.counts(4).tolist() == [0, 2, 0, 4]


def test_an_index_beyond_the_data_is_named() -> None:
    counted = sf.CountedSampler([0, 7, 5])
    list(counted)
    with pytest.raises(sf.TrajectoryError, match=r"handed out the index 5, expected indices of 5 .* 0 to 4\. Give"):
        counted.counts(5)
    assert counted.counts(8).sum() == 3
    for n in (0, 2.5, None, True):
        with pytest.raises(sf.TrajectoryError, match="expected a whole number, at least 1"):
            counted.counts(n)


@pytest.mark.parametrize("drawn", ["x", 1.5, [0, "x"], None, {"index": 1}, torch.tensor([0.5, 1.0])])
def test_what_is_no_index_is_refused_and_shown(drawn: Any) -> None:
    with pytest.raises(sf.TrajectoryError, match=r"the sampler handed out .*expected an index, or a list of indices"):
        list(sf.CountedSampler([drawn]))


def test_an_index_below_zero_is_refused() -> None:
    with pytest.raises(sf.TrajectoryError, match=r"list handed out the index -1, expected one >= 0"):
        list(sf.CountedSampler([-1]))


def test_a_sampler_without_a_length_has_none() -> None:
    with pytest.raises(TypeError):
        len(sf.CountedSampler(iter([1])))


def test_attributes_are_those_of_the_wrapped_sampler_also_where_they_are_set() -> None:
    inner = DistributedSampler(INDICES, num_replicas=2, rank=1, seed=5)
    counted = sf.CountedSampler(inner)
    counted.set_epoch(4)
    assert inner.epoch == counted.epoch == 4
    counted.epoch = 6
    assert inner.epoch == 6
    batches = sf.CountedSampler(BatchSampler(inner, 3, drop_last=False))
    assert (batches.batch_size, batches.drop_last, batches.sampler) == (3, False, inner)
    assert not hasattr(counted, "batch_size")
    with pytest.raises(AttributeError, match="nothing"):
        counted.nothing  # noqa: B018
    other = copy.copy(batches)
    assert list(other) == list(batches)


@pytest.mark.parametrize("whole", [False, True], ids=["sampler", "batch sampler"])
@pytest.mark.parametrize("split", [False, True])
def test_accelerate_shards_it_as_it_shards_the_sampler_itself(whole: bool, split: bool) -> None:
    """Two processes see the same batches as without it, and each of them counts all that both see."""
    for rank in range(2):
        seen = []
        for wrap in (lambda sampler: sampler, sf.CountedSampler):
            torch.manual_seed(0)
            counted = wrap(BatchSampler(RandomSampler(INDICES), 2, False)) if whole else wrap(RandomSampler(INDICES))
            loader = (
                DataLoader(INDICES, batch_sampler=counted)
                if whole
                else DataLoader(INDICES, sampler=counted, batch_size=2)
            )
            prepared = prepare_data_loader(
                loader, num_processes=2, process_index=rank, split_batches=split, put_on_device=False, rng_types=[]
            )
            seen.append([batch.tolist() for batch in prepared])
        assert seen[0] == seen[1]
        assert counted.counts(10).tolist() == [1] * 10


def test_the_counts_of_the_ranks_of_a_distributed_sampler_add_up() -> None:
    ranks = [sf.CountedSampler(DistributedSampler(INDICES, num_replicas=2, rank=rank)) for rank in range(2)]
    for counted in ranks:
        assert len(list(DataLoader(INDICES, sampler=counted, batch_size=2))) == 3
    assert sum(counted.counts(10) for counted in ranks).tolist() == [1] * 10


def test_drop_last_counts_what_is_dropped_unless_the_batch_sampler_is_wrapped() -> None:
    sampler, batches = sf.CountedSampler(_random()), sf.CountedSampler(BatchSampler(_random(), 4, drop_last=True))
    loaders = (
        DataLoader(INDICES, sampler=sampler, batch_size=4, drop_last=True),
        DataLoader(INDICES, batch_sampler=batches),
    )
    used = [torch.bincount(torch.cat(list(loader)), minlength=10) for loader in loaders]
    assert used[0].equal(used[1])
    assert sampler.counts(10).sum() == 10
    assert batches.counts(10).equal(used[1])
    assert used[1].sum() == 8


# ---- weights ----


def test_checkpoints_stand_for_the_steps_nearest_to_them_as_in_segments() -> None:
    """Example 0 is drawn in the first 10 steps, example 1 in the next 10, example 2 in all 40."""
    counts = [[10, 0, 10], [10, 10, 20], [10, 10, 40]]
    drawn = torch.tensor([[10.0, 5, 15], [0, 5, 15], [0, 0, 10]])  # steps 1-15, 16-30, 31-40
    assert nearest_bounds([10, 20, 40], 0, 40) == [0, 15, 30, 40]
    expected = drawn / drawn.mean(1, keepdim=True)
    for given in (counts, np.array(counts), torch.tensor(counts)):
        torch.testing.assert_close(weights_at_checkpoints([10, 20, 40], given), expected.double())


def test_a_checkpoint_before_the_first_step_stands_for_the_first_steps() -> None:
    found = weights_at_checkpoints([0, 10], [[2, 0], [6, 4]])  # prefetched before the first step
    torch.testing.assert_close(found, torch.tensor([[1.2, 0.8], [1.2, 0.8]]).double())


def test_weights_have_mean_one_and_one_checkpoint_takes_all_counts() -> None:
    counts = torch.randint(0, 9, (1, 50))
    torch.testing.assert_close(weights_at_checkpoints([7], counts)[0], counts[0] / counts.double().mean())
    found = weights_at_checkpoints([3, 4, 11], torch.randint(0, 9, (3, 50)).cumsum(0))
    torch.testing.assert_close(found.mean(1), torch.ones(3).double())
    assert (found >= 0).all()


def test_around_a_checkpoint_where_nothing_was_drawn_examples_have_their_share_of_the_run() -> None:
    found = weights_at_checkpoints([10, 20, 30, 40], [[4, 0], [5, 3], [5, 3], [5, 3]])
    torch.testing.assert_close(found[2:], torch.tensor([[1.25, 0.75]] * 2).double())
    assert found[0, 0] > found[1, 0]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[0, 0], [0, 0]], r"no example was drawn up to step 20.*as sampler= or batch_sampler="),
        ([[3, 1], [2, 9]], r"example 0 had been drawn 2 times at step 20, expected a number that does not fall"),
        ([[3, -1], [3, 9]], r"example 1 had been drawn -1 times at step 10"),
        ([[3, 1]], r"shape \[1, 2\]: expected \[2, examples\]"),
        ([3, 1], r"shape \[2\]: expected \[2, examples\]"),
        ([[1.0, float("nan")], [2, 2]], r"example 1 had been drawn nan times"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts: Any, message: str) -> None:
    with pytest.raises(sf.TrajectoryError, match=message):
        weights_at_checkpoints([10, 20], counts)


@pytest.mark.parametrize(
    "given", [[1, 3, 0, 4], np.array([1, 3, 0, 4]), torch.tensor([2.0, 6, 0, 8]), np.array([1, 3, 0, 4], np.float32)]
)
def test_weights_are_brought_to_a_mean_of_one(given: Any) -> None:
    found = check_example_weights(given, 4)
    assert found.dtype == torch.float64
    assert found.tolist() == [0.5, 1.5, 0.0, 2.0]
    assert check_example_weights(found, 4).equal(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2], r"have shape \[2\]: expected one finite number >= 0 for each of the 3 .*in shape \[3\]"),
        ([[1, 2, 3]], r"have shape \[1, 3\]"),
        (2.0, r"have shape \[\]"),
        ([1, -2, 3], r"example_weights\[1\] is -2\.0: expected"),
        ([1, 2, float("nan")], r"example_weights\[2\] is nan: expected"),
        ([float("inf"), 2, 1], r"example_weights\[0\] is inf: expected"),
        ([0, 0, 0], r"have the mean 0\.0: .*not all of them 0\. Leave them out"),
        ([1e308, 1e308, 1e308], r"have the mean inf"),
        ("abc", r"example_weights: expected"),
        ([None, 1, 2], r"example_weights: expected"),
        ([[1], [2, 3], 4], r"example_weights: expected"),
    ],
)
def test_what_are_no_weights_is_refused(given: Any, message: str) -> None:
    with pytest.raises(sf.TrajectoryError, match=message):
        check_example_weights(given, 3)


def test_weights_are_given_for_all_checkpoints_or_for_each() -> None:
    each = [[1, 3], [2, 2], [1, 0]]
    for given in (each, np.array(each), torch.tensor(each), [torch.tensor(row) for row in each]):
        found = example_weights_by_checkpoint(given, 3, 2)
        assert [row.tolist() for row in found] == [[0.5, 1.5], [1, 1], [2, 0]]
    assert [row.tolist() for row in example_weights_by_checkpoint(np.array([1, 3]), 3, 2)] == [[0.5, 1.5]] * 3
    with pytest.raises(sf.TrajectoryError, match=r"have 3 rows: expected \[2\] for all .*or one row for each of the 4"):
        example_weights_by_checkpoint(each, 4, 2)
    for wrong in ("abc", None, 1.0, torch.tensor(1.0), [], [[1, 2], [3, -4]], [[1], [2]], [1, [2, 3]]):
        with pytest.raises(sf.TrajectoryError, match="example_weights"):
            example_weights_by_checkpoint(wrong, 2, 2)


# ---- by retraining ----


def _states(path: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"weight": theta[None, :-1].detach(), "bias": theta[-1:].detach()} for theta in path]


def _slope(
    folder: Path, states: Any, steps: list[int], lr: float, weights: Any, truth: Tensor, **constants: Any
) -> float:
    """The slope of SOURCE's scores of single examples on the changes that retraining without them makes."""
    trajectory = trajectory_of(folder / "run", states, N, steps=steps, lr=lr, example_weights=weights, **constants)
    model = nn.Linear(FEATURES, 1).double()
    analyzer = analyzer_of(model, trajectory, folder / "store", Linear(), method=sf.Source(segments=2))
    analyzer.fit(TRAIN)
    scores = analyzer.score(sf.Groups.singletons(N), TRAIN, QUERY).values
    return ((scores * truth).sum() / truth.square().sum()).item()


@pytest.mark.parametrize("constants", [{}, {"weight_decay": 0.2}], ids=["plain", "decayed"])
def test_weights_of_the_losses_are_right_by_retraining_without_each_example(tmp_path: Path, constants: Any) -> None:
    """Full batches in which the loss of example i is multiplied by c_i, other ones in the first half than later."""
    draws = torch.Generator().manual_seed(2)
    halves = [check_example_weights(torch.randint(0, 5, (N,), generator=draws).square(), N) for _ in range(2)]
    gradient, start, lr, steps = oracles.weighted_gradient(losses), torch.zeros(FEATURES + 1).double(), 4e-5, 5

    def train(kept: Tensor) -> list[Tensor]:
        path = [start]
        for half in (half for half in halves for _ in range(20)):
            path.append(oracles.train_sgd(path[-1], gradient, half * kept, [lr] * steps, **constants).detach())
        return path[1:]

    path, without = train(torch.ones(N).double()), []
    for example in range(N):
        kept = torch.ones(N).double()
        kept[example] = 0
        without.append(measure(train(kept)[-1]) - measure(path[-1]))
    truth = torch.stack(without, 1)
    options = {"steps": list(range(5, 205, 5)), "lr": lr, "truth": truth, **constants}
    first, second = ([half] * 20 for half in halves)
    right = _slope(tmp_path / "right", _states(path), weights=first + second, **options)
    alike = _slope(tmp_path / "alike", _states(path), weights=None, **options)
    assert right == pytest.approx(1, abs=0.02)
    assert alike < 0.9


class _Shown:
    """The training data, whose every example is its own index."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


def _loader(kind: str) -> tuple[Any, sf.CountedSampler]:
    """A DataLoader whose examples come as often as their weights say, and what counts them."""
    weights = torch.arange(N) % 5
    sampler = WeightedRandomSampler(weights, N + 3, generator=torch.Generator().manual_seed(1))
    if kind == "drop_last":
        counted = sf.CountedSampler(BatchSampler(sampler, 5, drop_last=True))
        return DataLoader(_Shown(), batch_sampler=counted), counted
    counted = sf.CountedSampler(sampler)
    workers = {"num_workers": 1, "multiprocessing_context": forkserver()} if kind == "workers" else {}
    return DataLoader(_Shown(), sampler=counted, batch_size=11, **workers), counted


def _epochs(loader: Any, count: int) -> Iterator[list[int]]:
    for _ in range(count):
        for batch in loader:
            yield batch.tolist()


@pytest.mark.parametrize("kind", ["plain", "workers", "drop_last"])
def test_a_weighted_sampler_that_was_counted_is_right_by_retraining_without_each_example(
    tmp_path: Path, kind: str
) -> None:
    (loader, counted), lr, epochs = _loader(kind), 2e-4, 4
    batches, counts, steps = [], [], []
    for number, batch in enumerate(_epochs(loader, epochs), start=1):
        batches.append(batch)
        if number % (2 * len(loader)) == 0:  # where a run would be recorded
            counts.append(counted.counts(N))
            steps.append(number)
    used = np.bincount(np.concatenate(batches), minlength=N)
    assert counts[-1].tolist() == used.tolist()

    def train(kept: Tensor) -> list[Tensor]:
        theta, path = torch.zeros(FEATURES + 1).double(), []
        for number, batch in enumerate(batches, start=1):
            theta = theta.detach().requires_grad_()
            loss = (losses(theta) * kept)[batch].mean()
            theta = theta - lr * torch.autograd.grad(loss, theta)[0]
            if number in steps:
                path.append(theta.detach())
        return path

    path, without = train(torch.ones(N).double()), []
    for example in range(N):
        kept = torch.ones(N).double()
        kept[example] = 0
        without.append(measure(train(kept)[-1]) - measure(path[-1]))
    options = {"steps": steps, "lr": lr, "truth": torch.stack(without, 1)}
    weights = weights_at_checkpoints(steps, torch.stack(counts))
    assert _slope(tmp_path / "counted", _states(path), weights=weights, **options) == pytest.approx(1, abs=0.02)
    assert _slope(tmp_path / "alike", _states(path), weights=None, **options) < 0.9
