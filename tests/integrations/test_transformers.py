"""RecordCallback: a Trainer's run recorded, and read from its folder, is one and the same run."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad

import segflow as sf

from ..support.trainer_runs import N, STEPS, model_of, scores, sentences, trainer_of

pytest.importorskip("transformers")

from transformers import TrainerCallback

from segflow.integrations.transformers import RecordCallback


def both(folder: Path, kind: str = "gpt2", **options: Any) -> tuple[nn.Module, sf.Trajectory, sf.Trajectory]:
    """One run of a Trainer, recorded by a callback and read from its folder."""
    model = model_of(kind)
    callback = RecordCallback(folder / "recorded", checkpoints=[4, STEPS])
    trainer_of(folder / "out", model, callbacks=[callback], **options).train()
    found = sf.Trajectory.from_trainer(folder / "out", model_of(kind), dataset_size=N)
    return model, sf.Trajectory.load(folder / "recorded"), found


def moved(trajectory: sf.Trajectory, name: str, span: tuple[int, int]) -> list[float]:
    """A parameter's rate and decay over the steps (span]."""
    group = trajectory.group_of(name)
    assert group is not None
    return [trajectory.lr_steps(*span)[group], trajectory.decay_steps(*span)[group]]


CASES: dict[str, dict[str, Any]] = {
    "tied head and decay groups": {},
    "adapters": {"kind": "lora"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.3},
    "warm-up from 0": {"warmup_steps": 3},
    "sparse logs": {"logging_steps": 4, "lr_scheduler_type": "cosine"},
    "sparse logs of a clipping that never acts": {"logging_steps": 3, "max_grad_norm": 1e3},
    "SGD": {"optim": "sgd", "lr_scheduler_type": "polynomial"},
    "all at once": {
        "kind": "lora",
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.3,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 0.001},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_says_what_a_recording_of_the_run_does(tmp_path: Path, case: str) -> None:
    model, recorded, found = both(tmp_path, **CASES[case])
    assert (found.steps, found.dataset_size) == (recorded.steps, recorded.dataset_size)
    assert found.optimizer.batch_size == recorded.optimizer.batch_size
    recorded, found = recorded.of_model(model), found.of_model(model)
    assert set(recorded.parameter_groups or ()) == set(found.parameter_groups or ())
    for name in recorded.parameter_groups or ():
        for span in ((0, 4), (4, STEPS)):
            assert moved(found, name, span) == pytest.approx(moved(recorded, name, span), rel=1e-6)
    for index in range(2):
        moments, others = (one.second_moments(index) for one in (recorded, found))
        assert (moments is None) == (others is None)
        for name, values in (moments or {}).items():
            torch.testing.assert_close(others[name], values, rtol=1e-12, atol=0)


FAST = ("tied head and decay groups", "all at once")


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_scores_from_the_folder_are_those_of_the_recording(tmp_path: Path, case: str) -> None:
    _, recorded, found = both(tmp_path, **CASES[case])
    kind = CASES[case].get("kind", "gpt2")
    one, other = (scores(tmp_path / name, model_of(kind), t) for name, t in (("a", recorded), ("b", found)))
    assert (one - other).abs().max() <= 1e-6 * one.abs().max()
    assert one.abs().max() > 0


@pytest.mark.slow
def test_a_llama_with_its_own_norms_agrees_too(tmp_path: Path) -> None:
    _, recorded, found = both(tmp_path, kind="llama", max_grad_norm=0.3, warmup_steps=2)
    one, other = (scores(tmp_path / name, model_of("llama"), t) for name, t in (("a", recorded), ("b", found)))
    assert (one - other).abs().max() <= 1e-6 * one.abs().max()
