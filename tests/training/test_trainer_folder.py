"""What a Trainer's folder says, and the folders that are refused: each is a real one with one thing changed."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import segflow as sf
from segflow.training.checkpoints import load_torch
from segflow.training.moment_files import optimizer_kind
from segflow.training.trainer_files import training_arguments

from ..support.model_tasks import WORDS
from ..support.models import gpt2
from ..support.trainer_runs import STEPS, N, model_of, scores, sentences, trainer_of

pytest.importorskip("transformers")

Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A Trainer's output_dir for the given options; each is trained once."""
    known: dict[str, Path] = {}

    def make(kind: str = "gpt2", **options: Any) -> Path:
        key = json.dumps([kind, options])
        if key not in known:
            known[key] = tmp_path_factory.mktemp("run") / "out"
            trainer_of(known[key], model_of(kind), **options).train()
        return known[key]

    return make


@pytest.fixture
def copied(made: Folders, tmp_path: Path) -> Folders:
    """The same, as a copy to be changed."""

    def copy(kind: str = "gpt2", **options: Any) -> Path:
        return Path(shutil.copytree(made(kind, **options), tmp_path / "copy"))

    return copy


def read(folder: Path, kind: str = "gpt2", **options: Any) -> sf.Trajectory:
    return sf.Trajectory.from_trainer(folder, model_of(kind), **{"dataset_size": N, **options})


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_saved(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = load_torch(path)
    change(content)
    torch.save(content, path)


# Names and moments


def by_hand(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The second moments of a live optimizer that the Trainer made and loaded itself, by the model's names."""
    trainer = trainer_of(folder, model_of(kind))
    trainer.create_optimizer()
    optimizer = trainer.optimizer
    optimizer.load_state_dict(load_torch(folder / "checkpoint-4" / "optimizer.pt"))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {
        names[id(p)]: state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"])) for p, state in optimizer.state.items()
    }


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora"])
def test_moments_go_by_the_names_of_an_optimizer_that_the_trainer_makes(made: Folders, kind: str) -> None:
    folder = made(kind)
    moments, expected = read(folder, kind).second_moments(0), by_hand(folder, kind)
    assert moments is not None and set(moments) - {"lm_head.weight"} == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(moments[name], values, rtol=1e-14, atol=0)


def test_weight_decay_is_each_groups_own(made: Folders) -> None:
    found = read(made())
    groups = found.parameter_groups or {}
    assert {found.decay_steps(0, STEPS)[groups[name]] > 0 for name in groups if "bias" in name or "ln" in name} == {
        False
    }
    assert found.decay_steps(0, STEPS)[groups["transformer.wte.weight"]] == pytest.approx(
        0.2 * found.learning_rates.sum(0)[0]
    )


def one_group(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)


def test_an_optimizer_of_ones_own_is_read_by_its_options(tmp_path: Path) -> None:
    model = model_of("gpt2")
    trainer_of(tmp_path, model, optimizers=one_group(model), lr_scheduler_type="constant").train()
    found = read(tmp_path)
    assert found.kinds == ("AdamW",) and found.eps == (1e-4,) and (found.used.beta1 == 0.8).all()
    assert found.decay_steps(0, STEPS) == pytest.approx((0.1 * 0.02 * STEPS,))
    with pytest.raises(sf.TrajectoryError, match=r"step 2 was logged with a learning rate of 0.02"):
        read(tmp_path, args={**training_arguments(None, tmp_path / "checkpoint-8"), "lr_scheduler_type": "linear"})


def test_an_optimizer_whose_groups_nothing_explains_needs_names(tmp_path: Path) -> None:
    model = model_of("gpt2")
    parameters = dict(model.named_parameters())
    names = [*reversed(parameters)]
    groups = [{"params": [parameters[n]], "weight_decay": 0.1 * (n.count("h.0"))} for n in names]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
    trainer_of(tmp_path, model, optimizers=(optimizer, schedule), lr_scheduler_type="constant").train()
    with pytest.raises(sf.TrajectoryError, match=r"cannot be told.*Give parameter_names="):
        read(tmp_path)
    found = read(tmp_path, parameter_names=names)
    assert [name for name in found.parameter_groups or () if name != "lm_head.weight"] == names
    with pytest.raises(sf.TrajectoryError, match="exp_avg of parameter 0 has shape"):
        read(tmp_path, parameter_names=list(parameters))


def test_names_that_torch_saved_are_used(copied: Folders) -> None:
    folder = copied()
    groups = read(folder).parameter_groups or {}
    names = [name for name in groups if name != "lm_head.weight"]

    def decay(content: dict[str, Any]) -> None:
        content["param_groups"][1]["weight_decay"] = 0.3  # no Trainer's groups any more

    def name(content: dict[str, Any]) -> None:
        for group in content["param_groups"]:
            group["param_names"] = [f"module.{names[number]}" for number in group["params"]]

    for step in (4, 8):
        edit_saved(folder / f"checkpoint-{step}" / "optimizer.pt", decay)
    refused(folder, "its groups are not those that a Trainer makes")
    for step in (4, 8):
        edit_saved(folder / f"checkpoint-{step}" / "optimizer.pt", name)
    assert read(folder).parameter_groups == groups


def test_a_model_with_other_parameters_frozen_is_refused(made: Folders) -> None:
    model = model_of("gpt2")
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(sf.TrajectoryError, match=r"cannot be told .*with the same parameters frozen"):
        sf.Trajectory.from_trainer(made(), model, dataset_size=N)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_is_loaded_without_training_is_named(made: Folders) -> None:
    from peft import PeftModel

    folder = made("lora")
    models = [
        PeftModel.from_pretrained(gpt2(), folder / "checkpoint-8", is_trainable=trainable).double()
        for trainable in (False, True)
    ]
    words = r"holds 8 parameters, and the model has 0 that require gradients; load peft's model with is_trainable=True"
    with pytest.raises(sf.TrajectoryError, match=words):
        sf.Trajectory.from_trainer(folder, models[0], dataset_size=N)
    assert sf.Trajectory.from_trainer(folder, models[1], dataset_size=N).second_moments(1)


class Alike(nn.Module):
    """A language model of three layers of one shape, all but `trained` of them frozen; a buffer counts its calls."""

    def __init__(self, trained: int):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("calls", torch.zeros(6, 6))
        self.double()
        for place, layer in enumerate(self.layers):
            layer.requires_grad_(place == trained)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        self.calls += 1
        return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("form", ["safetensors", "torch", "end beside the checkpoints"])
def test_a_model_with_another_layer_of_the_same_shape_frozen_is_refused(form: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Alike(2), lr_scheduler_type="constant", max_steps=6)
    trainer.train()
    if form == "end beside the checkpoints":
        trainer.save_model()
        trainer.save_state()
        shutil.rmtree(tmp_path / "checkpoint-6")
    if form == "torch":
        for path in tmp_path.glob("*/model.safetensors"):
            torch.save(load_file(path), path.with_name("pytorch_model.bin"))
            path.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*ended at step 6, after the last checkpoint")
        expected = sf.Trajectory.from_trainer(tmp_path, Alike(2), dataset_size=N).second_moments(1) or {}
        with pytest.raises(sf.TrajectoryError, match=r"'layers.2.weight' changed since checkpoint-4.* not hold it"):
            sf.Trajectory.from_trainer(tmp_path, Alike(0), dataset_size=N)
        names = [name for name, p in Alike(2).named_parameters() if p.requires_grad]
        names = sorted(names, key=lambda name: name.endswith("bias"))
        found = sf.Trajectory.from_trainer(tmp_path, Alike(0), dataset_size=N, parameter_names=names).second_moments(1)
    assert found is not None and all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_models_moments_are_refused(made: Folders) -> None:
    with pytest.raises(sf.TrajectoryError, match=r"optimizer.pt: which of its parameters is which cannot be told"):
        sf.Trajectory.from_trainer(made(), model_of("llama"), dataset_size=N)


def test_a_parameter_that_not_every_step_moved_is_not_attributed(copied: Folders) -> None:
    folder = copied()

    def take_back(content: dict[str, Any]) -> None:
        content["state"][0]["step"] -= 1
        del content["state"][1]

    for step in (4, 8):
        edit_saved(folder / f"checkpoint-{step}" / "optimizer.pt", take_back)
    found = read(folder)
    assert found.why_untrained("transformer.wte.weight") == (
        "the optimizer stepped it in 7 of 8 steps, and the folder does not say in which (RecordCallback does)"
    )
    assert found.why_untrained("transformer.wpe.weight") == "no step moved it"
    assert not {"transformer.wte.weight", "lm_head.weight"} & set(found.second_moments(0) or {})


@pytest.mark.parametrize(
    ("optim", "options", "kind"),
    [
        ("adamw_torch", {"betas", "eps", "amsgrad", "maximize"}, "AdamW"),
        ("sgd", {"momentum", "dampening", "nesterov", "maximize"}, "SGD"),
        ("adamw_bnb_8bit", {"betas", "eps", "alpha"}, "adamw_bnb_8bit"),
        ("adamw_torch_8bit", {"betas", "eps", "amsgrad"}, "adamw_torch_8bit"),
        ("adamw_torch", {"betas", "eps", "momentum_decay", "maximize"}, "adamw_torch"),
        ("adafactor", {"eps", "beta1", "clip_threshold"}, "adafactor"),
    ],
)
def test_only_torchs_own_optimizers_go_by_a_known_name(optim: str, options: set[str], kind: str) -> None:
    assert optimizer_kind(dict.fromkeys(options, 0.5), optim) == kind


@pytest.mark.slow
def test_an_unknown_optimizer_is_refused_by_methods_that_need_rates_only(made: Folders, tmp_path: Path) -> None:
    found = read(made(optim="adafactor"))
    assert found.kinds == ("adafactor", "adafactor")
    assert scores(tmp_path / "a", model_of("gpt2"), found, sf.InfluenceFunction()).abs().max() > 0
    with pytest.raises(sf.TrajectoryError, match="trained with adafactor"):
        scores(tmp_path / "b", model_of("gpt2"), found)


# Schedules and steps


def test_arguments_are_read_without_their_classes_or_given(made: Folders) -> None:
    folder = made(warmup_steps=0.3, lr_scheduler_type="cosine")
    saved = training_arguments(None, folder / "checkpoint-8")
    assert (saved["lr_scheduler_type"], saved["optim"], saved["max_steps"]) == ("cosine", "adamw_torch_fused", STEPS)
    given = trainer_of(folder, model_of("gpt2"), warmup_steps=0.3, lr_scheduler_type="cosine").args
    rates = [read(folder, args=args).learning_rates for args in (None, given, saved)]
    assert torch.equal(rates[0], rates[1]) and torch.equal(rates[0], rates[2]) and rates[0][0, 0] == 0


def test_warm_up_by_the_older_ratio_is_the_same(made: Folders) -> None:
    folder = made(warmup_steps=3)
    args = {**training_arguments(None, folder / "checkpoint-8"), "warmup_steps": 0, "warmup_ratio": 0.3}
    assert torch.equal(read(folder, args=args).learning_rates, read(folder).learning_rates)


@pytest.mark.parametrize(
    "changed", [{"lr_scheduler_type": "cosine"}, {"learning_rate": 0.5}, {"warmup_steps": 2}, {"learning_rate": 0.019}]
)
def test_a_definition_that_does_not_meet_the_log_is_refused(made: Folders, changed: dict[str, Any]) -> None:
    args = {**training_arguments(None, made(logging_steps=4) / "checkpoint-8"), **changed}
    if "learning_rate" in changed:  # rates come from what the optimizer began with
        assert torch.equal(read(made(logging_steps=4), args=args).learning_rates, read(made()).learning_rates)
        return
    with pytest.raises(sf.TrajectoryError, match="step 4 was logged with a learning rate of"):
        read(made(logging_steps=4), args=args)


def test_the_optimizers_own_rates_are_checked_where_nothing_is_logged(made: Folders) -> None:
    folder = made(logging_strategy="no")
    expected = read(made()).learning_rates
    assert torch.equal(read(folder).learning_rates, expected)
    with pytest.raises(sf.TrajectoryError, match=r"after 4 steps the learning rate of parameter group 0 is 0.01"):
        read(folder, args={**training_arguments(None, folder / "checkpoint-8"), "lr_scheduler_type": "constant"})


def test_rates_that_nothing_confirms_are_named(copied: Folders) -> None:
    folder = copied(logging_strategy="no")
    assert "learning rates" not in read(folder).observed  # the first checkpoint confirms them
    shutil.rmtree(folder / "checkpoint-4")
    words = "as the arguments say; nothing that was logged confirms them"
    with pytest.warns(UserWarning, match=f"the learning rates are {words}"):
        found = read(folder)
    assert found.observed["learning rates"] == words
    given = read(folder, learning_rates=found.learning_rates[:, 0])
    assert torch.equal(given.learning_rates, found.learning_rates) and "learning rates" not in given.observed


def test_rates_of_ones_own_are_checked_too(made: Folders) -> None:
    rates = read(made()).learning_rates[:, 0]
    assert torch.equal(read(made(), learning_rates=rates).learning_rates, read(made()).learning_rates)
    with pytest.raises(sf.TrajectoryError, match="step 8 was logged"):
        read(made(), learning_rates=torch.cat([rates[:-1], rates[:1]]))


def test_steps_that_mixed_precision_left_out_are_no_steps(copied: Folders) -> None:
    """The Trainer counts 10 of them where the optimizer took 8; as in a folder of a run with GradScaler."""
    folder = copied(max_grad_norm=0.3)

    def count(state: dict[str, Any]) -> None:
        log = [row for row in state["log_history"] if "learning_rate" in row]
        for row in log:
            row["step"] += 2 if row["step"] > 2 else 0
        lost = [{"step": s, "grad_norm": float("inf"), "learning_rate": log[2]["learning_rate"]} for s in (3, 4)]
        state.update(log_history=sorted([*log, *lost], key=lambda row: row["step"]))
        state["global_step"] += 2

    expected = read(folder)
    for step in (4, 8):
        edit_json(folder / f"checkpoint-{step}" / "trainer_state.json", count)
        edit_json(folder / f"checkpoint-{step}" / "trainer_state.json", lambda state: state.update(max_steps=8))
        (folder / f"checkpoint-{step}").rename(folder / f"moved-{step + 2}")
    for step in (6, 10):
        (folder / f"moved-{step}").rename(folder / f"checkpoint-{step}")
    found = read(folder)
    assert found.steps == (4, 8) and found.observed["skipped steps"] == 2
    assert (found.used.clip_factors == expected.used.clip_factors).all()
    assert found.lr_steps(0, 8) == expected.lr_steps(0, 8)


def test_an_optimizer_and_a_scheduler_that_count_apart_are_refused(copied: Folders) -> None:
    folder = copied()
    edit_saved(folder / "checkpoint-8" / "scheduler.pt", lambda content: content.update(last_epoch=7))
    refused(folder, "the optimizer has taken 8 steps, and its scheduler 7")


def test_of_an_optimizer_that_does_not_count_the_scheduler_tells_the_steps(copied: Folders) -> None:
    folder = copied(optim="sgd", lr_scheduler_type="constant")
    edit_saved(folder / "checkpoint-8" / "scheduler.pt", lambda content: content.update(last_epoch=7))
    found = read(folder)
    assert found.steps == (4, 7) and found.observed["skipped steps"] == 1


# Folders that are refused, and ends


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(sf.TrajectoryError, match=match):
        read(folder, **options)


def test_folders_that_lack_something_say_what(copied: Folders, tmp_path: Path) -> None:
    folder = copied(max_grad_norm=1.0)
    refused(tmp_path, r"no checkpoint-\* folders here")
    arguments = training_arguments(None, folder / "checkpoint-8")
    (folder / "checkpoint-8" / "training_args.bin").unlink()
    refused(folder, r"training_args.bin: not readable .*Give args=")
    refused(
        folder, r"the training arguments lack \['optim'\]", args={k: v for k, v in arguments.items() if k != "optim"}
    )
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    refused(folder, r"checkpoint-4/optimizer.pt: no such file.*save_only_model=False", args=arguments)


def test_logs_without_norms_need_the_clip_factors(copied: Folders) -> None:
    folder = copied(max_grad_norm=1.0)
    for step in (4, 8):
        edit_json(
            folder / f"checkpoint-{step}" / "trainer_state.json",
            lambda state: [row.pop("grad_norm", None) for row in state["log_history"]],
        )
    refused(folder, "no grad_norm was logged")
    clipped, whole = (read(folder, clip_factors=factor).lr_steps(0, 8)[0] for factor in (0.25, 1.0))
    assert clipped == pytest.approx(0.25 * whole)


def test_factors_between_logged_ones_are_named(made: Folders) -> None:
    with pytest.warns(UserWarning, match="clip factors were logged in 2 of 8 steps"):
        found = read(made(max_grad_norm=0.3, logging_steps=4))
    assert found.observed["clip factors"] == "logged in 2 of 8 steps, and interpolated between them"


def test_checkpoints_of_different_runs_are_refused(copied: Folders, made: Folders) -> None:
    folder = copied()
    shutil.rmtree(folder / "checkpoint-4")
    shutil.copytree(made(seed=4) / "checkpoint-4", folder / "checkpoint-4")
    refused(folder, r"checkpoint-4.*its log of step 1 is not that of .*one of them is of another run, or damaged")


def test_an_emptied_log_is_of_another_run_or_damaged(copied: Folders) -> None:
    folder = copied()
    edit_json(folder / "checkpoint-8" / "trainer_state.json", lambda state: state.update(log_history=[]))
    refused(folder, r"its log of step 1 is not that of .*checkpoint-8.*of another run, or damaged")


def evaluated(folder: Path, seed: int, **options: Any) -> None:
    trainer_of(
        folder,
        model_of("gpt2"),
        sentences(seed=seed),
        eval_dataset=sentences(4, seed=2),
        logging_strategy="no",
        eval_strategy="steps",
        eval_steps=2,
        lr_scheduler_type="constant",
        **options,
    ).train()


def test_checkpoints_whose_logs_differ_in_what_was_evaluated_are_refused(tmp_path: Path) -> None:
    evaluated(tmp_path / "a", seed=1, save_steps=3, max_steps=9)
    evaluated(tmp_path / "b", seed=7)
    assert read(tmp_path / "b").steps == (4, 8)
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    refused(tmp_path / "b", "checkpoint-3.*its log of step 2 is not that of .*checkpoint-4")


def test_an_end_of_another_run_is_refused(copied: Folders, tmp_path: Path) -> None:
    folder = copied()
    other = trainer_of(tmp_path / "other", model_of("gpt2"), sentences(seed=7), max_steps=12, save_strategy="no")
    other.train()
    other.save_model(folder)
    other.state.save_to_json(folder / "trainer_state.json")
    refused(folder, r"checkpoint-8/trainer_state.json: its log of step 1 is not that of .*copy/trainer_state.json")


def test_a_log_with_nan_goes_on_as_others_do(copied: Folders) -> None:
    folder = copied()
    for step in (4, 8):
        edit_json(
            folder / f"checkpoint-{step}" / "trainer_state.json",
            lambda state: state["log_history"][0].update(loss=float("nan")),
        )
    assert read(folder).steps == (4, 8)


@pytest.mark.parametrize(
    "log", [None, ["step"], [5], [{"loss": 1.0}], [{"step": "x"}], [{"step": 1, "learning_rate": "abc"}]]
)
def test_a_log_that_is_none_is_damaged(copied: Folders, log: Any) -> None:
    folder = copied()
    for step in (4, 8):
        edit_json(folder / f"checkpoint-{step}" / "trainer_state.json", lambda state: state.update(log_history=log))
    refused(folder, r"checkpoint-4/trainer_state.json: damaged")


def resumed(folder: Path, first: dict[str, Any], second: dict[str, Any], **both: Any) -> Path:
    """A run that is stopped at step 4, and goes on with other arguments."""
    trainer_of(folder, model_of("gpt2"), **{"max_steps": 4, **both, **first}).train()
    trainer_of(folder, model_of("gpt2"), **both, **second).train(resume_from_checkpoint=True)
    return folder


def with_earlier(folder: Path, **options: Any) -> Path:
    """The folder, as if its first checkpoint had been written with other arguments."""
    torch.save(trainer_of(folder, model_of("gpt2"), **options).args, folder / "checkpoint-4" / "training_args.bin")
    return folder


def test_a_run_that_was_resumed_with_another_limit_to_the_norm_needs_the_factors(tmp_path: Path) -> None:
    folder = resumed(tmp_path, {"max_grad_norm": 0.1}, {}, lr_scheduler_type="constant")
    refused(folder, r"checkpoint-4/training_args.bin: .*other arguments \(max_grad_norm=0.1, later 0.0\)")
    found = read(folder, clip_factors=[0.5] * 4 + [1.0] * 4)
    assert found.used.clip_factors[:, 0].tolist() == [0.5] * 4 + [1.0] * 4
    saved = training_arguments(None, folder / "checkpoint-8")
    assert (read(folder, args=saved).used.clip_factors == 1).all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2, later 1"),
        ({"per_device_train_batch_size": 5}, "per_device_train_batch_size=5, later 3"),
        ({"optim": "sgd", "label_smoothing_factor": 0.1}, "optim='sgd', later 'adamw_torch_fused', label_smoothing_fa"),
        ({"warmup_steps": 3}, "warmup_steps=3, later 0"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine', later 'linear'"),
    ],
)
def test_other_arguments_of_an_earlier_checkpoint_are_refused_by_name(
    changed: dict[str, Any], words: str, copied: Folders
) -> None:
    folder = with_earlier(copied(), **changed)
    refused(folder, rf"checkpoint-4/training_args.bin: .*other arguments \({words}")
    assert read(folder, args=training_arguments(None, folder / "checkpoint-8")).steps == (4, 8)


def test_what_the_user_gives_may_have_changed(copied: Folders) -> None:
    folder = copied()
    rates = read(folder).learning_rates[:, 0]
    with_earlier(folder, per_device_train_batch_size=5, lr_scheduler_type="cosine")
    refused(folder, "per_device_train_batch_size=5, later 3, lr_scheduler_type='cosine'", clip_factors=1.0)
    refused(folder, r"\(lr_scheduler_type='cosine', later 'linear'\)", batch_size=4)
    assert read(folder, batch_size=4, learning_rates=rates).optimizer.batch_size == 4


def test_steps_that_were_added_to_a_schedule_are_refused(tmp_path: Path) -> None:
    folder = resumed(tmp_path, {"max_steps": 4}, {}, logging_strategy="no")
    refused(folder, r"other arguments \(max_steps=4, later 8\)")
    rates = [0.02 * (1 - step / 4) for step in range(5)] + [0.02 * (1 - step / 8) for step in range(5, 8)]
    found = read(folder, learning_rates=rates)  # the first step that was added had the rate that the end had left
    assert found.lr_steps(0, 8)[0] == pytest.approx(sum(rates))


def test_arguments_of_the_schedule_that_change_no_rate_may_change(tmp_path: Path) -> None:
    """More steps of a constant rate; and a base rate, for a Trainer that goes on has the optimizer's."""
    folder = resumed(tmp_path, {}, {"learning_rate": 0.01}, lr_scheduler_type="constant")
    assert read(folder).learning_rates.tolist() == [[0.02, 0.02]] * 8


def test_an_optimizer_that_had_taken_steps_before_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model_of("gpt2"))
    trainer.train()
    trainer.train()
    refused(tmp_path, "has taken 12 steps, and the Trainer counts 4, so that 8 were before")


