"""Layers that batches without their data left out: rates count min(1 / share, ceiling) times, and decay counts once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.runtime.ranks import current

from ..support.gang import Gang
from ..support.helpers import analyzer_of, apart, perturbed_states, trajectory_of, vectors
from ..support.histories import by_span, history, moment_files

N, QUERIES, EPS, CEILING = 20, 4, 1e-3, 2.0
GROUPS = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)
RATES = by_span((16, (0.004, 0.002)), (24, (0.004, 0.003)))
DECAYS = by_span((40, (0.001, 0.002)))


class TwoHeads(nn.Module):
    """A body and a head for each kind of data; the first feature's sign says which head is whose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.plus, self.minus = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return torch.where(x[:, :1] > 0, self.plus(h), self.minus(h))


HEADS = {name: int(not name.startswith("body")) for name in TwoHeads().state_dict()}
EACH = {name: ("body", "plus", "minus").index(name.split(".")[0]) for name in HEADS}  # a group for each layer


def _data(plus: int) -> TensorDataset:
    """N examples, of which the first `plus` are one head's and the others the other's, mixed."""
    x, y = vectors(N).tensors
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    sign = torch.where(torch.arange(N) < plus, 1.0, -1.0).double()[order]
    return TensorDataset(torch.cat([x[:, :1].abs() * sign[:, None], x[:, 1:]], 1), y)


def _trajectory(folder: Path, rates: Tensor, ceiling: float, optimizer: str, **given: Any) -> sf.Trajectory:
    made, count = trajectory_of(folder / "run", perturbed_states(TwoHeads(), 4), N), rates.shape[1]
    files = None if optimizer == "SGD" else moment_files(folder / "moments", TwoHeads(), 4)
    return history(
        made,
        HEADS if count == 2 else EACH,
        rates,
        decays=DECAYS[:, [0, 1, 1][:count]],
        optimizer=sf.OptimizerConstants(optimizer, eps=EPS),
        moments=files,
        ceilings=(1.0, *(ceiling,) * (count - 1)),
        coupled=(optimizer == "Adam",) * count,
        **given,
    )


def _by_layer(store: Path, trajectory: sf.Trajectory, method: Any, train: Any, **options: Any) -> dict[str, Tensor]:
    analyzer = analyzer_of(TwoHeads(), trajectory, store, method=method, **options)
    analyzer.fit(train, batch_size=7)
    return dict(analyzer.score(GROUPS, train, vectors(QUERIES, seed=5), keep=("layer",)).by_layer)


