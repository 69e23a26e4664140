"""fit, score and features refuse what would make numbers wrong without `check`, and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import segflow as sf

from ..support.check_tasks import (
    Branches,
    N,
    Regularised,
    TaskOf,
    check,
    functional_dropout,
    in_train_mode,
    mean_loss,
    squared_sum,
    summed,
)
from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

CALLS = ("fit", "score", "features")


def _analyzer(folder: Path, task: Any, model: nn.Module, train: Any, method: Any, **options: Any) -> sf.Analyzer:
    states = [*perturbed_states(model, 1), model.state_dict()]
    return analyzer_of(
        model, trajectory_of(folder / "run", states, len(train)), folder / "store", task, method=method, **options
    )


def _call(
    folder: Path, call: str, task: Any, model: Any = None, train: Any = None, query: Any = None, **options: Any
) -> Any:
    """One call of an analyzer that was not asked to check anything."""
    model, train = mlp() if model is None else model, vectors(N) if train is None else train
    method = sf.InfluenceFunction(damping=0.1) if call == "fit" else sf.TracIn()
    analyzer = _analyzer(folder, task, model, train, method, **options)
    if call == "fit":
        return analyzer.fit(train)
    if call == "features":
        return analyzer.features(train)
    return analyzer.score(sf.Groups.singletons(len(train)), train, vectors(5, seed=3) if query is None else query)


# ---- what is refused ----


class Rows(nn.Module):
    """Two layers; between them the rows of a batch go through `mix`, and behind them back through `back`."""

    def __init__(self, mix: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.mix, self.back = nn.Linear(5, 6), nn.Linear(6, 3), mix, back
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.head(torch.tanh(self.first(self.mix(x)))), x)


def _order(x: Tensor) -> Tensor:
    return x[:, 0].argsort()


def sorting() -> Rows:
    """As for packed sequences: sorted in front of the layers, and put back behind them."""
    return Rows(lambda x: x[_order(x)], lambda z, x: z[_order(x).argsort()])


def reversing() -> Rows:
    return Rows(lambda x: x.flip(0), lambda z, x: z.flip(0))


def attending() -> Rows:
    """Attention over the batch's axis, as where batch_first was forgotten."""
    return Rows(lambda x: (x @ x.T).softmax(-1) @ x, lambda z, x: z)


def mean_over_tokens(batch: Any, model: nn.Module) -> Tensor:
    """The mean over all tokens of the batch that count, of which examples have different numbers."""
    x, labels = batch
    counts = 1 + 9 * (x[:, 0] > 0).double()
    return (counts * functional.cross_entropy(model(x), labels, reduction="none")).sum() / counts.sum()


