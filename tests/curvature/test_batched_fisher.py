"""Batched second moments, and curvature of some of the examples, against dense formulas over the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.curvature import passes
from segflow.curvature.projection import Probes, probes
from segflow.data.streams import stream
from segflow.errors import MethodError, SegflowError
from segflow.methods.plan import Projection
from segflow.runtime.ranks import current

from ..support import oracles
from ..support.gang import Failed, Gang
from ..support.helpers import analyzer_of, example_loss, perturbed_states, trajectory_of
from ..support.naive import (
    GROUPS,
    QUERIES,
    Margins,
    N,
    assert_near,
    flat,
    grouped_rows,
    naive_gradients,
    problem,
    projected_scores,
    scored,
    tracked_modules,
)


def _batched(rows: Tensor, batch: int, seed: int = 0) -> Tensor:
    """Sums over batches of rows in the drawn order."""
    order = stream(seed, "curvature examples").permutation(len(rows))
    return torch.stack([rows[order[at : at + batch]].sum(0) for at in range(0, len(rows), batch)])


def _relative_error(batched: Tensor, exact: Tensor) -> float:
    return ((batched - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("net", "batch"),
    [
        ("conv", 3),
        ("mlp", 8),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("mlp", 3), ("conv", 8), ("mlp", 50), ("conv", 50)]),
    ],
)
@pytest.mark.parametrize(("method", "kind"), [(sf.TRAK, "output"), (sf.ProjectedFisher, "train")])
def test_the_batched_fisher_is_that_of_summed_gradients(
    tmp_path: Path, method: Any, kind: str, batch: int, net: str
) -> None:
    asked, real, features = (naive_gradients(net, of) for of in ("measurement", "train", kind))
    batched, exact = _batched(flat(features), batch), flat(features)
    expected = projected_scores(batched, flat(asked), grouped_rows(flat(real)), 0.02)
    scores = scored(tmp_path, method(None, 0.02, fisher_batch=batch), net)
    assert_near(scores.values, expected, 1e-6)
    error = _relative_error(batched.mT @ batched, exact.mT @ exact)
    assert scores.provenance["batching_error"] == [pytest.approx(error, rel=1e-6)]


def test_the_batched_fisher_is_projected_too(tmp_path: Path) -> None:
    asked, real = (naive_gradients("mlp", of) for of in ("measurement", "train"))
    made = probes(
        Projection(6, 3), {n: tuple(g.shape[1:]) for n, g in real.items()}, torch.float64, torch.device("cpu")
    )
    rows = [
        sum(torch.einsum("npoi,kpo,kpi->nk", g, made[n].outputs_kPO, made[n].inputs_kPI) for n, g in of.items())
        for of in (asked, real)
    ]
    expected = projected_scores(_batched(rows[1], 4), rows[0], grouped_rows(rows[1]), 0.02)
    assert_near(scored(tmp_path, sf.ProjectedFisher(6, 0.02, 3, fisher_batch=4)).values, expected, 1e-6)


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_batched_eigenvalues_are_squares_of_summed_pseudo_gradients(tmp_path: Path, kind: str, net: str) -> None:
    batch, damping = 6, 0.05
    asked, real, sampled = (naive_gradients(net, of) for of in ("measurement", "train", "sample"))
    model, train, _ = problem(net)
    model.load_state_dict(perturbed_states(model, 3)[2])
    covariances = oracles.naive_covariances(
        model, tracked_modules(model), example_loss(model, train, Margins(), "sample"), N
    )
    expected, sides = torch.zeros(QUERIES, len(GROUPS), dtype=torch.float64), []
    for name, (A, S) in covariances.items():
        Q_A, Q_S = oracles.eigenbasis(A, S)
        if kind == "diagonal":
            Q_A, Q_S = (torch.eye(Q.shape[-1]).double().expand_as(Q) for Q in (Q_A, Q_S))
        sums = _batched(sampled[name], batch)
        Lambda = oracles.corrected_eigenvalues(sums, Q_A, Q_S) * len(sums) / N
        sides.append((Lambda.flatten(), oracles.corrected_eigenvalues(sampled[name], Q_A, Q_S).flatten()))
        for part, block in enumerate(oracles.dense_curvature(Q_A, Q_S, Lambda)):
            query, group = asked[name][:, part].flatten(1), grouped_rows(real[name][:, part].flatten(1))
            expected += oracles.influence_scores(query, block, damping, group, N)
    scores = scored(tmp_path, sf.InfluenceFunction(damping, kind, fisher_batch=batch), net)
    assert_near(scores.values, expected)
    error = _relative_error(*(torch.cat(side) for side in zip(*sides, strict=True)))
    assert scores.provenance["batching_error"] == [pytest.approx(error, rel=1e-6)]


METHODS: dict[str, Any] = {
    "source": sf.Source,
    "influence": sf.InfluenceFunction,
    "trak": lambda **options: sf.TRAK(6, 0.02, **options),
    "fisher": lambda **options: sf.ProjectedFisher(6, 0.02, **options),
}


@pytest.mark.parametrize("name", METHODS)
def test_batches_of_one_are_the_ordinary_method_and_larger_ones_are_not(tmp_path: Path, name: str) -> None:
    plain, one, more = (
        scored(tmp_path / str(place), METHODS[name](**options))
        for place, options in enumerate(({}, {"fisher_batch": 1}, {"fisher_batch": 5}))
    )
    assert plain.values.equal(one.values)
    assert "batching_error" not in one.provenance
    assert not torch.allclose(one.values, more.values, rtol=1e-3)


@pytest.mark.parametrize("method", [sf.ProjectedFisher(6, 0.02, fisher_batch=4), sf.Source(fisher_batch=4)])
def test_batches_do_not_depend_on_how_the_data_is_walked(tmp_path: Path, method: Any) -> None:
    model, train, query = problem("mlp")
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 3), N, lr=0.3)
    values = []
    for batch_size in (2, 7, 100):
        analyzer = analyzer_of(model, trajectory, tmp_path / str(batch_size), Margins(), method=method)
        analyzer.fit(train, batch_size=batch_size)
        values.append(analyzer.score(GROUPS, train, query).values)
    assert_near(values[1], values[0])
    assert_near(values[2], values[0])


def test_the_error_of_batching_is_measured_on_some_of_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_COMPARED", 6)
    rows = flat(naive_gradients("mlp", "train"))
    method = sf.ProjectedFisher(None, 0.02, fisher_batch=3)
    model, train, query = problem("mlp")
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 3), N, lr=0.3)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", Margins(), method=method)
    analyzer.fit(train, batch_size=3)
    scores = analyzer.score(GROUPS, train, query)
    order = stream(0, "curvature examples").permutation(N)[:6]
    exact, batched = rows[order], torch.stack([rows[order[:3]].sum(0), rows[order[3:]].sum(0)])
    error = _relative_error(batched.mT @ batched, exact.mT @ exact)
    assert scores.provenance["batching_error"] == [pytest.approx(error, rel=1e-6)]
    assert_near(
        scores.values,
        projected_scores(_batched(rows, 3), flat(naive_gradients("mlp", "measurement")), grouped_rows(rows), 0.02),
        1e-6,
    )


def _on_ranks(folder: str, store: str, name: str, few: int | None) -> list[list[float]]:
    model, train, query = problem("mlp")
    trajectory = trajectory_of(Path(folder) / f"run-{current().index}", perturbed_states(model, 3), N, lr=0.3)
    method = METHODS[name](fisher_batch=3)
    analyzer = analyzer_of(model, trajectory, Path(folder) / store, Margins(), method=method, curvature_examples=few)
    analyzer.fit(train, batch_size=4)
    return analyzer.score(GROUPS, train, query).values.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "few"), [("source", None), ("fisher", 13), ("trak", None)])
def test_any_number_of_ranks_makes_the_same_batches(
    gang: Gang, tmp_path: Path, name: str, few: int | None, count: int
) -> None:
    alone = _on_ranks(str(tmp_path), "alone", name, few)
    for of_rank in gang.run(count, _on_ranks, str(tmp_path), "ranks", name, few):
        assert not isinstance(of_rank, Failed), of_rank
        torch.testing.assert_close(torch.tensor(of_rank), torch.tensor(alone), rtol=1e-8, atol=1e-12)


def test_curvature_of_some_examples_is_theirs_and_groups_are_whole(tmp_path: Path) -> None:
    """With M of N examples the dense inverse of the M drawn ones meets gradients of all."""
    few, damping = 11, 0.05
    asked, real, sampled = (naive_gradients("mlp", of) for of in ("measurement", "train", "sample"))
    drawn = np.sort(stream(0, "curvature examples").permutation(N)[:few])
    model, train, _ = problem("mlp")
    model.load_state_dict(perturbed_states(model, 3)[2])
    loss = example_loss(model, train, Margins(), "sample")
    covariances = oracles.naive_covariances(model, tracked_modules(model), lambda i: loss(int(drawn[i])), few)
    expected = torch.zeros(QUERIES, len(GROUPS), dtype=torch.float64)
    for name, (A, S) in covariances.items():
        [block] = oracles.dense_curvature(*oracles.pooled_ekfac([(A, S, sampled[name][drawn])]))
        query, group = asked[name][:, 0].flatten(1), grouped_rows(real[name][:, 0].flatten(1))
        expected += oracles.influence_scores(query, block, damping, group, N)
    scores = scored(tmp_path, sf.InfluenceFunction(damping), curvature_examples=few)
    assert_near(scores.values, expected)
    assert scores.provenance["curvature_examples"] == few


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal"])
def test_fewer_examples_change_the_curvature_and_more_than_there_are_do_not(tmp_path: Path, curvature: str) -> None:
    method = sf.InfluenceFunction(0.05, curvature)
    every, more, few = (
        scored(tmp_path / str(count), method, curvature_examples=count).values for count in (None, 1000, 9)
    )
    assert every.equal(more)
    assert not torch.allclose(every, few, rtol=1e-3)


@pytest.mark.parametrize("few", [0, -3, 2.5, True])
def test_what_is_no_number_of_examples_is_refused(tmp_path: Path, few: Any) -> None:
    with pytest.raises(SegflowError, match=r"curvature_examples=.*expected a whole number"):
        scored(tmp_path, sf.Source(), curvature_examples=few)


@pytest.mark.parametrize("make", [*METHODS.values()])
@pytest.mark.parametrize("size", [0, 2.5, True])
def test_what_is_no_batch_is_refused(make: Any, size: Any) -> None:
    with pytest.raises(MethodError, match=r"fisher_batch=.*expected a whole number, at least 1"):
        make(fisher_batch=size)


@pytest.mark.parametrize("curvature", ["kfac", "identity"])
def test_what_squares_no_gradients_has_nothing_to_batch(curvature: str) -> None:
    with pytest.raises(MethodError, match="nothing to batch"):
        sf.InfluenceFunction(0.1, curvature, fisher_batch=4)


def test_features_are_the_same_by_way_of_tokens_and_of_gradients() -> None:
    """Many positions take the gradient first; both ways are one linear map."""
    generator = torch.Generator().manual_seed(0)
    made = probes(Projection(4, 0), {"a": (2, 3, 5)}, torch.float64, torch.device("cpu"))["a"]
    for positions, first in ((1, False), (400, True)):
        a, g = (torch.randn(2, 6, positions, D, generator=generator, dtype=torch.float64) for D in (5, 3))
        with mock.patch.object(Probes, "of_gradients", autospec=True, side_effect=Probes.of_gradients) as by_gradient:
            found = made.of_tokens(passes.Tokens(a, g))
        gradient = torch.einsum("pbso,pbsi->bpoi", g, a)
        torch.testing.assert_close(found, torch.einsum("bpoi,kpo,kpi->bk", gradient, made.outputs_kPO, made.inputs_kPI))
        assert by_gradient.called is first
