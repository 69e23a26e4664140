"""Views of examples that are drawn at random: their mean, as of a dataset that holds every view as an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

import segflow as sf
from segflow.data.readers import Reader

from ..support.helpers import FixedLabels, analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N, VIEWS = 20, 3


class Augmented(Dataset):
    """Inputs with noise on them, another at each reading."""

    def __init__(self) -> None:
        self.data = vectors(N)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        return x + 0.5 * torch.randn(x.shape, dtype=x.dtype), y


def _unrolled() -> TensorDataset:
    """Every view as an example of its own: view v of example i is example v * N + i."""
    batches = list(Reader(Augmented(), seed=0).batches([[i] for i in range(N)], torch.device("cpu"), views=VIEWS))
    columns = [torch.cat([batch.content[side] for batch in batches]) for side in (0, 1)]
    return TensorDataset(*(column.unflatten(0, (N, VIEWS)).transpose(0, 1).flatten(0, 1) for column in columns))


METHODS = [
    sf.Source(segments=2),
    sf.InfluenceFunction(0.01),
    sf.InfluenceFunction(0.01, "kfac"),
    sf.InfluenceFunction(0.01, "diagonal"),
    sf.TracIn(),
    sf.GradientCosine(),
    sf.ProjectedFisher(5),
    sf.RepresentationSimilarity(),
    sf.RepresentationSimilarity(cosine=False),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_scores_of_views_are_those_of_a_dataset_that_holds_them_all(tmp_path: Path, method: Any) -> None:
    groups = sf.Groups.random(N, 6, seed=1)
    every = [[v * N + i for v in range(VIEWS) for i in members] for members in groups.members]

    def scored(size: int, train: Any, of: sf.Groups, views: int) -> Tensor:
        folder = tmp_path / str(size)
        trajectory = trajectory_of(folder / "run", perturbed_states(mlp(), 2, 0.3), size)
        analyzer = analyzer_of(mlp(), trajectory, folder / f"store{views}", FixedLabels(), method=method, views=views)
        analyzer.fit(train)
        return analyzer.score(of, train, vectors(3, seed=9)).values

    expected = scored(VIEWS * N, _unrolled(), sf.Groups.from_lists(every, VIEWS * N), 1)
    if isinstance(method, sf.RepresentationSimilarity) and method.cosine:
        expected = expected / VIEWS  # a sum of cosines has no number of examples in it
    torch.testing.assert_close(scored(N, Augmented(), groups, VIEWS), expected, rtol=1e-9, atol=1e-14)
    assert not torch.allclose(scored(N, Augmented(), groups, 1), expected, rtol=1e-3)


def test_features_are_the_mean_of_those_of_views(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 1, 0.3), N)
    big = trajectory_of(tmp_path / "big", perturbed_states(mlp(), 1, 0.3), VIEWS * N)
    for kind in ("gradient", "weight gradient", "representation", "input"):
        found = analyzer_of(mlp(), trajectory, tmp_path / "a", FixedLabels(), views=VIEWS).features(Augmented(), kind)
        every = analyzer_of(mlp(), big, tmp_path / "b", FixedLabels()).features(_unrolled(), kind)
        expected = torch.from_numpy(every.reshape(VIEWS, N, -1).mean(0))
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_lissas_batches_take_views_in_turn(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 1, 0.3), N)

    def scored(views: int) -> Tensor:
        method = sf.LiSSA(5.0, steps=60, sample_size=N)
        analyzer = analyzer_of(mlp(), trajectory, tmp_path / f"{views}", FixedLabels(), method=method, views=views)
        return analyzer.score(sf.Groups.random(N, 6), Augmented(), vectors(3, seed=9)).values

    assert not torch.allclose(scored(1), scored(VIEWS), rtol=1e-3)


def test_units_of_another_number_of_views_are_refused(tmp_path: Path) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 2, 0.3), N)
    for views, other in ((1, 2), (2, 1)):
        fit = {n: analyzer_of(mlp(), trajectory, tmp_path / f"s{views}", FixedLabels(), views=n).fit for n in (1, 2)}
        fit[views](Augmented())
        with pytest.raises(sf.StoreError, match="views: stored"):
            fit[other](Augmented())


@pytest.mark.parametrize(
    "options", [{"views": 0}, {"views": 1.5}, {"num_workers": -1}, {"num_workers": True}, {"collate_fn": 3}]
)
def test_options_that_make_no_sense_are_refused_by_name(tmp_path: Path, options: dict[str, Any]) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 1, 0.3), N)
    with pytest.raises(sf.SegflowError, match=rf"{next(iter(options))}="):
        analyzer_of(mlp(), trajectory, tmp_path / "store", **options)
