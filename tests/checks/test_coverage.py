"""What share of the trained parameters is attributed is counted right, grouped by reason, and said aloud."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf

from ..support.check_tasks import N, TaskOf, check
from ..support.helpers import analyzer_of, mlp, trajectory_of, vectors

LOW = "segflow attributes"
LEFT_OUT = "left out with exclude="


class Normed(nn.Module):
    """Linear layers, five norms between them, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.norms = nn.Sequential(*(nn.LayerNorm(6) for _ in range(5)))
        self.scale = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norms(self.first(x))) * self.scale


def _analyzer(
    folder: Path, model: nn.Module, groups: dict[str, int] | None = None, task: Any = None, **options: Any
) -> sf.Analyzer:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trajectory = trajectory_of(folder / "run", [state], N)
    if groups is not None:
        trajectory = sf.Trajectory(trajectory.checkpoints, [10], 0.1, N, None, groups)
    options = {"method": sf.TracIn(), **options}
    return analyzer_of(model, trajectory, folder / "store", task or sf.tasks.Classification(), **options)


def _tokens() -> TensorDataset:
    """Pairs of one of 7 tokens and the token that follows it."""
    return TensorDataset(*torch.randint(0, 7, (2, N), generator=torch.Generator().manual_seed(0)))


def _lines(report: Any, start: str) -> list[str]:
    return [line.removeprefix(start) for line in str(report).splitlines() if line.startswith(start)]


def test_everything_that_was_trained_is_attributed(tmp_path: Path) -> None:
    report = _analyzer(tmp_path, Normed()).check(vectors(N))
    assert str(report).splitlines()[0] == "attributed: 120 of 120 trained parameters (100.0%)"
    assert not _lines(report, "not ") and not report.skipped


def test_what_is_left_out_is_grouped_by_reason_the_largest_first(tmp_path: Path) -> None:
    report = _analyzer(tmp_path, Normed(), task=TaskOf(tracked=["first", "norms"]), exclude="norms").check(vectors(N))
    assert str(report).splitlines()[0] == "attributed: 36 of 120 trained parameters (30.0%)"
    unnamed = "not among the tracked modules that the task names"
    assert _lines(report, "not attributed: ") == [
        f"{LEFT_OUT}: 10 parameter tensors, 60 parameters (norms.0.weight, norms.0.bias, norms.1.weight, ...)",
        f"{unnamed}: 1 module, 21 parameters (head)",
        f"{unnamed}: 1 parameter tensor, 3 parameters (scale)",
    ]
    assert len(report.skipped) == 12 and report.skipped["norms.3.bias"] == LEFT_OUT


def test_what_training_did_not_change_is_no_part_of_the_share_and_said_with_its_reason(tmp_path: Path) -> None:
    model = Normed()
    trained = {name: 0 for name, _ in model.named_parameters() if name not in ("first.bias", "norms.0.weight", "scale")}
    report = _analyzer(tmp_path, model, trained, exclude="norms").check(vectors(N))
    assert (report.attributed, report.parameters, report.total) == (51, 120 - 15, 120)
    assert str(report).splitlines()[0] == ("attributed: 51 of 105 trained parameters (48.6%); the model has 120 in all")
    assert _lines(report, "not trained: ") == [
        "it is in no parameter group: 3 parameter tensors, 15 parameters (scale, first.bias, norms.0.weight)"
    ]
    assert _lines(report, "not attributed: ")[0].startswith(f"{LEFT_OUT}: 9 parameter tensors, 54 parameters")


@pytest.mark.parametrize("frozen", [("0.weight", "0.bias"), ("0.weight",), ("0.bias",)])
def test_without_parameter_groups_what_requires_gradients_was_trained(tmp_path: Path, frozen: tuple[str, ...]) -> None:
    model = mlp()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    report = _analyzer(tmp_path, model).check(vectors(N))
    left = sum(model.get_parameter(name).numel() for name in frozen)
    assert report.total - report.parameters == left
    assert _lines(report, "not trained: it does not require gradients: ")[0].endswith(f"({', '.join(frozen)})")
    assert report.attributed == report.parameters, "a bias alone too"
    assert not _lines(report, "not attributed: ")


def _apart(folder: Path, **options: Any) -> sf.Analyzer:
    """Of a model whose biases were trained at a rate of their own."""
    model = mlp()
    groups = {name: int(name.endswith("bias")) for name in model.state_dict()}
    files = trajectory_of(folder / "run", [model.state_dict()], N).checkpoints
    rates = torch.tensor([[0.1, 0.2]]).expand(10, 2)
    trajectory = sf.Trajectory(files, [10], rates, N, sf.OptimizerConstants("SGD"), groups)
    task = sf.tasks.Classification()
    return analyzer_of(model, trajectory, folder / "store", task, method=sf.TracIn(), **options)


