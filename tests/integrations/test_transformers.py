"""RecordCallback: a Trainer's run recorded, and read from its folder, is one and the same run."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad
from torch.utils.data import IterableDataset

import segflow as sf

from ..support.gang import free_port
from ..support.trainer_runs import STEPS, N, model_of, scores, sentences, trainer_of

pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback

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


FAST = ("all at once",)


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


# What observes training is gone when it is over, however it ended


class Stop(TrainerCallback):
    """Raises after a step, or ends training at an event after it."""

    def __init__(self, step: int, error: type[BaseException] | None = None, event: str = "on_step_end"):
        self.step, self.error = step, error
        setattr(self, event, self.stop)

    def stop(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error("here")
            control.should_training_stop = True
        return control


def watched() -> tuple[Any, ...]:
    """The functions of torch that a recording replaces while it is open."""
    return torch.autograd.backward, clip_grad.torch, torch.amp.grad_scaler.GradScaler._unscale_grads_


def hooks_of(trainer: Any) -> int:
    inner = trainer.optimizer.optimizer
    return len(inner._optimizer_step_pre_hooks) + len(inner._optimizer_step_post_hooks)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("added_later", [False, True])
def test_training_that_raises_leaves_nothing_behind(
    tmp_path: Path, error: type[BaseException], added_later: bool
) -> None:
    before, callback = watched(), RecordCallback(tmp_path / "run", checkpoints=[2, STEPS])
    given = {} if added_later else {"callbacks": [callback, Stop(3, error)]}
    trainer = trainer_of(tmp_path / "out", model_of("gpt2"), **given)
    if added_later:
        callback.attach(trainer)
        trainer.add_callback(Stop(3, error))
    with pytest.raises(error, match="here"):
        trainer.train()
    assert watched() == before and hooks_of(trainer) == 0
    assert sf.Trajectory.load(tmp_path / "run", unfinished=True).steps == (2,)
    with pytest.raises(sf.TrajectoryError, match="did not finish"):
        sf.Trajectory.load(tmp_path / "run")


def test_a_recording_goes_on_where_a_trainer_resumes(tmp_path: Path) -> None:
    whole = RecordCallback(tmp_path / "whole", checkpoints=[4, STEPS])
    trainer_of(tmp_path / "a", model_of("gpt2"), callbacks=[whole], max_grad_norm=0.3).train()
    first = RecordCallback(tmp_path / "parts", checkpoints=[4, STEPS])
    trainer = trainer_of(tmp_path / "b", model_of("gpt2"), callbacks=[first, Stop(5, ValueError)], max_grad_norm=0.3)
    with pytest.raises(ValueError, match="here"):
        trainer.train()
    second = RecordCallback(tmp_path / "parts", checkpoints=[4, STEPS])
    trainer = trainer_of(tmp_path / "b", model_of("gpt2"), callbacks=[second], max_grad_norm=0.3)
    trainer.train(resume_from_checkpoint=True)
    expected, found = (sf.Trajectory.load(tmp_path / name) for name in ("whole", "parts"))
    assert found.observed["resumed after steps"] == [4]
    assert found.steps == expected.steps and (found.used.clip_factors == expected.used.clip_factors).all()
    for name, tensor in expected.state(1).items():
        assert torch.equal(found.state(1)[name], tensor), name


def test_a_resumed_trainer_without_a_recording_to_go_on_with_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "out", model_of("gpt2"), callbacks=[Stop(5, ValueError)])
    with pytest.raises(ValueError, match="here"):
        trainer.train()
    trainer = trainer_of(tmp_path / "out", model_of("gpt2"), callbacks=[RecordCallback(tmp_path / "run")])
    with pytest.raises(sf.TrajectoryError, match="steps 1 to 4 are missing"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_train_needs_a_callback_of_its_own(tmp_path: Path, overwrite: bool) -> None:
    callback = RecordCallback(tmp_path / "run", stage="first", checkpoints=2, overwrite=overwrite)
    trainer = trainer_of(tmp_path / "out", model_of("gpt2"), callbacks=[callback], save_strategy="no")
    trainer.train()
    with pytest.raises(sf.TrajectoryError, match=r"train\(\) was called again"):
        trainer.train()
    trainer.remove_callback(callback)
    RecordCallback(tmp_path / "run", stage="second", checkpoints=2).attach(trainer)
    trainer.train()
    assert [stage.stage for stage in sf.Trajectory.load(tmp_path / "run").stages] == ["first", "second"]


def test_a_callback_that_cannot_be_told_of_failures_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "out", model_of("gpt2"))
    trainer.add_callback(RecordCallback(tmp_path / "run"))
    with pytest.raises(sf.TrajectoryError, match=r"callback.attach"):
        trainer.train()


def test_a_trainer_with_a_recording_can_be_thrown_away(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "out", model_of("gpt2"), callbacks=[RecordCallback(tmp_path / "run")])
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None


# What is recorded


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Sentences without a length."""

    def __iter__(self) -> Any:
        return iter(sentences() * 4)