ALONE = "differs alone and in a batch"
FAULTS: dict[str, tuple[Callable[[], Any], Callable[[], nn.Module], str]] = {
    "mean loss": (lambda: TaskOf(train=mean_loss), mlp, "train loss is a mean over the batch: a batch of 8 has 0.125"),
    "mean over tokens": (lambda: TaskOf(train=mean_over_tokens), mlp, "no mean over the batch's tokens"),
    "squared sum": (lambda: TaskOf(train=squared_sum), mlp, "examples' losses add up to"),
    "attention over the batch": (TaskOf, attending, "examples that do not interact"),
    "batch norm": (
        lambda: TaskOf(train=in_train_mode),
        lambda: Regularised(nn.BatchNorm1d(6)),
        "changes the buffer 'middle.running_mean'",
    ),
    "dropout": (lambda: TaskOf(train=in_train_mode), lambda: Regularised(nn.Dropout(0.5)), "Something is random"),
    "functional dropout": (lambda: TaskOf(train=functional_dropout), mlp, "Something is random"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_in_every_call(tmp_path: Path, fault: str, call: str) -> None:
    task, model, text = FAULTS[fault]
    with pytest.raises(sf.SegflowError, match=text):
        _call(tmp_path, call, task(), model())


MEASUREMENTS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "mean": (mean_loss, "the measurement loss is a mean over the batch: a batch of 5 has 0.2"),
    "dropout": (functional_dropout, "the measurement loss of one batch was .*Something is random"),
    "rows sorted": (lambda batch, model: summed((batch[0][_order(batch[0])], batch[1]), model), "measurement loss"),
}


@pytest.mark.parametrize("fault", MEASUREMENTS)
def test_a_faulty_measurement_is_refused_by_score(tmp_path: Path, fault: str) -> None:
    measurement, text = MEASUREMENTS[fault]
    with pytest.raises(sf.SegflowError, match=text):
        _call(tmp_path, "score", TaskOf(measurement=measurement))


def test_a_faulty_output_is_refused_by_the_fit_that_needs_it(tmp_path: Path) -> None:
    class Mean(sf.tasks.Classification):
        def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
            return super().compute_output(batch, model) / len(batch[0])

    train = vectors(N)
    with pytest.raises(sf.TaskError, match="the output loss is a mean over the batch"):
        _analyzer(tmp_path / "trak", Mean(), mlp(), train, sf.TRAK(dimension=4)).fit(train)
    _analyzer(tmp_path / "fisher", Mean(), mlp(), train, sf.ProjectedFisher(dimension=4)).fit(train)


@pytest.mark.parametrize("call", CALLS)
def test_a_dataset_that_begins_with_equal_rows_is_judged_by_distinct_ones(tmp_path: Path, call: str) -> None:
    equal = Subset(vectors(1), [0] * 100)
    train = ConcatDataset([equal, vectors(3, seed=5)])
    rows = Rows(lambda x: x, lambda z, x: z.flip(0))
    with pytest.raises(sf.SegflowError, match=f"{ALONE}|do not interact"):
        _call(tmp_path, call, TaskOf(), rows, train)


@pytest.mark.parametrize("count", [2, 3, N])
def test_a_dataset_in_the_models_own_order_does_not_hide_that_it_sorts(tmp_path: Path, count: int) -> None:
    x, labels = vectors(count).tensors
    train = TensorDataset(x[_order(x)], labels)
    plain = Rows(lambda x: x, lambda z, x: z)
    expected, found = (
        _call(tmp_path / name, "score", TaskOf(), model, train, vectors(1)).values
        for name, model in (("plain", plain), ("sorting", sorting()))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rows", [reversing, sorting])
def test_rows_that_a_model_is_seen_to_move_are_scored_as_each_example_is_alone(
    tmp_path: Path, rows: Callable[[], Rows]
) -> None:
    """The first example and the last change places: the layers are run example by example."""
    x, labels = vectors(N).tensors
    train = TensorDataset(x[_order(x).flip(0)], labels)
    plain, moved = Rows(lambda x: x, lambda z, x: z), rows()
    expected = _call(tmp_path / "plain", "score", TaskOf(), plain, train, vectors(1)).values
    assert_close(_call(tmp_path / "moved", "score", TaskOf(), moved, train, vectors(1)).values, expected)


def test_a_property_whose_outputs_see_other_rows_is_refused(tmp_path: Path) -> None:
    class Mixed(sf.properties.SoftAccuracy):
        def outputs(self, batch: Any, model: nn.Module) -> Tensor:
            return model(batch[0] - batch[0].mean(0))

    queries = [sf.properties.SoftAccuracy(vectors(9)), Mixed(vectors(9))]
    with pytest.raises(sf.TaskError, match=r"Mixed: the measurement loss .*do not interact"):
        _call(tmp_path / "score", "score", TaskOf(), query=queries)
    with pytest.raises(sf.TaskError, match=r"Mixed: the measurement loss .*do not interact"):
        check(tmp_path / "check", TaskOf(), query=queries)


def test_what_was_refused_is_refused_again(tmp_path: Path) -> None:
    train = vectors(N)
    analyzer = _analyzer(tmp_path, TaskOf(train=mean_loss), mlp(), train, sf.InfluenceFunction(damping=0.1))
    for _ in range(2):
        with pytest.raises(sf.TaskError, match="mean over the batch"):
            analyzer.fit(train)


@pytest.mark.parametrize("call", CALLS)
def test_a_layer_that_no_loss_depends_on_is_refused_after_the_pass(tmp_path: Path, call: str) -> None:
    """As under activation checkpointing that hides layers; probes do not judge it."""
    text = r"(pass|gradients), .*layer 'side' was never reached"
    if call == "features":  # of the last layer alone
        text = "the loss does not depend on any tracked layer"
    with pytest.raises(sf.SegflowError, match=text):
        _call(tmp_path, call, TaskOf(), Branches("detached"))


def test_a_layer_that_the_groups_examples_do_not_reach_is_no_fault_of_theirs(tmp_path: Path) -> None:
    def rarely(batch: Any, model: Any) -> Tensor:
        rare = batch[0][:, 0] > 0
        side = model.side(batch[0]) if rare.any() else model.side(batch[0]).detach()
        return functional.cross_entropy(model.main(batch[0]) + rare[:, None] * side, batch[1], reduction="sum")

    train, model = vectors(N), Branches("no")
    common = torch.nonzero(train.tensors[0][:, 0] <= 0).flatten().tolist()
    analyzer = _analyzer(tmp_path, TaskOf(rarely, rarely, rarely), model, train, sf.TracIn())
    groups = sf.Groups.from_lists([common[:3], common[3:6]], N, partial=True)
    assert torch.as_tensor(analyzer.score(groups, train, vectors(9, seed=3)).values).isfinite().all()


# ---- pseudo-labels ----


def _unsampled(batch: Any, model: nn.Module) -> Tensor:
    return summed(batch, model)


def _most_likely(batch: Any, model: nn.Module) -> Tensor:
    logits = model(batch[0])
    return functional.cross_entropy(logits, logits.argmax(1), reduction="sum")


def _drawn_for_nothing(batch: Any, model: nn.Module) -> Tensor:
    torch.multinomial(model(batch[0]).detach().softmax(-1), 1)
    return summed(batch, model)


def _mean_of_drawn(batch: Any, model: nn.Module) -> Tensor:
    return sf.tasks.Classification().compute_train_loss(batch, model, sample=True) / len(batch[0])


SAMPLES = {
    "ignored": (_unsampled, "gives the same gradients in every draw and calls none of torch's random functions"),
    "most likely labels": (_most_likely, "`sample` is ignored or its labels are fixed.*draws_labels = False"),
    "drawn and not used": (_drawn_for_nothing, "draws labels that differ from draw to draw, but its gradients do not"),
    "mean": (_mean_of_drawn, "the sample loss is a mean over the batch: a batch of 8 has 0.125"),
}


@pytest.mark.parametrize("fault", SAMPLES)
@pytest.mark.parametrize("method", [sf.InfluenceFunction(damping=0.1), sf.Source(segments="auto")])
def test_pseudo_labels_that_are_none_are_refused_by_fit(tmp_path: Path, fault: str, method: Any) -> None:
    sample, text = SAMPLES[fault]
    train = vectors(N)
    analyzer = _analyzer(tmp_path, TaskOf(sample=sample), mlp(), train, method)
    with pytest.raises(sf.TaskError, match=re.escape(text) if "*" not in text else text):
        analyzer.fit(train)


def test_an_empirical_fisher_is_allowed_to_a_task_that_says_so(tmp_path: Path) -> None:
    task = TaskOf(sample=_unsampled)
    task.draws_labels = False
    _call(tmp_path, "fit", task)


def test_pseudo_labels_are_not_asked_of_a_method_without_curvature(tmp_path: Path) -> None:
    train = vectors(N)
    _analyzer(tmp_path, TaskOf(sample=_unsampled), mlp(), train, sf.ProjectedFisher(dimension=4)).fit(train)
    _call(tmp_path / "tracin", "score", TaskOf(sample=_unsampled))


# ---- what is not refused ----


def _confident(dtype: torch.dtype, scale: float) -> tuple[nn.Sequential, TensorDataset]:
    """A model that is sure of every example's label."""
    model = mlp(dtype)
    x = vectors(N, dtype).tensors[0]
    with torch.no_grad():
        model[4].weight.mul_(scale)
    return model, TensorDataset(x, model(x).argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [30.0, 100.0, 300.0, 1000.0])
def test_memorised_data_and_sure_models_pass(tmp_path: Path, dtype: torch.dtype, scale: float) -> None:
    model, train = _confident(dtype, scale)
    states = [model.state_dict()]
    trajectory = trajectory_of(tmp_path / "run", states, N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", TaskOf(), method=sf.InfluenceFunction(damping=0.1))
    analyzer.fit(train)
    analyzer.score(sf.Groups.random(N, 4), train, train)


def _interpolated(dtype: torch.dtype, residual: float) -> tuple[nn.Module, TensorDataset]:
    """A wide model whose outputs are its targets but for a relative residual."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 3)).to(dtype)
    x = vectors(N, dtype, features=32).tensors[0]
    off = 1 + residual * torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    return model, TensorDataset(x, (model(x).detach() * off).to(dtype))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("residual", [0.0, 1e-7, 1e-5])
def test_residuals_that_are_rounding_pass(tmp_path: Path, call: str, dtype: torch.dtype, residual: float) -> None:
    model, train = _interpolated(dtype, residual)
    _call(tmp_path, call, sf.tasks.Regression(), model, train, train)


def test_small_residuals_do_not_excuse_a_mean(tmp_path: Path) -> None:
    class Mean(sf.tasks.Regression):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return super().compute_train_loss(batch, model, sample) / len(batch[0])

    model, train = _interpolated(torch.float32, 1e-3)
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], N)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", Mean(), method=sf.TracIn())
    with pytest.raises(sf.TaskError, match="the train loss is a mean over the batch"):
        analyzer.score(sf.Groups.random(N, 4), train, train)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_examples_and_small_batches_pass(tmp_path: Path, n: int) -> None:
    train = vectors(n)
    for call in CALLS:
        _call(tmp_path / call, call, TaskOf(), train=train, query=vectors(1, seed=3))
    analyzer = _analyzer(tmp_path / "batches", TaskOf(), mlp(), train, sf.InfluenceFunction(damping=0.1))
    analyzer.fit(train, batch_size=1)
    analyzer.score(sf.Groups.singletons(n), train, train, batch_size=1)


@pytest.mark.parametrize("call", CALLS)
def test_half_precision_passes(tmp_path: Path, call: str) -> None:
    _call(tmp_path, call, TaskOf(), mlp(torch.bfloat16), vectors(N, torch.bfloat16), vectors(9, torch.bfloat16))


class Padded(nn.Module):
    """Attention over the positions that are no padding, whose inputs are all zero."""

    def __init__(self, masked: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head, self.masked = nn.Linear(5, 6), nn.Linear(6, 3), masked
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, keep = torch.tanh(self.up(x)), (x != 0).any(2)
        mask = keep[:, None, :] if self.masked else torch.ones_like(keep)[:, None, :]
        mixed = (h @ h.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ h
        return self.head((mixed * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))


def _ragged(items: list[Any]) -> tuple[Tensor, Tensor]:
    return pad_sequence([x for x, _ in items], batch_first=True), torch.stack([label for _, label in items])


class Masking(TaskOf):
    def get_attention_mask(self, batch: Any) -> Tensor:
        return (batch[0] != 0).any(2)


@pytest.mark.parametrize("call", CALLS)
def test_padding_passes_where_it_is_masked(tmp_path: Path, call: str) -> None:
    train = [(vectors(1 + n % 5, seed=n).tensors[0], torch.tensor(n % 3)) for n in range(20)]
    _call(tmp_path / "masked", call, Masking(), Padded(), train, train, collate_fn=_ragged)
    with pytest.raises(sf.SegflowError, match=f"{ALONE}|do not interact"):
        _call(tmp_path / "not", call, Masking(), Padded(masked=False), train, train, collate_fn=_ragged)


class Tagger(nn.Module):
    """Labels every position of a sequence by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x)))