def test_parameters_that_are_left_out_singly_count_by_themselves(tmp_path: Path) -> None:
    assert _apart(tmp_path / "whole").check(vectors(N)).attributed == 79
    report = _apart(tmp_path / "part", exclude="*.bias").check(vectors(N))
    assert (report.attributed, report.parameters) == (66, 79)
    assert _lines(report, "not attributed: ") == [
        f"{LEFT_OUT}: 3 parameter tensors, 13 parameters (0.bias, 2.bias, 4.bias)"
    ]


class Attending(nn.Module):
    """An attention whose projections of queries, keys and values are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention = nn.Linear(5, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([self.first(x), self.first(x.flip(1))], 1)
        return self.head(self.attention(steps, steps, steps)[0].sum(1))


def test_blocks_that_are_a_part_of_a_tensor_are_left_out_by_their_own_names_and_sizes(tmp_path: Path) -> None:
    report = _analyzer(tmp_path, Attending(), exclude=["attention.q", "attention.v"]).check(vectors(N))
    assert report.parameters - report.attributed == 2 * 6 * 7
    assert _lines(report, "not attributed: ") == [f"{LEFT_OUT}: 2 blocks, 84 parameters (attention.q, attention.v)"]


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "max_norm= changes its weight in the forward": lambda: nn.Embedding(7, 4, max_norm=1.0),
    "scale_grad_by_freq= makes an example's gradient depend on the rest of the batch": lambda: nn.Embedding(
        7, 4, scale_grad_by_freq=True
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_example_has_a_gradient_of_is_named_with_its_reason(tmp_path: Path, reason: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(REFUSED[reason](), nn.Linear(4, 7)).double()
    with pytest.warns(UserWarning, match=LOW):
        report = _analyzer(tmp_path, model).check(_tokens())
    assert (report.attributed, report.parameters) == (35, 63)
    assert _lines(report, "not attributed: ") == [f"{reason}: 1 module, 28 parameters (0)"]


@pytest.mark.parametrize("reason", REFUSED)
def test_a_tensor_that_some_module_uses_so_is_left_out_of_all_modules(tmp_path: Path, reason: str) -> None:
    model = Tied(False)
    model.embed, weight = REFUSED[reason](), model.embed.weight
    model.embed.weight = weight
    with pytest.warns(UserWarning, match=LOW):
        report = _analyzer(tmp_path, model).check(_tokens())
    assert (report.attributed, report.parameters) == (20, 48)
    assert _lines(report, "not attributed: ") == [f"{reason}: 1 module, 28 parameters (embed)"]
    assert report.skipped["head"] == reason


class Tied(nn.Module):
    """An embedding whose weight is the head's as well; apart: in a Parameter object of its own."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = nn.Parameter(self.embed.weight.data) if apart else self.embed.weight
        self.double()
        if apart:
            self.head.weight.data = self.embed.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(self.embed(x)))


@pytest.mark.parametrize("apart", [False, True])
def test_a_tensor_with_several_names_counts_once(tmp_path: Path, apart: bool) -> None:
    model, data = Tied(apart), _tokens()
    with pytest.warns(UserWarning, match=LOW) if apart else nullcontext():
        report = _analyzer(tmp_path, model).check(data)
    assert (report.attributed, report.parameters, report.total) == (20 if apart else 48, 48, 48)
    if apart:
        assert "are two parameters in one memory" in _lines(report, "not attributed: ")[0]
        return
    part = _analyzer(tmp_path, model, exclude="embed").check(data)
    assert (part.attributed, part.parameters, part.total) == (20, 48, 48)
    assert _lines(part, "not attributed: ") == [f"{LEFT_OUT}: 1 module, 28 parameters (head)"]
    one_name = _analyzer(tmp_path, model, {"embed.weight": 0, "first.weight": 0, "first.bias": 0})
    assert one_name.check(data).parameters == 48, "the optimizer knows a tied tensor by its first name"


def test_a_model_that_is_a_layer_itself_is_attributed_whole(tmp_path: Path) -> None:
    report = _analyzer(tmp_path, nn.Linear(5, 3).double()).check(vectors(N))
    assert (report.attributed, report.parameters, report.total) == (18, 18, 18)
    assert not _lines(report, "not ")


def test_a_part_that_is_compiled_counts_under_its_plain_name(tmp_path: Path) -> None:
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    report = _analyzer(tmp_path / "all", model).check(vectors(N))
    assert (report.attributed, report.parameters, report.total) == (79, 79, 79)
    with pytest.warns(UserWarning, match=LOW):
        left = _analyzer(tmp_path / "part", model, exclude="0").check(vectors(N))
    assert (left.attributed, left.parameters) == (43, 79)
    assert _lines(left, "not attributed: ")