def test_a_dataset_without_a_length_needs_one(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "a", model_of("gpt2"), Stream(), callbacks=[RecordCallback(tmp_path / "run")])
    with pytest.raises(sf.TrajectoryError, match=r"has no length.*Give dataset_size="):
        trainer.train()
    callback = RecordCallback(tmp_path / "run", dataset_size=N)
    trainer_of(tmp_path / "b", model_of("gpt2"), Stream(), callbacks=[callback]).train()
    assert sf.Trajectory.load(tmp_path / "run").dataset_size == N


def test_training_is_bit_identical_with_a_recording(tmp_path: Path) -> None:
    """Also with evaluation, clipping and accumulation on the way."""
    ends = []
    for callbacks in ([], [RecordCallback(tmp_path / "run", batch_size=5)]):
        model = model_of("gpt2")
        options = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": sentences(4, seed=2)}
        options |= {"max_grad_norm": 0.3, "gradient_accumulation_steps": 2}
        trainer = trainer_of(tmp_path / f"out{len(callbacks)}", model, callbacks=callbacks, **options)
        trainer.train()
        ends.append((torch.get_rng_state(), *model.state_dict().values(), *trainer.state.log_history[0].values()))
    for one, other in zip(*ends, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert sf.Trajectory.load(tmp_path / "run").optimizer.batch_size == 5


def test_a_batch_size_that_was_too_large_leaves_no_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(
        tmp_path / "out", model_of("gpt2"), callbacks=[RecordCallback(tmp_path / "run")], auto_find_batch_size=True
    )
    compute_loss = trainer.compute_loss

    def full(model: nn.Module, inputs: Any, *others: Any, **options: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, *others, **options)

    monkeypatch.setattr(trainer, "compute_loss", full)
    before = watched()
    trainer.train()
    found = sf.Trajectory.load(tmp_path / "run")
    assert found.total_steps == STEPS and found.optimizer.batch_size == 2
    assert watched() == before and hooks_of(trainer) == 0


def test_options_of_record_are_passed_on(tmp_path: Path) -> None:
    weights = [2.0] + [1.0] * (N - 1)
    callback = RecordCallback(
        tmp_path / "run", checkpoints=[3], dtype=torch.bfloat16, example_weights=weights, progress=False
    )
    trainer_of(tmp_path / "out", model_of("gpt2"), callbacks=[callback]).train()
    found = sf.Trajectory.load(tmp_path / "run")
    assert found.steps == (3, STEPS) and found.optimizer.batch_size == 3
    assert {tensor.dtype for tensor in found.state(0).values() if tensor.is_floating_point()} == {torch.bfloat16}
    shares = found.example_weights(0)
    assert shares is not None and shares[0] == 2 * shares[1]


@pytest.mark.parametrize(
    ("event", "last", "best"), [("on_step_end", 6, 4), ("on_evaluate", 6, 4), ("on_epoch_end", 4, 2)]
)
def test_the_last_step_is_recorded_and_not_the_best_that_the_trainer_loads(
    tmp_path: Path, event: str, last: int, best: int
) -> None:
    """Training that ends early loads another checkpoint's weights before it says that it has ended."""
    model, ends = model_of("gpt2"), []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            ends.append({name: value.clone() for name, value in others["model"].state_dict().items()})

    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "eval_dataset": sentences(4, seed=2)}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": best == 4}
    callbacks = [RecordCallback(tmp_path / "run", checkpoints=[2, STEPS]), Note(), Stop(last, event=event)]
    trainer = trainer_of(tmp_path / "out", model, callbacks=callbacks, **options)
    with pytest.warns(UserWarning, match=f"training ended at step {last}"):
        trainer.train()
    found = sf.Trajectory.load(tmp_path / "run")
    assert found.steps == (2, last)
    for name, value in ends[-1].items():
        assert torch.equal(found.state(1)[name], value), name
    assert not all(torch.equal(ends[-1][name], value) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match=f"not that of checkpoint-{best}, which the Trainer loaded"):
        unfinished = event == "on_epoch_end"  # nothing in the folder says that training ended there
        folder = sf.Trajectory.from_trainer(tmp_path / "out", model, dataset_size=N, unfinished=unfinished)
    assert folder.steps[-1] == last and f"checkpoint-{best}" in folder.observed["model"]


