"""Factors against naive per-example loops, curvlinops and Kronfluence, all on the same pseudo-labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.curvature.fitted_factors import StoredCurvature
from segflow.curvature.kronecker import KroneckerBlock
from segflow.curvature.passes import covariances
from segflow.methods.plan import curvatures
from segflow.model.observing import observing
from segflow.runtime.ranks import Ranks
from segflow.stage.unit_identity import training_identity

from ..support import oracles
from ..support.helpers import (
    Attention,
    ConvNet,
    FixedLabels,
    analyzer_of,
    example_loss,
    images,
    mlp,
    out_of_place,
    perturbed_states,
    pseudo_labels,
    sequences,
    trajectory_of,
    vectors,
)

N = 18


CASES = {"linear": (mlp, vectors), "conv": (ConvNet, images), "sequence": (Attention, sequences)}


def _fitted(analyzer: sf.Analyzer, train: Any) -> dict[str, KroneckerBlock]:
    """The pooled curvature of the method's first pool, as scoring reads it."""
    context = analyzer.context
    [curvature, *_] = curvatures(analyzer.method.plan(context.run))
    with observing(context.model):
        view = context.loss_view("train", train)
        return dict(StoredCurvature(context, curvature, training_identity(context, train, view), view))


def _dense(block: KroneckerBlock) -> Tensor:
    return oracles.dense_curvature(block.basis.inputs_PII, block.basis.outputs_POO, block.eigenvalues_POI)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("memory", "weighting"), [(2 << 30, "equal"), (1, "nearest")])
def test_pooled_factors_equal_a_naive_per_example_loop(tmp_path: Path, case: str, memory: int, weighting: str) -> None:
    make_model, make_data = CASES[case]
    model, train = make_model(), make_data(N)
    states = perturbed_states(model, 3)
    trajectory = trajectory_of(tmp_path / "run", states, N)
    method = sf.Source(segments=1, checkpoint_weights=weighting)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=method, memory=memory)
    analyzer.fit(train, batch_size=5)
    blocks = _fitted(analyzer, train)

    layers = {name: layer.module for name, layer in analyzer.context.layers.tracked.items()}
    per_checkpoint = []
    for state in states:
        model.load_state_dict(state)
        loss = example_loss(model, train, FixedLabels(), "sample")
        per_checkpoint.append(
            (oracles.naive_covariances(model, layers, loss, N), oracles.example_gradients(model, layers, loss, N))
        )
    for name, block in blocks.items():
        expected = oracles.pooled_ekfac(
            [(*cov[name], grads[name]) for cov, grads in per_checkpoint],
            None if weighting == "equal" else (0.5, 1 / 3, 1 / 6),  # of 30 steps 15, 10 and 5 are nearest
        )
        torch.testing.assert_close(_dense(block), oracles.dense_curvature(*expected), rtol=1e-9, atol=1e-12)
        assert block.eigenvalues_POI.std() > 0


