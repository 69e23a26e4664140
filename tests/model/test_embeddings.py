"""Embeddings and bags: one-hot tokens make up autograd's gradients, and are never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from segflow.model.layers import choose_layers
from segflow.model.one_hot import OneHot

from ..support.exactness import RANDOMISED, Calls, assert_seen_exactly, normal

DTYPE = torch.float64
WORDS = 7


def _indices(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(seed))


@RANDOMISED
@given(st.data())
def test_embedding_tokens_equal_autograd_on_indices_of_any_rank(data: st.DataObject) -> None:
    """Repeated indices too: there are fewer words than indices."""
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3), "examples and positions")
    layer = nn.Embedding(
        WORDS,
        data.draw(st.integers(1, 3), "width"),
        padding_idx=data.draw(st.sampled_from([None, 0, 2, -1]), "padding"),
        sparse=data.draw(st.booleans(), "sparse"),
    )
    words = _indices(*shape, seed=data.draw(st.integers(0, 9)))
    words.flatten()[0] = 1  # a gradient of zero proves nothing
    words[(0,) * words.ndim] = 1
    assert not assert_seen_exactly(Calls(lambda m, x: m.words(x).tanh().cumsum(-1), words=layer), words).alone


def test_indices_along_another_axis_than_the_first_are_exact() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        return model.words(x.mT).cumsum(0).transpose(0, 1)

    assert not assert_seen_exactly(Calls(run, words=nn.Embedding(WORDS, 3)), _indices(4, 2)).alone


def test_an_embedding_s_inputs_are_never_formed() -> None:
    model = Calls(lambda m, x: m.words(x), words=nn.Embedding(1 << 30, 1, device="meta"))
    layer = choose_layers(model).tracked["words"]
    tokens = layer.tokens(_indices(2, 3), normal(2, 3, 1), torch.float64)
    assert isinstance(tokens.a_PBSI, OneHot) and tokens.a_PBSI.shape == (1, 2, 3, 1 << 30)


@pytest.mark.parametrize("positions", [None, "[S]", "[1, S]"])
def test_positions_that_are_looked_up_for_all_examples_together_are_exact(positions: str | None) -> None:
    """As GPT-2 and BERT look them up: [S] and [1, S] do not count the examples."""

    def run(model: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        places = {None: places.expand_as(x), "[S]": places, "[1, S]": places[None]}[positions]
        return model.fc((model.words(x) + model.places(places)).tanh())

    model = Calls(run, words=nn.Embedding(WORDS, 3), places=nn.Embedding(5, 3), fc=nn.Linear(3, 2))
    for size in (2, 3, 4, 5):
        seen = assert_seen_exactly(model, _indices(4, 5)[:, :size], sizes=(1, 2, 3, 4))
        assert not seen.alone


# ---- bags ----


def _bags(data: st.DataObject, mode: str) -> tuple[list[dict[str, Tensor]], bool]:
    """Examples of one bag each, some of them empty; whether they have weights."""
    weighted = mode == "sum" and data.draw(st.booleans(), "weighted")
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=4), "lengths of the bags")
    lengths[0] = max(1, lengths[0])
    bags = []
    for place, length in enumerate(lengths):
        bag = {"words": _indices(length, seed=place)}
        bag["words"][:1] = 1
        if weighted:
            bag["weights"] = normal(length, seed=place)
        bags.append(bag)
    return bags, weighted


@RANDOMISED
@given(st.data())
def test_bags_one_after_the_other_equal_autograd(data: st.DataObject) -> None:
    mode, ends = data.draw(st.sampled_from(["sum", "mean"])), data.draw(st.booleans(), "include_last_offset")
    padding = data.draw(st.sampled_from([None, 0, -1]), "padding")
    layer = nn.EmbeddingBag(WORDS, 2, mode=mode, include_last_offset=ends, padding_idx=padding)
    bags, weighted = _bags(data, mode)

    def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        lengths = torch.tensor([0, *(len(one["words"]) for one in examples)])
        offsets = lengths.cumsum(0)
        joined = {key: torch.cat([one[key] for one in examples]) for key in examples[0]}
        return joined | {"offsets": offsets if ends else offsets[:-1]}

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        given = {"per_sample_weights": batch["weights"]} if weighted else {}
        return model(batch["words"], batch["offsets"], **given).cumsum(1).sin().sum()

    seen = assert_seen_exactly(layer, bags, loss, collate=collate)
    assert not seen.alone


@RANDOMISED
@given(st.data())
def test_bags_in_rows_equal_autograd(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(["sum", "mean"]))
    padding = data.draw(st.sampled_from([None, 0, 2, -1]), "padding")
    layer = nn.EmbeddingBag(WORDS, 2, mode=mode, padding_idx=padding, sparse=data.draw(st.booleans(), "sparse"))
    words = _indices(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), seed=data.draw(st.integers(0, 9)))
    words[0, 0] = 1
    weights = normal(WORDS) if mode == "sum" and data.draw(st.booleans(), "weighted") else None

    def run(model: Any, x: Tensor) -> Tensor:
        return model.bag(x, per_sample_weights=None if weights is None else weights[x]).cumsum(1)

    assert not assert_seen_exactly(Calls(run, bag=layer), words).alone


def test_bags_of_maxima_are_exact_by_the_fallback() -> None:
    layer = nn.EmbeddingBag(WORDS, 2, mode="max")
    seen = assert_seen_exactly(Calls(lambda m, x: m.bag(x), bag=layer), _indices(4, 3))
    assert seen.shapes == {"bag.weight": (1, 2 * WORDS, 1)}


def test_indices_of_a_vocabulary_that_single_precision_cannot_count_are_kept() -> None:
    """2^24 + 1 is no float32."""
    model = Calls(lambda m, x: m.bag(x), bag=nn.EmbeddingBag((1 << 24) + 2, 1, device="meta"))
    layer = choose_layers(model).tracked["bag"]
    value = layer.call_value((torch.tensor([[(1 << 24) + 1, 3]]),), {})
    tokens = layer.tokens(value, torch.ones(1, 1), torch.float32)
    assert isinstance(tokens.a_PBSI, OneHot) and tokens.a_PBSI.index_BS.tolist() == [[(1 << 24) + 1, 3]]


class TinyScaledWordEmbedding(nn.Embedding):
    """As those of Gemma and BART."""

    def __init__(self, scale: float | Tensor):
        super().__init__(WORDS, 3)
        self.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("scale", [3.0, torch.tensor(0.5)])
def test_scaled_embeddings_are_exact_in_batches_also_where_they_are_tied(scale: Any) -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        return model.head(model.embed(x).tanh())

    model = Calls(run, embed=TinyScaledWordEmbedding(scale), head=nn.Linear(3, WORDS, bias=False))
    for _ in range(2):
        seen = assert_seen_exactly(model, _indices(4, 3))
        assert not seen.alone and not seen.view.layout.functions
        model.head.weight = model.embed.weight
