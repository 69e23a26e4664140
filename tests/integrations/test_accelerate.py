"""A loop with accelerate leaves the recording that a plain loop leaves; docs/TRAINING.md shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import segflow as sf

from ..support.helpers import FixedLabels, mlp, vectors

N, BATCH, ACCUMULATE, EPOCHS = 24, 4, 2, 3
SINGLE = sf.Groups.singletons(N)
PAGE = Path(__file__).parents[2] / "docs" / "TRAINING.md"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """accelerate keeps what it was told in singletons."""
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._reset_state()


def parts(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Any, TensorDataset]:
    model, train = mlp(dtype), vectors(N, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6)
    return model, optimizer, schedule, train


def plain(folder: Path, bf16: bool, dtype: torch.dtype) -> nn.Module:
    """The loop without accelerate."""
    model, optimizer, schedule, train = parts(dtype)
    with sf.record(model, optimizer, folder, dataset_size=N, total_steps=9, checkpoints=3):
        for _ in range(EPOCHS):
            for index, (x, y) in enumerate(DataLoader(train, batch_size=BATCH), start=1):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = model(x)
                (nn.functional.cross_entropy(logits.to(dtype), y) / ACCUMULATE).backward()
                if index % ACCUMULATE:
                    continue
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model


def with_accelerate(folder: Path, bf16: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    """The page's block, run in a folder; the model as it was prepared, and bare."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text().partition("## An accelerate loop")[2], re.DOTALL)
    model, optimizer, schedule, train = parts(dtype)
    names: dict[str, Any] = {
        "sf": sf,
        "model": model,
        "optimizer": optimizer,
        "scheduler": schedule,
        "train": train,
        "loader": DataLoader(train, batch_size=BATCH),
        "epochs": EPOCHS,
        "loss_of": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        "Accelerator": lambda **options: Accelerator(**options, cpu=True),
    }
    text = blocks[0].replace("from accelerate import Accelerator\n", "").replace('"run"', repr(str(folder)))
    exec(text.replace('mixed_precision="bf16"', f"mixed_precision={'bf16' if bf16 else 'no'!r}"), names)
    return names["model"], names["bare"]


def scores(model: nn.Module, folder: Path, store: Path, dtype: torch.dtype) -> Tensor:
    train, query = vectors(N, dtype), vectors(4, dtype, seed=5)
    analyzer = sf.Analyzer(model, FixedLabels(), sf.Trajectory.load(folder), store=store, progress=False)
    analyzer.fit(train, batch_size=8)
    return analyzer.score(SINGLE, train, query).values


@pytest.mark.parametrize("bf16", [False, True])
def test_the_pages_loop_leaves_the_recording_of_a_plain_loop(bf16: bool, tmp_path: Path) -> None:
    dtype = torch.float32 if bf16 else torch.float64
    prepared, bare = with_accelerate(tmp_path / "run", bf16, dtype)
    model = plain(tmp_path / "plain", bf16, dtype)
    for name, value in model.state_dict().items():
        assert torch.equal(bare.state_dict()[name], value), name
    run, expected = sf.Trajectory.load(tmp_path / "run"), sf.Trajectory.load(tmp_path / "plain")
    assert run.steps == expected.steps == (3, 6, 9) and run.observed == expected.observed
    assert (run.used.clip_factors < 1).any() and (run.used.clip_factors == expected.used.clip_factors).all()
    assert len(set(run.learning_rates[:, 0].tolist())) > 4
    found = scores(bare if bf16 else prepared, tmp_path / "run", tmp_path / "a", dtype)
    wanted = scores(model, tmp_path / "plain", tmp_path / "b", dtype)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