def test_scaling_in_the_basis_is_a_function_of_the_dense_curvature(tmp_path: Path) -> None:
    model, train = ConvNet(), images(N)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 1), N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=sf.Source(segments=1))
    analyzer.fit(train)
    block = _fitted(analyzer, train)["second"]
    gradient = torch.randn(7, *block.eigenvalues_POI.shape, dtype=torch.float64)
    found = block.basis.unrotate(block.basis.rotate(gradient) * torch.exp(-3 * block.eigenvalues_POI))
    for part, matrix in enumerate(_dense(block)):
        dense = oracles.dense_function(matrix, lambda sigma: torch.exp(-3 * sigma))
        expected = (gradient[:, part].flatten(1) @ dense).reshape(found[:, part].shape)
        torch.testing.assert_close(found[:, part], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_factors_equal_curvlinops_on_the_same_labels(tmp_path: Path) -> None:
    from curvlinops import EKFACLinearOperator

    model, train = mlp(), vectors(N)
    x = train.tensors[0]
    [state] = perturbed_states(model, 1)
    trajectory = trajectory_of(tmp_path / "run", [state], N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=sf.InfluenceFunction())
    analyzer.fit(train, batch_size=7)

    model.load_state_dict(state)
    parameters = dict(model.named_parameters())
    operator = EKFACLinearOperator(
        out_of_place(model),
        nn.CrossEntropyLoss(reduction="mean"),
        list(parameters.values()),
        [(x, pseudo_labels(x))],
        fisher_type="empirical",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    dense = torch.as_tensor(operator @ torch.eye(sum(p.numel() for p in parameters.values()), dtype=torch.float64))
    places = torch.arange(dense.shape[0]).split([p.numel() for p in parameters.values()])
    place_of = {name: place.reshape(parameters[name].shape) for name, place in zip(parameters, places, strict=True)}
    for name, block in _fitted(analyzer, train).items():
        order = oracles.layer_matrix(model.get_submodule(name), place_of[f"{name}.weight"], place_of[f"{name}.bias"])
        expected = dense[order.flatten()][:, order.flatten()]
        torch.testing.assert_close(_dense(block)[0], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["linear", "sequence"])
def test_factors_equal_kronfluence_on_the_same_labels(tmp_path: Path, case: str) -> None:
    import kronfluence
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Peer(Task):
        draws_labels = False

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return FixedLabels().compute_train_loss(batch, model, sample)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return FixedLabels().compute_measurement(batch, model)

    make_model, make_data = CASES[case]
    model, train = make_model(), make_data(N)
    [state] = perturbed_states(model, 1)
    trajectory = trajectory_of(tmp_path / "run", [state], N)
    ours = analyzer_of(model, trajectory, tmp_path / "store", task=Peer(), method=sf.InfluenceFunction())
    ours.fit(train, batch_size=7)
    blocks = _fitted(ours, train)

    model.load_state_dict(state)
    precise = dict.fromkeys(
        ("activation_covariance_dtype", "gradient_covariance_dtype", "per_sample_gradient_dtype", "lambda_dtype"),
        torch.float64,
    )
    prepared = kronfluence.prepare_model(out_of_place(model), Peer())
    peer = kronfluence.Analyzer("peer", prepared, Peer(), cpu=True, output_dir=str(tmp_path), disable_tqdm=True)
    peer.fit_all_factors(
        "factors", train, per_device_batch_size=7, factor_args=FactorArguments(use_empirical_fisher=False, **precise)
    )
    theirs = peer.load_all_factors("factors")
    for name, block in blocks.items():
        basis = (theirs[f"{side}_eigenvectors"][name] for side in ("activation", "gradient"))
        count = theirs["num_lambda_processed"][name]
        expected = oracles.dense_curvature(
            *(q[None].double() for q in basis), theirs["lambda_matrix"][name][None] / count
        )
        torch.testing.assert_close(_dense(block), expected, rtol=1e-6, atol=1e-9)


def test_attention_mask_keeps_padding_out_of_the_input_covariance(tmp_path: Path) -> None:
    class Masked(FixedLabels):
        def get_attention_mask(self, batch: Any) -> Tensor:
            return (torch.arange(4) < 3).expand(len(batch[0]), 4)

    model, train = Attention(), sequences(N)
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)
    inputs = train.tensors[0]
    for task, rows in ((FixedLabels(), inputs), (Masked(), inputs[:, :3])):
        analyzer = analyzer_of(
            model, trajectory, tmp_path / type(task).__name__, task=task, method=sf.InfluenceFunction()
        )
        context = analyzer.context
        with observing(model):
            view = context.loss_view("sample", train)
            sums = covariances(
                view, context.walk(view, context.train_reader(train), [range(N)], "test"), Ranks(), "here"
            )
        tokens = torch.cat([rows.reshape(-1, 5), torch.ones(rows.shape[0] * rows.shape[1], 1).double()], 1)
        torch.testing.assert_close(sums["up"].a_PII[0] / sums["up"].a_rows, tokens.mT @ tokens / len(tokens))


def test_seed_changes_the_pseudo_labels_and_nothing_else_does(tmp_path: Path) -> None:
    model, train = mlp(), vectors(N)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 1), N)
    task = sf.tasks.Classification()

    def eigenvalues(folder: str, seed: int) -> Tensor:
        analyzer = analyzer_of(
            model, trajectory, tmp_path / folder, task=task, method=sf.InfluenceFunction(), seed=seed
        )
        torch.rand(len(folder))  # the user's random state must not matter
        analyzer.fit(train)
        return _fitted(analyzer, train)["0"].eigenvalues_POI

    first = eigenvalues("first", 0)
    assert torch.equal(eigenvalues("second", 0), first)
    assert not torch.allclose(eigenvalues("third", 1), first)
