"""What CONTRIBUTING shows is run: a method, a kind of layer, a task and a property of one's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.model.layers import registry

from .support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
METHOD, LAYER, TASK, PROPERTY = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
N = 12


def _run(block: str, **given: Any) -> dict[str, Any]:
    names = {"__name__": "contributing", **given}
    exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    return names


def test_each_example_is_short_and_every_room_is_in_the_drawing() -> None:
    for block in (METHOD, LAYER, TASK, PROPERTY):
        assert len(block.splitlines()) < 30
    rooms = [path.parent.name for path in (ROOT / "segflow").glob("*/__init__.py")]
    assert {room for room in rooms if f" {room}/" not in TEXT} == {"integrations"}
    for target in re.findall(r"`make ([a-z-]+)`", TEXT):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_method_is_the_mean_of_gradient_products_at_the_last_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, train, query, groups = mlp(), vectors(N), vectors(3, seed=4), sf.Groups.random(N, 5)
    states = perturbed_states(model, 3)
    trajectory, task = trajectory_of(tmp_path / "run", states, N), sf.tasks.Classification()
    analyzer = _run(METHOD, model=model, trajectory=trajectory, task=task)["analyzer"]
    analyzer.fit(train)
    scores = analyzer.score(groups, train, query).values

    def gradient(state: dict[str, Tensor], batch: Any) -> Tensor:
        model.load_state_dict(state)
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    queries = torch.stack([gradient(states[-1], query[row : row + 1]) for row in range(3)])
    late = [torch.stack([gradient(state, train[list(m)]) for m in groups.members]) for state in states[-2:]]
    torch.testing.assert_close(scores, queries @ ((late[0] + late[1]) / 2).T / N, rtol=1e-9, atol=1e-12)


class Grouped(nn.Module):
    def __init__(self, parts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(parts, inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bpi,pio->bpo", x, self.weight)


def test_the_kind_of_layer_scores_as_a_grouped_convolution_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_KINDS", list(registry._KINDS))
    _run(LAYER, Grouped=Grouped)
    torch.manual_seed(0)
    ends = nn.Linear(5, 6), nn.Linear(4, 3)
    own = nn.Sequential(ends[0], nn.Unflatten(1, (2, 3)), Grouped(2, 3, 2), nn.Flatten(), ends[1]).double()
    convolution = nn.Conv1d(6, 4, 1, groups=2, bias=False)
    plain = nn.Sequential(ends[0], nn.Unflatten(1, (6, 1)), convolution, nn.Flatten(), ends[1]).double()
    convolution.weight.data = own[2].weight.detach().mT.reshape(4, 3, 1)
    values = []
    for name, model in (("own", own), ("plain", plain)):
        trajectory = trajectory_of(tmp_path / f"run-{name}", [model.state_dict()], N)
        for method in (sf.Source(), sf.LiSSA(steps=3)):
            store = tmp_path / name / type(method).__name__
            analyzer = analyzer_of(model, trajectory, store, method=method)
            assert len(analyzer.context.layers.tracked) == 3
            assert analyzer.context.parameters == sum(p.numel() for p in model.parameters())
            analyzer.fit(vectors(N))
            values.append(analyzer.score(sf.Groups.random(N, 5), vectors(N), vectors(3, seed=4)).values)
    torch.testing.assert_close(values[0], values[2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values[1], values[3], rtol=1e-9, atol=1e-12)


def test_the_task_has_the_curvature_s_scale(tmp_path: Path) -> None:
    task = _run(TASK)["Counts"]()
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    data = TensorDataset(vectors(24).tensors[0], torch.poisson(torch.ones(24).double()))
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], 24)
    report = analyzer_of(model, trajectory, tmp_path / "store", task).check(data, data)
    assert report.curvature.factor == pytest.approx(1, abs=4 * report.curvature.error)


def test_the_property_is_a_query(tmp_path: Path) -> None:
    model, train = mlp(), vectors(N)
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", method=sf.GradientDot())
    analyzer.fit(train)
    groups = sf.Groups.random(N, 5)
    scores = _run(PROPERTY, analyzer=analyzer, train=train, groups=groups, query=vectors(3, seed=4))["scores"]
    assert scores.query_labels == ("WorstLoss", "again") and scores.values[0].equal(scores.values[1])