METHODS: dict[str, tuple[Any, str]] = {
    "source": (apart(2), "SGD"),
    "coupled layers": (sf.Source(2, query_points="final"), "SGD"),
    "kronecker": (sf.Source(2, query_points="final"), "Adam"),
    "diagonal": (sf.Source(2, query_points="final", preconditioner="diagonal"), "Adam"),
    "fast": (apart(2, fast=True), "AdamW"),
    "tracin": (sf.TracIn(), "SGD"),
    "hydra": (sf.Hydra(), "SGD"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_layers_rate_counts_as_often_as_its_share_and_ceiling_say(tmp_path: Path, name: str) -> None:
    """Heads with shares of 0.8 and 0.2 under a ceiling of 2: as if their rates were times 1.25 and times 2.

    So are the shares that coupled layers have of one correction.
    """
    method, optimizer = METHODS[name]
    train = _data(16)
    found = _by_layer(tmp_path / "a", _trajectory(tmp_path, RATES, CEILING, optimizer), method, train)
    rates = RATES[:, [0, 1, 1]] * torch.tensor([1.0, 1.25, 2.0])
    expected = _by_layer(tmp_path / "b", _trajectory(tmp_path, rates, 1.0, optimizer), method, train)
    if name != "fast":  # whose mean parameters depend on the rates of all groups
        for layer, values in expected.items():
            torch.testing.assert_close(found[layer], values, rtol=1e-9, atol=1e-12)
    once = _by_layer(tmp_path / "once", _trajectory(tmp_path, RATES, 1.0, optimizer), method, train)
    assert torch.equal(found["body"], once["body"]) == (getattr(method, "layers", "apart") == "apart")
    assert not torch.allclose(found["plus"], once["plus"], rtol=1e-2, atol=0)


def test_shares_are_measured_only_where_rates_depend_on_them(tmp_path: Path) -> None:
    train = _data(16)
    for label, ceiling, method in (
        ("needed", 2.0, sf.TracIn()),
        ("one", 1.0, sf.TracIn()),
        ("no rates", 2.0, sf.GradientDot()),
    ):
        analyzer = analyzer_of(
            TwoHeads(), _trajectory(tmp_path, RATES, ceiling, "SGD"), tmp_path / label, method=method
        )
        analyzer.fit(train)
        found = [path.name for path in (tmp_path / label).glob("units/shares/*")]
        assert found == (["step-10.safetensors"] if label == "needed" else [])


def test_without_fit_the_shares_are_missed(tmp_path: Path) -> None:
    analyzer = analyzer_of(TwoHeads(), _trajectory(tmp_path, RATES, 2.0, "SGD"), tmp_path / "store", method=sf.TracIn())
    with pytest.raises(sf.StoreError, match=r"no unit 'shares/step-10'. Run Analyzer.fit"):
        analyzer.score(GROUPS, _data(16), vectors(QUERIES, seed=5))


def test_scores_are_bound_to_the_shares(tmp_path: Path) -> None:
    store = tmp_path / "store"
    _by_layer(store, _trajectory(tmp_path, RATES, 2.0, "SGD"), sf.Hydra(), _data(16))
    entries = [json.loads(path.read_text()) for path in (store / "manifest/scores").glob("**/*.json")]
    assert len(entries) == 4
    for entry in entries:
        [operator] = entry["made_from"]["operators"]
        assert operator["shares"] == [0.2, 0.8] and operator["ceilings"] == [1.0, 2.0]
        assert "shares/step-10" in entry["inputs"]


@pytest.mark.parametrize("method", [sf.TracIn(), sf.Source(segments=1)])
def test_a_layer_that_no_example_reaches_is_named(tmp_path: Path, method: Any) -> None:
    analyzer = analyzer_of(TwoHeads(), _trajectory(tmp_path, RATES, 2.0, "SGD"), tmp_path / "s", method=method)
    with pytest.raises(sf.LayerError, match="no training example reaches layer 'minus'"):
        analyzer.fit(_data(N))


def test_a_position_is_enough_to_reach_a_layer(tmp_path: Path) -> None:
    """Sequences of which one position alone is the head's."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.body(x))
            return torch.where(x[..., :1] > 0, self.head(h), h[..., :3]).mean(1)

    x = -vectors(4 * N).tensors[0].abs().reshape(N, 4, 5)
    x[:5, 2, 0] *= -1
    train = TensorDataset(x, vectors(N).tensors[1])
    made = trajectory_of(tmp_path / "run", perturbed_states(Positions(), 2), N)
    groups = {name: int(name.startswith("head")) for name in Positions().state_dict()}
    capped = history(made, groups, by_span((20, (0.1, 0.1))), ceilings=(1.0, 100.0))
    plain = history(made, groups, by_span((20, (0.1, 0.4))))
    scores = []
    for label, trajectory in {"capped": capped, "plain": plain}.items():
        analyzer = analyzer_of(Positions(), trajectory, tmp_path / label, method=sf.TracIn())
        analyzer.fit(train)
        scores.append(analyzer.score(GROUPS, train, train).values)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-12)


def _ranked(folder: str) -> list[list[float]]:
    root = Path(folder)
    trajectory = _trajectory(root / f"rank-{current().index}-of-{current().count}", RATES, CEILING, "SGD")
    by_layer = _by_layer(root / f"store-of-{current().count}", trajectory, sf.TracIn(), _data(16))
    return torch.stack(list(by_layer.values())).sum(0).tolist()


def test_ranks_share_the_count(tmp_path: Path, gang: Gang) -> None:
    alone, *two = gang.run(1, _ranked, str(tmp_path)) + gang.run(2, _ranked, str(tmp_path))
    for values in two:
        torch.testing.assert_close(torch.tensor(values), torch.tensor(alone), rtol=1e-9, atol=1e-12)
