"""docs/TASKS.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import segflow as sf

from ..support.helpers import analyzer_of, trajectory_of
from ..support.model_tasks import causal_data
from .test_queries import Letters
from .test_sequences import Past

TEXT = (Path(__file__).parent.parent.parent / "docs" / "TASKS.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, data = Past(words=24), causal_data((4, 6, 3))
    given: dict[str, Any] = {"torch": torch, "sf": sf, "model": model, "train": data, "tokenizer": Letters()}
    given |= {"groups": sf.Groups.singletons(3)}
    given["trajectory"] = trajectory_of(tmp_path / "run", [model.state_dict()], 3)
    for block in BLOCKS:
        exec(compile(block, "TASKS.md", "exec"), given)
    assert given["mean"] == 13 / 3 and given["labels"].tolist() == [0, 0, 0, 1]
    assert given["scores"].values.shape == (1, 3) and given["by_token"].values.shape == (6, 3)
    torch.testing.assert_close(given["by_token"].values.sum(0), given["scores"].values[0], rtol=1e-6, atol=1e-9)


def test_the_task_of_ones_own_has_the_curvatures_scale(tmp_path: Path) -> None:
    given: dict[str, Any] = {"torch": torch, "sf": sf}
    exec(compile(BLOCKS[-1], "TASKS.md", "exec"), given)
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = [{"x": row, "level": int(row.sum() > 0) + int(row[0] > 0) + 1} for row in x]
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], 12)
    report = analyzer_of(model, trajectory, tmp_path / "store", given["Ordinal"]()).check(data, data)
    assert report.curvature.factor == pytest.approx(1, abs=4 * report.curvature.error)


def test_every_ready_made_task_has_its_place_on_the_page() -> None:
    for name in sf.tasks.__all__:
        assert name in TEXT
