"""Padding that the task masks enters no curvature: scores are those of batches of one, whatever the layers are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import segflow as sf

from ..support.helpers import trajectory_of

WORDS, WIDTH, N = 11, 6, 9
PAD = 1  # an ordinary word, as of tokenizers that have no word for padding


class Words(nn.Module):
    """Words are embedded, mixed by one layer that is called twice, and predicted by a head that may be tied."""

    def __init__(self, tied: bool, table: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.again = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.used = nn.Linear(WIDTH, WIDTH) if table else None  # its weight is used without a call
        if tied:
            self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.again(self.again(self.embed(ids)).tanh()).tanh()
        if self.used is not None:
            h = functional.linear(h, self.used.weight, self.used.bias)
        return self.head(h)


class OtherWord(sf.Task):
    draws_labels = False

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        ids, real = batch
        labels = (ids * 7 + 3) % WORDS if sample else (ids * 4 + 1) % WORDS
        return (functional.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none") * real).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch: Any) -> Tensor:
        return batch[1]


def collate(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    ids = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=PAD)
    real = torch.arange(ids.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
    return ids, real.double()


def texts(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, WORDS, (length,), generator=generator) for length in lengths]


LENGTHS = [3, WIDTH, 2, 4, 3, 5, 2, WIDTH, 4]  # the longest is as long as layers are wide
METHODS = [sf.InfluenceFunction(0.01, curvature="kfac"), sf.Source(segments=1)]


@pytest.mark.parametrize("method", METHODS, ids=["kfac", "source"])
@pytest.mark.parametrize(("tied", "table"), [(False, True), (True, False)], ids=["table", "tied"])
def test_padded_batches_have_the_scores_of_batches_of_one(tmp_path: Path, method: Any, tied: bool, table: bool) -> None:
    model, data = Words(tied, table), texts(LENGTHS)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trajectory = trajectory_of(tmp_path / "run", [state], N)
    values = []
    for size in (1, 4):
        analyzer = sf.Analyzer(
            model,
            OtherWord(),
            trajectory,
            store=tmp_path / str(size),
            method=method,
            collate_fn=collate,
            progress=False,
        )
        analyzer.fit(data, batch_size=size)
        values.append(analyzer.score(sf.Groups.singletons(N), data, data[:3], batch_size=size).values)
    for of_batches in values[1:]:
        torch.testing.assert_close(of_batches, values[0], rtol=1e-8, atol=1e-12)
