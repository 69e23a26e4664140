"""Whitening, k-means and clusters of bounded size, against exact references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import cluster as sklearn_cluster

import segflow as sf
from segflow.groups import kmeans as clustering
from segflow.groups import whitening
from segflow.groups.kmeans import KMeans, balanced, cluster, lloyd, nearest
from segflow.groups.whitening import Rows, Whitening, feature_rows


def _blobs(n: int = 600, features: int = 5, seed: int = 0) -> np.ndarray:
    """Correlated features of very different scales around a few centres, far from the origin."""
    generator = np.random.default_rng(seed)
    centres = 4 * generator.standard_normal((7, features))
    x = centres[generator.integers(0, 7, n)] + generator.standard_normal((n, features))
    return (x @ generator.standard_normal((features, features))) * np.logspace(-2, 2, features) + 30.0


def _white(x: Any, kind: str = "full", **options: Any) -> np.ndarray:
    rows = feature_rows(x)
    return Rows(rows, Whitening.fit(rows, kind, **options)).all().numpy()


def _partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def _inertia(white_NR: np.ndarray, labels: np.ndarray) -> float:
    parts = [white_NR[labels == label] for label in np.unique(labels)]
    return sum(((part - part.mean(0)) ** 2).sum() for part in parts)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "_CHUNK", 8 * 5 * 64)  # 64 rows of five features


# Whitening


@pytest.mark.parametrize("kind", ["full", "scale", "none"])
def test_whitened_features_have_the_covariance_that_is_promised(kind: str, small_chunks: None) -> None:
    x = _blobs()
    white, exact = _white(x, kind).astype(np.float64), np.cov(x.T, bias=True)
    expected = {
        "full": np.eye(5),
        "scale": exact / np.sqrt(np.outer(exact.diagonal(), exact.diagonal())),
        "none": exact / 4.0 ** round(np.log2(exact.diagonal().mean()) / 2),
    }[kind]
    np.testing.assert_allclose(np.cov(white.T, bias=True), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-4 * np.abs(white).max())


def test_full_whitening_is_numpys_principal_axes_divided_by_their_standard_deviations() -> None:
    x = _blobs()
    sigma, axes = np.linalg.eigh(np.cov(x.T, bias=True))
    expected = ((x - x.mean(0)) @ axes / np.sqrt(sigma))[:, ::-1]
    found = _white(x)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_moments_of_chunks_are_those_of_all_rows_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.sort(_blobs(), axis=0) + 1e6  # sorted, so that chunks differ, and far from zero
    for products in (True, False):
        monkeypatch.setattr(whitening, "_CHUNK", 8 * 5 * 37)
        found = whitening.moments(x, products)
        centred = x - x.mean(0)
        exact = centred.T @ centred if products else (centred**2).sum(0)
        np.testing.assert_allclose(found.scatter.numpy(), exact, rtol=1e-7)
        np.testing.assert_allclose(found.mean_D.numpy(), x.mean(0), rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 4])
def test_gradients_of_a_model_with_c_classes_have_at_most_c_dimensions(dtype: torch.dtype, classes: int) -> None:
    torch.manual_seed(0)
    residual = torch.softmax(torch.randn(400, classes), 1) - torch.eye(classes)[torch.randint(0, classes, (400,))]
    features = (residual.to(torch.float32 if dtype == torch.bfloat16 else dtype)) @ torch.randn(classes, 90).to(
        torch.float32 if dtype == torch.bfloat16 else dtype
    )
    assert _white(features.to(dtype)).shape[1] == classes - 1  # the residuals add up to zero


def test_constant_features_are_left_out_and_scaling_one_changes_nothing() -> None:
    x = _blobs()
    padded = np.insert(x, 2, 0.1, axis=1).astype(np.float32)
    assert _white(padded).shape[1] == _white(padded, "scale").shape[1] == 5
    assert _white(padded, "none").shape[1] == 6
    scaled = x * np.array([1, 1e3, 1, 1, 1])
    np.testing.assert_allclose(_white(scaled, "scale"), _white(x, "scale"), rtol=1e-4, atol=1e-4)


def test_examples_that_are_all_alike_are_one_group() -> None:
    for kind in ("full", "scale", "none"):
        assert len(sf.Groups.kmeans(np.full((9, 3), 0.1), count=4, whiten=kind)) == 1


@pytest.mark.parametrize("kind", ["full", "scale", "none"])
@pytest.mark.parametrize("memory", [1 << 30, 5000], ids=["in memory", "beyond"])
def test_one_factor_of_all_features_changes_no_group(kind: str, memory: int) -> None:
    x = _blobs()
    own = cluster(x, 8, kind, KMeans(memory=memory))
    assert len(np.unique(own)) == 8
    for power in (-400, -100, 150, 400):  # of two: without rounding
        scaled = cluster(x * 2.0**power, 8, kind, KMeans(memory=memory))
        assert scaled.tolist() == own.tolist(), f"2 to the {power}"


@pytest.mark.parametrize("kind", ["full", "scale", "none"])
@pytest.mark.parametrize("factor", [1e200, 1e-200])
def test_features_whose_squares_are_out_of_range_are_refused(kind: str, factor: float) -> None:
    with pytest.raises(sf.GroupError, match=r"largest magnitude is .*, expected 1e-140 to 1e\+140.* Multiply all"):
        sf.Groups.kmeans(np.random.default_rng(0).random((20, 3)) * factor, count=3, whiten=kind)


def test_a_covariance_that_does_not_fit_the_memory_is_refused_and_scaling_is_not() -> None:
    x = np.random.default_rng(0).standard_normal((20, 50))
    with pytest.raises(sf.GroupError, match=r'covariance of 50 features needs 60,000 bytes.*whiten="scale"'):
        sf.Groups.kmeans(x, count=3, memory=50_000)
    assert len(sf.Groups.kmeans(x, count=3, memory=50_000, whiten="scale")) == 3


# k-means


@pytest.mark.parametrize("k", [2, 7, 40])
def test_clusters_are_those_of_sklearn(k: int) -> None:
    white = _white(_blobs())
    init, _ = sklearn_cluster.kmeans_plusplus(white, k, random_state=3)
    exact = sklearn_cluster.KMeans(k, init=init, n_init=1, tol=1e-3, max_iter=60, algorithm="lloyd").fit(white)
    found = cluster(_blobs(), k, how=KMeans(seed=3))
    assert _partition(found) == _partition(exact.labels_)
    assert sorted(set(found.tolist())) == list(range(k))


@pytest.mark.parametrize(("tolerance", "iterations"), [(1e-3, 60), (0.0, 300), (1e-3, 2)])
def test_our_own_lloyd_takes_sklearns_steps_from_the_same_centres(
    tolerance: float, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "_DISTANCES", 4 * 7 * 100)  # a hundred rows at a time
    white = _white(_blobs())
    init = white[:7].copy()
    model = sklearn_cluster.KMeans(7, init=init, n_init=1, tol=tolerance, max_iter=iterations, algorithm="lloyd")
    exact = model.fit(white.copy()).cluster_centers_
    found = lloyd(torch.from_numpy(white), torch.from_numpy(init), tolerance, iterations)
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-4, atol=1e-4)


def test_our_own_lloyd_leaves_empty_clusters_in_place() -> None:
    x, centres = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.4], [99.0]])
    assert lloyd(x, centres, 1e-3, 5).tolist() == [[0.5], [99.0]]


def test_nearest_centres_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_DISTANCES", 4 * 9 * 50)
    x, centres = torch.randn(120, 4), torch.randn(9, 4)
    exact = torch.cdist(x.double(), centres.double()).square().sort(1)
    for most in (1, 4, 20):
        places, distances = nearest(x, centres, most)
        assert places.shape == (120, min(most, 9))
        np.testing.assert_array_equal(places, exact.indices[:, :most].numpy())
        np.testing.assert_allclose(distances, exact.values[:, :most].numpy(), rtol=1e-4, atol=1e-5)


def test_features_from_disk_give_the_clusters_of_those_in_memory(tmp_path: Path, small_chunks: None) -> None:
    x = _blobs().astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    for features in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(x), x.reshape(600, 5, 1), x.tolist()):
        np.testing.assert_array_equal(cluster(features, 7), cluster(x, 7))
    np.testing.assert_array_equal(x, np.load(tmp_path / "x.npy"))  # what is given is left alone


def test_features_beyond_memory_are_clustered_nearly_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.sort(_blobs(4000), axis=0)  # sorted data is read well mixed
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(clustering, "_BATCH", 512)
    held = _inertia(_white(x), cluster(x, 20))
    read = cluster(np.load(tmp_path / "x.npy", mmap_mode="r"), 20, how=KMeans(memory=70_000))
    assert _partition(read) != _partition(cluster(x, 20)), "mini-batches take other steps"
    assert _inertia(_white(x), read) < 1.1 * held
    np.testing.assert_array_equal(read, cluster(x, 20, how=KMeans(memory=70_000)))


def test_batches_beyond_memory_hold_every_row_once_and_rows_from_everywhere() -> None:
    batches = list(clustering._shuffled(1000, 128, np.random.default_rng(0)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert all(len(batch) <= 128 and np.ptp(batch) > 500 for batch in batches[:-1])


def test_fewer_distinct_rows_than_clusters_give_fewer_groups_without_a_warning() -> None:
    x = np.repeat(np.arange(4.0), 10)[:, None]
    assert sf.Groups.kmeans(x, count=9).sizes.tolist() == [10] * 4
    assert sf.Groups.kmeans(x, count=9, memory=100).sizes.tolist() == [10] * 4
    assert sf.Groups.kmeans(x, count=9, max_size=6).sizes.max() <= 6


def test_the_first_centres_of_many_examples_are_drawn_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = sklearn_cluster.kmeans_plusplus
    monkeypatch.setattr(
        sklearn_cluster, "kmeans_plusplus", lambda x, *a, **k: (drawn.append(len(x)), real(x, *a, **k))[1]
    )
    monkeypatch.setattr(clustering, "_SEEDED_ON", 50)
    cluster(_blobs(), 3)
    cluster(_blobs(), 20)
    cluster(_blobs(), 100)
    assert drawn == [50, 200, 600]


# Clusters of bounded size


def _stable(x_NR: np.ndarray, centres_KR: np.ndarray, label_N: np.ndarray, max_size: int, most: int = 16) -> bool:
    """Brute force: no example would rather have one of its nearest centres that has room, or holds a farther one."""
    far_NK = ((x_NR[:, None].astype(np.float64) - centres_KR[None]) ** 2).sum(-1)
    for example, own in enumerate(label_N):
        for centre in np.argsort(far_NK[example])[:most]:
            if far_NK[example, centre] >= far_NK[example, own] - 1e-4:
                break
            held = far_NK[label_N == centre, centre]
            if len(held) < max_size or held.max() > far_NK[example, centre] + 1e-4:
                return False
    return True


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 16), slack=st.integers(0, 3), n=st.integers(16, 90))
def test_bounded_clusters_are_a_stable_matching(seed: int, k: int, slack: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    x = (generator.standard_normal((n, 2)) * generator.exponential(1, (n, 1))).astype(np.float32)  # skewed
    centres, most = generator.standard_normal((k, 2)).astype(np.float32), -(-n // k) + slack
    label_N = balanced(torch.from_numpy(x), torch.from_numpy(centres), most)
    assert np.bincount(label_N).max() <= most
    assert _stable(x, centres, label_N, most)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(17, 30), slack=st.integers(0, 1))
def test_of_more_centres_a_matching_is_stable_among_each_examples_nearest(seed: int, k: int, slack: int) -> None:
    generator = np.random.default_rng(seed)
    x = (generator.standard_normal((90, 2)) * generator.exponential(0.3, (90, 1))).astype(np.float32)
    centres, most = generator.standard_normal((k, 2)).astype(np.float32), -(-90 // k) + slack
    label_N = balanced(torch.from_numpy(x), torch.from_numpy(centres), most)
    assert np.bincount(label_N).max() <= most
    assert _stable(x, centres, label_N, most)


def test_a_full_centre_beyond_the_nearest_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_NEAREST", 1)
    x, centres = np.array([[0.0], [0.1], [5.5]], dtype=np.float32), np.array([[0.0], [2.5], [9.0]], dtype=np.float32)
    label_N = balanced(torch.from_numpy(x), torch.from_numpy(centres), 1)
    assert label_N.tolist() == [0, 2, 1]
    assert _stable(x, centres, label_N, 1, most=1)
    assert not _stable(x, centres, label_N, 1, most=3)


def test_a_matching_that_is_not_stable_is_told_from_one_that_is() -> None:
    x, centres = np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]])
    assert _stable(x, centres, np.array([0, 1]), 1)
    assert not _stable(x, centres, np.array([1, 0]), 1)


def test_examples_that_all_of_their_nearest_centres_refuse_go_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clustering, "_NEAREST", 2)
    x, centres = torch.randn(60, 2) * 0.01, torch.arange(20.0)[:, None].expand(20, 2).contiguous()
    label_N = balanced(x, centres, 3)
    assert np.bincount(label_N, minlength=20).tolist() == [3] * 20
    assert set(label_N[np.argsort((x - centres[0]).square().sum(1).numpy())[:3]]) == {0}


@pytest.mark.parametrize("memory", [1 << 30, 2000], ids=["in memory", "beyond"])
def test_max_size_holds_on_skewed_clusters_and_raises_their_number(memory: int) -> None:
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.standard_normal((280, 2)) * 0.1, generator.standard_normal((20, 2)) * 9])
    free = sf.Groups.kmeans(x, count=10, memory=memory, whiten="scale")
    bounded = sf.Groups.kmeans(x, count=10, memory=memory, whiten="scale", max_size=40)
    more = sf.Groups.kmeans(x, count=10, memory=memory, whiten="scale", max_size=25)
    assert free.sizes.max() > 60
    assert bounded.sizes.max() <= 40
    assert (len(more), more.sizes.max()) == (12, 25)
    again = sf.Groups.kmeans(x, count=10, memory=memory, whiten="scale", max_size=40)
    assert bounded.membership().tolist() == again.membership().tolist()


# Groups.kmeans


def test_groups_of_a_size_and_a_count_of_groups_are_the_same_thing() -> None:
    x = _blobs()
    by_size, by_count = sf.Groups.kmeans(x, size=90), sf.Groups.kmeans(x, count=7)
    assert by_size.membership().tolist() == by_count.membership().tolist()
    assert by_size.labels == tuple(f"cluster {k}" for k in range(7))
    assert len(sf.Groups.kmeans(x, size=1)) == 600
    assert len(sf.Groups.kmeans(x, size=5000)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"whiten": "none"},
        {"whiten": "scale"},
        {"max_size": 40},
        {"tolerance": 0.5},
        {"iterations": 1},
        {"memory": 5000},
    ],
    ids=str,
)
def test_every_option_changes_the_groups(options: dict[str, Any]) -> None:
    x = _blobs()
    own, other = sf.Groups.kmeans(x, count=30), sf.Groups.kmeans(x, **{"count": 30, **options})
    assert _partition(own.membership()) != _partition(other.membership())
    assert own.membership().tolist() == sf.Groups.kmeans(x, count=30).membership().tolist(), "and nothing else does"


BAD = np.ones((4, 2))
BAD[2, 1] = np.nan


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (BAD, {"count": 2}, "example 2 has NaN or infinite"),
        (np.array([[1.0], [np.inf]]), {"count": 1, "whiten": "none"}, "example 1 has NaN"),
        (torch.tensor([[1.0], [float("nan")]]), {"count": 1, "whiten": "scale"}, "example 1 has NaN"),
        (np.array(3.0), {"count": 1}, r"shape \(\)"),
        (np.ones((0, 3)), {"count": 1}, r"shape \(0, 3\)"),
        (np.ones((3, 0)), {"count": 1}, r"shape \(3, 0\)"),
        (["a", "b"], {"count": 1}, "expected real numbers"),
        (torch.ones(3, 2, dtype=torch.complex64), {"count": 1}, "complex64"),
        ([[1.0], [2.0, 3.0]], {"count": 1}, "expected an array"),
        (np.eye(4), {}, "size=None, count=None: give one"),
        (np.eye(4), {"size": 2, "count": 2}, "size=2, count=2: give one"),
        (np.eye(4), {"size": 0}, "size=0"),
        (np.eye(4), {"count": 5}, "count=5.*4 examples"),
        (np.eye(4), {"count": 1.5}, r"count=1\.5"),
        (np.eye(4), {"count": "2"}, "count='2'"),
        (np.eye(4), {"count": 2, "max_size": 0}, "max_size=0"),
        (np.eye(4), {"count": 2, "max_size": "3"}, "max_size='3'"),
        (np.eye(4), {"count": 2, "whiten": "zca"}, "whiten='zca' is not known"),
        (np.eye(4), {"count": 2, "tolerance": -1.0}, r"tolerance=-1\.0"),
        (np.eye(4), {"count": 2, "tolerance": "a"}, "tolerance='a': expected a finite number, at least 0"),
        (np.eye(4), {"count": 2, "tolerance": None}, "tolerance=None: expected a finite number"),
        (np.eye(4), {"count": 2, "seed": None}, "seed=None: expected a whole number"),
        (np.eye(4), {"count": 2, "iterations": 0}, "iterations=0"),
        (np.eye(4), {"count": 2, "memory": 0}, "memory=0"),
        (np.eye(4), {"count": 2, "seed": -1}, "seed=-1"),
    ],
)
def test_what_makes_no_sense_is_named(features: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(sf.GroupError, match=message):
        sf.Groups.kmeans(features, **options)


def test_features_of_few_dimensions_are_whitened_in_these_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same distances as by the whole covariance; one row outside the span, which no sample holds, is noticed."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(300, 7, generator=generator) @ torch.randn(7, 90, generator=generator) + 3.0
    seen: list[tuple[int, ...]] = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: seen.append(tuple(matrix.shape)) or real(matrix))
    quick = Rows(wide, Whitening.fit(wide, "full")).all()
    with monkeypatch.context() as patched:
        patched.setattr(whitening, "few_dimensions", lambda _: None)
        whole = Rows(wide, Whitening.fit(wide, "full")).all()
    assert seen == [(8, 8), (90, 90)]  # the mean is one direction more
    assert quick.shape == whole.shape == (300, 7)
    torch.testing.assert_close(torch.cdist(quick, quick), torch.cdist(whole, whole), rtol=1e-3, atol=1e-3)
    sampled = set(np.linspace(0, 299, 64).round().astype(int).tolist())
    other = next(row for row in range(300) if row not in sampled)
    wide[other] += torch.randn(90, generator=generator)
    assert whitening.few_dimensions(wide) is None
