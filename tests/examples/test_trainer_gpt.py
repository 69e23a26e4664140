"""The GPT example, on a few made-up texts: two stages of training are explained down to tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from examples import trainer_gpt


@pytest.mark.slow
def test_the_pieces_of_the_gpt_example_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"WORDS": 300, "LENGTH": 40, "SHORTEST": 4, "PASSAGES": 6, "EPOCHS": 1, "BATCH": 2}
    for name, value in small.items():
        monkeypatch.setattr(trainer_gpt, name, value)
    draw = np.random.default_rng(0)
    words = ["in", "the", "beginning", "god", "created", "heaven", "and", "earth", "congress", "of", "united", "states"]
    texts = {
        stage: [(source, " ".join(draw.choice(words, 200))) for source in sources]
        for stage, sources in (("speeches", ("Adams", "Polk")), ("bible", ("Genesis", "Mark", "Luke")))
    }
    tokenizer = trainer_gpt.make_tokenizer([text for of_stage in texts.values() for _, text in of_stage])
    of_stage = {stage: trainer_gpt.passages(of, tokenizer) for stage, of in texts.items()}
    data, sources = ({stage: parts[place] for stage, parts in of_stage.items()} for place in (0, 1))
    assert {len(passages) for passages in data.values()} == {6}
    figures = trainer_gpt.study(data, sources, tokenizer, tmp_path)
    assert figures["book"] in {"Genesis", "Mark", "Luke"}
    assert {label for label, _ in figures["speeches"]["The Congress of the United States"]["for it"]} == {
        "Adams",
        "Polk",
    }
    text = trainer_gpt.as_text(figures)
    assert text.count("| bible |") == text.count("| speeches |") == 3
    assert figures["passage"] in text
