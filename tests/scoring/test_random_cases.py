"""Whatever the model, groups, batches, memory, ranks and interruptions: the scores of the naive dense formulas."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset

import segflow as sf
from segflow.runtime.ranks import current

from ..support.dense import METHODS, QUERIES, TRAINED, N, quantities, reference
from ..support.gang import Failed, Gang
from ..support.helpers import ConvNet, analyzer_of, images, perturbed_states, trajectory_of, vectors


def _model(widths: list[int], seed: int) -> nn.Module:
    if not widths:
        return ConvNet(seed=seed)
    torch.manual_seed(seed)
    sizes = [5, *widths, 3]
    layers = [(nn.Linear(a, b, bias=bool((seed + a) % 2)), nn.Tanh()) for a, b in pairwise(sizes)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1]).double()


class Stopping(Dataset):
    """Stops the run once, at some read on some rank."""

    def __init__(self, data: Any, rank: int, read: int):
        self.data, self.rank, self.left = data, rank, read

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if current().index == self.rank:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.data[index]


def _scores(folder: str, case: dict[str, Any]) -> list[list[float]]:
    """What a user's script computes, started again where it was stopped."""
    root, model = Path(folder), _model(case["widths"], case["seed"])
    make = vectors if case["widths"] else images
    trajectory = trajectory_of(root / f"run-{current().index}", perturbed_states(model, 4), N, **TRAINED)
    method = METHODS[case["method"]][0]
    analyzer = analyzer_of(model, trajectory, root / "store", method=method, memory=case["memory"])
    groups = sf.Groups.from_lists(case["groups"], N, partial=True)
    train = Stopping(make(N), *case["stop"])
    for _ in range(2):
        try:
            analyzer.fit(train, batch_size=case["batch_size"])
            return analyzer.score(groups, train, make(QUERIES, seed=5), batch_size=case["batch_size"]).values.tolist()
        except (KeyboardInterrupt, sf.RankError):
            continue
    raise AssertionError("stopped more than once")


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    examples = draw(st.permutations(range(N)))
    cuts = sorted(draw(st.sets(st.integers(1, N), min_size=1, max_size=8)))
    return {
        "widths": draw(st.lists(st.integers(1, 7), max_size=3)),
        "seed": draw(st.integers(0, 3)),
        "method": draw(st.sampled_from(sorted(METHODS))),
        "groups": [examples[a:b] for a, b in zip([0, *cuts], cuts, strict=False)],
        "batch_size": draw(st.integers(1, N + 2)),
        "memory": draw(st.sampled_from([1, 4000, 2 << 30])),
        "stop": (draw(st.integers(0, 3)), draw(st.integers(1, 900))),
    }


def _claim(gang: Gang, case: dict[str, Any], ranks: int) -> None:
    model, make = _model(case["widths"], case["seed"]), vectors if case["widths"] else images
    states = perturbed_states(model, 4)
    groups = sf.Groups.from_lists(case["groups"], N, partial=True)
    exact = quantities(model, states, make(N), make(QUERIES, seed=5))
    expected = reference(exact, groups, METHODS[case["method"]][1])
    with tempfile.TemporaryDirectory() as folder:
        for found in gang.run(ranks, _scores, folder, case):
            assert not isinstance(found, Failed), found.trace
            error = (torch.tensor(found, dtype=torch.float64) - expected).abs().max() / expected.abs().max()
            assert error < 1e-8, error


_SETTINGS: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=8, derandomize=True, **_SETTINGS)
@given(case=_cases(), ranks=st.integers(1, 2))
def test_scores_are_those_of_the_dense_formulas(gang: Gang, case: dict[str, Any], ranks: int) -> None:
    _claim(gang, case, ranks)


@pytest.mark.slow
@settings(max_examples=150, **_SETTINGS)
@given(case=_cases(), ranks=st.integers(1, 4))
def test_scores_are_those_of_the_dense_formulas_in_many_cases(gang: Gang, case: dict[str, Any], ranks: int) -> None:
    _claim(gang, case, ranks)
