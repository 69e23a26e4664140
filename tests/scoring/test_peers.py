"""Scores against those of libraries that implement the same method: traker, dattri and Kronfluence.

Each has a scale and a sign of its own. segflow's score is the predicted change on removal, so it holds 1/N and the
loss gradient's sign. Of several runs segflow averages the scores, traker averages features and weights apart, so that
only one model can be compared with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import segflow as sf

from ..support.helpers import (
    Attention,
    FixedLabels,
    analyzer_of,
    mlp,
    out_of_place,
    perturbed_states,
    sequences,
    trajectory_of,
    vectors,
)
from ..support.kronfluence_scores import kronfluence_scores

N, QUERIES = 20, 4
SINGLE = sf.Groups.singletons(N)
DECAYING = [0.3 * 0.9**step for step in range(30)]


class Margins(FixedLabels):
    """Fixed pseudo-labels, margins as measurements."""

    def __init__(self) -> None:
        super().__init__("margin")


@pytest.fixture
def double() -> Iterator[None]:
    """Peers that make tensors of the default type make them in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _data(net: str = "mlp") -> tuple[nn.Module, TensorDataset, TensorDataset]:
    if net == "mlp":
        return out_of_place(mlp()), vectors(N), vectors(QUERIES, seed=5)
    inputs, labels = sequences(N + QUERIES).tensors
    return Attention(), TensorDataset(inputs[:N], labels[:N]), TensorDataset(inputs[N:], labels[N:])


def _ours(folder: Path, method: Any, net: str = "mlp", count: int = 1, lr: Any = 0.1, task: Any = None) -> Tensor:
    """The scores of every training example [QUERIES, N]."""
    model, train, query = _data(net)
    steps = [8, 18, 30] if count == 3 else None
    trajectory = trajectory_of(folder / "run", perturbed_states(model, count), N, steps=steps, lr=lr)
    analyzer = analyzer_of(model, trajectory, folder / "store", task=task or Margins(), method=method)
    analyzer.fit(train, batch_size=7)
    return analyzer.score(SINGLE, train, query, batch_size=6).values


def _close(found: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


# ---- traker ----


@pytest.mark.parametrize("damping", [0.02, 0.5])
def test_trak_equals_traker(tmp_path: Path, damping: float) -> None:
    """traker divides features by sqrt(p), adds lambda_reg to their sum of squares, and divides the inverse by its mean.

    Its float32 sets the tolerance.
    """
    from trak import TRAKer
    from trak.projectors import NoOpProjector

    model, train, query = _data()
    [state] = perturbed_states(model, 1)
    p = sum(parameter.numel() for parameter in model.parameters())
    traker = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=N,
        save_dir=str(tmp_path / "traker"),
        device="cpu",
        projector=NoOpProjector(device="cpu"),
        proj_dim=p,
        use_half_precision=False,
        lambda_reg=damping * N / p,
        logging_level=logging.ERROR,
    )
    traker.load_checkpoint(state, model_id=0)
    traker.featurize(train.tensors, num_samples=N)
    traker.finalize_features()
    features = torch.as_tensor(traker.saver.current_store["grads"]).double()
    divided_by = torch.linalg.inv(features.mT @ features + damping * N / p * torch.eye(p).double()).abs().mean()
    traker.start_scoring_checkpoint("queries", state, model_id=0, num_targets=QUERIES)
    traker.score(query.tensors, num_samples=QUERIES)
    theirs = torch.as_tensor(traker.finalize_scores("queries")).double()
    _close(_ours(tmp_path, sf.TRAK(None, damping)), -divided_by * theirs.mT, 1e-5)


# ---- dattri ----

scripted = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.script:DeprecationWarning")  # which torch itself uses


