"""Groups in every method: at group size 1 they are the ordinary methods, and larger groups are sums of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.scoring.group_gradients import GroupGradients

from ..support.helpers import ConvNet, analyzer_of, images, mlp, perturbed_states, trajectory_of, vectors

N, QUERIES = 18, 4
METHODS: dict[str, Any] = {
    "SOURCE": sf.Source(segments=2),
    "Fast-SOURCE": sf.Source(segments=2, fast=True),
    "influence function": sf.InfluenceFunction(),
    "K-FAC": sf.InfluenceFunction(curvature="kfac"),
    "TracIn": sf.TracIn(),
    "Hydra": sf.Hydra(),
    "gradient dot": sf.GradientDot(),
    "representations": sf.RepresentationSimilarity(),
    "TRAK": sf.TRAK(6, 0.02),
    "projected Fisher": sf.ProjectedFisher(6, 0.02),
    "batched Fisher": sf.ProjectedFisher(6, 0.02, fisher_batch=4),
    "LiSSA": sf.LiSSA(2.0, steps=4, sample_size=6),
}
PARTITIONS = {
    "one group": sf.Groups.from_lists([range(N)], N),
    "uneven": sf.Groups.from_lists([[0, 3, 5], range(6, 16), [1], [2, 4], [17, 16]], N),
    "some left out": sf.Groups.from_lists([[4, 9, 2], [17]], N, partial=True),
}


def _analyzer(folder: Path, method: Any, net: str) -> tuple[sf.Analyzer, Any, Any]:
    model, make = (mlp(), vectors) if net == "mlp" else (ConvNet(), images)
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 3), N, lr=0.3)
    analyzer = analyzer_of(model, trajectory, folder / "store", method=method)
    analyzer.fit(make(N), batch_size=7)
    return analyzer, make(N), make(QUERIES, seed=5)


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("name", METHODS)
def test_groups_are_the_sums_of_single_examples(tmp_path: Path, name: str, net: str) -> None:
    analyzer, train, query = _analyzer(tmp_path, METHODS[name], net)
    single = analyzer.score(sf.Groups.singletons(N), train, query).values
    assert single.abs().max() > 0
    for groups in PARTITIONS.values():
        for batch_size in (4, 50):
            found = analyzer.score(groups, train, query, batch_size=batch_size).values
            expected = torch.stack([single[:, list(members)].sum(1) for members in groups.members], 1)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * single.abs().max().item())


def test_queries_meet_groups_and_never_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is multiplied with the queries has one row for each group, whatever the number of examples."""
    analyzer, train, query = _analyzer(tmp_path, sf.InfluenceFunction(), "mlp")
    rows: list[int] = []
    real = GroupGradients._product

    def product(self: GroupGradients, name: str, queries_QPOI: Tensor) -> Tensor:
        rows.append(len(self._sums[name]))
        assert not self._scores, "single examples met the queries"
        return real(self, name, queries_QPOI)

    monkeypatch.setattr(GroupGradients, "_product", product)
    for size in (2, 6, 18):
        rows.clear()
        analyzer.score(sf.Groups.random(N, size), train, query, batch_size=50)
        assert rows == [N // size] * 3
