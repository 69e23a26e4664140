"""Checkpoints stand for steps by each parameter group's own rates: in sums of gradients, in curvature, and in P."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.methods.method import final_point
from segflow.methods.plan import Curvature, Plan, Point, Spectral, Term
from segflow.training.segments import cut

from ..support import oracles
from ..support.dense import Quantities, ekfac_traces, quantities, reference
from ..support.helpers import analyzer_of, apart, mlp, perturbed_states, trajectory_of, vectors
from ..support.histories import by_span, history, moment_files

N, QUERIES, EPS = 20, 4, 1e-3
GROUPS = sf.Groups.from_lists([[0, 3, 5], range(6, 20), [1], [2, 4]], N)
OWN_GROUP = {name: int(name.startswith("4")) for name in mlp().state_dict()}  # the last layer's is another one
# In the first segment the last layer is frozen until its second checkpoint comes near; in the second it has a schedule.
RATES = by_span((16, (0.4, 0.0)), (9, (0.4, 0.9)), (15, (0.2, 0.1)))
DECAYS = by_span((20, (0.01, 0.0)), (20, (0.02, 0.03)))


def _made(folder: Path) -> sf.Trajectory:
    return trajectory_of(folder, perturbed_states(mlp(), 4), N)


def _scores(folder: Path, trajectory: sf.Trajectory, method: Any, keep: tuple[str, ...] = ()) -> sf.Scores:
    analyzer = analyzer_of(mlp(), trajectory, folder, method=method)
    analyzer.fit(vectors(N))
    return analyzer.score(GROUPS, vectors(N), vectors(QUERIES, seed=5), keep=keep)


def test_segments_weigh_checkpoints_by_the_rates_of_each_group(tmp_path: Path) -> None:
    [first, second] = cut(history(_made(tmp_path), OWN_GROUP, RATES), 2)
    rates = RATES.tolist()

    def total(group: int, start: int, end: int) -> float:
        return sum(row[group] for row in rates[start:end])

    for segment, start in ((first, 0), (second, 20)):
        middle, end = start + 15, start + 20
        expected = [
            (total(g, start, middle) / total(g, start, end), total(g, middle, end) / total(g, start, end))
            for g in (0, 1)
        ]
        assert segment.weights == tuple(pytest.approx(pair) for pair in zip(*expected, strict=True))
        both = [sum(total(g, *span) for g in (0, 1)) for span in ((start, middle), (middle, end))]
        assert segment.overall == pytest.approx([part / sum(both) for part in both])


@pytest.mark.parametrize("factor", [0.0, 0.1, 3.7])
def test_groups_that_agree_to_rounding_weigh_by_one_number(tmp_path: Path, factor: float) -> None:
    """A group that never moved weighs its checkpoints alike, and so do groups whose steps were alike."""
    steps = torch.linspace(0.1, 0.7, 40, dtype=torch.float64)[:, None]
    own = torch.full_like(steps, 0.3) if factor == 0.0 else steps
    made = _made(tmp_path / "run")
    rates = torch.cat([own, factor * own], 1)
    for segment in cut(history(made, OWN_GROUP, rates), 4 if factor == 0.0 else 2):
        assert all(isinstance(weight, float) for weight in segment.weights)
        assert segment.weights == segment.overall


@dataclass(frozen=True)
class KFAC:
    """An influence function with K-FAC pooled over the whole run, against each checkpoint's gradients."""

    def plan(self, trajectory: sf.Trajectory, stage: int = -1) -> Plan:
        [segment] = cut(trajectory, 1)
        points, groups = tuple(Point.at(0, index) for index in segment.checkpoints), len(segment.lr_steps)
        curvature = Curvature(0, points, segment.weights, kind="kfac")
        operator = Spectral(
            stage=0, kind="damped_inverse", curvature=curvature, amount=(0.01,) * groups, shift=(0.0,) * groups
        )
        final = final_point(trajectory)
        term = Term(label="all", stage=0, query=final, operators=(operator,), train=points, weights=segment.weights)
        return (term,)


