"""Sequences of different lengths: padding changes no gradient, draw or factor, and objectives are those of training.

Axes: B examples, S positions, C words.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import segflow as sf
from segflow.data.draws import drawing
from segflow.tasks import CausalLM, MaskedLM, Padding, SequenceClassification, TokenClassification

from ..support.helpers import analyzer_of, trajectory_of
from ..support.model_tasks import causal_data, classed_data, masked_data
from ..support.models import bert_classifier, gpt2, llama, masked_bert

LENGTHS, NO, CLASSES = (4, 7, 2, 5), -100, "bert, classes"


def _prompted(lengths: Any) -> list[dict[str, Tensor]]:
    """The first half of each text has no labels."""
    data = causal_data(lengths)
    for example in data:
        example["labels"] = example["labels"].clone()
        example["labels"][: len(example["labels"]) // 2] = NO
    return data


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], Callable[[], sf.Task]]] = {
    "gpt2": (gpt2, causal_data, CausalLM),
    "gpt2, completions": (gpt2, _prompted, lambda: CausalLM("token sum", label_smoothing=0.1)),
    "llama": (llama, causal_data, lambda: CausalLM("batch token mean", mean_tokens=3)),
    "bert, masked words": (masked_bert, masked_data, MaskedLM),
    CLASSES: (bert_classifier, classed_data, SequenceClassification),
}


def _gradients(task: sf.Task, model: nn.Module, batch: Any, sample: bool, numbers: list[int]) -> list[Tensor]:
    with drawing(0, 1, numbers):
        loss = task.compute_train_loss(batch, model, sample=sample)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(1).double() if g is None else g for g in found]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(  # a pooler of classes takes the first position, whatever it is
    ("name", "side"),
    [(name, side) for name in MODELS for side in ("left", "right") if (name, side) != (CLASSES, "left")],
)
def test_gradients_and_drawn_labels_do_not_depend_on_padding(name: str, side: str, sample: bool) -> None:
    make, make_data, make_task = MODELS[name]
    torch.manual_seed(0)
    model, data, task = make().double().eval(), make_data(LENGTHS), make_task()
    if make is not llama and side == "left":
        data = [example | {"position_ids": torch.arange(len(example["input_ids"]))} for example in data]
    batch = Padding(pad_id=3, side=side)(data)
    fill, room = {"input_ids": 3, "labels": NO}, (2, 0) if side == "left" else (0, 2)
    more = {k: functional.pad(v, room, value=fill.get(k, 0)) for k, v in batch.items() if v.ndim == 2}
    alone = [
        _gradients(task, model, {key: value[None] for key, value in example.items()}, sample, [n])
        for n, example in enumerate(data)
    ]
    expected = [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)]
    assert any(gradient.any() for gradient in expected)
    for padded in (batch, batch | more):
        found = _gradients(task, model, padded, sample, list(range(len(data))))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_pseudo_labels_stand_where_targets_are_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of drawn labels has a slope in the logits of targets alone."""
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[NO, NO, 1, 2, NO], [0, NO, NO, NO, NO]])
    for task, moved in ((CausalLM(), 1), (MaskedLM(), 0)):
        (slope,) = torch.autograd.grad(task.compute_train_loss((logits, labels), nn.Identity(), sample=True), logits)
        expected = functional.pad(labels[:, moved:], (0, moved), value=NO) != NO
        assert (slope != 0).any(-1).equal(expected)


def test_draws_do_not_depend_on_how_many_tokens_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.zeros(2, 300, 3).double(), torch.ones(2, 300).long()
    shapes: list[int] = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, n: shapes.append(len(p)) or draw(p, n))
    with drawing(0, 0, [4, 9]):
        both = MaskedLM().compute_train_loss((logits, labels), nn.Identity(), sample=True)
    assert shapes == [256, 256, 88]
    torch.testing.assert_close(both.item(), 2 * 300**0.5 * torch.tensor(3.0).double().log().item())


# ---- masks ----