class Tags(sf.Task):
    """Sums over the positions that are no padding. mask: what get_attention_mask makes of 0 where there is padding."""

    def __init__(self, mask: Callable[[Tensor], Any]) -> None:
        self.mask = mask

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, labels = batch
        z_BSO = model(x)
        each = labels[:, None].expand(z_BSO.shape[:2])
        if sample:
            each = torch.distributions.Categorical(logits=z_BSO.detach()).sample()
        losses = functional.cross_entropy(z_BSO.mT, each, reduction="none")
        return (losses * (x != 0).any(2)).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch: Any) -> Any:
        return self.mask((batch[0] != 0).any(2))


def _sequences(most: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(vectors(1 + n % most, seed=n).tensors[0], torch.tensor(n % 3)) for n in range(20)]


def _tagged(
    folder: Path, method: Any, mask: Callable[[Tensor], Any], train: Any = None, batch_size: int = 8
) -> sf.Analyzer:
    train = _sequences() if train is None else train
    analyzer = _analyzer(folder, Tags(mask), Tagger(), train, method, collate_fn=_ragged)
    analyzer.fit(train, batch_size=batch_size)
    return analyzer


def _forgotten(mask: Tensor) -> None:
    return None


COVARIANCES = [sf.Source(segments=1), sf.InfluenceFunction(damping=0.1), sf.InfluenceFunction(0.1, curvature="kfac")]
FORGOTTEN = (
    r"layer 'up' sees [1-5] positions of example \d+ alone and 5 in a batch of 8.*get_attention_mask.*batch_size=1"
)