METHODS: dict[str, Any] = {
    **{form: apart(2, preconditioner=form) for form in ("kronecker", "diagonal", "none")},
    "kfac": KFAC(),
    "tracin": sf.TracIn(),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_layer_is_scored_as_if_the_whole_model_had_its_groups_history(tmp_path: Path, name: str) -> None:
    made, by_layer = _made(tmp_path / "run"), {}
    scale = 1.0 if name in ("none", "kfac", "tracin") else 0.01
    files = moment_files(tmp_path, mlp(), 4)
    for label, columns in {"both": [0, 1], "first": [0], "second": [1]}.items():
        of = OWN_GROUP if label == "both" else dict.fromkeys(OWN_GROUP, 0)
        trajectory = history(
            made,
            of,
            scale * RATES[:, columns],
            decays=DECAYS[:, columns],
            optimizer=sf.OptimizerConstants("AdamW", eps=EPS),
            moments=files,
        )
        scores = _scores(tmp_path / label, trajectory, METHODS[name], keep=("layer",))
        by_layer[label] = dict(scores.by_layer)
        whole = _scores(tmp_path / label, trajectory, METHODS[name]).values
        torch.testing.assert_close(whole, scores.values, rtol=1e-9, atol=1e-12)
    for layer, expected in {"0": "first", "2": "first", "4": "second"}.items():
        torch.testing.assert_close(by_layer["both"][layer], by_layer[expected][layer], rtol=1e-7, atol=1e-12)
    assert not torch.allclose(by_layer["first"]["4"], by_layer["second"]["4"], rtol=1e-2, atol=0)


def _covered(start: int, groups: list[int]) -> list[float]:
    """The summed rates of the steps nearest to a segment's two checkpoints."""
    return [float(RATES[start + a : start + b, groups].sum()) for a, b in ((0, 15), (15, 20))]


def _weights(start: int, groups: list[int]) -> list[float]:
    return [part / sum(_covered(start, groups)) for part in _covered(start, groups)]


def _along_the_run() -> list[float]:
    """The weights of four checkpoints by the rates of both groups; the second's and the third's steps are ten."""
    covered = [float(RATES[a:b].sum()) for a, b in ((0, 15), (15, 25), (25, 35), (35, 40))]
    return [part / sum(covered) for part in covered]


def _shares(exact: Quantities, start: int, pool: tuple[int, int]) -> dict[str, float]:
    """Each layer's share of its group's rate times its own trace."""
    group_of = {name: int(name == "4") for name in exact.layers}
    traces = ekfac_traces(exact, pool, lambda name: _weights(start, [group_of[name]]))
    return oracles.trace_shares(traces, {name: sum(_covered(start, [group])) for name, group in group_of.items()})


def _source(exact: Quantities, layer: str, default: bool) -> Tensor:
    """SOURCE's dense formula for a layer, with its group's rates, decay and weights."""
    group = int(layer == "4")

    def combine(queries: Any, grouped: Any, curvature: Any) -> Tensor:
        segments = []
        for start, pool in ((0, (0, 1)), (20, (2, 3))):
            weights = _weights(start, [group])
            segments.append(
                {
                    "curvature": curvature(pool, weights) / (_shares(exact, start, pool)[layer] if default else 1),
                    "weights": weights,
                    "lr_steps": sum(_covered(start, [group])),
                    "decay_steps": float(DECAYS[start : start + 20, group].sum()),
                    "group_gradients": [grouped[i] for i in pool],
                }
            )
        query = sum(w * q for w, q in zip(_along_the_run(), queries, strict=True)) if default else queries[-1]
        return torch.stack(oracles.source_scores(query, segments, N)).sum(0)

    return reference(replace(exact, layers=(layer,)), GROUPS, combine)


@pytest.mark.parametrize("default", [True, False], ids=["default", "apart"])
def test_scores_equal_the_dense_formula_with_each_groups_rates_decay_and_weights(tmp_path: Path, default: bool) -> None:
    trajectory = history(_made(tmp_path / "run"), OWN_GROUP, RATES, decays=DECAYS)
    scores = _scores(tmp_path / "store", trajectory, sf.Source(2) if default else apart(2))
    exact = quantities(mlp(), perturbed_states(mlp(), 4), vectors(N), vectors(QUERIES, seed=5))
    expected = sum(_source(exact, layer, default) for layer in exact.layers)
    torch.testing.assert_close(scores.values, expected, rtol=1e-8, atol=1e-12)


def test_fast_source_weighs_mean_parameters_by_the_rates_of_all_groups(tmp_path: Path) -> None:
    trajectory = history(_made(tmp_path / "run"), OWN_GROUP, RATES)
    for term, segment in zip(sf.Source(segments=2, fast=True).plan(trajectory), cut(trajectory, 2), strict=True):
        [point] = term.train
        assert tuple(weight for _, weight in point.weights) == segment.overall and term.weights == (1.0,)
    assert torch.isfinite(_scores(tmp_path / "store", trajectory, sf.Source(segments=2, fast=True)).values).all()


def test_units_of_sums_over_layers_are_bound_to_the_weights_in_them(tmp_path: Path) -> None:
    """Only where weights differ between layers; with layers apart the units are the same whatever the weights."""
    made, method = _made(tmp_path / "run"), KFAC()
    alike, apart = history(made, OWN_GROUP, 0 * RATES + 0.3), history(made, OWN_GROUP, RATES)
    other = history(made, OWN_GROUP, RATES.flip(0))
    values = {}
    for label, trajectory in {"alike": alike, "apart": apart, "other": other}.items():
        values[label] = _scores(tmp_path / label, trajectory, method).values
        entries = [json.loads(path.read_text()) for path in (tmp_path / label / "manifest/scores").glob("**/*.json")]
        assert len(entries) == 4
        assert all(("weights" in entry["made_from"]) == (label != "alike") for entry in entries)
    assert not torch.allclose(values["apart"], values["other"], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "weights", [((0.5, 0.4), (0.5, 0.5)), ((0.5, 0.5), (0.5,)), (0.5, (0.5, 0.6))], ids=["sum", "lengths", "mixed"]
)
def test_weights_that_do_not_add_up_for_every_group_are_refused(weights: Any) -> None:
    point = Point.at(0, 0)
    with pytest.raises(sf.MethodError, match="expected one for each, 1 in all"):
        Term(label="one", stage=0, query=point, operators=(), train=(point, Point.at(0, 1)), weights=weights)
