"""What a model is given of a batch, and what is read of its answer: wrappers, outputs and keys of every kind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import segflow as sf
from segflow.tasks import CausalLM, Classification, MaskedLM, MultiLabel, Regression, SequenceClassification
from segflow.tasks.calling import parameters_of, unwrapped

from ..support.model_tasks import causal_data, classed_data, masked_data, padded
from ..support.models import bert_classifier, gpt2, llama, masked_bert

LENGTHS = (4, 6, 2)


class Named(nn.Module):
    """Takes two arguments by name, one of which has a default, and answers as it is told."""

    def __init__(self, answer: Any = lambda z: z):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.answer = nn.Linear(3, 4).double(), answer

    def forward(self, pixels: Tensor, shift: Tensor | None = None) -> Any:
        return self.answer(self.line(pixels) + (0 if shift is None else shift))


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Plain:
    def __init__(self, logits: Tensor):
        self.logits, self.loss = logits, None


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 3, 1, 1, 2])
SHIFT = torch.arange(4, dtype=torch.float64).expand(5, 4) ** 2


def _loss(model: nn.Module, batch: Any, task: sf.Task | None = None) -> float:
    return (task or Classification()).compute_train_loss(batch, model).item()


def _expected(shift: bool = False) -> float:
    return functional.cross_entropy(Named()(X, SHIFT if shift else None), Y, reduction="sum").item()


ANSWERS: dict[str, Any] = {
    "tensor": lambda z: z,
    "tuple": lambda z: (z, z * 0),
    "mapping": lambda z: {"hidden": z * 0, "logits": z},
    "pretraining": lambda z: {"prediction_logits": z, "seq_relationship_logits": z * 0},
    "object": Plain,
    "named tuple": lambda z: Pair(hidden=z * 0, logits=z),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_logits_are_found_in_every_kind_of_answer(name: str) -> None:
    assert _loss(Named(ANSWERS[name]), {"pixels": X, "labels": Y}) == _expected()


def test_logits_of_16_bits_are_summed_in_single_precision() -> None:
    model = Named().to(torch.bfloat16)
    loss = Classification().compute_train_loss({"pixels": X.to(torch.bfloat16), "labels": Y}, model)
    logits = model(X.to(torch.bfloat16)).float()
    assert loss.dtype == torch.float32
    assert loss.item() == functional.cross_entropy(logits, Y, reduction="none").sum().item()


BATCHES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "named": ({"pixels": X, "labels": Y, "index": Y}, {}, False),
    "all that is named": ({"pixels": X, "shift": SHIFT, "labels": Y}, {}, True),
    "a key": ({"image": X, "shift": SHIFT, "labels": Y}, {"inputs": "image"}, False),
    "keys": ({"pixels": X, "shift": SHIFT, "labels": Y}, {"inputs": ["pixels"]}, False),
    "two keys": ({"pixels": X, "shift": SHIFT, "labels": Y}, {"inputs": ("pixels", "shift")}, True),
    "inputs": ({"inputs": X, "shift": SHIFT, "labels": Y}, {}, False),
    "inputs that are a mapping": ({"inputs": {"pixels": X, "shift": SHIFT}, "labels": Y}, {}, True),
    "pair": ((X, Y), {}, False),
    "pair with a mapping": (({"pixels": X, "shift": SHIFT, "labels": Y * 0}, Y), {}, True),
    "label": ({"pixels": X, "label": Y}, {}, False),
    "targets": ({"pixels": X, "targets": Y}, {}, False),
    "labels before label": ({"pixels": X, "label": Y * 0, "labels": Y}, {}, False),
    "targets by name": ({"pixels": X, "shift": SHIFT, "labels": Y * 0, "y": Y}, {"targets": "y"}, True),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_model_is_given_what_it_takes_by_name_or_what_is_said(name: str) -> None:
    batch, options, with_shift = BATCHES[name]
    assert _loss(Named(), batch, Classification(**options)) == _expected(with_shift)


class Taking(nn.Module):
    """Has a loss of its own, as transformers' models do, and notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.given = Named(), set[str]()

    def forward(self, pixels: Tensor, labels: Tensor | None = None, **others: Any) -> Tensor:
        self.given = {"pixels", *others} | (set() if labels is None else {"labels"})
        return self.inner(pixels, others.get("shift"))


def test_a_model_that_takes_any_name_gets_all_tensors_but_labels_and_weights() -> None:
    batch = {"pixels": X, "labels": Y, "label": Y, "w": Y.double(), "shift": SHIFT, "text": ["a"] * 5}
    model = Taking()
    task = Classification(weights="w", mean_weight=1)
    assert task.compute_measurement(batch, model).item() == _expected(shift=True)
    assert model.given == {"pixels", "shift"}


