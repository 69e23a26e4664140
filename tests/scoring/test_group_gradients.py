"""Scores of groups are the sums of their members', whatever the batches, and faulty input is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import segflow as sf
from segflow.model.one_hot import OneHot
from segflow.model.tokens import Tokens
from segflow.runtime.ranks import Ranks
from segflow.scoring.group_gradients import GroupGradients
from segflow.scoring.meeting import MetQueries
from segflow.scoring.outer_products import OuterProducts
from segflow.scoring.tiles import GroupBatch, shares, tiles

from ..support.exactness import track
from ..support.helpers import ConvNet, FixedLabels, analyzer_of, images, mlp, perturbed_states, trajectory_of, vectors

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


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("sizes", [(3, 1, 2), (1,) * 6, (6,)])
@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("hot", [False, True])
def test_few_queries_meet_tokens_and_many_meet_sums_with_the_same_products(
    sizes: tuple[int, ...], positions: int, rank: int, hot: bool
) -> None:
    """Of queries that are sums of `rank` outer products, or are formed (0); hot: of an embedding's one-hot inputs."""
    layer, B, (P, O, I) = track("layer", nn.Linear(5, 3), True), sum(sizes), (1, 3, 6)
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(P, B, positions, D, generator=generator, dtype=torch.float64) for D in (I, O))
    index = torch.randint(0, I, (B, positions), generator=generator)
    tokens = Tokens(OneHot(index, a[0, :, :, 0], I), g) if hot else Tokens(a, g)
    summed = [False, False]
    for place, Q in enumerate((1, 40)):
        sides = [torch.randn(P, Q, max(1, rank), D, generator=generator, dtype=torch.float64) for D in (O, I)]
        stack = OuterProducts(*sides, scale_POI=torch.rand(P, O, I, generator=generator, dtype=torch.float64))
        side = GroupGradients(MetQueries({"layer": stack if rank else stack.formed()}, {}, 1, Ranks()), len(sizes), 99)
        side.add(layer, tokens, GroupBatch(np.arange(B), sizes, 0))
        summed[place] = bool(side._sums)
        of = torch.einsum("qpoi,pbso,pbsi->qb", stack.formed(), g, tokens.dense_a).split(sizes, 1)
        assert _close(side.scores()[0], torch.stack([part.sum(1) for part in of], 1))
    few = positions > 1 and len(sizes) < B if hot else positions > 1 or max(sizes) > 1
    assert summed == [False, few]


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
    with pytest.raises(sf.SegflowError, match=f"batch_size={batch_size}.*expected a whole number, at least 1"):
        analyzer.score(sf.Groups.singletons(12), train, vectors(2), batch_size=batch_size)


def test_query_labels_name_the_rows_and_must_be_as_many(fitted: tuple[sf.Analyzer, TensorDataset]) -> None:
    analyzer, train = fitted
    groups = sf.Groups.random(12, 5)
    assert analyzer.score(groups, train, vectors(2)).query_labels == ("0", "1")
    assert analyzer.score(groups, train, vectors(2), query_labels=["a", 7]).query_labels == ("a", "7")
    with pytest.raises(sf.ScoreError, match="3 query labels for 2 queries: expected one for each"):
        analyzer.score(groups, train, vectors(2), query_labels=["a", "b", "c"])
