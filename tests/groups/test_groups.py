"""Groups are exact partitions, their batches keep them together, and their scores are the sums of their members'."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import segflow as sf
from segflow.model.layers.registry import track
from segflow.model.tokens import Tokens
from segflow.runtime.ranks import Ranks
from segflow.scoring.group_gradients import GroupGradients
from segflow.scoring.meeting import MetQueries
from segflow.scoring.outer_products import OuterProducts
from segflow.scoring.tiles import GroupBatch, shares, tiles

from ..support.helpers import ConvNet, FixedLabels, analyzer_of, images, mlp, perturbed_states, trajectory_of, vectors

# ---- constructors ----


def test_from_lists_keeps_members_labels_and_sizes() -> None:
    groups = sf.Groups.from_lists([[0, 3], range(1, 3), np.array([4]), torch.tensor([5])], 6, labels=["a", 2, "c", "d"])
    assert [member.tolist() for member in groups.members] == [[0, 3], [1, 2], [4], [5]]
    assert groups.labels == ("a", "2", "c", "d")
    assert groups.sizes.tolist() == [2, 2, 1, 1]
    assert groups.membership().tolist() == [0, 1, 1, 0, 2, 3]
    assert (len(groups), groups.length, groups.partial) == (4, 6, False)
    assert repr(groups) == "Groups(4 groups of 1 to 2 examples, 6 of 6 examples)"
    assert sf.Groups.from_lists([[0], [1]], 2).labels == ("group 0", "group 1")


def test_partial_leaves_examples_out_on_purpose() -> None:
    groups = sf.Groups.from_lists([[1], [3]], 5, partial=True)
    assert groups.membership().tolist() == [-1, 0, -1, 1, -1]


def test_members_are_the_groups_own_copies() -> None:
    indices = np.array([0, 1])
    groups = sf.Groups((indices, [2]), ("a", "b"), 3)  # type: ignore[arg-type]
    indices[0] = 1
    assert [member.tolist() for member in groups.members] == [[0, 1], [2]]


def test_singletons_are_one_example_each_in_order() -> None:
    groups = sf.Groups.singletons(4)
    assert [member.tolist() for member in groups.members] == [[0], [1], [2], [3]]
    assert groups.labels == ("0", "1", "2", "3")


@given(length=st.integers(1, 60), size=st.integers(1, 70))
def test_random_is_a_partition_into_groups_of_the_size(length: int, size: int) -> None:
    groups = sf.Groups.random(length, size, seed=3)
    assert sorted(np.concatenate(groups.members).tolist()) == list(range(length))
    assert groups.sizes[:-1].tolist() == [size] * (len(groups) - 1)
    assert 1 <= groups.sizes[-1] <= size


def test_random_depends_on_the_seed_and_repeats_with_it() -> None:
    first, same, other = (sf.Groups.random(30, 7, seed=seed).membership().tolist() for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, 0, 2, 1], {"0": [1], "1": [3], "2": [0, 2]}),
        (["b", "a", "b"], {"a": [1], "b": [0, 2]}),
        (torch.tensor([10, 9, 10]), {"9": [1], "10": [0, 2]}),
        (np.array([1.5, -1.0, 1.5]), {"-1.0": [1], "1.5": [0, 2]}),
        (np.array(["é", "z"]), {"z": [1], "é": [0]}),
        ([torch.tensor(1), 1, np.int64(1), 0], {"0": [3], "1": [0, 1, 2]}),
        (["web", 3, None, "web", 3], {"None": [2], "3": [1, 4], "web": [0, 3]}),
        ([("web", 1), ("book", 2), ("web", 1)], {"('book', 2)": [1], "('web', 1)": [0, 2]}),
    ],
)
def test_by_makes_one_group_for_each_distinct_label(labels, expected: dict[str, list[int]]) -> None:
    groups = sf.Groups.by(labels)
    found = {label: member.tolist() for label, member in zip(groups.labels, groups.members, strict=True)}
    assert found == expected
    assert list(found) == list(expected), "numbers are ordered as numbers"
    assert groups.length == len(labels)


FAULTS = {
    "overlap": (
        lambda: sf.Groups.from_lists([[0, 1], [1, 2, 0]], 3, labels=["x", "y"]),
        r"groups overlap: 2 examples appear more than once, the first is 0 \(in \['x', 'y'\]\)",
    ),
    "twice in one": (
        lambda: sf.Groups.from_lists([[0, 1, 1]], 2),
        r"groups overlap: 1 examples .* first is 1 \(in \['group 0'\]\)",
    ),
    "overlap of partial groups": (lambda: sf.Groups.from_lists([[0], [0]], 9, partial=True), "groups overlap"),
    "miss": (
        lambda: sf.Groups.from_lists([[0, 2]], 5),
        r"groups miss 3 of 5 examples, the first is 1\. Add them to a group, or pass partial=True",
    ),
    "exceed": (
        lambda: sf.Groups.from_lists([[0], [1, 7]], 2, labels=["x", "y"]),
        r"group 'y' names example 7, but the data has 0\.\.1",
    ),
    "negative": (lambda: sf.Groups.from_lists([[0, -1]], 1), "group 'group 0' names example -1"),
    "empty group": (lambda: sf.Groups.from_lists([[0], []], 1), r"group 'group 1' is empty\. Leave it out"),
    "no groups": (lambda: sf.Groups.from_lists([], 1), "no groups were given. Expected at least one"),
    "no labels": (lambda: sf.Groups.by([]), "no groups were given"),
    "labels": (lambda: sf.Groups.from_lists([[0], [1]], 2, labels=["a"]), "1 labels for 2 groups: expected one for"),
    "floats": (
        lambda: sf.Groups.from_lists([[0.0, 1.0]], 2),
        r"list of example indices, found float64 of shape \(2,\)",
    ),
    "booleans": (lambda: sf.Groups.from_lists([[True, False]], 2), "list of example indices, found bool"),
    "nested": (
        lambda: sf.Groups.from_lists([[[0], [1]]], 2),
        r"list of example indices, found int64 of shape \(2, 1\)",
    ),
    "ragged": (lambda: sf.Groups.from_lists([[[0], [1, 2]]], 3), "list of example indices .*inhomogeneous"),
    "flat list": (lambda: sf.Groups.from_lists([0, 1], 2), r"list of example indices, found int64 of shape \(\)"),
    "size": (lambda: sf.Groups.random(5, 0), "size=0: expected at least 1"),
    "one-hot labels": (lambda: sf.Groups.by(torch.eye(2)), "a label cannot name a group"),
    "list labels": (lambda: sf.Groups.by([[1], [2]]), "a label cannot name a group .*unhashable"),
    "NaN label": (lambda: sf.Groups.by(np.array([1.0, np.nan])), "a label is NaN"),
    "batch size": (
        lambda: tiles(shares(sf.Groups.singletons(2), 1)[0], 0, 1),
        "batch_size=0, tile_size=1: expected at least 1",
    ),
    "tile size": (
        lambda: tiles(shares(sf.Groups.singletons(2), 1)[0], 1, 0),
        "batch_size=1, tile_size=0: expected at least 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_groups_are_refused_with_what_is_wrong(fault: str) -> None:
    make, text = FAULTS[fault]
    with pytest.raises(sf.GroupError, match=text):
        make()


# ---- batches ----


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.just(1), st.integers(1, 6), st.integers(1, 60)), min_size=1, max_size=40),
    batch_size=st.integers(1, 40),
    tile_size=st.integers(1, 45),
    left_out=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_tiles_walk_every_group_once_within_the_batch_size_and_the_padding(
    sizes: list[int], batch_size: int, tile_size: int, left_out: int, seed: int
) -> None:
    length = sum(sizes) + left_out
    shuffled = np.random.default_rng(seed).permutation(length)[: sum(sizes)]
    members = np.split(shuffled, np.cumsum(sizes)[:-1])
    groups = sf.Groups.from_lists(members, length, partial=True)
    planned = tiles(shares(groups, 1)[0], batch_size, tile_size)
    assert sorted(np.concatenate([tile.groups for tile in planned]).tolist()) == list(range(len(sizes)))
    for tile in planned:
        assert 1 <= len(tile.groups) <= tile_size
        walked: dict[int, list[np.ndarray]] = {}
        for batch in tile.batches:
            assert len(batch.examples) == sum(batch.sizes) <= batch_size
            assert max(batch.sizes) * len(batch.sizes) <= 1.5 * len(batch.examples)
            for offset, piece in enumerate(np.split(batch.examples, np.cumsum(batch.sizes)[:-1])):
                walked.setdefault(int(tile.groups[batch.first + offset]), []).append(piece)
        assert set(walked) == set(tile.groups.tolist())
        for group, pieces in walked.items():
            assert np.concatenate(pieces).tolist() == members[group].tolist()
            assert len(pieces) == -(-sizes[group] // batch_size), "kept together, or in as few pieces as can be"
            assert max(map(len, pieces)) - min(map(len, pieces)) <= 1, "split evenly"


def test_small_groups_share_batches() -> None:
    [tile] = tiles(shares(sf.Groups.random(60, 3), 1)[0], batch_size=32, tile_size=100)
    assert [len(batch.examples) for batch in tile.batches] == [30, 30]


# ---- scores ----

N, QUERIES = 22, 3


class SequenceNet(nn.Module):
    """Linear layers on [examples, positions, features], one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Linear(5, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.double()

    def forward(self, x_BF: Tensor) -> Tensor:
        x_BSF = torch.stack([x_BF, x_BF.roll(1, -1), x_BF.square()], 1)
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(torch.tanh(self.embed(x_BSF)))))).mean(1))