RANK = """
import sys, warnings
import torch
import segflow as sf
from segflow.integrations.transformers import RecordCallback
from tests.support.trainer_runs import model_of, trainer_of

folder = sys.argv[1]
trainer = trainer_of(
    folder + "/out", model_of("gpt2"), callbacks=[RecordCallback(folder + "/run", checkpoints=2)],
    per_device_train_batch_size=2, max_grad_norm=0.5, ddp_backend="gloo",
)
trainer.train()
"""


@pytest.mark.slow
def test_a_trainer_on_two_processes_is_recorded_once_as_its_folder_says(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, check=True, capture_output=True, timeout=300
    )
    recorded = sf.Trajectory.load(tmp_path / "run")
    folder = sf.Trajectory.from_trainer(tmp_path / "out", model_of("gpt2"), dataset_size=N)
    assert recorded.steps == folder.steps == (4, 8)
    assert recorded.lr_steps(0, 8) == pytest.approx(folder.lr_steps(0, 8), rel=1e-6)
    assert recorded.optimizer.batch_size == folder.optimizer.batch_size == 4
    for index in range(2):
        moments, others = recorded.second_moments(index), folder.of_model(model_of("gpt2")).second_moments(index)
        assert moments is not None and others is not None
        for name, moment in moments.items():
            torch.testing.assert_close(others[name], moment)


