"""The example of the Trainer, on a tiny BERT of random weights and made-up reviews, without downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segflow as sf

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pandas = pytest.importorskip("pandas")

WORDS = ("good", "fine", "great", "bad", "dull", "poor", "plot", "cast", "music")


def reviews(count: int, films: int, wrong: int) -> Any:
    """Reviews of two to five words, good ones fresh and bad ones rotten; the first `wrong` have the other label."""
    draw = np.random.default_rng(count)
    labels = np.arange(count) % 2
    texts = [
        " ".join(
            draw.permutation([*draw.choice(WORDS[3 - 3 * y :][:3], 1 + i % 2), *draw.choice(WORDS[6:], 1 + i % 3)])
        )
        for i, y in enumerate(labels)
    ]
    flipped = np.arange(count) < wrong
    names = [f"film {i % films}" for i in range(count)]
    return pandas.DataFrame({"text": texts, "film": names, "label": labels ^ flipped, "wrong": flipped})


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Any, Any]:
    """A tokenizer of a dozen words and a BERT of three layers."""
    import transformers as hf

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=14, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    return hf.BertTokenizer(str(tmp_path / "vocab.txt")), hf.BertForSequenceClassification(config)


@pytest.mark.slow
def test_the_example_trains_scores_and_tells(parts: tuple[Any, Any], tmp_path: Path) -> None:
    from examples import trainer_minilm

    tokenizer, model = parts
    frozen = model.bert.encoder.layer[0].output.dense.weight.clone()
    train, query = reviews(40, 4, 4), reviews(8, 4, 0)
    result = trainer_minilm.study(model, train, query, tokenizer, tmp_path, epochs=4)
    assert model.bert.encoder.layer[0].output.dense.weight.equal(frozen)
    assert set(result["methods"]) == {"Source", "TracIn"}
    assert result["methods"]["Source"]["found"] == sum("flipped" in text for text in result["most harmful"][:4])
    text = trainer_minilm.as_text(result)
    assert f"| `Source` | {result['methods']['Source']['found']:.0f} (" in text
    assert "| chance | 0 (10%) | |" in text
    assert all(one["text"] in text for one in result["explained"])
    assert result["explained"][0]["loss"] >= result["explained"][1]["loss"]


def test_films_are_ranked_by_the_sums_of_their_reviews() -> None:
    from examples import trainer_minilm

    train = reviews(8, 4, 1)
    values = torch.tensor([[1.0, 0, 0, -3, 2, 2.5, 0, 0], *torch.zeros(2, 8).tolist()])
    scores = sf.Scores(values, ("0", "1", "2"), tuple(map(str, range(8))), (1,) * 8)
    found = trainer_minilm.explained(scores, train, 0)
    assert found["helped by films"] == [
        "film 0 (+3.000; 50% fresh)",
        "film 1 (+2.500; 100% fresh)",
        "film 2 (+0.000; 0% fresh)",
    ]
    assert found["harmed by films"][0] == "film 3 (-3.000; 100% fresh)"
    assert f"“{train['text'][5]}” (*film 1*" in found["helped by review"]
    assert f"“{train['text'][3]}” (*film 3*" in found["harmed by review"]
    assert "flipped" in trainer_minilm.shown(train, 0)
    assert "flipped" not in trainer_minilm.shown(train, 1)


def test_batches_are_dictionaries_whose_rows_are_not_padded_yet(parts: tuple[Any, Any]) -> None:
    from examples import trainer_minilm

    rows = trainer_minilm.encoded(reviews(6, 2, 0), parts[0])
    assert {frozenset(row) for row in rows} == {frozenset({"input_ids", "attention_mask", "labels"})}
    assert [row["labels"] for row in rows] == [0, 1, 0, 1, 0, 1]
    assert len({len(row["input_ids"]) for row in rows}) > 1
