"""A model that is compiled, wrapped or checkpointed is attributed as the plain one is, in double precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint

import segflow as sf
from segflow.model.observing import observing

from ..support.helpers import FixedLabels, analyzer_of, vectors

N, STEPS = 12, 6
DATA = vectors(N)
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch.compile
compiled = partial(torch.compile, backend="eager")


class Net(nn.Module):
    """Two layers in a block, with or without activation checkpointing, and a head."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.block = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.block(x))
        if self.reentrant:
            x = x.detach().requires_grad_()  # else torch computes no gradients
        return self.head(checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant))


def _whole(model: Net) -> Any:
    return compiled(model)


def _in_place(model: Net) -> Any:
    model.compile(backend="eager")
    return model


def _inner(model: Net) -> Any:
    model.block = compiled(model.block)
    return model


def _innermost(model: Net) -> Any:
    model.block[0] = compiled(model.block[0])
    return compiled(model)


def _forward(model: Net) -> Any:
    model.forward = compiled(model.forward)  # type: ignore[method-assign]
    return model


def _layer_in_place(model: Net) -> Any:
    model.block[2].compile(backend="eager")
    return model


def _forward_of_a_layer(model: Net) -> Any:
    model.head.forward = compiled(model.head.forward)
    return model


def _in_parallel(model: Net) -> Any:
    return nn.DataParallel(compiled(model))


def _compiled_in_parallel(model: Net) -> Any:
    return compiled(nn.DataParallel(model))


WRAPPED: list[Callable[[Net], Any]] = [
    _whole,
    _in_place,
    _inner,
    _innermost,
    _forward,
    _layer_in_place,
    _forward_of_a_layer,
    _in_parallel,
    _compiled_in_parallel,
]


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    torch._dynamo.reset()


def train(model: Any, folder: Path, plainly: Any = None) -> sf.Trajectory:
    """Train with Adam under record(), which is given `model`; the steps run `plainly` where that is given."""
    inputs, labels = DATA.tensors
    optimizer = torch.optim.Adam((plainly or model).parameters(), lr=0.05, weight_decay=0.01)
    with sf.record(model, optimizer, folder, dataset_size=N, total_steps=STEPS, checkpoints=2):
        for _ in range(STEPS):
            optimizer.zero_grad()
            functional.cross_entropy((plainly or model)(inputs), labels).backward()
            optimizer.step()
    return sf.Trajectory.load(folder)


def scores(model: Any, trajectory: sf.Trajectory, store: Path, method: Any = None, task: Any = None) -> Any:
    analyzer = analyzer_of(model, trajectory, store, task, method=method or sf.Source(1))
    analyzer.fit(DATA)
    return layer_scores(analyzer)


def layer_scores(analyzer: sf.Analyzer) -> dict[str, Any]:
    return dict(analyzer.score(sf.Groups.singletons(N), DATA, DATA, keep="layer").by_layer or {})


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert [*found] == [*expected] == ["block.0", "block.2", "head"]
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_model_that_was_trained_wrapped_has_the_plain_ones_scores(wrap: Callable[[Net], Any], tmp_path: Path) -> None:
    plain, wrapped = Net(), wrap(Net())
    expected = scores(plain, train(plain, tmp_path / "plain"), tmp_path / "s1")
    trajectory = train(wrapped, tmp_path / "wrapped")
    assert set(trajectory.state(0)) == set(plain.state_dict())
    assert_alike(scores(wrapped, trajectory, tmp_path / "s2"), expected)
    # What was trained wrapped is analysed plain.
    assert_alike(scores(plain, trajectory, tmp_path / "s3"), expected)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_store_that_a_plain_model_filled_serves_the_wrapped_one(wrap: Callable[[Net], Any], tmp_path: Path) -> None:
    trajectory = train(Net(), tmp_path / "run")
    expected = scores(Net(), trajectory, tmp_path / "store")
    analyzer = analyzer_of(wrap(Net()), trajectory, tmp_path / "store", method=sf.Source(1))
    assert_alike(layer_scores(analyzer), expected)  # `fit` has not run for this model