@pytest.mark.parametrize("method", COVARIANCES, ids=str)
def test_a_forgotten_mask_is_refused_where_covariances_are_needed(tmp_path: Path, method: Any) -> None:
    with pytest.raises(sf.TaskError, match=FORGOTTEN):
        _tagged(tmp_path, method, _forgotten)


def test_a_mask_that_one_layer_lacks_is_refused(tmp_path: Path) -> None:
    _tagged(tmp_path / "both", COVARIANCES[1], lambda mask: {"up": mask, "head": mask})
    with pytest.raises(sf.TaskError, match="layer 'head' sees"):
        _tagged(tmp_path / "one", COVARIANCES[1], lambda mask: {"up": mask})


@pytest.mark.parametrize("mask", [torch.Tensor.clone, torch.ones_like], ids=["mask", "ones"])
@pytest.mark.parametrize("method", COVARIANCES, ids=str)
def test_a_mask_that_is_given_is_accepted(tmp_path: Path, method: Any, mask: Callable[[Tensor], Tensor]) -> None:
    _tagged(tmp_path, method, mask)


def test_without_a_mask_equal_lengths_single_examples_and_other_curvatures_pass(tmp_path: Path) -> None:
    _tagged(tmp_path / "equal", COVARIANCES[1], _forgotten, _sequences(1))
    _tagged(tmp_path / "diagonal", sf.InfluenceFunction(0.1, curvature="diagonal"), _forgotten)
    for method in (sf.TracIn(), sf.GradientDot()):
        analyzer = _tagged(tmp_path / str(method), method, _forgotten)
        analyzer.score(sf.Groups.random(20, 4), _sequences(), _sequences())
    _tagged(tmp_path / "single", COVARIANCES[1], _forgotten, batch_size=1)