def test_changed_constants_are_refused(copied: Folders) -> None:
    folder = copied()
    edit_saved(
        folder / "checkpoint-4" / "optimizer.pt", lambda content: content["param_groups"][0].update(weight_decay=0.1)
    )
    refused(folder, r"the optimizer's \['weight_decay'\] were others")


def test_a_run_that_was_stopped_is_explained_if_asked_for(copied: Folders) -> None:
    folder = copied()
    shutil.rmtree(folder / "checkpoint-8")
    refused(folder, "stands at step 4 of 8, and nothing says that training ended there")
    assert read(folder, unfinished=True).steps == (4,)


def test_an_end_after_the_last_checkpoint_is_taken_from_what_was_saved_beside_it(tmp_path: Path) -> None:
    model = model_of("gpt2")
    trainer = trainer_of(tmp_path, model, save_strategy="epoch", max_steps=10, save_steps=100)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    shutil.rmtree(tmp_path / "checkpoint-10")
    with pytest.warns(UserWarning, match=r"ended at step 10, after the last checkpoint .step 8"):
        found = read(tmp_path)
    assert found.steps == (4, 8, 10) and found.observed["second moments at the end"] == "those of step 8"
    found.load_into(other := model_of("gpt2"), 2)
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    moments = [found.second_moments(index) or {} for index in (1, 2)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert read(tmp_path, unfinished=True).steps == (4, 8)


def test_few_checkpoints_are_enough_and_the_log_covers_all_steps(made: Folders) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(made(save_total_limit=1))
    assert found.steps == (8,) and torch.equal(found.learning_rates, read(made()).learning_rates)


def test_what_the_user_says_is_used(made: Folders) -> None:
    found = read(made(), stage="tuned", batch_size=7, example_weights=[3.0] + [1.0] * (N - 1))
    assert (found.stage, found.optimizer.batch_size) == ("tuned", 7)
    shares = found.example_weights(0)
    assert shares is not None and shares[0] == 3 * shares[1]
    assert read(made()).observed["sampling"].startswith("uniform")


ARGUMENTS = {
    "learning_rate": 0.02,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "optim": "adamw_torch",
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lr_scheduler_kwargs": "{bad"}, r"args: lr_scheduler_kwargs='{bad': expected a dict"),
        ({"lr_scheduler_kwargs": [1]}, r"args: lr_scheduler_kwargs=\[1\]: expected a dict"),
        ({"learning_rate": "x"}, "args: learning_rate='x': expected a number, at least 0"),
        ({"learning_rate": None}, r"lack \['learning_rate'\]"),
        ({"learning_rate": -0.1}, "args: learning_rate=-0.1: expected"),
        ({"optim": None}, r"lack \['optim'\]"),
        ({"max_grad_norm": "y"}, "args: max_grad_norm='y': expected a number"),
        ({"max_grad_norm": math.nan}, "args: max_grad_norm=nan: expected a number"),
        ({"warmup_steps": "z"}, "args: warmup_steps='z': expected a number, at least 0"),
        ({"warmup_ratio": [1]}, r"args: warmup_ratio=\[1\]: expected a number"),
        ({"label_smoothing_factor": "some"}, "args: label_smoothing_factor='some': expected a number"),
        ({"gradient_accumulation_steps": "q"}, "args: gradient_accumulation_steps='q': expected a whole number, at l"),
        ({"gradient_accumulation_steps": 1.5}, "args: gradient_accumulation_steps=1.5: expected a whole number"),
        ({"distributed_state": 5}, "args: distributed_state=5: expected accelerate's PartialState"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(made: Folders, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(sf.TrajectoryError, match=words):
        read(made(), args={**ARGUMENTS, **changed})


@pytest.mark.parametrize("limit", [None, 0, -1, math.inf])
def test_limits_to_the_norm_that_clip_nothing(made: Folders, limit: float | None) -> None:
    found = read(made(), args={**ARGUMENTS, "max_grad_norm": limit})
    assert (found.used.clip_factors == 1).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["state"][0].update(step=torch.tensor(math.nan)), r"step of parameter 0 is nan"),
        (lambda c: c["state"][0].update(step="eight"), "could not convert string"),
        (lambda c: c["state"].update({0: None}), "expected the state_dict of a torch optimizer"),
        (lambda c: c.update(state=[]), "expected the state_dict of a torch optimizer"),
        (lambda c: c["param_groups"].__setitem__(0, 5), "expected the state_dict of a torch optimizer"),
        (lambda c: c["param_groups"][0].pop("lr"), "expected the state_dict of a torch optimizer .KeyError: 'lr'"),
        (lambda c: c["param_groups"][0].update(lr=None), "expected the state_dict of a torch optimizer"),
        (lambda c: c["param_groups"][0].update(initial_lr="x"), "expected the state_dict of a torch optimizer"),
        (lambda c: c["param_groups"][0].update(betas=None), "betas=None of a parameter group of AdamW"),
        (lambda c: c["param_groups"][0].update(weight_decay="x"), "weight_decay='x' of a parameter group"),
        (lambda c: c["param_groups"][0].update(eps=(1, 2)), r"eps=\(1, 2\) of a parameter group of AdamW"),
        (lambda c: c["state"][0].pop("exp_avg_sq"), r"parameter 0 \('transformer.wte.weight'\) has no exp_avg_sq"),
        (lambda c: c["state"][0].update(exp_avg_sq=None), "has no exp_avg_sq, and AdamW keeps one"),
        (lambda c: c["state"][0].pop("step"), "has no step, and AdamW keeps one"),
        (lambda c: c["param_groups"][0].update(amsgrad=True), "has no max_exp_avg_sq, and AdamW keeps one"),
        (lambda c: c["state"].clear(), "AdamW has taken steps, and its state is empty"),
    ],
)
def test_an_optimizers_file_that_was_damaged_is_named(
    copied: Folders, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    folder = copied()
    for step in (4, 8):
        edit_saved(folder / f"checkpoint-{step}" / "optimizer.pt", change)
    refused(folder, f"checkpoint-4/optimizer.pt: .*{words}")


class Touch:
    """Unpickled by pickle, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_that_saved_arguments_name_is_run(copied: Folders, tmp_path: Path) -> None:
    folder, mark = copied(), tmp_path / "mark"
    torch.save({"optim": Touch(mark)}, folder / "checkpoint-8" / "training_args.bin")
    refused(folder, "Give args=")
    assert not mark.exists()
    load_torch_unsafely = torch.serialization.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "segflow.training.trainer_files.load_torch", lambda path: load_torch_unsafely(path, weights_only=False)
        )
        refused(folder, "Give args=")
    assert mark.exists()