class PixelNet(nn.Module):
    """A grouped convolution with a single output position: one token an example, in two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole, self.head = nn.Conv2d(2, 4, 6, groups=2), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.whole(x).flatten(1)))


NETS = {
    "mlp": (mlp, vectors),
    "conv": (ConvNet, images),
    "sequence": (SequenceNet, vectors),
    "pixel": (PixelNet, images),
}
METHODS = {"source": sf.Source(segments=2), "influence": sf.InfluenceFunction(0.01), "tracin": sf.TracIn()}


class Case(NamedTuple):
    model: nn.Module
    train: TensorDataset
    query: TensorDataset
    trajectory: sf.Trajectory
    fitted: Path

    def score(
        self, groups: sf.Groups, method: str, store: Path, query: object = None, memory: int = 1 << 30, **options
    ) -> sf.Scores:
        """Scores from a store of its own, so that nothing but the fitted factors is reused."""
        shutil.copytree(self.fitted, store)
        analyzer = analyzer_of(self.model, self.trajectory, store, method=METHODS[method], memory=memory)
        return analyzer.score(groups, self.train, query or self.query, **options)


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    make, data = NETS[request.param]
    folder, model, train = tmp_path_factory.mktemp(request.param), make(), data(N)
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 3), N, momentum=0.5, weight_decay=0.01)
    for method in METHODS.values():
        analyzer_of(model, trajectory, folder / "store", method=method).fit(train, batch_size=16)
    return Case(model, train, data(QUERIES, seed=4), trajectory, folder / "store")


def _sums(singles: Tensor, groups: sf.Groups) -> Tensor:
    return torch.stack([singles[:, torch.as_tensor(member)].sum(1) for member in groups.members], 1)


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-10 * expected.abs().max())


RAGGED = [[0], [21, 1], range(2, 11), [11, 12, 13], [20], [14, 15], [16], range(17, 20)]


@pytest.mark.parametrize("method", METHODS)
def test_group_scores_are_the_sums_of_singleton_scores(case: Case, method: str, tmp_path: Path) -> None:
    singles = case.score(sf.Groups.singletons(N), method, tmp_path / "singles", batch_size=1).values
    assert singles.shape == (QUERIES, N)
    assert singles.abs().min() > 0
    ragged = sf.Groups.from_lists(RAGGED, N)
    tile = 2 * 4 * sum(p.numel() for p in case.model.parameters()) * 8  # two groups at a time
    for number, (batch_size, memory) in enumerate([(4, tile), (64, 1 << 30)]):
        found = case.score(ragged, method, tmp_path / str(number), batch_size=batch_size, memory=memory)
        assert _close(found.values, _sums(singles, ragged)), (batch_size, memory)


def test_singleton_scores_do_not_depend_on_batch_size_or_memory(case: Case, tmp_path: Path) -> None:
    groups, method = sf.Groups.singletons(N), "source"
    one_by_one = case.score(groups, method, tmp_path / "one", batch_size=1, keep=("term", "layer"))
    for number, (batch_size, memory) in enumerate([(16, 1), (3, 20_000)]):
        found = case.score(
            groups, method, tmp_path / str(number), batch_size=batch_size, memory=memory, keep=("term", "layer")
        )
        assert _close(found.values, one_by_one.values), (batch_size, memory)
        for kind in ("by_term", "by_layer"):
            parts, expected = getattr(found, kind), getattr(one_by_one, kind)
            assert all(_close(parts[name], expected[name]) for name in expected), (kind, batch_size, memory)


def test_memory_and_batch_size_really_change_the_walk() -> None:
    groups = sf.Groups.from_lists(RAGGED, N)
    walks = [
        [batch.sizes for tile in tiles(shares(groups, 1)[0], *sizes) for batch in tile.batches]
        for sizes in ((64, 8), (64, 1), (4, 8))
    ]
    assert walks[0] != walks[1] != walks[2] != walks[0]


def test_partial_groups_score_as_their_columns_of_a_whole_partition(case: Case, tmp_path: Path) -> None:
    whole = case.score(sf.Groups.from_lists(RAGGED, N), "source", tmp_path / "whole", batch_size=8)
    part = sf.Groups.from_lists([RAGGED[2], RAGGED[5]], N, partial=True)
    assert _close(case.score(part, "source", tmp_path / "part", batch_size=8).values, whole.values[:, [2, 5]])


def test_queries_fewer_than_the_batch_score_as_queries_one_at_a_time(case: Case, tmp_path: Path) -> None:
    groups = sf.Groups.from_lists(RAGGED, N)
    together = case.score(groups, "source", tmp_path / "all", batch_size=128).values
    for row in range(QUERIES):
        alone = case.score(groups, "source", tmp_path / f"{row}", query=Subset(case.query, [row]), batch_size=128)
        assert _close(alone.values, together[row : row + 1])


@pytest.mark.parametrize("module", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), nn.Conv2d(4, 6, 2, groups=2)])
def test_one_token_singletons_take_the_fast_path_and_equal_the_general_one(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = track("layer", module, module.bias is not None)
    P, O, I = layer.shape
    generator = torch.Generator().manual_seed(0)
    K, Q = 6, 4
    a, g, queries = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((P, K, 1, I), (P, K, 1, O), (Q, P, O, I))
    )
    examples = np.arange(K)
    for budget in (1, 1 << 20):  # queries one at a time, and all at once
        fast = GroupGradients(MetQueries({"layer": queries}, {}, 1, Ranks()), K, budget)
        fast.add(layer, Tokens(a, g), GroupBatch(examples, (1,) * K, 0))
        assert not fast._sums, "no gradient of an example was formed"
        general = GroupGradients(MetQueries({"layer": queries}, {}, 1, Ranks()), K, budget)
        with monkeypatch.context() as patched:
            patched.setattr(GroupGradients, "_meets_tokens", lambda *_: False)
            for k in range(K):
                general.add(layer, Tokens(a[:, [k]], g[:, [k]]), GroupBatch(examples[[k]], (1,), k))
        assert general._sums
        naive = torch.stack(
            [
                sum((queries[:, p] * torch.outer(g[p, k, 0], a[p, k, 0])).sum((1, 2)) for p in range(P))
                for k in range(K)
            ],
            1,
        )
        assert _close(fast.scores()[0], naive)
        assert _close(general.scores()[0], naive)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("sizes", [(3, 1, 2), (1,) * 6, (6,)])
@pytest.mark.parametrize("positions", [1, 4])
def test_few_queries_meet_tokens_and_many_meet_sums_with_the_same_products(
    sizes: tuple[int, ...], positions: int, outer: bool
) -> None:
    layer, B, (P, O, I) = track("layer", nn.Linear(5, 3), True), sum(sizes), (1, 3, 6)
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(P, B, positions, D, generator=generator, dtype=torch.float64) for D in (I, O))
    summed = [False, False]
    for place, Q in enumerate((1, 40)):
        sides = [torch.randn(P, Q, D, generator=generator, dtype=torch.float64) for D in (O, I)]
        stack = OuterProducts(*sides, scale_POI=torch.rand(P, O, I, generator=generator, dtype=torch.float64))
        side = GroupGradients(MetQueries({"layer": stack if outer else stack.formed()}, {}, 1, Ranks()), len(sizes), 99)
        side.add(layer, Tokens(a, g), GroupBatch(np.arange(B), sizes, 0))
        summed[place] = bool(side._sums)
        of = torch.einsum("qpoi,pbso,pbsi->qb", stack.formed(), g, a).split(sizes, 1)
        assert _close(side.scores()[0], torch.stack([part.sum(1) for part in of], 1))
    assert summed == [False, positions > 1 or max(sizes) > 1]


# ---- what does not fit ----


@pytest.fixture
def fitted(tmp_path: Path) -> tuple[sf.Analyzer, TensorDataset]:
    model, train = mlp(), vectors(12)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 1), 12)
    return analyzer_of(model, trajectory, tmp_path / "store", FixedLabels(), method=sf.TracIn()), train


def test_groups_of_another_length_are_refused(fitted: tuple[sf.Analyzer, TensorDataset]) -> None:
    analyzer, train = fitted
    with pytest.raises(sf.GroupError, match="the groups are about 11 examples, the training data has 12"):
        analyzer.score(sf.Groups.singletons(11), train, vectors(2))


def test_an_empty_query_set_is_refused(fitted: tuple[sf.Analyzer, TensorDataset]) -> None:
    analyzer, train = fitted
    with pytest.raises(sf.TaskError, match=r"the query dataset is empty\. Expected at least one example"):
        analyzer.score(sf.Groups.singletons(12), train, [])
    with pytest.raises(sf.TaskError, match="the query dataset is empty"):
        analyzer.check(train, query=[])


def test_a_query_set_without_a_length_is_refused(fitted: tuple[sf.Analyzer, TensorDataset]) -> None:
    analyzer, train = fitted
    with pytest.raises(sf.TaskError, match=r"the query dataset has no length\. Expected a map-style dataset"):
        analyzer.score(sf.Groups.singletons(12), train, iter([]))


def test_a_training_set_that_changed_length_is_refused(fitted: tuple[sf.Analyzer, TensorDataset]) -> None:
    analyzer, _ = fitted
    with pytest.raises(sf.TrajectoryError, match="has 13 examples, but the run was recorded with dataset_size=12"):
        analyzer.score(sf.Groups.singletons(13), vectors(13), vectors(2))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused(fitted: tuple[sf.Analyzer, TensorDataset], batch_size: int) -> None:
    analyzer, train = fitted
    with pytest.raises(sf.SegflowError, match=f"batch_size={batch_size}.*expected at least 1"):
        analyzer.score(sf.Groups.singletons(12), train, vectors(2), batch_size=batch_size)


def test_query_labels_name_the_rows_and_must_be_as_many(fitted: tuple[sf.Analyzer, TensorDataset]) -> None:
    analyzer, train = fitted
    groups = sf.Groups.random(12, 5)
    assert analyzer.score(groups, train, vectors(2)).query_labels == ("0", "1")
    assert analyzer.score(groups, train, vectors(2), query_labels=["a", 7]).query_labels == ("a", "7")
    with pytest.raises(sf.ScoreError, match="3 query labels for 2 queries: expected one for each"):
        analyzer.score(groups, train, vectors(2), query_labels="abc")