def test_only_the_call_of_segflow_runs_eagerly(tmp_path: Path) -> None:
    runs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    model = Net()
    fast, x = torch.compile(model, backend=backend), DATA.tensors[0]
    with pytest.raises(KeyError), observing(model):
        fast(x)
        assert not runs
        raise KeyError("the user's")
    fast(x)
    assert runs


@pytest.mark.parametrize("wrap", [_whole, _in_place, _forward, _layer_in_place])
def test_a_torch_that_cannot_suspend_compiling_refuses_a_compiled_model_by_name(
    wrap: Callable[[Net], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = wrap(Net())
    monkeypatch.delattr(torch.compiler, "set_stance")
    with (
        pytest.raises(sf.LayerError, match=r"module '.*' .* is compiled by torch.compile, which torch .*before"),
        observing(outer),
    ):
        pass
    with observing(Net()):
        pass


class CompiledLoss(FixedLabels):
    """A task whose loss is compiled."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return compiled(super().compute_train_loss)(batch, model, sample)


def test_a_compiled_loss_is_that_of_the_plain_one(tmp_path: Path) -> None:
    trajectory = train(Net(), tmp_path / "run")
    expected = scores(Net(), trajectory, tmp_path / "s1")
    found = scores(Net(), trajectory, tmp_path / "s2", task=CompiledLoss())
    assert_alike(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", [sf.GradientDot(), sf.Source(1)], ids=["GradientDot", "Source"])
def test_activation_checkpointing_changes_no_score(reentrant: bool, method: Any, tmp_path: Path) -> None:
    plain, saving = Net(), Net(reentrant)
    expected = scores(plain, train(plain, tmp_path / "plain"), tmp_path / "s1", method)
    trajectory = train(saving, tmp_path / "saving")
    analyzer_of(saving, trajectory, tmp_path / "s0", sf.tasks.Classification()).check(DATA, DATA)
    found = scores(saving, trajectory, tmp_path / "s2", method)
    assert_alike(found, expected)


def test_gradients_through_checkpointing_are_autograds(tmp_path: Path) -> None:
    model = Net(reentrant=True)
    trajectory = train(model, tmp_path / "run")
    found = analyzer_of(model, trajectory, tmp_path / "s", method=sf.GradientDot()).score(
        sf.Groups.singletons(N), DATA, DATA
    )
    trajectory.load_into(model, 1)
    rows = []
    for x, y in zip(*DATA.tensors, strict=True):
        loss = functional.cross_entropy(model(x[None]), y[None])
        model.zero_grad()
        loss.backward()  # reentrant checkpointing knows no torch.autograd.grad
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    gradients = torch.stack(rows)
    np.testing.assert_allclose(np.asarray(found.values), (gradients @ gradients.T / N).numpy(), rtol=1e-9, atol=1e-14)


def test_torchs_checkpointing_is_as_it_was_afterwards() -> None:
    before = {
        name: getattr(checkpoint, name) for name in ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    }
    with pytest.raises(KeyError), observing(Net()):
        assert all(getattr(checkpoint, name) is not value for name, value in before.items())
        raise KeyError("the user's")
    assert all(getattr(checkpoint, name) is value for name, value in before.items())


def test_an_error_inside_a_checkpointed_block_is_the_users_own(tmp_path: Path) -> None:
    def fails(_x: Tensor) -> Tensor:
        raise ZeroDivisionError("the user's block")

    with observing(Net()), pytest.raises(ZeroDivisionError, match="the user's block"):
        checkpoint.checkpoint(fails, torch.ones(1), use_reentrant=False)


def test_torchs_wrapper_for_checkpointing_leaves_names_as_they_are(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, saving = Net(), Net()
    saving.block = checkpoint_wrapper(saving.block)
    expected = scores(plain, train(plain, tmp_path / "plain"), tmp_path / "s1")
    trajectory = train(saving, tmp_path / "saving")
    assert_alike(scores(saving, trajectory, tmp_path / "s2"), expected)
    assert_alike(scores(plain, trajectory, tmp_path / "s3"), expected)