def test_each_stage_has_its_own_share(tmp_path: Path) -> None:
    model = mlp()
    files = trajectory_of(tmp_path / "run", [model.state_dict()], N).checkpoints
    first = sf.Trajectory(files, [10], 0.1, N, None, {"0.weight": 0, "0.bias": 0}, stage="pretrain")
    rest = {name: 0 for name in model.state_dict() if not name.startswith("0.")}
    both = sf.Trajectory(files, [10], 0.1, N, None, rest, stage="finetune").after(first)
    analyzer = analyzer_of(model, both, tmp_path / "store", sf.tasks.Classification(), method=sf.TracIn())
    report = analyzer.check({"pretrain": vectors(N), "finetune": vectors(N)})
    assert (report.attributed, report.parameters, report.total) == (43, 43, 79)
    assert (report.earlier["pretrain"].attributed, report.earlier["pretrain"].parameters) == (36, 36)
    assert "attributed: 36 of 36 trained parameters (100.0%); the model has 79 in all" in str(report)


def test_blocks_that_are_computed_slowly_are_said_by_the_way_they_are(tmp_path: Path) -> None:
    report = _analyzer(tmp_path, Normed()).check(vectors(N))
    assert _lines(report, "slow: ") == ["its module's calls repeated by torch.func, vmapped: 1 block (scale)"]
    assert not _lines(_analyzer(tmp_path, Normed(), exclude="scale").check(vectors(N)), "slow: ")
    ways = {f"gru.{number}": "example by example" for number in range(4)} | {"max": "by one copy for each example"}
    assert _lines(replace(report, slow=ways), "slow: ") == [
        "example by example: 4 blocks (gru.0, gru.1, gru.2, ...)",
        "by one copy for each example: 1 block (max)",
    ]


# ---- the warning ----


CALLS: dict[str, Callable[[sf.Analyzer], Any]] = {
    "check": lambda analyzer: analyzer.check(vectors(N), vectors(3)),
    "fit": lambda analyzer: analyzer.fit(vectors(N)),
    "score": lambda analyzer: analyzer.score(sf.Groups.random(N, 6), vectors(N), vectors(3)),
}


@pytest.mark.parametrize("call", CALLS)
def test_little_attributed_is_warned_of_once_wherever_work_begins(tmp_path: Path, call: str) -> None:
    method = sf.TracIn() if call == "score" else sf.Source(segments=1)
    analyzer = _analyzer(tmp_path, Normed(), method=method, exclude="norms")
    with pytest.warns(UserWarning, match=LOW) as caught:
        CALLS[call](analyzer)
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert "60 of 120 trained parameters (50.0%)" in text
    assert (
        f"{LEFT_OUT}: 10 parameter tensors, 60 parameters (norms.0.weight, norms.0.bias, norms.1.weight, ...)" in text
    )
    assert "Choose more layers where some were chosen (layers=, exclude=, " in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for another in ("check", "fit", "score") if call != "score" else ("check", "score"):
            CALLS[another](analyzer)


def test_from_95_percent_on_nothing_is_warned_of(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 40), nn.Linear(40, 3)).double()

    def share(exclude: str) -> float:
        return _analyzer(tmp_path / exclude[0], model, exclude=exclude).check(vectors(N)).coverage.share

    with pytest.warns(UserWarning, match=LOW):
        assert share("2") == pytest.approx(0.9386, abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert share("1.bias") == pytest.approx(0.9800, abs=1e-4)


def test_the_warning_names_the_stage_that_it_is_about(tmp_path: Path) -> None:
    model = Normed()
    files = trajectory_of(tmp_path / "run", [model.state_dict()], N).checkpoints
    some = {name: 0 for name in model.state_dict() if not name.startswith("norms")}
    every = dict.fromkeys(model.state_dict(), 0)
    stages = sf.Trajectory(files, [10], 0.1, N, None, every, stage="pretrain")
    both = sf.Trajectory(files, [10], 0.1, N, None, some, stage="finetune").after(stages)
    analyzer = analyzer_of(model, both, tmp_path / "store", TaskOf(), method=sf.TracIn(), exclude="norms")
    with pytest.warns(UserWarning, match=r"segflow attributes in stage 'pretrain' 60 of 120 trained parameters") as one:
        analyzer.check({"pretrain": vectors(N), "finetune": vectors(N)})
    assert "finetune" not in str(one[0].message)
    last = analyzer_of(model, both, tmp_path / "store", TaskOf(), method=sf.TracIn(), exclude="norms")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last.check({"finetune": vectors(N)}).attributed == 60, "no data of the other stage is given"


def test_layers_that_were_chosen_are_warned_of_too(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not among the tracked modules that the task names: 2 modules, 43 parameters"):
        check(tmp_path, TaskOf(tracked=["0"]))
