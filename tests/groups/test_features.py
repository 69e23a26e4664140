"""Features of training examples: what they are, in which order, from how many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.curvature.projection import probes
from segflow.methods.plan import Projection

from ..support import oracles
from ..support.gang import Failed, Gang
from ..support.helpers import ConvNet, analyzer_of, example_loss, images, mlp, perturbed_states, trajectory_of, vectors

N = 23


class Sequences(nn.Module):
    """A layer over positions, pooled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x))).square().mean(1)


def sequences(n: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


def _analyzer(model: nn.Module, folder: Path, task: Any = None, **options: Any) -> sf.Analyzer:
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 3), N)
    return analyzer_of(model, trajectory, folder / "store", task or sf.tasks.Classification(), **options)


def _at_the_end(model: nn.Module) -> None:
    model.load_state_dict(perturbed_states(model, 3)[-1])


def _layer_inputs(model: nn.Module, data: TensorDataset, layer: str, gradients: bool) -> Tensor:
    """Naively, example by example: a layer's input, or the loss's gradient with respect to it, [N, ..., D]."""
    task, rows = sf.tasks.Classification(), []
    for example in range(len(data)):
        seen: list[Tensor] = []

        def replace(_module: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> tuple[Tensor]:
            seen.append(args[0].detach().clone().requires_grad_())
            return (seen[-1],)

        handle = model.get_submodule(layer).register_forward_pre_hook(replace)
        loss = example_loss(model, data, task)(example)
        handle.remove()
        rows.append(torch.autograd.grad(loss, seen)[0] if gradients else seen[0].detach())
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("make", "data", "last"), [(mlp, vectors, "4"), (Sequences, sequences, "head"), (ConvNet, images, "head")]
)
def test_gradients_are_autograds_of_each_example_with_respect_to_the_last_layers_input(
    tmp_path: Path, make: Any, data: Any, last: str
) -> None:
    model, train = make(), data(N)
    found = _analyzer(model, tmp_path).features(train, batch_size=7)
    _at_the_end(model)
    expected = _layer_inputs(model, train, last, gradients=True)
    expected = expected.sum(1) if expected.ndim == 3 else expected
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("make", "data", "last"), [(mlp, vectors, "4"), (Sequences, sequences, "head")])
def test_representations_are_what_a_forward_hook_sees_averaged_over_positions(
    tmp_path: Path, make: Any, data: Any, last: str
) -> None:
    model, train = make(), data(N)
    found = _analyzer(model, tmp_path).features(train, "representation", batch_size=7)
    _at_the_end(model)
    expected = _layer_inputs(model, train, last, gradients=False)
    expected = expected.mean(1) if expected.ndim == 3 else expected
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("of", ["gradient", "representation"])
def test_a_layer_can_be_named(tmp_path: Path, of: str) -> None:
    model, train = mlp(), vectors(N)
    found = _analyzer(model, tmp_path).features(train, of, layer="2")
    _at_the_end(model)
    np.testing.assert_allclose(found, _layer_inputs(model, train, "2", of == "gradient").numpy(), rtol=1e-5, atol=1e-8)


def test_inputs_are_what_the_model_is_given(tmp_path: Path) -> None:
    train = images(N)
    found = _analyzer(ConvNet(), tmp_path).features(train, "input", batch_size=5)
    np.testing.assert_array_equal(found, train.tensors[0].flatten(1).float().numpy())


