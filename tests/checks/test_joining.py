"""Examples of different shapes, without a collate function: what the user never joins is no reason to refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.checks.probe_examples import probe_examples
from segflow.data.readers import Reader
from segflow.errors import JoinError

from ..support.check_tasks import TaskOf, mean_loss
from ..support.helpers import analyzer_of, trajectory_of

METHOD = sf.InfluenceFunction(damping=0.1)
SORTED, MIXED = [4, 4, 5, 5, 6, 6, 7, 7], [4, 7, 5, 6, 8, 9, 10, 11]
CPU = torch.device("cpu")


class Sounds(nn.Module):
    """A convolution over as many positions as an example has, and the mean over them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv1d(2, 4, 3), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean(2))


def _data(lengths: list[int]) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, n, generator=generator).double(), place % 3) for place, n in enumerate(lengths)]


def _analyzer(folder: Path, length: int, task: Any = None) -> sf.Analyzer:
    model = Sounds()
    trajectory = trajectory_of(folder / "run", [model.state_dict()], length)
    return analyzer_of(model, trajectory, folder / "store", task or TaskOf(), method=METHOD)


def _scores(folder: Path, lengths: list[int], batch_size: int) -> Tensor:
    data, analyzer = _data(lengths), _analyzer(folder, len(lengths))
    analyzer.fit(data, batch_size=batch_size)
    return analyzer.score(sf.Groups.singletons(len(data)), data, data, batch_size=batch_size).values


def test_neighbours_that_can_be_joined_are_scored_as_they_are_alone(tmp_path: Path) -> None:
    pairs, alone = (_scores(tmp_path / str(size), SORTED, size) for size in (2, 1))
    assert alone.norm() > 0
    torch.testing.assert_close(pairs, alone, rtol=1e-9, atol=1e-12)


def test_examples_of_which_no_two_can_be_joined_are_scored_one_by_one(tmp_path: Path) -> None:
    turned = [MIXED[place] for place in (2, 0, 1, 3, 4, 5, 6, 7)]
    assert _scores(tmp_path / "alone", MIXED, 1).isfinite().all()
    _analyzer(tmp_path / "check", 8).check(_data(MIXED), _data(turned), curvature_tolerance=100)
    with pytest.raises(sf.TaskError, match=r"examples \[0, 1\] of the training data cannot be joined into a batch"):
        _scores(tmp_path / "pairs", MIXED, 2)


def test_a_fault_shows_in_the_first_examples_where_spread_ones_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(sf.TaskError, match=r"the train loss is a mean over the batch: a batch of 2 has 0.5"):
        _analyzer(tmp_path, 8, TaskOf(train=mean_loss)).fit(_data(SORTED), batch_size=2)


@pytest.mark.parametrize(
    "lengths, most, expected",
    [
        ([4] * 8, 3, [{0, 4, 7}]),
        (SORTED, 2, [{0, 1}]),
        (SORTED, 4, [{0, 1}]),
        (MIXED, 2, [{0}, {7}]),
        ([4], 2, [{0}]),
    ],
)
def test_probes_are_spread_or_neighbours_or_single(lengths: list[int], most: int, expected: list[set[int]]) -> None:
    chosen = probe_examples(Reader(_data(lengths)), CPU, most)
    assert sorted(sorted(examples.indices) for examples in chosen) == sorted(map(sorted, expected))


def test_a_single_example_that_cannot_be_collated_is_named() -> None:
    with pytest.raises(JoinError, match=r"examples \[0\]"):
        probe_examples(Reader([object()]), CPU, 2)