def _dattri_task(model: nn.Module, states: list[dict[str, Tensor]]) -> Any:
    from dattri.task import AttributionTask

    def run(parameters: Any, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, labels = batch
        return torch.func.functional_call(model, parameters, (inputs.reshape(-1, 5),)), labels.reshape(-1)

    def loss(parameters: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(*run(parameters, batch))

    def margin(parameters: Any, batch: Any) -> Tensor:
        logits, labels = run(parameters, batch)
        true = labels[..., None] == torch.arange(3)
        chosen = logits.masked_fill(~true, 0.0).sum(-1)
        return (chosen - logits.masked_fill(true, -torch.inf).logsumexp(-1)).sum()

    return AttributionTask(loss, model, states, target_func=margin)


def _loaders(train: TensorDataset, query: TensorDataset) -> tuple[Any, Any]:
    return DataLoader(train, batch_size=N), DataLoader(query, batch_size=QUERIES)


@scripted
def test_tracin_equals_dattris_with_the_learning_rates_of_the_nearest_steps(tmp_path: Path, double: None) -> None:
    from dattri.algorithm.tracin import TracInAttributor

    model, train, query = _data()
    task = _dattri_task(model, perturbed_states(model, 3))
    stands_for = [sum(DECAYING[:13]), sum(DECAYING[13:24]), sum(DECAYING[24:])]  # of checkpoints at 8, 18 and 30
    peer = TracInAttributor(task, weight_list=torch.tensor(stands_for), normalized_grad=False)
    peer.projector_kwargs = None  # which its constructor replaces by a projection
    theirs = peer.attribute(*_loaders(train, query))
    _close(_ours(tmp_path, sf.TracIn(), count=3, lr=DECAYING), theirs.mT / N, 1e-10)


@scripted
def test_gradient_products_and_cosines_equal_dattris(tmp_path: Path, double: None) -> None:
    from dattri.algorithm.tracin import TracInAttributor

    model, train, query = _data()
    task = _dattri_task(model, perturbed_states(model, 1))
    for method, normalized in ((sf.GradientDot(), False), (sf.GradientCosine(), True)):
        peer = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=normalized)
        peer.projector_kwargs = None
        theirs = peer.attribute(*_loaders(train, query)).mT
        _close(_ours(tmp_path / f"{normalized}", method), theirs if normalized else theirs / N, 1e-10)


@scripted
@pytest.mark.parametrize("solver", ["explicit", "cg"])
def test_lissa_that_converged_equals_dattris_exact_influence(tmp_path: Path, double: None, solver: str) -> None:
    from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorExplicit

    model, train, query = _data()
    task, damping = _dattri_task(model, perturbed_states(model, 1)), 2.0
    if solver == "cg":
        peer = IFAttributorCG(task, max_iter=30, regularization=damping)
    else:
        peer = IFAttributorExplicit(task, regularization=damping)
    loader, queries = _loaders(train, query)
    peer.cache(loader)
    theirs = peer.attribute(loader, queries).detach()
    ours = _ours(tmp_path, sf.LiSSA(damping, steps=120, sample_size=N))
    _close(ours, theirs.mT / N, 1e-10)


# ---- Kronfluence ----


def _kronfluence(folder: Path, net: str, strategy: str, damping: float | None) -> Tensor:
    from kronfluence.task import Task

    class Peer(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return Margins().compute_train_loss(batch, model, sample)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return Margins().compute_measurement(batch, model)

    model, train, query = _data(net)
    model.load_state_dict(perturbed_states(model, 1)[0])
    return kronfluence_scores(folder, Peer(), model, train, query, strategy, damping)


@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
@pytest.mark.parametrize(
    ("net", "damping"), [pytest.param("mlp", "heuristic", marks=pytest.mark.slow), ("sequence", 0.05)]
)
@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal", "identity"])
def test_influence_functions_equal_kronfluences(tmp_path: Path, strategy: str, damping: Any, net: str) -> None:
    """Kronfluence's K-FAC has no factor for positions: its curvature of T positions is ours divided by T.

    Its identity is never damped.
    """
    positions = 4 if (strategy, net) == ("kfac", "sequence") else 1
    amount = None if damping == "heuristic" else damping / positions
    theirs = _kronfluence(tmp_path / "peer", net, strategy, amount) / positions
    ours = _ours(tmp_path, sf.InfluenceFunction(0.0 if strategy == "identity" else damping, strategy), net)
    _close(ours, theirs / N, 1e-10)