def test_a_mask_that_single_examples_need_not_is_refused_once_batches_are_fitted(tmp_path: Path) -> None:
    train = _sequences()
    analyzer = _analyzer(tmp_path, Tags(_forgotten), Tagger(), train, COVARIANCES[1], collate_fn=_ragged)
    analyzer.fit(train, batch_size=1)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(sf.TaskError, match=FORGOTTEN):
        analyzer.fit(train)


def test_check_refuses_a_forgotten_mask(tmp_path: Path) -> None:
    train = _sequences()
    for mask, refused in ((_forgotten, True), (torch.Tensor.clone, False)):
        analyzer = _analyzer(tmp_path / mask.__name__, Tags(mask), Tagger(), train, sf.Source(), collate_fn=_ragged)
        with pytest.raises(sf.TaskError, match="get_attention_mask") if refused else nullcontext():
            analyzer.check(train, curvature_tolerance=100)


def test_a_measurement_may_have_no_gradient_in_some_layers_or_at_some_examples(tmp_path: Path) -> None:
    def of_some(batch: Any, model: Any) -> Tensor:
        counts = batch[0][:, 0] > 0
        return model[4](batch[0][:, :4].detach())[counts].sum() if counts.any() else torch.zeros(()).double()

    query = vectors(12, seed=3)
    query.tensors[0][0, 0] = 1.0  # the layers are found with the first example
    assert 0 < (query.tensors[0][:, 0] > 0).sum() < 12
    _call(tmp_path, "score", TaskOf(measurement=of_some), query=query)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=False)


@pytest.mark.parametrize("call", CALLS)
def test_activation_checkpointing_passes(tmp_path: Path, call: str) -> None:
    _call(tmp_path, call, TaskOf(), Checkpointed())


def test_a_layer_that_mixes_rows_may_be_left_out(tmp_path: Path) -> None:
    for call in ("fit", "score"):
        _call(tmp_path / call, call, TaskOf(tracked=["head"]), Unordered())


class Unordered(nn.Module):
    """Its first layer sees the rows backwards, its head in order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x.flip(0))).flip(0))


# ---- what it costs ----


class Counting(nn.Module):
    """Counts the examples that go through it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.examples = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.examples += len(x)
        return self.layers(x)


@pytest.mark.parametrize("n", [2, 6, 7, 48])
@pytest.mark.parametrize("method", [sf.InfluenceFunction(damping=0.1), sf.TRAK(dimension=4)])
def test_the_probes_of_a_dataset_take_at_most_130_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, n: int
) -> None:
    model, train = Counting(), vectors(n)
    analyzer = _analyzer(tmp_path, sf.tasks.Classification(), model, train, method)
    counts: dict[str, list[int]] = {"before_fit": [], "before_score": []}
    for name, seen in counts.items():
        real = getattr(analyzer._guards, name)

        def counted(*args: Any, real: Any = real, seen: Any = seen) -> None:
            before = model.examples
            real(*args)
            seen.append(model.examples - before)

        monkeypatch.setattr(analyzer._guards, name, counted)
    for query in (vectors(9, seed=3), vectors(9, seed=4)):
        analyzer.fit(train)
        analyzer.score(sf.Groups.singletons(n), train, query)
    assert 0 < counts["before_fit"][0] <= 130
    assert counts["before_fit"][1] == 0, "the same analyzer and dataset"
    assert all(0 < count <= 65 for count in counts["before_score"]), "the queries are others each time"
