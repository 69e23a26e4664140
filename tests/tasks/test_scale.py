"""The scale of every ready-made task: pseudo-labels have the exact curvature, and losses are those of torch.

Pseudo-labels are enumerated, each with its probability, and the second moment of the sampled gradients in the logits is
compared with the loss's second derivative in them, which is the same for whatever labels are true.
Axes: B examples, S positions, T targets, C classes, L labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import segflow as sf
from segflow.tasks import (
    Binary,
    CausalLM,
    Classification,
    ContrastivePairs,
    MaskedLM,
    MultiLabel,
    Regression,
    SequenceClassification,
    TokenClassification,
)

CLASS_WEIGHTS, NO = [1.0, 3.0, 0.5], -100
LABELS_BS = torch.tensor([[1, 2, NO, 0], [NO, 0, NO, NO], [NO, NO, NO, NO]])
WEIGHTS = torch.tensor([0.5, 3.0, 0.0], dtype=torch.float64)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _classes() -> dict[str, Any]:
    return {"inputs": _numbers(3, 3), "labels": torch.tensor([1, 2, 1]), "weights": WEIGHTS}


def _several() -> dict[str, Any]:
    return {"inputs": _numbers(3, 2), "labels": torch.tensor([[0, 1], [1, 1], [0, 0]]), "weights": WEIGHTS}


def _one() -> dict[str, Any]:
    return {"inputs": _numbers(3, 1), "labels": torch.tensor([0, 1, 1]), "weights": WEIGHTS}


def _tokens() -> dict[str, Any]:
    return {"inputs": _numbers(3, 4, 3), "labels": LABELS_BS}


WEIGHTED = {"weights": "weights", "mean_weight": 1.7}
TASKS: dict[str, tuple[sf.Task, dict[str, Any]]] = {
    "classification": (Classification(), _classes()),
    "smoothed": (Classification(label_smoothing=0.2), _classes()),
    "class weights": (Classification(class_weights=CLASS_WEIGHTS, mean_weight=1.3), _classes()),
    "weights": (Classification(**WEIGHTED), _classes()),
    "all": (
        SequenceClassification(label_smoothing=0.2, class_weights=torch.tensor(CLASS_WEIGHTS), **WEIGHTED),
        _classes(),
    ),
    "several labels, mean": (MultiLabel(), _several()),
    "several labels, sum": (MultiLabel("sum", pos_weight=[2.5, 0.3]), _several()),
    "several labels, weights": (MultiLabel(pos_weight=2.5, **WEIGHTED), _several()),
    "one logit": (Binary(), _one()),
    "one logit, weights": (Binary(pos_weight=2.5, **WEIGHTED), _one()),
    "regression": (Regression(), _several()),
    "regression, weights": (Regression("sum", **WEIGHTED), _several()),
    "sequence mean": (CausalLM(), _tokens()),
    "token sum": (CausalLM("token sum", label_smoothing=0.1), _tokens()),
    "batch token mean": (CausalLM("batch token mean", mean_tokens=2.5), _tokens()),
    "sequence mean, weights": (CausalLM(**WEIGHTED), _tokens() | {"weights": WEIGHTS}),
    "masked words, both weights": (
        MaskedLM("token sum", class_weights=CLASS_WEIGHTS, **WEIGHTED),
        _tokens() | {"weights": WEIGHTS},
    ),
    "masked words": (MaskedLM(), _tokens()),
    "masked words, batch": (
        MaskedLM("batch token mean", mean_tokens=1.5, ignore_index=2),
        _tokens() | {"labels": (LABELS_BS + 3) % 3},
    ),
    "token classes": (
        TokenClassification("token sum", class_weights=CLASS_WEIGHTS, mean_weight=1.3, label_smoothing=0.2),
        _tokens(),
    ),
}


def _loss(task: sf.Task, batch: dict[str, Any], logits: Tensor, sample: bool = False) -> Tensor:
    return task.compute_train_loss(batch | {"inputs": logits}, nn.Identity(), sample=sample)


def _draws(monkeypatch: pytest.MonkeyPatch, task: sf.Task, batch: dict[str, Any]) -> Iterator[float]:
    """The probability of each outcome of what the task draws, which it draws at that time."""
    chances: dict[str, Tensor] = {}

    def note(name: str, p: Tensor, result: Tensor) -> Tensor:
        chances[name] = p.detach().double()
        return result

    monkeypatch.setattr(torch, "multinomial", lambda p, n: note("labels", p, torch.zeros(len(p), n, dtype=torch.long)))
    monkeypatch.setattr(torch, "bernoulli", lambda p: note("bits", p, torch.zeros_like(p)))
    monkeypatch.setattr(torch, "randn_like", lambda like: note("noise", like, torch.zeros_like(like)))
    _loss(task, batch, batch["inputs"], sample=True)
    [(name, p)] = chances.items()
    options = {"labels": range(p.shape[-1]), "bits": (0.0, 1.0), "noise": (-1.0, 1.0)}[name]
    rows = p.flatten(0, -2) if name == "labels" else p.flatten()
    for outcome in itertools.product(options, repeat=len(rows)):
        drawn = torch.tensor(outcome, dtype=torch.long if name == "labels" else torch.float64)
        if name == "labels":
            monkeypatch.setattr(torch, "multinomial", lambda p, n, drawn=drawn: drawn[:, None])
            yield rows.gather(1, drawn[:, None]).prod().item()
        elif name == "bits":
            monkeypatch.setattr(torch, "bernoulli", lambda p, drawn=drawn: drawn.reshape(p.shape))
            yield torch.where(drawn == 1, rows, 1 - rows).prod().item()
        else:  # signs have the normal distribution's second moment
            monkeypatch.setattr(torch, "randn_like", lambda like, drawn=drawn: drawn.reshape(like.shape))
            yield 0.5 ** len(rows)


def _one_example(batch: dict[str, Any], number: int) -> dict[str, Any]:
    return {key: value[[number]] for key, value in batch.items()}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_pseudo_labels_have_the_exact_curvature_of_every_task_and_option(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    task, whole = TASKS[name]
    batch = _one_example(whole, number)
    logits = batch["inputs"]
    exact = torch.autograd.functional.hessian(lambda z: _loss(task, batch, z), logits)
    exact = exact.reshape(logits.numel(), logits.numel())
    moment, total = torch.zeros_like(exact), 0.0
    for chance in _draws(monkeypatch, task, batch):
        leaf = logits.clone().requires_grad_()
        (g,) = torch.autograd.grad(_loss(task, batch, leaf, sample=True), leaf)
        moment += chance * torch.outer(g.flatten(), g.flatten())
        total += chance
    assert total == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(moment, exact, rtol=1e-9, atol=1e-12)


def test_pseudo_labels_of_pairs_have_the_curvature_of_the_loss_in_the_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    task = ContrastivePairs(scale=4.0, bias=-1.0)
    first, second = _numbers(1, 3), _numbers(2, 3)[1:]
    moment = 0.0
    for bit in (0.0, 1.0):
        monkeypatch.setattr(torch, "bernoulli", lambda p, bit=bit: torch.full_like(p, bit))
        leaf = first.clone().requires_grad_()
        batch = {"first": leaf, "second": second, "labels": torch.tensor([0])}
        logit = 4.0 * functional.cosine_similarity(leaf, second) - 1.0
        (slope,) = torch.autograd.grad(logit.sum(), leaf)
        (g,) = torch.autograd.grad(task.compute_train_loss(batch, nn.Identity(), sample=True), leaf)
        p = logit.sigmoid().item()
        moment += (p if bit else 1 - p) * torch.outer(g[0], g[0])
    torch.testing.assert_close(moment, p * (1 - p) * torch.outer(slope[0], slope[0]), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", TASKS)
def test_losses_and_measurements_are_sums_over_examples(name: str) -> None:
    task, batch = TASKS[name]
    for of in (
        lambda one: task.compute_train_loss(one, nn.Identity()),
        lambda one: task.compute_measurement(one, nn.Identity()),
        lambda one: task.compute_output(one, nn.Identity()),
    ):
        alone = sum(of(_one_example(batch, number)).item() for number in range(3))
        assert of(batch).item() == pytest.approx(alone, rel=1e-12)


# ---- torch's own losses, after the normalisation that the docstrings state ----


def test_class_weights_and_smoothing_are_those_of_torchs_cross_entropy() -> None:
    logits, labels = _numbers(40, 3), torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
    weights = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    expected = functional.cross_entropy(logits, labels, weights, label_smoothing=0.2)
    task = Classification(class_weights=weights, label_smoothing=0.2, mean_weight=weights[labels].mean().item())
    found = task.compute_train_loss((logits, labels), nn.Identity()) / 40
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    plain = functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(task.compute_measurement((logits, labels), nn.Identity()), plain)


def test_sample_weights_are_those_of_a_weighted_mean() -> None:
    batch = _classes()
    losses = functional.cross_entropy(batch["inputs"], batch["labels"], reduction="none")
    mean = Classification(weights="weights", mean_weight=1.0).compute_train_loss(batch, nn.Identity()) / 3
    torch.testing.assert_close(mean, (WEIGHTS * losses).mean())
    share = Classification(weights="weights", mean_weight=WEIGHTS.mean()).compute_train_loss(batch, nn.Identity()) / 3
    torch.testing.assert_close(share, (WEIGHTS * losses).sum() / WEIGHTS.sum())
    squares = (batch["inputs"] - batch["inputs"].flip(0)).square().mean(1)
    batch |= {"labels": batch["inputs"].flip(0)}
    found = Regression(weights="weights", mean_weight=1.0).compute_train_loss(batch, nn.Identity()) / 3
    torch.testing.assert_close(found, (WEIGHTS * squares).mean())


@pytest.mark.parametrize("pos_weight", [None, 2.5, [2.5, 0.3]])
def test_binary_losses_are_those_of_torch(pos_weight: Any) -> None:
    batch = _several()
    logits, targets = batch["inputs"], batch["labels"].double()
    given = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)
    expected = nn.BCEWithLogitsLoss(pos_weight=given)(logits, targets)
    torch.testing.assert_close(MultiLabel(pos_weight=pos_weight).compute_train_loss(batch, nn.Identity()) / 3, expected)
    if not isinstance(pos_weight, list):
        expected = nn.BCEWithLogitsLoss(pos_weight=given)(logits[:, 0], targets[:, 0])
        for z in (logits[:, 0], logits[:, :1]):
            for y in (targets[:, 0].bool(), targets[:, :1].long()):
                found = Binary(pos_weight=pos_weight).compute_train_loss((z, y), nn.Identity()) / 3
                torch.testing.assert_close(found, expected)


def test_binary_measurements_follow_their_formulas() -> None:
    logits, labels = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.tensor([1, 1])
    p = logits.sigmoid()
    formulas = {"loss": -p.log(), "log_probability": p.log(), "margin": p.log() - (1 - p).log()}
    for name, of_example in formulas.items():
        batch = {"inputs": logits, "labels": labels, "w": torch.ones(2)}
        task = Binary(name, pos_weight=3, weights="w", mean_weight=2)
        torch.testing.assert_close(task.compute_measurement(batch, nn.Identity()), of_example.sum())
        assert MultiLabel("mean", name).compute_measurement(
            {"inputs": logits[None], "labels": labels[None]}, nn.Identity()
        ).item() == pytest.approx(of_example.mean().item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_losses_are_torchs_with_an_ignored_label(smoothing: float) -> None:
    logits, targets = _numbers(3, 4, 3), (LABELS_BS != NO).sum().item()
    for weights in (None, torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)):
        expected = functional.cross_entropy(
            logits.flatten(0, 1), LABELS_BS.flatten(), weights, label_smoothing=smoothing
        )
        options: dict[str, Any] = {"label_smoothing": smoothing}
        if weights is not None:
            mean = weights[LABELS_BS[LABELS_BS != NO]].mean()
            options |= {"class_weights": weights, "mean_weight": mean}
        task = TokenClassification("batch token mean", mean_tokens=targets / 3, **options)
        torch.testing.assert_close(task.compute_train_loss((logits, LABELS_BS), nn.Identity()) / 3, expected)


def test_objectives_weigh_tokens_as_they_say() -> None:
    logits = _numbers(3, 4, 3)
    of_token = functional.cross_entropy(logits.flatten(0, 1), LABELS_BS.flatten(), reduction="none").reshape(3, 4)
    sums, counts = of_token.sum(1), (LABELS_BS != NO).sum(1)
    expected = {
        ("sequence mean", None): (sums / counts.clamp_min(1)).sum(),
        ("token sum", None): sums.sum(),
        ("batch token mean", 2.5): sums.sum() / 2.5,
    }
    for (objective, mean), total in expected.items():
        for of in ("compute_train_loss", "compute_measurement"):
            found = getattr(MaskedLM(objective, mean_tokens=mean), of)((logits, LABELS_BS), nn.Identity())
            torch.testing.assert_close(found, total)
        p = of_token.neg().exp()
        margin = torch.where(LABELS_BS == NO, 0.0, p.log() - (1 - p).log())
        weight = total / sums.sum() if objective != "sequence mean" else 1 / counts.clamp_min(1)[:, None]
        output = MaskedLM(objective, mean_tokens=mean).compute_output((logits, LABELS_BS), nn.Identity())
        torch.testing.assert_close(output, (weight * margin).sum())
        for measurement, value in (("log_probability", -sums.sum()), ("margin", margin.sum())):
            task = MaskedLM(objective, mean_tokens=mean, measurement=measurement)
            torch.testing.assert_close(task.compute_measurement((logits, LABELS_BS), nn.Identity()), value)


def test_a_batch_without_any_target_has_the_loss_zero() -> None:
    logits, labels = _numbers(2, 3, 3).requires_grad_(), torch.full((2, 3), NO)
    for sample in (False, True):
        loss = CausalLM(label_smoothing=0.1).compute_train_loss((logits, labels), nn.Identity(), sample=sample)
        assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()
