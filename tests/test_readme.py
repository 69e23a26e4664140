"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import segflow as sf

from .support.helpers import mlp, vectors
from .support.model_tasks import WORDS
from .support.trainer_runs import model_of, sentences, trainer_of

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_api_example_runs_and_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, sizes, _, groups = BLOCKS
    assert len(code.splitlines()) <= 32
    monkeypatch.chdir(tmp_path)
    train, model = vectors(40, torch.float32), mlp(torch.float32)
    given: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train": train,
        "query": vectors(5, torch.float32, seed=8),
        "loader": DataLoader(train, batch_size=4),
        "epochs": 6,
        "sources": ["web", "books", "code", "mail"] * 10,
    }
    exec(compile(code, "README.md", "exec"), given)
    assert given["scores"].values.shape == (5, 4)
    assert set(given["table"].columns) == {"books", "code", "mail", "web"}
    assert "attributed: 79 of 79 trained parameters (100.0%)" in capsys.readouterr().out

    by_hand = given["scores"].values.double()
    given["train_and_measure"] = lambda kept, seed: (3 * (by_hand.sum(1) - by_hand[:, kept].sum(1))).tolist()
    exec(compile(sizes, "README.md", "exec"), given)
    torch.testing.assert_close(given["calibrated"].values.double(), 3 * by_hand)

    given |= {"annotators": ["ann", "bob"] * 20, "regions": ["north", "south", "north", "south", "south"]}
    given["train_and_measure"] = lambda kept, seed: [float(len(kept)) + seed % 7] * 5
    exec(compile(groups, "README.md", "exec"), given)
    assert given["by_source"].values.shape == (2, 4) and given["by_annotator"].values.shape == (2, 4)
    assert given["scores"].values.shape == (5, 40)
    assert {row.series for row in given["table"].rows} == {"Source", "random"}
    assert (tmp_path / "retraining.png").is_file() and (tmp_path / "retraining.json").is_file()


class Words:
    """A tokenizer of sorts."""

    def encode(self, text: str) -> list[int]:
        return [1 + sum(map(ord, word)) % (WORDS - 1) for word in re.findall(r" ?\S+", text)]


def test_a_trainers_folder_is_explained_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = BLOCKS[2]
    assert len(code.strip().splitlines()) <= 11  # one of them is empty
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        trainer_of(tmp_path / "out", model_of("llama").float()).train()
    data = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in sentences()]
    given: dict[str, Any] = {"sf": sf, "train": data, "tokenizer": Words(), "books": ["Genesis", "Mark"] * 5}
    exec(compile(code, "README.md", "exec"), given)
    assert given["scores"].values.shape == (1, 2) and given["scores"].values.all()


def test_the_commands_and_the_picture_exist() -> None:
    root = Path(__file__).parent.parent
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (root / picture).is_file()
    assert "make test" in (root / ".ci" / "run").read_text()


def test_behind_each_promise_stands_a_test_that_is_there() -> None:
    section = README.split("## Nothing is silently wrong")[1].split("\n## ")[0]
    promises = [line for line in section.splitlines() if line.startswith("- ")]
    assert len(promises) > 20
    for promise in promises:
        behind = re.search(r'\(\[test\]\((tests/\S+\.py) "(test_\w+)"\)\)$', promise)
        assert behind is not None, promise
        assert f"def {behind[2]}(" in (Path(__file__).parent.parent / behind[1]).read_text(), promise
