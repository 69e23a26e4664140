"""What share of the trained parameters is attributed is counted right, grouped by reason, and said aloud."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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


def _lines(report: Any, start: str) -> list[str]:
    return [line.removeprefix(start) for line in str(report).splitlines() if line.startswith(start)]


def test_what_is_left_out_is_grouped_by_reason_the_largest_first(tmp_path: Path) -> None:
    report = _analyzer(tmp_path, Normed()).check(vectors(N))
    assert str(report).splitlines()[0] == "attributed: 57 of 120 trained parameters (47.5%)"
    assert _lines(report, "not attributed: ") == [
        "LayerNorm is not supported: 5 modules, 60 parameters (norms.0, norms.1, norms.2, ...)",
        "Normed is not supported: 1 module, 3 parameters (the model itself)",
    ]
    assert len(report.skipped) == 6 and report.skipped["norms.3"] == "LayerNorm is not supported"


def test_what_training_did_not_change_is_no_part_of_the_share_and_said_with_its_reason(tmp_path: Path) -> None:
    model = Normed()
    trained = {name: 0 for name, _ in model.named_parameters() if name not in ("first.bias", "norms.0.weight", "scale")}
    report = _analyzer(tmp_path, model, trained).check(vectors(N))
    assert (report.attributed, report.parameters, report.total) == (51, 120 - 15, 120)
    assert str(report).splitlines()[0] == ("attributed: 51 of 105 trained parameters (48.6%); the model has 120 in all")
    assert _lines(report, "not trained: ") == [
        "it is in no parameter group: 3 parameter tensors, 15 parameters (scale, first.bias, norms.0.weight)"
    ]
    assert _lines(report, "not attributed: ")[0].startswith("LayerNorm is not supported: 5 modules, 54 parameters")


@pytest.mark.parametrize("frozen", [("0.weight", "0.bias"), ("0.weight",), ("0.bias",)])
def test_without_parameter_groups_what_requires_gradients_was_trained(tmp_path: Path, frozen: tuple[str, ...]) -> None:
    model = mlp()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    report = _analyzer(tmp_path, model).check(vectors(N))
    left = sum(model.get_parameter(name).numel() for name in frozen)
    assert report.total - report.parameters == left
    assert _lines(report, "not trained: it does not require gradients: ")[0].endswith(f"({', '.join(frozen)})")
    alone = 6 if frozen == ("0.weight",) else 0  # a bias without its weight has no layer that takes it
    assert report.parameters - report.attributed == alone
    reason = "its weight was not trained: it does not require gradients"
    assert _lines(report, "not attributed: ") == ([f"{reason}: 1 module, 6 parameters (0)"] if alone else [])


def test_parameters_that_are_skipped_singly_count_by_themselves(tmp_path: Path) -> None:
    model = mlp()
    groups = {name: int(name.endswith("bias")) for name in model.state_dict()}
    files = trajectory_of(tmp_path / "run", [model.state_dict()], N).checkpoints
    rates = torch.tensor([[0.1, 0.2]]).expand(10, 2)
    trajectory = sf.Trajectory(files, [10], rates, N, sf.OptimizerConstants("SGD"), groups)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", sf.tasks.Classification(), method=sf.TracIn())
    report = analyzer.check(vectors(N))
    assert (report.attributed, report.parameters) == (66, 79)
    assert _lines(report, "not attributed: ") == [
        "it was trained with another learning rate than the weight: 3 parameter tensors, 13 parameters "
        "(0.bias, 2.bias, 4.bias)"
    ]


class Tied(nn.Module):
    """Two embeddings, the second of which is the head's weight, in a Parameter object of its own."""

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
    model = Tied(apart)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(*torch.randint(0, 7, (2, N), generator=generator))
    report = _analyzer(tmp_path, model).check(data)
    assert (report.attributed, report.parameters, report.total) == (20, 48, 48)
    one_name = _analyzer(tmp_path, model, {"embed.weight": 0, "first.weight": 0, "first.bias": 0})
    if not apart:
        assert one_name.check(data).parameters == 48, "the optimizer knows a tied tensor by its first name"


def test_a_model_that_is_a_layer_itself_is_attributed_whole(tmp_path: Path) -> None:
    report = _analyzer(tmp_path, nn.Linear(5, 3).double()).check(vectors(N))
    assert (report.attributed, report.parameters, report.total) == (18, 18, 18)
    assert not _lines(report, "not ")


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
    assert not _lines(report, "slow: ")
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
    analyzer = _analyzer(tmp_path, Normed(), method=sf.TracIn() if call == "score" else sf.Source(segments=1))
    with pytest.warns(UserWarning, match=LOW) as caught:
        CALLS[call](analyzer)
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert "57 of 120 trained parameters (47.5%)" in text
    assert "LayerNorm is not supported: 5 modules, 60 parameters (norms.0, norms.1, norms.2, ...)" in text
    assert "segflow.model.layers.register" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for another in ("check", "fit", "score") if call != "score" else ("check", "score"):
            CALLS[another](analyzer)


def test_from_95_percent_on_nothing_is_warned_of(tmp_path: Path) -> None:
    def mostly(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.Linear(width, 3)).double()

    def share(width: int) -> float:
        return (6 * width + 3 * width + 3) / (6 * width + 3 * width + 3 + 2 * width)

    assert share(100) < 0.95
    with pytest.warns(UserWarning, match=LOW):
        _analyzer(tmp_path / "below", mostly(100)).check(vectors(N))
    model = nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 40), nn.LayerNorm(40), nn.Linear(40, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _analyzer(tmp_path / "above", model).check(vectors(N)).coverage.share >= 0.95


def test_the_warning_names_the_stage_that_it_is_about(tmp_path: Path) -> None:
    model = Normed()
    files = trajectory_of(tmp_path / "run", [model.state_dict()], N).checkpoints
    linear = {name: 0 for name in model.state_dict() if name.startswith(("first", "head"))}
    every = dict.fromkeys(model.state_dict(), 0)
    stages = sf.Trajectory(files, [10], 0.1, N, None, every, stage="pretrain")
    both = sf.Trajectory(files, [10], 0.1, N, None, linear, stage="finetune").after(stages)
    analyzer = analyzer_of(model, both, tmp_path / "store", TaskOf(), method=sf.TracIn())
    with pytest.warns(UserWarning, match=r"segflow attributes in stage 'pretrain' 57 of 120 trained parameters") as one:
        analyzer.check({"pretrain": vectors(N), "finetune": vectors(N)})
    assert "finetune" not in str(one[0].message)
    last = analyzer_of(model, both, tmp_path / "store", TaskOf(), method=sf.TracIn())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last.check({"finetune": vectors(N)}).attributed == 57, "no data of the other stage is given"


def test_layers_that_were_chosen_are_warned_of_too(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not among the tracked modules that the task names: 2 modules, 43 parameters"):
        check(tmp_path, TaskOf(tracked=["0"]))