@pytest.fixture
def process_group() -> Iterator[None]:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29713"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Handing(nn.Module):
    """A wrapper of a user's own that hands on all that it is given."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)


def test_wrappers_are_looked_through(process_group: None) -> None:
    model = Named()
    wrappers = (
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        Handing,
        lambda inner: torch.compile(inner, backend="eager"),
        lambda inner: torch.compile(nn.parallel.DistributedDataParallel(inner), backend="eager"),
    )
    for wrap in wrappers:
        wrapped = wrap(model)
        assert parameters_of(wrapped).named == ("pixels", "shift")
        assert _loss(wrapped, {"pixels": X, "shift": SHIFT, "index": Y, "labels": Y}) == _expected(shift=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_a_peft_model_takes_what_its_base_takes() -> None:
    from peft import LoraConfig, get_peft_model

    base = bert_classifier()
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert unwrapped(adapted) is unwrapped(adapted.base_model) is base
    batch = padded(classed_data(LENGTHS)) | {"index": torch.arange(3), "token_type_ids": torch.ones(3, 6).long()}
    adapted.eval()
    expected = base.eval()(**{k: v for k, v in batch.items() if k not in ("index", "labels")}).logits
    plain = functional.cross_entropy(expected, batch["labels"], reduction="none").sum()
    torch.testing.assert_close(SequenceClassification().compute_train_loss(batch, adapted), plain)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_transformers_models_have_the_trainers_loss(make: Any) -> None:
    """The Trainer calls the model with labels and the number of labels in the batch that something predicts."""
    batch, model = padded(causal_data(LENGTHS)), make().double().eval()
    batch["labels"][0, :2] = -100
    items = (batch["labels"][:, 1:] != -100).sum()
    expected = model(**batch, num_items_in_batch=items).loss
    data = [{key: value[n] for key, value in batch.items()} for n in range(3)]
    mean = sf.tasks.mean_tokens(data, shifted=True)
    assert mean == items.item() / 3
    loss = CausalLM("batch token mean", mean_tokens=mean).compute_train_loss(batch, model) / 3
    torch.testing.assert_close(loss, expected.double(), rtol=1e-6, atol=0)  # transformers sums in single precision


def _gradient_of_the_trainer(make: Any, data: list[Any], folder: str, **options: Any) -> tuple[nn.Module, list[Tensor]]:
    """The model before a Trainer's only step of SGD, of two accumulated batches of two, and that step's gradient."""
    from transformers import Trainer, TrainingArguments

    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = model.double()
    before = [p.detach().clone() for p in model.parameters()]
    arguments = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, data_collator=padded).train()
    gradient = [(old - new.detach()) / 0.5 for old, new in zip(before, model.parameters(), strict=True)]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    return model, gradient


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_trainer_itself_steps_by_the_gradient_of_the_batch_token_mean(
    tmp_path: Any, make: Any, smoothing: float
) -> None:
    data = causal_data((4, 6, 2, 5))
    model, steps = _gradient_of_the_trainer(make, data, str(tmp_path), label_smoothing_factor=smoothing)
    mean = sf.tasks.mean_tokens(data, model=model)
    assert mean == (17 if make is gpt2 else 13) / 4  # of ...ForCausalLM the Trainer leaves first labels out
    task = CausalLM("batch token mean", mean_tokens=mean, label_smoothing=smoothing)
    loss = task.compute_train_loss(padded(data), model) / 4
    for step, gradient in zip(steps, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(step, gradient, rtol=1e-4, atol=1e-7)  # transformers sums in single precision


def test_the_trainer_sums_accumulated_batches_of_models_that_average_by_themselves(tmp_path: Any) -> None:
    """docs/TASKS.md tells it: the gradient is as many times the mean loss's as batches are accumulated."""
    data = classed_data((4, 6, 2, 5))
    model, steps = _gradient_of_the_trainer(bert_classifier, data, str(tmp_path))
    loss = SequenceClassification().compute_train_loss(padded(data), model) / 4
    for step, gradient in zip(steps, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(step, 2 * gradient, rtol=1e-4, atol=1e-7)


def test_masked_words_and_classes_have_transformers_own_losses() -> None:
    batch, model = padded(masked_data(LENGTHS)), masked_bert().double().eval()
    mean = sf.tasks.mean_tokens(masked_data(LENGTHS), shifted=False)
    task = MaskedLM("batch token mean", mean_tokens=mean)
    torch.testing.assert_close(task.compute_train_loss(batch, model) / 3, model(**batch).loss)
    batch, model = padded(classed_data(LENGTHS)), bert_classifier().double().eval()
    torch.testing.assert_close(SequenceClassification().compute_train_loss(batch, model) / 3, model(**batch).loss)
    flags = batch | {"labels": torch.eye(3, dtype=torch.float64)}
    model.config.problem_type = "multi_label_classification"
    torch.testing.assert_close(MultiLabel().compute_train_loss(flags, model) / 3, model(**flags).loss)
    model.config.problem_type = "regression"
    torch.testing.assert_close(Regression().compute_train_loss(flags, model) / 3, model(**flags).loss)
    model.config.return_dict = False
    torch.testing.assert_close(Regression().compute_train_loss(flags, model) / 3, model(**flags)[0])


def test_one_output_of_a_sequence_is_a_regression_of_flat_targets() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=24, num_labels=1, **sizes)).double().eval()
    batch = padded(classed_data(LENGTHS)) | {"labels": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)}
    torch.testing.assert_close(Regression().compute_train_loss(batch, model) / 3, model(**batch).loss)
    with pytest.raises(sf.TaskError, match=r"one output, whose softmax is always 1\. Take Binary or Regression"):
        SequenceClassification().compute_train_loss(batch | {"labels": torch.tensor([0, 0, 0])}, model)
    with pytest.raises(
        sf.TaskError, match=r"found torch.float64\. .* Regression for numbers, and Binary or MultiLabel"
    ):
        SequenceClassification().compute_train_loss(batch, bert_classifier().double())