def test_masks_show_what_the_targets_of_a_causal_model_can_see() -> None:
    batch = {
        "input_ids": torch.ones(3, 5).long(),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[NO, NO, 2, 3, NO], [NO, NO, 1, NO, 4], [NO] * 5]),
    }
    seen = [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0] * 5]
    assert CausalLM().get_attention_mask(batch).tolist() == seen
    pair = (batch["input_ids"], batch["labels"])
    assert CausalLM().get_attention_mask(pair).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0] * 5]
    inner = ({k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"])
    assert CausalLM().get_attention_mask(inner).tolist() == seen
    for task in (MaskedLM(), TokenClassification(), SequenceClassification(), sf.tasks.Regression()):
        assert task.get_attention_mask(batch) is batch["attention_mask"]
        assert task.get_attention_mask(inner) is batch["attention_mask"]
        assert task.get_attention_mask(pair) is None


def test_labels_that_are_missing_are_the_tokens_that_the_mask_shows() -> None:
    model = gpt2().double().eval()
    batch = Padding()(causal_data(LENGTHS))
    del batch["labels"]
    expected = Padding()(causal_data(LENGTHS))
    for of in ("compute_train_loss", "compute_measurement"):
        found = getattr(CausalLM(), of)(batch, model)
        torch.testing.assert_close(found, getattr(CausalLM(), of)(expected, model))
    with pytest.raises(sf.TaskError, match="the batch has no 'words'"):
        CausalLM(labels="words").compute_train_loss(batch, model)
    with pytest.raises(sf.TaskError, match=r"none of \['labels', 'label', 'targets'\]"):
        MaskedLM().compute_train_loss(batch, model)


class Past(nn.Module):
    """A causal model without a mask: the mean of what came before, and a head."""

    def __init__(self, words: int = 6, width: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(words, width), nn.Linear(width, width), nn.Linear(width, words)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(torch.tanh(self.mix(x.cumsum(1) / torch.arange(1, x.shape[1] + 1).double()[:, None])))


def _texts(lengths: Any = (4, 9, 2, 6, 3, 8)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    words = [torch.randint(0, 6, (length,), generator=generator) for length in lengths]
    return [{"input_ids": w, "labels": w} for w in words]


@pytest.mark.parametrize("kind", ["mapping", "pair", "padded more"])
def test_factors_and_scores_do_not_depend_on_padding_without_a_mask(tmp_path: Path, kind: str) -> None:
    """Right padding that no target sees; factors are fitted in batches of one, and of all."""

    def collate(examples: Any) -> Any:
        batch = Padding(pad_id=2)(examples)
        if kind == "padded more":
            batch = {k: functional.pad(v, (0, 3), value=NO if k == "labels" else 2) for k, v in batch.items()}
        tokens, labels = batch["input_ids"], batch["labels"]
        return (tokens, labels) if kind == "pair" else {"input_ids": tokens, "labels": labels}

    model, data = Past(), _texts()
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], len(data))
    groups = sf.Groups.singletons(len(data))
    values = []
    for size in (1, 6):
        options = {"method": sf.Source(segments=1), "collate_fn": collate}
        analyzer = analyzer_of(model, trajectory, tmp_path / f"store{size}", CausalLM(), **options)
        assert "padding" not in str(analyzer.check(data, data))
        analyzer.fit(data, batch_size=size)
        values.append(analyzer.score(groups, data, data, batch_size=size).values)
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=1e-12)


# ---- the objectives, against training ----


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(6, 5), nn.Linear(5, 6, bias=False)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


STEPS, LOWERED, LENGTHS_8 = 12, 1e-3, (3, 12, 2, 7, 4, 10, 5, 9)
CONFUSED_WITH = {
    "sequence mean": "batch token mean",
    "token sum": "sequence mean",
    "batch token mean": "sequence mean",
}
RATES = {"sequence mean": 0.05, "token sum": 0.01, "batch token mean": 0.05}
# Of the losses [B, S] of a batch, 0 where there is no target, and what these are with one example's weight lowered.
OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sequence mean": lambda plain, lowered: (lowered.sum(1) / (plain != 0).sum(1)).mean(),
    "token sum": lambda plain, lowered: lowered.sum(1).mean(),
    "batch token mean": lambda plain, lowered: lowered.sum() / (plain != 0).sum(),
}


def _token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"])[:, :-1]
    return functional.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none", ignore_index=NO)


def _trained(objective: str, data: Any, size: int, lowered: int | None = None) -> tuple[nn.Module, list[Any]]:
    """The model after training, and its states in the middle of it and at the end.

    The losses of a lowered example are multiplied by 1 - LOWERED, and divided by the counts that they were divided by.
    """
    model, order = Bigram(), torch.Generator().manual_seed(1)
    weights = torch.ones(len(data), dtype=torch.float64)
    weights[[] if lowered is None else lowered] = 1 - LOWERED
    states = []
    optimizer = torch.optim.SGD(model.parameters(), RATES[objective])
    for epoch in range(STEPS * size // len(data)):
        for rows in torch.randperm(len(data), generator=order).split(size):
            losses = _token_losses(model, Padding()([data[row] for row in rows.tolist()]))
            optimizer.zero_grad()
            OBJECTIVES[objective](losses, losses * weights[rows][:, None]).backward()
            optimizer.step()
        if (epoch + 1) * 2 * len(data) in (STEPS * size, 2 * STEPS * size):
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    return model, states


def _predicted(objective: str, data: Any, query: Any, states: Any, rate: float, folder: Path) -> Tensor:
    """What SOURCE says of the change in the queries' summed losses, of each example's removal."""
    mean = sf.tasks.mean_tokens(data, shifted=True) if objective == "batch token mean" else None
    task = CausalLM(objective, mean_tokens=mean, measurement="log_probability")
    trajectory = trajectory_of(folder / "run", states, len(data), lr=[rate] * STEPS, steps=[STEPS // 2, STEPS])
    options = {"method": sf.Source(segments=1), "collate_fn": sf.tasks.pad}
    analyzer = analyzer_of(Bigram(), trajectory, folder / "store", task, **options)
    analyzer.fit(data)
    return -analyzer.score(sf.Groups.singletons(len(data)), data, query).values


@pytest.mark.parametrize("size", [8, pytest.param(4, marks=pytest.mark.slow)], ids=["full batches", "half batches"])
@pytest.mark.parametrize("trained", list(OBJECTIVES))
def test_each_objective_agrees_with_training_by_it_and_another_one_does_not(
    tmp_path: Path, trained: str, size: int
) -> None:
    data, query = _texts(LENGTHS_8), _texts((6, 5, 4))

    def measured(lowered: int | None) -> Tensor:
        model, _ = _trained(trained, data, size, lowered)
        return torch.stack([_token_losses(model, sf.tasks.pad([one])).sum().detach() for one in query])

    before, states = measured(None), _trained(trained, data, size)[1]
    changes_QN = torch.stack([(measured(n) - before) / LOWERED for n in range(len(data))], 1)
    off = {}
    for objective in (trained, CONFUSED_WITH[trained]):
        found_QN = _predicted(objective, data, query, states, RATES[trained], tmp_path / objective.split()[0])
        off[objective] = ((found_QN - changes_QN).norm() / changes_QN.norm()).item()
        slope = ((found_QN * changes_QN).sum() / changes_QN.square().sum()).item()
        assert objective != trained or abs(slope - 1) < 0.05
    assert off[trained] < (0.1 if size == len(data) else 0.2)
    assert off[CONFUSED_WITH[trained]] > 3 * off[trained]
