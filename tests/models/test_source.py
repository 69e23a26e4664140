"""SOURCE's scores of whole models under AdamW, against a naive dense implementation with the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segflow as sf

from ..support import dense_source
from ..support.dense_source import Run
from ..support.gang import Failed, Gang
from ..support.helpers import ConvNet
from ..support.model_tasks import ClassTask, MaskedWordTask, WordTask, causal_data, image_data, padded
from ..support.models import CASES, QUERIES, Case, N, adamw, gpt2
from ..support.naive import assert_near

GROUPS = sf.Groups.from_lists([[0, 2], [1], [3, 4, 5], [6]], N)
CHECKPOINTS = (2, 4, 6, 8)
PLAIN = (7,) * (N + QUERIES)  # lengths
LONG = (10,) * (N + QUERIES)  # with every word among them, so that no eigenvalues of the tied block all but coincide


class Images(ConvNet):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values)


def by_layer(model: nn.Module) -> torch.optim.AdamW:
    """Weights and biases alike; the head has constants of its own."""
    head = [{"params": list(model.head.parameters()), "weight_decay": 0.05}]
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    return torch.optim.AdamW([{"params": rest, "weight_decay": 0.2}, *head], lr=0.02)


def usual(model: nn.Module) -> torch.optim.AdamW:
    return adamw(model, lr=0.02, weight_decay=0.2)


WHOLE = {
    "convolutions": Case(Images, ClassTask(fixed=True), image_data),
    "convolutions, biases apart": Case(Images, ClassTask(fixed=True), image_data),
    "gpt2": replace(CASES["gpt2"], task=WordTask(shift=True, fixed=True), lengths=PLAIN),
    "gpt2, head apart": Case(partial(gpt2, tied=False), WordTask(shift=True, fixed=True), causal_data, lengths=PLAIN),
    "masked bert": replace(CASES["masked bert"], task=WordTask(fixed=True), lengths=LONG),
    "ragged bert": replace(CASES["masked bert"], task=MaskedWordTask(fixed=True)),
    "llama": replace(CASES["llama"], task=WordTask(shift=True, fixed=True), lengths=PLAIN),
    "resnet": replace(CASES["resnet"], task=ClassTask(fixed=True)),
}


OPTIMIZERS = {"convolutions": by_layer}  # usual elsewhere


def trained(name: str, folder: Path) -> Run:
    """Record a short run, whose learning rates differ between parameter groups; what the loop itself saw of it."""
    case = WHOLE[name]
    model, (data, _) = case.model(), case.data()
    optimizer, batches = OPTIMIZERS.get(name, usual)(model), [data[:4], data[4:]]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 1 - k / 12, lambda _: 0.5])
    states, moments, learning_rates = [], [], []
    names = {p: name for name, p in model.named_parameters()}
    steps = CHECKPOINTS[-1]
    with sf.record(model, optimizer, folder, dataset_size=N, checkpoints=CHECKPOINTS, progress=False):
        for step in range(1, steps + 1):
            learning_rates.append([group["lr"] for group in optimizer.param_groups])
            examples = batches[step % 2]
            optimizer.zero_grad()
            (case.task.compute_train_loss(padded(examples), model) / len(examples)).backward()
            optimizer.step()
            schedule.step()
            if step in CHECKPOINTS:
                states.append({name: value.clone() for name, value in model.state_dict().items()})
                moments.append({names[p]: of["exp_avg_sq"] / (1 - 0.999**step) for p, of in optimizer.state.items()})
    decays = torch.tensor([group["weight_decay"] for group in optimizer.param_groups], dtype=torch.float64)
    groups = {names[p]: place for place, group in enumerate(optimizer.param_groups) for p in group["params"]}
    rates = torch.tensor(learning_rates, dtype=torch.float64)
    return Run(CHECKPOINTS, states, moments, rates, decays.expand(steps, -1), groups)


def expected(case: Case, run: Run) -> Tensor:
    model, (train, query) = case.model(), case.data()
    blocks = dense_source.blocks_of(model, run.groups)

    def losses(examples: list[Any], compute: Callable[..., Tensor], **options: Any) -> list[Callable[[], Tensor]]:
        return [lambda e=example: compute(case.collate([e]), model, **options) for example in examples]

    of_kinds = {
        "real": losses(train, case.task.compute_train_loss),
        "sampled": losses(train, case.task.compute_train_loss, sample=True),
        "asked": losses(query, case.task.compute_measurement),
    }
    seen = dense_source.seen_by(model, run, blocks, of_kinds)
    return dense_source.source_scores(run, blocks, seen, GROUPS.members, segments=2)


def found(name: str, folder: str, store: str, batch_size: int) -> list[list[float]]:
    """The scores, as a user's script computes them on every rank."""
    case, root = WHOLE[name], Path(folder)
    train, query = case.data()
    trajectory, method = sf.Trajectory.load(root / "run"), sf.Source(segments=2)
    analyzer = sf.Analyzer(
        case.model(), case.task, trajectory, store=root / store, method=method, collate_fn=case.collate, progress=False
    )
    analyzer.fit(train, batch_size=batch_size)
    return analyzer.score(GROUPS, train, query, batch_size=batch_size).values.tolist()


def as_tensor(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", WHOLE)
def test_scores_of_a_whole_model_are_those_of_dense_matrices(name: str, tmp_path: Path) -> None:
    run = trained(name, tmp_path / "run")
    assert_near(as_tensor(found(name, str(tmp_path), "store", 4)), expected(WHOLE[name], run))


@pytest.mark.parametrize("name", [pytest.param("convolutions", marks=pytest.mark.slow), "gpt2"])
def test_two_ranks_get_them_too(name: str, gang: Gang, tmp_path: Path) -> None:
    run = trained(name, tmp_path / "run")
    ranks = gang.run(2, found, name, str(tmp_path), "store", 3)
    for rank, values in enumerate(ranks):
        assert not isinstance(values, Failed), f"rank {rank}: {values.text}\n{values.trace}"
    assert ranks[0] == ranks[1]
    assert_near(as_tensor(ranks[0]), expected(WHOLE[name], run))
