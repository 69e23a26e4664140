"""Layers are chosen by names and patterns, before fitting and among what was fitted; sizes decide what is dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import segflow as sf

from .support.helpers import vectors

N = 20
TRAIN, QUERY, GROUPS = vectors(N), vectors(4, seed=5), sf.Groups.random(N, 4, seed=0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh())
    return nn.Sequential(nn.Linear(5, 6), block, nn.Linear(6, 3)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, steps: int) -> None:
    """Whole batches, recorded."""
    x, y = TRAIN.tensors
    with sf.record(model, optimizer, folder, dataset_size=N, total_steps=steps, checkpoints=4):
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Sequential, Path]:
    """Trained with AdamW, without weight decay on biases and norms."""
    model, folder = network(), tmp_path_factory.mktemp("run") / "run"
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    train(model, torch.optim.AdamW(groups, lr=1e-2), folder, steps=12)
    return model, folder


def analyzer_of(run: tuple[nn.Sequential, Path], store: Path, **options: Any) -> sf.Analyzer:
    return sf.Analyzer(
        run[0], sf.tasks.Classification(), sf.Trajectory.load(run[1]), store=store, progress=False, **options
    )


def scored(analyzer: sf.Analyzer, **options: Any) -> sf.Scores:
    analyzer.fit(TRAIN)
    return analyzer.score(GROUPS, TRAIN, QUERY, **options)


def tracked(analyzer: sf.Analyzer) -> list[str]:
    return list(analyzer.context.layers.tracked)


ALL = ["0", "0.bias", "1.0", "1.0.bias", "1.1.weight", "1.1.bias", "2", "2.bias"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"layers": "1"}, ["1.0", "1.0.bias", "1.1.weight", "1.1.bias"]),
        ({"layers": ["*.bias"]}, ["0.bias", "1.0.bias", "1.1.bias", "2.bias"]),
        ({"layers": ["0.weight", "2"]}, ["0", "2", "2.bias"]),
        ({"exclude": "1.*"}, ["0", "0.bias", "2", "2.bias"]),
        ({"exclude": ("1.1", "2.bias")}, ["0", "0.bias", "1.0", "1.0.bias", "2"]),
        ({"layers": "1", "exclude": "*.bias"}, ["1.0", "1.1.weight"]),
    ],
)
def test_names_and_patterns_mean_modules_blocks_and_parameters(
    run: tuple[nn.Sequential, Path], tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    analyzer = analyzer_of(run, tmp_path, **options)
    assert tracked(analyzer) == expected
    assert set(analyzer.context.layers.skipped) == set(ALL) - set(expected)


PARTS = [
    ({}, ["0", "1.0", "1.1.weight", "1.1.bias", "2"], 111),
    ({"exclude": "*.bias"}, ["0", "1.0", "1.1.weight", "2"], 111 - 6 - 6 - 6 - 3),
    ({"exclude": ["1", "2.weight"]}, ["0", "2.bias"], 36 + 3),
    ({"layers": "0.bias"}, ["0.bias"], 6),
    ({"exclude": "1"}, ["0", "2"], 36 + 21),
]


@pytest.mark.parametrize(("options", "expected", "parameters"), PARTS)
def test_a_weight_or_a_bias_that_is_named_alone_is_a_block_by_itself(
    tmp_path: Path, options: dict[str, Any], expected: list[str], parameters: int
) -> None:
    model = network()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    trajectory = sf.Trajectory([tmp_path / "state.pt"], [10], 0.1, N)
    analyzer = sf.Analyzer(model, sf.tasks.Classification(), trajectory, store=tmp_path / "store", **options)
    assert tracked(analyzer) == expected
    assert analyzer.context.parameters == parameters


@pytest.mark.parametrize("option", ["layers", "exclude"])
def test_a_name_that_means_nothing_is_refused_with_the_closest(
    run: tuple[nn.Sequential, Path], tmp_path: Path, option: str
) -> None:
    with pytest.raises(
        sf.LayerError, match=rf"{option}=: the model has no module or parameter '1.2.weight'.*1.1.weight"
    ):
        analyzer_of(run, tmp_path, **{option: "1.2.weight"})
    with pytest.raises(sf.LayerError, match=f"{option}=3: expected a name or a sequence of names"):
        analyzer_of(run, tmp_path, **{option: 3})


METHODS = [sf.Source(segments=2), sf.Source(segments=1, curvature="coupled"), sf.ProjectedFisher(), sf.GradientDot()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__ + str(getattr(m, "curvature", "")))
def test_scores_of_some_of_the_fitted_layers_are_their_parts_of_all(tmp_path: Path, method: Any) -> None:
    folder, model = tmp_path / "run", network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.01)
    train(model, optimizer, folder, steps=6)
    analyzer = analyzer_of((model, folder), tmp_path / "store", method=method)
    parts = scored(analyzer, keep="layer").by_layer
    fitted = sorted(path.name for path in (tmp_path / "store").rglob("*.safetensors") if "scores" not in path.parts)
    some = analyzer.score(GROUPS, TRAIN, QUERY, layers=["1", "2.weight"], keep="layer")
    assert list(some.by_layer) == ["1.0", "1.1.weight", "1.1.bias", "2"]
    assert some.provenance["attributed_layers"] == list(some.by_layer)
    for name, values in some.by_layer.items():
        torch.testing.assert_close(values, parts[name], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(some.values, sum(some.by_layer.values()), rtol=1e-9, atol=1e-14)
    now = sorted(path.name for path in (tmp_path / "store").rglob("*.safetensors") if "scores" not in path.parts)
    assert now == fitted  # nothing was fitted again
    with pytest.raises(sf.LayerError, match="layers=: the model has no module or parameter 'head'"):
        analyzer.score(GROUPS, TRAIN, QUERY, layers="head")


def test_cosines_of_some_layers_are_those_of_their_gradients_alone(
    run: tuple[nn.Sequential, Path], tmp_path: Path
) -> None:
    method = sf.GradientCosine()
    whole = scored(analyzer_of(run, tmp_path / "all", method=method), layers="1")
    alone = scored(analyzer_of(run, tmp_path / "one", method=method, layers="1"))
    torch.testing.assert_close(whole.values, alone.values, rtol=1e-9, atol=1e-12)


def second_moment(run: tuple[nn.Sequential, Path], parameter: str) -> Tensor:
    """[D, D]: the mean of g g^T over the training examples at the end, of pseudo-labels that are their labels."""
    model, (x, y) = run[0], TRAIN.tensors
    rows = []
    for i in range(N):
        loss = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, model.get_parameter(parameter))[0].flatten())
    return torch.stack(rows).mT @ torch.stack(rows) / N


class OwnLabels(sf.tasks.Classification):
    """The empirical Fisher: pseudo-labels are the labels."""

    draws_labels = False

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return super().compute_train_loss(batch, model, sample=False)


@pytest.mark.parametrize("vector", [6, 5])
def test_a_vectors_curvature_is_dense_up_to_its_size_and_diagonal_beyond(
    run: tuple[nn.Sequential, Path], tmp_path: Path, vector: int
) -> None:
    """(F + 1)^-1 applied to the query's gradient, met with the examples', in one block alone."""
    analyzer = sf.Analyzer(
        run[0],
        OwnLabels(),
        sf.Trajectory.load(run[1]),
        store=tmp_path,
        method=sf.InfluenceFunction(damping=1e-3),
        progress=False,
        layers="1.1.weight",
        block_sizes=sf.BlockSizes(vector=vector),
    )
    analyzer.fit(TRAIN)
    values = analyzer.score(sf.Groups.singletons(N), TRAIN, TRAIN).values
    F = second_moment(run, "1.1.weight")
    F = F if vector == 6 else torch.diag(F.diagonal())
    model, (x, y) = run[0], TRAIN.tensors
    rows = []
    for i in range(N):
        loss = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, model[1][1].weight)[0])
    G = torch.stack(rows)
    expected = G @ torch.linalg.solve(F + 1e-3 * torch.eye(6).double(), G.mT) / N
    torch.testing.assert_close(torch.as_tensor(values), expected, rtol=1e-8, atol=1e-12)


def test_a_side_that_is_too_wide_is_diagonal_and_has_no_eigenvectors(
    run: tuple[nn.Sequential, Path], tmp_path: Path
) -> None:
    values = {}
    for side in (6, 5):
        analyzer = analyzer_of(
            run, tmp_path / str(side), layers=["0.weight", "2.weight"], block_sizes=sf.BlockSizes(side=side)
        )
        values[side] = scored(analyzer).values
        layers = analyzer.context.layers.tracked
        assert [layers["0"].diagonal_outputs, layers["2"].diagonal_inputs] == [side == 5] * 2
        assert not layers["0"].diagonal_inputs
    assert not torch.allclose(values[5], values[6])
    with pytest.raises(sf.LayerError, match="BlockSizes: side=-1: expected a whole number"):
        sf.BlockSizes(side=-1)


def test_a_store_of_other_sizes_is_not_taken(run: tuple[nn.Sequential, Path], tmp_path: Path) -> None:
    scored(analyzer_of(run, tmp_path))
    with pytest.raises(sf.StoreError, match="model"):
        analyzer_of(run, tmp_path, block_sizes=sf.BlockSizes(vector=2)).score(GROUPS, TRAIN, QUERY)