FAULTS: dict[str, tuple[Any, str]] = {
    "nothing fits": (lambda: _loss(Named(), {"x": X, "labels": Y}), r"takes \['pixels', 'shift'\], and the batch has"),
    "what is needed is missing": (
        lambda: _loss(Named(), {"shift": SHIFT, "labels": Y}),
        "Say what it is given: inputs=",
    ),
    "no targets": (
        lambda: _loss(Named(), {"pixels": X}),
        r"none of \['labels', 'label', 'targets'\], only \['pixels'\]",
    ),
    "no such targets": (lambda: _loss(Named(), {"pixels": X, "labels": Y}, Classification(targets="y")), "has no 'y'"),
    "no such input": (
        lambda: _loss(Named(), {"x": X, "labels": Y}, Classification(inputs=["pixels"])),
        "has no 'pixels'",
    ),
    "a list of targets": (
        lambda: _loss(Named(), {"pixels": X, "labels": ["a"] * 5}),
        "a tensor of targets, found list",
    ),
    "other outputs": (
        lambda: _loss(Named(lambda z: {"last_hidden_state": z}), (X, Y)),
        r"an output or a mapping with 'logits'.*found dict with \['last_hidden_state'\]\. Derive a Task",
    ),
    "an empty tuple": (lambda: _loss(Named(lambda z: ()), (X, Y)), r"found tuple of \[\]"),
    "a key that is none": (lambda: Classification(targets=3), "targets=3: expected a key of the batch"),
    "weights of a pair": (
        lambda: _loss(Named(), (X, Y), Classification(weights="w", mean_weight=1)),
        r"the batch is no mapping\. Give its key in the task: weights=",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_called_or_read_is_refused_with_what_to_do(fault: str) -> None:
    make, text = FAULTS[fault]
    with pytest.raises(sf.TaskError, match=text):
        make()


def test_a_property_takes_the_batches_and_outputs_that_tasks_take() -> None:
    data = [{"pixels": x, "index": 0, "label": y} for x, y in zip(X, Y, strict=True)]
    expected = Named()(X).softmax(1).gather(1, Y[:, None]).mean().item()
    for answer in ANSWERS.values():
        assert sf.properties.SoftAccuracy(data).evaluate(Named(answer)) == pytest.approx(expected)
    texts = classed_data(LENGTHS)
    model = bert_classifier().double().eval()
    found = sf.properties.MeanLoss(texts, SequenceClassification(), collate_fn=sf.tasks.pad).evaluate(model)
    assert found == pytest.approx(model(**padded(texts)).loss.item())


def test_what_is_no_dataset_is_refused_where_tokens_are_counted() -> None:
    rows = [{"labels": torch.tensor([1, 2])}]
    with pytest.raises(sf.TaskError, match=r"found a DataLoader, expected .* give its \.dataset"):
        sf.tasks.mean_tokens(torch.utils.data.DataLoader(rows))  # type: ignore[arg-type]
    with pytest.raises(sf.TaskError, match=r"with the keys \['train'\]"):
        sf.tasks.mean_tokens({"train": rows})
