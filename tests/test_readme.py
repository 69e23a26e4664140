"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from .helpers import mlp, vectors

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_api_example_runs_and_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
    assert "attributed: 79 of 79 parameters (100.0%)" in capsys.readouterr().out


def test_the_commands_and_the_picture_exist() -> None:
    root = Path(__file__).parent.parent
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (root / picture).is_file()
    assert "make test" in (root / ".ci" / "run").read_text()