class OwnModel(nn.Module):
    """Labels go by another name, so that the Trainer counts no items."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 3)

    def forward(self, input_ids: torch.Tensor, target: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
        logits = self.table(input_ids).mean(1)
        return {"loss": nn.functional.cross_entropy(logits, target), "logits": logits}


def accumulating(kind: str) -> tuple[nn.Module, list[Any]]:
    from transformers import LlamaForSequenceClassification

    from ..support.models import bert_classifier

    torch.manual_seed(0)
    classes = [{"input_ids": one["input_ids"], "labels": int(one["input_ids"][0]) % 3} for one in sentences()]
    if kind == "own":
        return OwnModel().double(), [{"input_ids": one["input_ids"], "target": one["labels"]} for one in classes]
    if kind == "llama":
        return model_of("llama"), sentences()
    if kind == "llama classifier":
        config = model_of("llama").config
        config.pad_token_id, config.num_labels = 0, 3
        model = LlamaForSequenceClassification(config).double()
    else:
        model = bert_classifier().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, classes


# How many times the mean loss's gradient a step's is, of two batches, in the recording and in the folder.
SCALES = {
    "bert": (2.0, 2.0),
    "llama": (1.0, 1.0),
    "llama classifier": (2.0, 2.0),
    "own": (1.0, 1.0),
    "bert, divided": (1.0, 2.0),  # which the folder does not tell
    "bert, own loss": (2.0, 2.0),
}


@pytest.mark.parametrize("kind", SCALES)
def test_accumulated_batches_count_as_they_were_added_up_or_averaged(kind: str, tmp_path: Path) -> None:
    model, data = accumulating(kind)
    data = data[:8]  # 4 batches in 2 steps
    seen: list[dict[str, torch.Tensor]] = []

    class Gradients(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            seen.append({n: p.grad.clone() for n, p in others["model"].named_parameters() if p.grad is not None})

    class OwnLoss(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            return model(**inputs).loss

    options = {
        "callbacks": [RecordCallback(tmp_path / "run", checkpoints=2), Gradients()],
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "max_steps": -1,
        "save_steps": 2,
        "optim": "sgd",
        "learning_rate": 1e-9,  # so small that gradients are those of the first model
        "remove_unused_columns": False,
    }
    trainer = trainer_of(tmp_path / "out", model, data, kind=OwnLoss if "own loss" in kind else Trainer, **options)
    if "divided" in kind:
        trainer.loss_is_scaled_for_ga = False
    trainer.train()
    recorded = sf.Trajectory.load(tmp_path / "run")
    folder = sf.Trajectory.from_trainer(tmp_path / "out", accumulating(kind)[0], dataset_size=8)
    assert (recorded.used.gradient_scale, folder.used.gradient_scale) == pytest.approx(SCALES[kind])
    assert "the folder does not tell" in folder.observed["accumulated batches"]
    summed = {n: seen[0][n] + seen[1][n] for n in seen[0]}  # of an epoch
    batch = {key: torch.stack([torch.as_tensor(one[key]) for one in data]) for key in data[0]}
    loss = model.eval()(**batch)["loss"]
    mean = dict(zip(summed, torch.autograd.grad(loss, [model.get_parameter(n) for n in summed]), strict=True))
    dots = [sum((a[n] * mean[n]).sum().item() for n in mean) for a in (summed, mean)]
    assert dots[0] / dots[1] == pytest.approx(2 * recorded.used.gradient_scale, rel=1e-4)


def test_steps_of_fewer_batches_count_as_the_mean_over_the_steps(tmp_path: Path) -> None:
    """5 batches in 3 steps of 2, 2 and 1; the first two alone have 2 each."""
    for steps, expected in ((3, 5 / 3), (2, 2.0)):
        model, data = accumulating("bert")
        callback = RecordCallback(tmp_path / f"run-{steps}", checkpoints=1)
        options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd"}
        folder = tmp_path / f"out-{steps}"
        trainer_of(folder, model, data, callbacks=[callback], max_steps=steps, save_steps=steps, **options).train()
        found = sf.Trajectory.from_trainer(folder, model, dataset_size=N)
        recorded = sf.Trajectory.load(tmp_path / f"run-{steps}")
        assert recorded.used.gradient_scale == pytest.approx(expected)
        assert found.used.gradient_scale == pytest.approx(expected)


def test_what_accumulated_batches_add_up_to_can_be_said(tmp_path: Path) -> None:
    model, data = accumulating("bert")
    callback = RecordCallback(tmp_path / "run", checkpoints=1, gradient_scale=1.5)
    options = {"gradient_accumulation_steps": 2, "max_steps": 2, "save_steps": 2, "optim": "sgd"}
    trainer_of(tmp_path / "out", model, data, callbacks=[callback], **options).train()
    told = sf.Trajectory.from_trainer(tmp_path / "out", model, dataset_size=N, gradient_scale=1.25)
    assert sf.Trajectory.load(tmp_path / "run").used.gradient_scale == 1.5
    assert told.used.gradient_scale == 1.25


def test_watching_accumulated_batches_changes_no_number(tmp_path: Path) -> None:
    states = []
    for number, callbacks in enumerate(([], [RecordCallback(tmp_path / "run", checkpoints=1)])):
        model = model_of("gpt2")
        trainer_of(tmp_path / f"out-{number}", model, callbacks=callbacks, gradient_accumulation_steps=2).train()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_callback_moves_on_to_the_trainer_that_is_made_next(tmp_path: Path) -> None:
    callback = RecordCallback(tmp_path / "run", checkpoints=1)

    class Interrupt(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            raise KeyboardInterrupt

    trainer_of(tmp_path / "first", model_of("gpt2"), callbacks=[callback])
    second = trainer_of(tmp_path / "second", model_of("gpt2"), callbacks=[callback, Interrupt()])
    backward = torch.autograd.backward
    with pytest.raises(KeyboardInterrupt):
        second.train()
    assert torch.autograd.backward is backward
