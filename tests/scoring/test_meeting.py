"""Where queries meet training tokens changes the cost, never the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.curvature.kronecker import Eigenbasis, KroneckerBlock, example_gradients
from segflow.model.tokens import Tokens
from segflow.runtime.ranks import Ranks
from segflow.scoring import plan_walk
from segflow.scoring.meeting import Traffic, met_queries

from ..support.helpers import ConvNet, analyzer_of, images, mlp, perturbed_states, trajectory_of, vectors

N = 12


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _basis(P: int, O: int, I: int, seed: int = 0) -> Eigenbasis:
    return Eigenbasis(
        torch.linalg.qr(_random(P, I, I, seed=seed))[0], torch.linalg.qr(_random(P, O, O, seed=seed + 1))[0]
    )


@pytest.mark.parametrize("positions", [1, 3, 200])
def test_example_gradients_in_a_basis_are_the_rotated_gradients(positions: int) -> None:
    """Few positions rotate the tokens, many rotate the gradient."""
    tokens, basis = Tokens(_random(2, 5, positions, 4), _random(2, 5, positions, 3, seed=1)), _basis(2, 3, 4)
    plain = torch.stack(
        [torch.stack([tokens.g_PBSO[p, b].mT @ tokens.a_PBSI[p, b] for p in range(2)]) for b in range(5)]
    )
    expected = basis.outputs_POO.mT @ plain @ basis.inputs_PII
    torch.testing.assert_close(example_gradients(tokens), plain)
    torch.testing.assert_close(example_gradients(tokens, basis), expected)


def test_a_change_of_basis_is_leaving_one_and_entering_the_other() -> None:
    first, second, gradient = _basis(2, 3, 4), _basis(2, 3, 4, seed=5), _random(6, 2, 3, 4)
    moved = first.to(second).rotate(first.rotate(gradient))
    torch.testing.assert_close(moved, second.rotate(gradient))
    torch.testing.assert_close(second.unrotate(moved), gradient)


class Blocks(dict[str, KroneckerBlock]):
    """Stands for a StoredCurvature."""

    fits = True


def _met(values: Any, blocks: Any, traffic: Traffic) -> tuple[Any, Any, Any]:
    met = met_queries(values, blocks, traffic, 99, 1, Ranks())
    return met.values, met.bases, met.sum_bases


def test_few_training_tokens_come_to_the_queries_and_many_do_not() -> None:
    block = KroneckerBlock(_basis(1, 3, 4), torch.ones(1, 3, 4).double())
    queries = _random(10, 1, 3, 4)
    few, bases, sums = _met({"layer": queries}, Blocks(layer=block), Traffic(10, 5000, {"layer": 5}))
    assert few["layer"] is queries and bases == {"layer": block.basis} and not sums
    summed, bases, sums = _met({"layer": queries}, Blocks(layer=block), Traffic(10, 2, {"layer": 5000}))
    assert summed["layer"] is queries and sums == {"layer": block.basis} and not bases
    for count, tokens, fits in ((10, 5000, True), (1, 5, True), (10, 5, False)):
        blocks = Blocks(layer=block)
        blocks.fits = fits
        many, bases, sums = _met({"layer": queries}, blocks, Traffic(count, 5000, {"layer": tokens}))
        assert not bases and not sums
        torch.testing.assert_close(many["layer"], block.basis.unrotate(queries))
    assert _met({"layer": queries}, None, Traffic(10, 1, {})) == ({"layer": queries}, {}, {})


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("method", [sf.Source(segments=3), sf.InfluenceFunction()], ids=["source", "influence"])
def test_the_meeting_place_changes_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: str, method: Any
) -> None:
    model, make = (mlp(), vectors) if net == "mlp" else (ConvNet(), images)
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 3), N)
    groups = sf.Groups.from_lists([[0, 1, 2, 3, 4], [5], [6, 7], range(8, 12)], N)
    values, met = [], []
    for rows, tokens in ((10**9, 0), (10**9, 10**9), (0, 10**9), (None, None)):

        def forced(
            queries: Any, blocks: Any, traffic: Traffic, *others: Any, rows: Any = rows, tokens: Any = tokens
        ) -> Any:
            if rows is not None:
                traffic = Traffic(traffic.queries, rows, dict.fromkeys(blocks, tokens))
            found = met_queries(queries, blocks, traffic, *others)
            met.append((len(found.bases), len(found.sum_bases)))
            return found

        monkeypatch.setattr(plan_walk, "met_queries", forced)
        analyzer = analyzer_of(model, trajectory, tmp_path / f"store-{tokens}-{rows}", method=method)
        analyzer.fit(make(N))
        values.append(analyzer.score(groups, make(N), make(4, seed=3)).values)
    assert {(3, 0), (0, 0), (0, 3)} <= set(met)
    for other in values[1:]:
        torch.testing.assert_close(values[0], other, rtol=1e-9, atol=0)
