"""Examples that training drew unequally: scores of a data set in which each stands as often as it was drawn.

The naive references know no weights: they take the mean over a list in which example i stands n_i times, and example
i's share of the objective is c_i = n_i N / sum(n).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import segflow as sf
from segflow.curvature.kronecker import Covariance
from segflow.curvature.lissa import in_proportion
from segflow.curvature.projection import probes
from segflow.data.streams import stream
from segflow.methods.plan import Point, Projection
from segflow.model.tokens import Tokens
from segflow.runtime.ranks import current

from ..support import oracles
from ..support.gang import Failed, Gang
from ..support.helpers import analyzer_of, apart, example_loss, perturbed_states, trajectory_of
from ..support.naive import (
    GROUPS,
    LR,
    QUERIES,
    Margins,
    N,
    assert_near,
    exact_hessian,
    flat,
    grouped_rows,
    problem,
    projected_scores,
    tracked_modules,
)

DECAY = 0.01
DRAWN = torch.randint(0, 4, (3, N), generator=torch.Generator().manual_seed(4))  # by checkpoint; some are never drawn
SHARES = DRAWN.double() * N / DRAWN.sum(1, keepdim=True)
SINGLES = sf.Groups.singletons(N)


def _run(
    folder: Path,
    method: Any,
    net: str = "mlp",
    groups: sf.Groups = GROUPS,
    weights: Any = SHARES,
    fitting: dict[str, Any] | None = None,
    **constants: Any,
) -> sf.Scores:
    model, train, query = problem(net)
    states = perturbed_states(model, 3)
    constants = {"lr": LR, "weight_decay": DECAY, **constants}
    trajectory = trajectory_of(folder / "run", states, N, example_weights=weights, **constants)
    analyzer = analyzer_of(model, trajectory, folder / "store", task=Margins(), method=method, **(fitting or {}))
    analyzer.fit(train, batch_size=7)
    return analyzer.score(groups, train, query, batch_size=6)


class Naive:
    """Naive gradients by layer [n, P, O, I] at one checkpoint, of the examples as often as they were drawn."""

    def __init__(self, net: str, checkpoint: int, chosen: Any = range(N)):
        model, train, query = problem(net)
        model.load_state_dict(perturbed_states(model, 3)[checkpoint])
        self.layers, self.share = tracked_modules(model), SHARES[checkpoint]
        drawn = [example for example in chosen for _ in range(int(DRAWN[checkpoint, example]))]

        def gradients(data: Any, kind: str, examples: list[int]) -> dict[str, Tensor]:
            loss = example_loss(model, data, Margins(), kind)
            return oracles.example_gradients(model, self.layers, lambda k: loss(examples[k]), len(examples))

        self.asked = gradients(query, "measurement", list(range(QUERIES)))
        self.sampled, self.outputs = gradients(train, "sample", drawn), gradients(train, "measurement", drawn)
        self.plain = gradients(train, "train", list(range(N)))
        self.sampled_once = gradients(train, "sample", list(range(N)))
        self.real = {n: g * self.share[:, None, None, None] for n, g in self.plain.items()}
        self.real_drawn = {n: g[drawn] for n, g in self.plain.items()}
        sample = example_loss(model, train, Margins(), "sample")
        self.covariances = oracles.naive_covariances(model, self.layers, lambda k: sample(drawn[k]), len(drawn))

    def fit(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return (*self.covariances[name], self.sampled[name])

    def blocks(self, name: str, kind: str) -> Tensor:
        if kind == "ekfac":
            return oracles.dense_curvature(*oracles.pooled_ekfac([self.fit(name)]))
        if kind == "diagonal":
            return torch.stack([torch.diag(g.square().mean(0).flatten()) for g in self.sampled[name].movedim(1, 0)])
        A, S, positions = *self.covariances[name], {"first": 9, "second": 9}.get(name, 1)
        return torch.stack([positions * torch.kron(s, a) for s, a in zip(S, A, strict=True)])


def _influence(at: Naive, kind: str, damping: float, groups: sf.Groups) -> Tensor:
    total = torch.zeros(QUERIES, len(groups), dtype=torch.float64)
    for name in at.layers:
        for part, block in enumerate(at.blocks(name, kind)):
            query, group = at.asked[name][:, part].flatten(1), grouped_rows(at.real[name][:, part].flatten(1), groups)
            total += oracles.influence_scores(query, block, damping, group, N)
    return total


def _source(net: str, segments: int, groups: sf.Groups) -> Tensor:
    """Of 30 steps 15, 10 and 5 are nearest to the checkpoints."""
    at = [Naive(net, checkpoint) for checkpoint in range(3)]
    weights = (0.5, 1 / 3, 1 / 6)
    pools = [((0, 1, 2), weights, 30)] if segments == 1 else [((c,), (1.0,), 10) for c in range(3)]
    total = torch.zeros(QUERIES, len(groups), dtype=torch.float64)
    for name in at[0].layers:
        for part in range(at[0].asked[name].shape[1]):
            parts = [
                {
                    "curvature": oracles.dense_curvature(*oracles.pooled_ekfac([at[c].fit(name) for c in pool], w))[
                        part
                    ],
                    "weights": w,
                    "lr_steps": steps * LR,
                    "decay_steps": steps * LR * DECAY,
                    "group_gradients": [grouped_rows(at[c].real[name][:, part].flatten(1), groups) for c in pool],
                }
                for pool, w, steps in pools
            ]
            total += torch.stack(oracles.source_scores(at[2].asked[name][:, part].flatten(1), parts, N)).sum(0)
    return total


@pytest.mark.parametrize("groups", [GROUPS, SINGLES], ids=["groups", "singles"])
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_source_is_that_of_the_examples_as_often_as_they_were_drawn(
    tmp_path: Path, net: str, segments: int, groups: sf.Groups
) -> None:
    assert_near(_run(tmp_path, apart(segments), net, groups).values, _source(net, segments, groups))


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_influence_functions_are_those_of_the_drawn_examples(tmp_path: Path, net: str, kind: str) -> None:
    found = _run(tmp_path, sf.InfluenceFunction(0.05, kind), net).values
    assert_near(found, _influence(Naive(net, 2), kind, 0.05, GROUPS))
    assert not torch.allclose(
        found, _run(tmp_path / "alike", sf.InfluenceFunction(0.05, kind), net, weights=None).values
    )


@pytest.mark.parametrize("saved", [True, False])
def test_source_for_adamw_is_that_of_the_drawn_examples(tmp_path: Path, saved: bool) -> None:
    """Moments that were not saved are those of batches whose examples are drawn in proportion to their weights."""
    at, batch, eps, lr = [Naive("mlp", checkpoint) for checkpoint in range(3)], 4, 1e-3, 2e-3
    drawn_moments = [
        {name: g.mean(0).square() + g.var(0, correction=0) / batch for name, g in point.real_drawn.items()}
        for point in at
    ]
    constants = {"name": "AdamW", "eps": eps, "lr": lr, "weight_decay": 0.3, "batch_size": batch, "beta1": 0.0}
    files = [
        {k: v for n, (m,) in of.items() for k, v in ((f"{n}.weight", m[:, :-1]), (f"{n}.bias", m[:, -1]))}
        for of in drawn_moments
    ]
    if saved:
        found = _run(tmp_path, apart(), second_moments=files, **constants).values
    else:
        with pytest.warns(UserWarning, match="were not saved"):
            found = _run(tmp_path, apart(), **constants).values
    weights, expected = (0.5, 1 / 3, 1 / 6), torch.zeros(QUERIES, len(GROUPS), dtype=torch.float64)
    for name in at[0].layers:
        P = oracles.preconditioner([of[name] for of in drawn_moments], eps, weights)
        scaled = oracles.pooled_ekfac([oracles.scaled_fit(point.fit(name), P) for point in at], weights)
        segment = {
            "P": P.flatten(),
            "basis": (scaled[2].flatten(), torch.kron(scaled[1][0], scaled[0][0])),
            "lr_steps": 30 * lr,
            "decay_steps": 30 * lr * 0.3,
            "coupled": False,
            "weights": weights,
            "group_gradients": [grouped_rows(point.real[name].flatten(1)) for point in at],
        }
        [part] = oracles.preconditioned_source_scores(at[2].asked[name].flatten(1), [segment], N)
        expected += part
    assert_near(found, expected)


def test_tracin_hydra_and_plain_products_weigh_each_examples_gradient(tmp_path: Path) -> None:
    at, covered = [Naive("mlp", checkpoint) for checkpoint in range(3)], (15, 10, 5)
    real, asked = ([flat(rows) for rows in ([p.real for p in at], [p.asked for p in at])[of]] for of in (0, 1))
    grouped = [grouped_rows(rows) for rows in real]
    steps = [(q, count * LR, g) for q, count, g in zip(asked, covered, grouped, strict=True)]
    assert_near(_run(tmp_path / "tracin", sf.TracIn()).values, oracles.tracin_scores(steps, N))
    at_the_end = [(asked[2], lr_steps, g) for _, lr_steps, g in steps]
    assert_near(_run(tmp_path / "hydra", sf.Hydra()).values, oracles.tracin_scores(at_the_end, N))
    assert_near(_run(tmp_path / "dot", sf.GradientDot()).values, asked[2] @ grouped[2].mT / N)


def test_a_cosine_is_that_of_the_groups_weighted_gradient(tmp_path: Path) -> None:
    at, unit = Naive("mlp", 2), torch.nn.functional.normalize
    grouped = grouped_rows(flat(at.real))
    assert_near(_run(tmp_path, sf.GradientCosine()).values, unit(flat(at.asked), dim=1) @ unit(grouped, dim=1).mT)


@pytest.mark.parametrize("method", [sf.RepresentationSimilarity(), sf.RepresentationSimilarity(cosine=False)])
def test_representations_have_no_weights(tmp_path: Path, method: Any) -> None:
    found = _run(tmp_path / "weighted", method).values
    assert found.equal(_run(tmp_path / "alike", method, weights=None).values)


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("dimension", [None, 6])
@pytest.mark.parametrize("method", [sf.TRAK, sf.ProjectedFisher])
def test_kernels_are_those_of_the_drawn_examples(tmp_path: Path, method: Any, dimension: int | None, net: str) -> None:
    at = Naive(net, 2)
    of = [at.outputs if method is sf.TRAK else at.real_drawn, at.asked, at.real]
    rows = [flat(gradients) for gradients in of]
    if dimension is not None:
        shapes = {name: tuple(g.shape[1:]) for name, g in at.real.items()}
        made = probes(Projection(dimension, 3), shapes, torch.float64, torch.device("cpu"))
        rows = [
            sum(
                torch.einsum("npoi,kpo,kpi->nk", g, made[n].outputs_kPO, made[n].inputs_kPI)
                for n, g in gradients.items()
            )
            for gradients in of
        ]
    rows[0] = rows[0] * (N / len(rows[0])) ** 0.5  # for `projected_scores` divides by N
    expected = projected_scores(rows[0], rows[1], grouped_rows(rows[2]), 0.02)
    assert_near(_run(tmp_path, method(dimension, 0.02, 3), net).values, expected, 1e-6)


def _batched(rows: Tensor, share: Tensor, batch: int) -> Tensor:
    """Sums over batches, in the drawn order, of rows times the root of their shares."""
    order = stream(0, "curvature examples").permutation(N)
    rows = rows * share.sqrt().reshape(-1, *[1] * (rows.ndim - 1))
    return torch.stack([rows[order[start : start + batch]].sum(0) for start in range(0, N, batch)])


def test_batched_second_moments_sum_gradients_times_the_roots_of_the_weights(tmp_path: Path) -> None:
    at, batch, damping = Naive("mlp", 2), 6, 0.05
    kernel = projected_scores(
        _batched(flat(at.plain), at.share, batch), flat(at.asked), grouped_rows(flat(at.real)), damping
    )
    found = _run(tmp_path / "kernel", sf.ProjectedFisher(None, damping, fisher_batch=batch))
    assert_near(found.values, kernel, 1e-6)
    expected = torch.zeros(QUERIES, len(GROUPS), dtype=torch.float64)
    for name, (A, S) in at.covariances.items():
        Q_A, Q_S = oracles.eigenbasis(A, S)
        sums = _batched(at.sampled_once[name], at.share, batch)
        Lambda = oracles.corrected_eigenvalues(sums, Q_A, Q_S) * len(sums) / N
        [block] = oracles.dense_curvature(Q_A, Q_S, Lambda)
        query, group = at.asked[name][:, 0].flatten(1), grouped_rows(at.real[name][:, 0].flatten(1))
        expected += oracles.influence_scores(query, block, damping, group, N)
    found = _run(tmp_path / "ekfac", sf.InfluenceFunction(damping, fisher_batch=batch))
    assert_near(found.values, expected)
    [error] = found.provenance["batching_error"]
    assert error > 0


def test_lissa_inverts_the_hessian_of_the_drawn_examples(tmp_path: Path) -> None:
    """Weights that are whole numbers and as many draws as examples: every batch holds each as often as it counts."""
    share = torch.tensor([0, 3, 1, 1, 0] * 4)
    drawn = [example for example in range(N) for _ in range(int(share[example]))]
    hessian, asked, rows = exact_hessian(drawn)
    damping = 2.0 + max(0.0, -torch.linalg.eigvalsh(hessian).min().item())
    expected = oracles.influence_scores(asked, hessian, damping, grouped_rows(rows * share[:, None]), N)
    for scale in (None, 20.0):
        method = sf.LiSSA(damping, steps=150, sample_size=N, scale=scale)
        assert_near(_run(tmp_path / f"{scale}", method, weights=share).values, expected, 1e-5)


def test_lissas_draws_are_in_proportion_to_the_weights() -> None:
    weights, draws = np.array([0.0, 0.35, 2.0, 1.15, 0.0, 2.5]), np.random.default_rng(0)
    counts = np.stack([np.bincount(in_proportion(weights, 4, draws), minlength=6) for _ in range(4000)])
    exact = weights * 4 / 6
    assert np.abs(counts - exact).max() < 1
    assert np.abs(counts.mean(0) - exact).max() < 0.03
    pairs = np.cov(counts.T)
    assert pairs[1, 3] > -1  # in random order: which examples come together differs
    assert len(np.unique(counts, axis=0)) > 4


def test_curvature_of_some_examples_is_weighted_among_them(tmp_path: Path) -> None:
    few = 9
    chosen = np.sort(stream(0, "curvature examples").permutation(N)[:few])
    some, every = Naive("mlp", 2, chosen), Naive("mlp", 2)
    some.real = every.real  # groups are scored with all of their examples
    for kind in ("ekfac", "kfac", "diagonal"):
        found = _run(tmp_path / kind, sf.InfluenceFunction(0.05, kind), fitting={"curvature_examples": few})
        assert_near(found.values, _influence(some, kind, 0.05, GROUPS))


def test_curvature_of_examples_that_were_never_drawn_is_refused(tmp_path: Path) -> None:
    chosen = stream(0, "curvature examples").permutation(N)[:4]
    weights = np.ones(N)
    weights[chosen] = 0
    with pytest.raises(sf.FactorError, match=r"step 30: all of the 4 examples .* weight of 0.*curvature_examples="):
        _run(tmp_path, sf.InfluenceFunction(), weights=weights, fitting={"curvature_examples": 4})


def test_covariances_count_tokens_as_often_as_their_example_where_padding_differs() -> None:
    times, generator = torch.tensor([0, 3, 1, 2]), torch.Generator().manual_seed(0)
    a, g = (torch.randn(2, 4, 5, D, generator=generator, dtype=torch.float64) for D in (3, 2))
    mask = torch.arange(5)[None, :] < torch.tensor([5, 1, 3, 4])[:, None]
    for masked in (mask, None):
        weighted, repeated = (
            Covariance.zeros(((2, 3, 3), (2, 2, 2)), torch.float64, torch.device("cpu")) for _ in range(2)
        )
        weighted.add_(Tokens(a, g), masked, times.double())
        rows = torch.repeat_interleave(torch.arange(4), times)
        repeated.add_(Tokens(a[:, rows], g[:, rows]), None if masked is None else masked[rows])
        for name, expected in vars(repeated).items():
            torch.testing.assert_close(getattr(weighted, name), expected)


METHODS = {
    "source": sf.Source(segments=2),
    "automatic": sf.Source(segments="auto", penalty=0.01),
    "fast": sf.Source(fast=True),
    "batched": sf.Source(fisher_batch=3),
    "kfac": sf.InfluenceFunction(0.05, "kfac"),
    "tracin": sf.TracIn(),
    "trak": sf.TRAK(6, 0.02),
    "lissa": sf.LiSSA(2.0, steps=5, sample_size=7),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_example_that_was_never_drawn_has_no_score_and_others_add_up(tmp_path: Path, name: str) -> None:
    never = (DRAWN == 0).all(0)
    never[:2] = True
    shares = torch.where(never, 0.0, SHARES + 0.1)
    single = _run(tmp_path / "single", METHODS[name], groups=SINGLES, weights=shares).values
    assert not single[:, never].any()
    assert (single[:, ~never] != 0).all()
    found = _run(tmp_path / "groups", METHODS[name], weights=shares).values
    assert_near(found, torch.stack([single[:, list(m)].sum(1) for m in GROUPS.members], 1))


@pytest.mark.parametrize("name", METHODS)
def test_what_was_never_drawn_may_be_anything(tmp_path: Path, name: str) -> None:
    """Neither curvature nor scores depend on an example of weight 0."""
    values = []
    for change in (0.0, 3.0):
        model, train, query = problem("mlp")
        train.tensors[0][5] += change
        weights = torch.ones(N)
        weights[5] = 0
        trajectory = trajectory_of(
            tmp_path / f"run-{change}", perturbed_states(model, 3), N, lr=LR, example_weights=weights
        )
        analyzer = analyzer_of(model, trajectory, tmp_path / f"{change}", task=Margins(), method=METHODS[name])
        analyzer.fit(train)
        values.append(analyzer.score(GROUPS, train, query).values)
    assert_near(values[1], values[0])


def test_equal_weights_give_the_scores_of_none(tmp_path: Path) -> None:
    for name, method in METHODS.items():
        if name != "lissa":  # other draws
            alike = _run(tmp_path / name / "none", method, weights=None).values
            assert_near(_run(tmp_path / name / "equal", method, weights=[7.0] * N).values, alike)


def test_automatic_segments_see_that_the_weights_changed(tmp_path: Path) -> None:
    """The parameters stay the same, but half of the examples leave after the second of four checkpoints."""
    model, train, query = problem("mlp")
    states = perturbed_states(model, 1) * 4
    half = [2.0 * (example < N // 2) for example in range(N)]
    for place, (weights, cuts) in enumerate([([[1.0] * N] * 4, []), ([[1.0] * N] * 2 + [half] * 2, [20])]):
        trajectory = trajectory_of(tmp_path / f"run-{place}", states, N, lr=LR, example_weights=weights)
        method = sf.Source(segments="auto", penalty=0.01)
        analyzer = analyzer_of(model, trajectory, tmp_path / f"store-{place}", task=Margins(), method=method)
        analyzer.fit(train)
        [stages] = analyzer.score(GROUPS, train, query).provenance["segmentation"]
        assert stages["train"]["cuts"] == cuts


@pytest.mark.parametrize("name", ["source", "automatic", "batched", "kfac", "tracin", "trak", "lissa"])
def test_a_store_of_other_weights_is_refused_or_not_read(tmp_path: Path, name: str) -> None:
    method, other = METHODS[name], SHARES.flip(0)
    fresh = _run(tmp_path / "fresh", method, weights=other).values
    for weights in (SHARES, None):
        folder = tmp_path / str(weights is None)
        assert not torch.allclose(_run(folder, method, weights=weights).values, fresh)
        if name in ("tracin", "lissa"):  # nothing is fitted: scores of their own
            assert _run(folder, method, weights=other).values.equal(fresh)
        else:
            with pytest.raises(sf.StoreError, match="with example weights"):
                _run(folder, method, weights=other)


def _on_ranks(folder: str, store: str, name: str, few: int | None) -> list[list[float]]:
    model, train, query = problem("mlp")
    states = perturbed_states(model, 3)
    trajectory = trajectory_of(Path(folder) / f"run-{current().index}", states, N, lr=LR, example_weights=SHARES)
    options = {"method": METHODS[name], "curvature_examples": few}
    analyzer = analyzer_of(model, trajectory, Path(folder) / store, Margins(), **options)
    analyzer.fit(train, batch_size=4)
    return analyzer.score(GROUPS, train, query).values.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "few"), [("source", 13), ("automatic", None), ("batched", None), ("kfac", None), ("trak", 11)]
)
def test_several_ranks_agree_with_one(gang: Gang, tmp_path: Path, name: str, few: int | None) -> None:
    alone = _on_ranks(str(tmp_path), "alone", name, few)
    for of_rank in gang.run(2, _on_ranks, str(tmp_path), "ranks", name, few):
        assert not isinstance(of_rank, Failed), of_rank
        torch.testing.assert_close(torch.tensor(of_rank), torch.tensor(alone), rtol=1e-8, atol=1e-12)


def _of_ranks_own(folder: str) -> None:
    model, train, _ = problem("mlp")
    rank = current().index
    weights = np.arange(N) + rank
    trajectory = trajectory_of(Path(folder) / f"run-{rank}", perturbed_states(model, 1), N, example_weights=weights)
    analyzer_of(model, trajectory, Path(folder) / "store", Margins()).fit(train)


def test_ranks_with_different_weights_are_refused(gang: Gang, tmp_path: Path) -> None:
    for of_rank in gang.run(2, _of_ranks_own, str(tmp_path)):
        assert isinstance(of_rank, Failed) and of_rank.kind == "RankError"


def test_a_points_weights_are_the_mean_of_its_checkpoints_and_of_another_stage_the_nearest(tmp_path: Path) -> None:
    model, _, _ = problem("mlp")
    states = perturbed_states(model, 3)
    earlier = trajectory_of(tmp_path / "earlier", states, N, example_weights=SHARES)
    later = trajectory_of(tmp_path / "later", states, N, example_weights=SHARES.flip(0))
    earlier.stage, later.stage = "before", "after"
    analyzer = analyzer_of(model, later.after(earlier), tmp_path / "store", Margins())
    first, last = analyzer.runs[0]
    assert first.example_weights(Point.at(0, 1)).equal(SHARES[1])
    mean = first.example_weights(Point(0, ((0, 0.25), (2, 0.75))))
    torch.testing.assert_close(mean, 0.25 * SHARES[0] + 0.75 * SHARES[2])
    assert first.example_weights(Point.at(1, 0)).equal(SHARES[2])
    assert last.example_weights(Point.at(0, 2)).equal(SHARES[2])
    plain = analyzer_of(model, trajectory_of(tmp_path / "plain", states, N), tmp_path / "store", Margins())
    assert plain.context.example_weights(Point.at(0, 1)) is None