class Scaling(sf.tasks.Classification):
    """Scales inputs before the model is given them, by name."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return super().compute_train_loss((3 * batch[0], batch[1]), lambda x: model(input=x), sample)


def test_inputs_are_those_that_the_task_makes_also_given_by_name(tmp_path: Path) -> None:
    train = vectors(N)
    found = _analyzer(mlp(), tmp_path, Scaling()).features(train, "input")
    np.testing.assert_array_equal(found, (3 * train.tensors[0]).float().numpy())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1))


def test_token_ids_are_refused_as_features_and_representations_recommended(tmp_path: Path) -> None:
    train = TensorDataset(torch.randint(0, 7, (N, 5)), torch.randint(0, 3, (N,)))
    analyzer = _analyzer(Tokens(), tmp_path)
    with pytest.raises(sf.TaskError, match=r"torch\.int64 of shape \(1, 5\).*representation"):
        analyzer.features(train, "input")
    assert analyzer.features(train, "representation").shape == (N, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("gradient",), {"layer": "first"}, "Conv2d.*linear only|Conv2d.*nn.Linear only"),
        (("gradient",), {"layer": "missing"}, "'missing' is not tracked"),
        (("input",), {"layer": "head"}, "of no layer"),
        (("colour",), {}, "of='colour' is not known"),
        (("gradient",), {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path: Path, arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(sf.SegflowError, match=message):
        _analyzer(ConvNet(), tmp_path).features(images(N), *arguments, **options)


def test_features_that_are_not_finite_name_the_batch(tmp_path: Path) -> None:
    train = vectors(N)
    train.tensors[0][11] = float("nan")
    for of in ("gradient", "input"):
        with pytest.raises(sf.TaskError, match=r"of the batch of 4 examples from 8 to 11"):
            _analyzer(mlp(), tmp_path / of).features(train, of, batch_size=4)


@pytest.mark.parametrize("of", ["gradient", "representation", "input"])
def test_features_on_disk_are_those_in_memory_and_read_only(tmp_path: Path, of: str) -> None:
    analyzer, train = _analyzer(mlp(), tmp_path), vectors(N)
    out = tmp_path / "new folder" / "features.npy"
    found = analyzer.features(train, of, batch_size=4, out=out)
    np.testing.assert_array_equal(found, analyzer.features(train, of, batch_size=9))
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    np.testing.assert_array_equal(np.load(out), found)
    assert [path.name for path in out.parent.iterdir()] == ["features.npy"]


def test_a_pass_that_fails_leaves_the_old_file_and_no_partial_one(tmp_path: Path) -> None:
    out, train = tmp_path / "features" / "of.npy", vectors(N)
    analyzer = _analyzer(mlp(), tmp_path)
    before = np.array(analyzer.features(train, out=out))
    train.tensors[0][20] = float("nan")
    with pytest.raises(sf.TaskError, match="not finite"):
        analyzer.features(train, batch_size=1, out=out)
    np.testing.assert_array_equal(np.load(out), before)
    assert [path.name for path in out.parent.iterdir()] == ["of.npy"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(sf.StoreError, match=r"of\.npy: cannot be written"):
        _analyzer(mlp(), tmp_path).features(vectors(N), out=tmp_path / "file" / "of.npy")


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyzer = _analyzer(model, tmp_path)
    for of in ("gradient", "representation", "input"):
        analyzer.features(vectors(N), of)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_features_are_those_of_the_last_stage(tmp_path: Path) -> None:
    model, data = mlp(), {"early": vectors(10, seed=3), "late": vectors(N)}
    stages = []
    for name, states in (("early", perturbed_states(model, 4)[:2]), ("late", perturbed_states(model, 3))):
        made = trajectory_of(tmp_path / name, states, len(data[name]))
        stages.append(sf.Trajectory(made.checkpoints, made.steps, 0.1, len(data[name]), made.optimizer, stage=name))
    task = sf.tasks.Classification()
    found = analyzer_of(model, stages[1].after(stages[0]), tmp_path / "store", task).features(data)
    expected = _analyzer(mlp(), tmp_path / "alone").features(data["late"])
    np.testing.assert_array_equal(found, expected)


def _on_ranks(folder: str, of: str, out: bool) -> Any:
    from segflow.runtime.ranks import current

    root = Path(folder)
    trajectory = trajectory_of(root / f"run-{current().index}", perturbed_states(mlp(), 3), N)
    analyzer = analyzer_of(mlp(), trajectory, root / "store", sf.tasks.Classification())
    path = root / "features.npy" if out else None
    return np.array(analyzer.features(vectors(N), of, batch_size=5, out=path)).tolist()


@pytest.mark.parametrize(
    ("of", "count", "out"),
    [("gradient", 2, False), ("input", 2, True), pytest.param("input", 3, True, marks=pytest.mark.slow)],
)
def test_every_rank_gets_the_features_of_all(gang: Gang, tmp_path: Path, of: str, count: int, out: bool) -> None:
    alone = _on_ranks(str(tmp_path / "alone"), of, False)
    for found in gang.run(count, _on_ranks, str(tmp_path), of, out):
        assert not isinstance(found, Failed), found.trace
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-8)


def _clusters_on_ranks() -> list[list[int]]:
    from segflow.runtime.ranks import current

    features = np.random.default_rng(0).standard_normal((40, 3))
    groups = sf.Groups.kmeans(features + 1e-3 * current().index, count=4)
    return [member.tolist() for member in groups.members]


def test_every_rank_gets_the_clusters_of_the_first(gang: Gang) -> None:
    found = gang.run(2, _clusters_on_ranks)
    assert found[0] == found[1] == _clusters_on_ranks()


@pytest.mark.parametrize(
    ("make", "data", "layer"), [(mlp, vectors, "0"), (mlp, vectors, "4"), (ConvNet, images, "second")]
)
def test_weight_gradients_are_projections_of_autograds(tmp_path: Path, make: Any, data: Any, layer: str) -> None:
    """All of it where the layer has at most 64 numbers; else 64 sums of its entries, weighed by outer products."""
    model = make()
    found = _analyzer(model, tmp_path).features(data(N), of="weight gradient", layer=layer, batch_size=4)
    _at_the_end(model)
    module = model.get_submodule(layer)
    exact = oracles.example_gradients(
        model, {layer: module}, example_loss(model, data(N), sf.tasks.Classification()), N
    )
    size = exact[layer][0].numel()
    expected = exact[layer].flatten(1)
    if size > 64:
        made = probes(Projection(64, 0), {layer: tuple(exact[layer].shape[1:])}, torch.float64, torch.device("cpu"))
        of = made[layer]
        expected = torch.einsum("npoi,kpo,kpi->nk", exact[layer], of.outputs_kPO, of.inputs_kPI)
    assert found.shape == (N, min(size, 64))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-7)
