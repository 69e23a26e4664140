"""Numbers of any kind in every argument: the result is that of the plain number, and what is no number is refused.

A door is an argument with a plain value for it and what comes of it. Each is given every kind of number that says the
same, and then what says something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.evaluation import (
    Bank,
    BatchedTraining,
    FunctionTraining,
    Stage,
    dataset_pruning,
    found_among_lowest,
    leave_one_group_out,
    linear_datamodeling_curve,
    linear_datamodeling_difference,
    linear_datamodeling_score,
    noise_ceiling,
    noisy_label_detection,
    random_subsets,
    removal_counterfactual,
    removal_order,
    retrain,
    retraining_score,
)
from segflow.methods import TRAK, InfluenceFunction, LiSSA, ProjectedFisher, RepresentationSimilarity, Source
from segflow.methods.method import describe
from segflow.training.per_step import check_batch_size, check_parameter_groups
from segflow.training.schedule import CheckpointSchedule

from .evaluation.closed_form import EFFECTS, TRUE, Linear
from .support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N = 12
LABELS = tuple("abcbacabcabc")
FEATURES = np.random.default_rng(0).normal(size=(N, 3))
WRONG = np.arange(20) % 3 == 0
DATA = TensorDataset(torch.randn(N, 4, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3)

WHOLE_KINDS: dict[str, Callable[[int], Any]] = {
    "float": float,
    "np.int64": np.int64,
    "np.uint8": np.uint8,
    "np.float32": np.float32,
    "array": np.array,
    "tensor": torch.tensor,
    "tensor of floats": lambda value: torch.tensor(float(value)),
}
REAL_KINDS: dict[str, Callable[[float], Any]] = {
    "np.float64": np.float64,
    "np.float32": np.float32,
    "array": np.array,
    "tensor": torch.tensor,
    "tensor in double precision": lambda value: torch.tensor(value, dtype=torch.float64),
}
TRUTH_KINDS: dict[str, Callable[[bool], Any]] = {"np.bool_": np.bool_, "array": np.array, "tensor": torch.tensor}


class Door(NamedTuple):
    """An argument: its name in messages, a plain value that every kind can say, and what comes of a value.

    result: (value, empty folder) -> anything that `told` compares.
    """

    name: str
    value: Any
    result: Callable[[Any, Path], Any]


def told(result: Any) -> Any:
    """What comes of an argument, as plain data that says the kind of each number."""
    if isinstance(result, sf.Scores):
        return told([result.values, result.query_labels, result.provenance])
    if isinstance(result, sf.Groups):
        return told([result.members, result.labels, result.length, result.partial])
    if isinstance(result, np.ndarray | torch.Tensor):
        return told([str(result.dtype), result.tolist()])
    if is_dataclass(result):
        result = {field.name: getattr(result, field.name) for field in fields(result)}
    if isinstance(result, dict):
        return {key: told(value) for key, value in result.items()}
    return [told(value) for value in result] if isinstance(result, list | tuple) else (type(result).__name__, result)


def _method(kind: type, option: str, value: Any, **others: Any) -> Door:
    return Door(option, value, lambda given, _: json.dumps(describe(kind(**{option: given}, **others))))


def _groups(name: str, value: Any, make: Callable[[Any], Any]) -> Door:
    return Door(name, value, lambda given, _: make(given))


def _analyzer(folder: Path, **options: Any) -> sf.Analyzer:
    model = mlp()
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 2), N)
    return analyzer_of(model, trajectory, folder / "store", **{"method": sf.Source(), **options})


def _classifier(folder: Path) -> sf.Analyzer:
    trajectory = trajectory_of(folder / "run", perturbed_states(MODEL, 2), N)
    return analyzer_of(MODEL, trajectory, folder / "store", sf.tasks.Classification())


def _score(analyzer: sf.Analyzer, **options: Any) -> list[Any]:
    """Scores, and what the store says that its units were made from."""
    analyzer.fit(vectors(N), **options)
    scores = analyzer.score(sf.Groups.by(LABELS), vectors(N), vectors(2, seed=4), **options)
    root = analyzer.context.store.on_rank_0.root
    entries = {path.name: json.loads(path.read_text()) for path in root.glob("manifest/**/*.json")}
    return [scores, [entries[name]["made_from"] for name in sorted(entries)]]


def _set_up(option: str, value: Any) -> Door:
    return Door(option, value, lambda given, folder: _score(_analyzer(folder, **{option: given})))


def _refined(option: str, value: Any) -> Door:
    def refine(given: Any, folder: Path) -> Any:
        options = {"keep": 0.5, "sizes": (2, 1), option: given}
        found = _analyzer(folder, method=sf.methods.GradientDot()).refine(
            sf.Groups.by(LABELS), vectors(N), vectors(2, seed=4), **options
        )
        return [found.groups, found.scores, [level._asdict() for level in found.levels]]

    return Door(option, value, refine)


def _evaluated(name: str, value: Any, evaluate: Callable[[Any], Any]) -> Door:
    return Door(name, value, lambda given, _: evaluate(given))


def _removed(option: str, value: Any, task: Callable[..., Any] = retraining_score) -> Door:
    return _retrained(option, value, task, shares=(0.25,))


def _curve(option: str, value: Any) -> Door:
    return _retrained(option, value, linear_datamodeling_curve, repetitions=1, subsets=8)


def _retrained(option: str, value: Any, task: Callable[..., Any], **others: Any) -> Door:
    def table(given: Any, folder: Path) -> Any:
        options = {"repetitions": 2, "progress": False, **others, option: given}
        return asdict(task(TRUE, Linear(noise=1.0), folder, **options))

    return Door(option, value, table)


def _kept(kept: np.ndarray, seed: int) -> list[float]:
    return [float(kept.sum()), float(seed)]


def _bank(folder: Path, **options: Any) -> list[Any]:
    training = FunctionTraining(_kept, {"sum": "of indices"}, processes=1)
    bank = Bank(folder, training, np.eye(3, dtype=bool), **options)
    return [bank.run(progress=False), bank.fingerprint]


def _stage(**options: Any) -> Stage:
    sgd = partial(torch.optim.SGD, lr=0.1)
    defaults = {"optimizer": sgd, "epochs": 2, "batch_size": 4, **options}
    return Stage(DATA.tensors[0], DATA.tensors[1].double()[:, None], nn.functional.mse_loss, **defaults)


def _batched(stage: Stage, together: Any = 2) -> list[Any]:
    training = BatchedTraining(
        partial(_Wide, 4, 1), (stage,), DATA.tensors[0], DATA.tensors[1], lambda out, y: out[:, 0] - y, together
    )
    return [training.settings(), training.run([(np.arange(4), 1), (np.arange(4, 8), 2)]), training.batches([])]


class _Wide(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).double()


GROUPS = sf.Groups.by(LABELS)
MEASURED = np.random.default_rng(1).normal(size=(8, 2, 3))
KEPT = np.random.default_rng(2).random((6, 20)) < 0.5
LINEAR = (TRUE, KEPT, np.random.default_rng(3).normal(size=(6, len(EFFECTS))))
MODEL = nn.Linear(4, 3)

WHOLE = {
    "Source.segments": _method(Source, "segments", 3),
    "Source.fisher_batch": _method(Source, "fisher_batch", 2),
    "InfluenceFunction.fisher_batch": _method(InfluenceFunction, "fisher_batch", 2),
    "LiSSA.steps": _method(LiSSA, "steps", 7),
    "LiSSA.sample_size": _method(LiSSA, "sample_size", 7),
    "LiSSA.repetitions": _method(LiSSA, "repetitions", 7),
    "LiSSA.seed": _method(LiSSA, "seed", 7),
    "TRAK.dimension": _method(TRAK, "dimension", 7),
    "TRAK.seed": _method(TRAK, "seed", 7),
    "ProjectedFisher.fisher_batch": _method(ProjectedFisher, "fisher_batch", 7),
    "Groups.from_lists": _groups("length", 3, lambda n: sf.Groups.from_lists([[0, 1], [2]], n)),
    "Groups": _groups("length", 3, lambda n: sf.Groups(([0, 1], [2]), ("a", "b"), n)),  # type: ignore[arg-type]
    "Groups.singletons": _groups("length", 3, sf.Groups.singletons),
    "Groups.random length": _groups("length", 7, lambda n: sf.Groups.random(n, 2)),
    "Groups.random size": _groups("size", 3, lambda n: sf.Groups.random(7, n)),
    "Groups.random seed": _groups("seed", 3, lambda n: sf.Groups.random(7, 2, n)),
    "kmeans size": _groups("size", 3, lambda n: sf.Groups.kmeans(FEATURES, size=n)),
    "kmeans count": _groups("count", 3, lambda n: sf.Groups.kmeans(FEATURES, count=n)),
    "kmeans max_size": _groups("max_size", 4, lambda n: sf.Groups.kmeans(FEATURES, count=3, max_size=n)),
    "kmeans seed": _groups("seed", 4, lambda n: sf.Groups.kmeans(FEATURES, count=3, seed=n)),
    "kmeans iterations": _groups("iterations", 4, lambda n: sf.Groups.kmeans(FEATURES, count=3, iterations=n)),
    "kmeans memory": _groups("memory", 255, lambda n: sf.Groups.kmeans(FEATURES[:4, :2], count=2, memory=n)),
    "split size": _groups("size", 2, lambda n: GROUPS.split(size=n)),
    "split seed": _groups("seed", 2, lambda n: GROUPS.split(size=2, seed=n)),
    "split only": _groups("only", 2, lambda n: GROUPS.split(size=2, only=[n])),
    "GroupTree.parents": _groups("level", 1, lambda n: sf.GroupTree.by(LABELS, range(N)).parents(n)),
    "Scores.top query": _groups("query", 1, lambda n: TRUE.top(n, 3)),
    "Scores.top k": _groups("k", 3, lambda n: TRUE.top(1, n)),
    "Analyzer seed": _set_up("seed", 3),
    "Analyzer memory": _set_up("memory", 200),
    "Analyzer curvature_examples": _set_up("curvature_examples", 6),
    "fit and score batch_size": Door("batch_size", 5, lambda n, folder: _score(_analyzer(folder), batch_size=n)),
    "features batch_size": Door(
        "batch_size", 5, lambda n, folder: _analyzer(folder).features(vectors(N), batch_size=n)
    ),
    "refine batch_size": _refined("batch_size", 5),
    "refine seed": _refined("seed", 5),
    "refine sizes": Door("sizes", 2, lambda n, folder: _refined("sizes", None).result([n, 1], folder)),
    "found_among_lowest": _evaluated("count", 5, lambda n: found_among_lowest(np.arange(20), WRONG, n)),
    "random_subsets count": _evaluated("count", 5, lambda n: random_subsets(n, 6)),
    "random_subsets groups": _evaluated("groups", 6, lambda n: random_subsets(3, n)),
    "random_subsets seed": _evaluated("seed", 6, lambda n: random_subsets(3, 6, seed=n)),
    "retrain repetitions": _evaluated(
        "repetitions", 2, lambda n: retrain(_kept, KEPT, repetitions=n, processes=1, progress=False)
    ),
    "retrain seed": _evaluated("seed", 2, lambda n: retrain(_kept, KEPT, seed=n, processes=1, progress=False)),
    "retrain processes": _evaluated("processes", 1, lambda n: retrain(_kept, KEPT, processes=n, progress=False)),
    "Bank repetitions": Door("repetitions", 2, lambda n, folder: _bank(folder, repetitions=n)),
    "Bank seed": Door("seed", 2, lambda n, folder: _bank(folder, seed=n)),
    "FunctionTraining each": _evaluated("each", 2, lambda n: FunctionTraining(_kept, {}, 1, each=n).batches([()] * 5)),
    "FunctionTraining processes": _evaluated(
        "processes", 2, lambda n: FunctionTraining(_kept, {}, n).batches([()] * 9)
    ),
    "Stage epochs": _evaluated("epochs", 2, lambda n: _batched(_stage(epochs=n))),
    "Stage batch_size": _evaluated("batch_size", 3, lambda n: _batched(_stage(batch_size=n))),
    "BatchedTraining together": _evaluated("together", 2, lambda n: _batched(_stage(), n)),
    "retraining_score repetitions": _removed("repetitions", 2),
    "retraining_score seed": _removed("seed", 2),
    "retraining_score measurement": _removed("measurement", 0),
    "curve subsets": _curve("subsets", 8),
    "detection resamples": _evaluated(
        "resamples", 4, lambda n: asdict(noisy_label_detection(TRUE, WRONG, resamples=n))
    ),
    "detection seed": _evaluated("seed", 4, lambda n: asdict(noisy_label_detection(TRUE, WRONG, seed=n, resamples=5))),
    "counterfactual counts": Door(
        "counts", 2, lambda n, folder: _retrained("counts", None, removal_counterfactual).result([n, 3], folder)
    ),
    "leave out resamples": Door("resamples", 4, lambda n, folder: _left_out(folder, resamples=n)),
    "leave out chosen": Door("chosen", 4, lambda n, folder: _left_out(folder, chosen=[n, 1])),
    "removal_order seed": _evaluated("seed", 4, lambda n: removal_order(TRUE, seed=n)),
    "SoftF1 positive": _evaluated("positive", 2, lambda n: sf.properties.SoftF1(DATA, n).evaluate(MODEL)),
    "parity positive": _evaluated(
        "positive", 2, lambda n: sf.properties.DemographicParityGap(DATA, LABELS, n).evaluate(MODEL)
    ),
    "CalibrationError bins": _evaluated(
        "bins", 5, lambda n: sf.properties.CalibrationError(DATA, bins=n).evaluate(MODEL)
    ),
    "evaluate batch_size": _evaluated(
        "batch_size", 5, lambda n: sf.properties.SoftAccuracy(DATA).evaluate(MODEL, batch_size=n)
    ),
    "Trajectory steps": Door("steps", 9, lambda n, folder: _run(folder, steps=[4, n])),
    "Trajectory dataset_size": Door("dataset_size", N, lambda n, folder: _trajectory(folder, n).dataset_size),
    "OptimizerConstants.batch_size": Door(
        "batch_size", 6, lambda n, folder: _trajectory(folder, N, batch_size=n).optimizer.batch_size
    ),
    "Trajectory parameter_groups": Door(
        "parameter_groups", 1, lambda n, folder: _trajectory(folder, N, {"0.weight": n}).group_of("0.weight")
    ),
    "record dataset_size": Door("dataset_size", N, lambda n, folder: _recorded(folder, dataset_size=n)),
    "record batch_size": Door("batch_size", 6, lambda n, folder: _recorded(folder, batch_size=n)),
    "record total_steps": Door("total_steps", 4, lambda n, folder: _recorded(folder, total_steps=n)),
    "record checkpoints": Door("checkpoints", 2, lambda n, folder: _recorded(folder, checkpoints=n)),
    "record steps of checkpoints": Door("checkpoints", 2, lambda n, folder: _recorded(folder, checkpoints=[n, 3])),
    "checkpoints": _evaluated("checkpoints", 2, lambda n: _due(CheckpointSchedule(6, n))),
    "steps of checkpoints": _evaluated("checkpoints", 3, lambda n: _due(CheckpointSchedule(None, [n, 6]))),
    "total_steps": _evaluated(
        "total_steps", 6, lambda n: [_due(CheckpointSchedule(n, 2)), CheckpointSchedule(n, 2).unmet(9)]
    ),
    "batch_size of a step": _evaluated("batch_size", 6, check_batch_size),
    "parameter_groups": _evaluated("parameter_groups", 1, lambda n: check_parameter_groups({"0.weight": n}, 2)),
}


def _left_out(folder: Path, **options: Any) -> Any:
    groups = sf.Groups.from_lists(np.arange(20).reshape(5, 4), 20)
    scores = TRUE.values.reshape(len(EFFECTS), 5, 4).sum(2)
    of_groups = sf.Scores(scores, TRUE.query_labels, groups.labels, (4,) * 5, TRUE.provenance)
    options = {"repetitions": 2, "resamples": 5, "progress": False, **options}
    return asdict(leave_one_group_out(of_groups, groups, Linear(noise=1.0), folder, **options))


def _run(folder: Path, **options: Any) -> list[Any]:
    run = trajectory_of(folder, perturbed_states(mlp(), 2), N, **options)
    return [run.steps, run.learning_rates, run.lr_steps(0, run.total_steps), repr(run)]


def _trajectory(folder: Path, size: Any, groups: Any = None, **constants: Any) -> sf.Trajectory:
    run = trajectory_of(folder, perturbed_states(mlp(), 2), N)
    return sf.Trajectory(
        run.checkpoints, run.steps, [[0.5, 0.25]] * 20, size, sf.OptimizerConstants(**constants), groups or {}
    )


def _recorded(folder: Path, **options: Any) -> Any:
    """What a recording of four steps says, in its files and when it is read."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options = {"dataset_size": N, "total_steps": 4, "checkpoints": 2, **options}
    with sf.record(model, optimizer, folder, **options):
        for _ in range(4):
            optimizer.zero_grad()
            model(DATA.tensors[0]).square().sum().backward()
            optimizer.step()
    return [(folder / "trajectory.json").read_text(), repr(sf.Trajectory.load(folder))]


def _due(schedule: CheckpointSchedule) -> list[Any]:
    return [[step for step in range(1, 8) if schedule.due(step)], schedule.surplus([1, 2, 3, 4, 5])]


REAL = {
    "InfluenceFunction.damping": _method(InfluenceFunction, "damping", 0.5),
    "TRAK.damping": _method(TRAK, "damping", 0.5),
    "LiSSA.damping": _method(LiSSA, "damping", 0.5),
    "LiSSA.scale": _method(LiSSA, "scale", 0.5),
    "Source.penalty": _method(Source, "penalty", 0.5),
    "kmeans tolerance": _groups("tolerance", 0.5, lambda x: sf.Groups.kmeans(FEATURES, count=3, tolerance=x)),
    "refine keep": _refined("keep", 0.5),
    "confidence": _evaluated("confidence", 0.5, lambda x: linear_datamodeling_score(*LINEAR, confidence=x)),
    "its difference's": _evaluated(
        "confidence", 0.5, lambda x: linear_datamodeling_difference(TRUE, *LINEAR, confidence=x)
    ),
    "noise_ceiling confidence": _evaluated("confidence", 0.5, lambda x: noise_ceiling(MEASURED, confidence=x)),
    "fraction": _evaluated("fraction", 0.5, lambda x: random_subsets(3, 6, x)),
    "retraining_score shares": Door(
        "shares", 0.5, lambda x, folder: _removed("shares", None).result([0.25, x], folder)
    ),
    "dataset_pruning shares": Door(
        "shares", 0.5, lambda x, folder: _removed("shares", None, dataset_pruning).result([0.25, x], folder)
    ),
    "detection shares": _evaluated(
        "shares", 0.5, lambda x: asdict(noisy_label_detection(TRUE, WRONG, shares=[0.25, x], resamples=5))
    ),
    "ratios": Door("ratios", 0.5, lambda x, folder: _curve("ratios", None).result([0.25, x], folder)),
    "temperature": _evaluated(
        "temperature", 0.5, lambda x: sf.properties.CalibrationError(DATA, temperature=x).evaluate(MODEL)
    ),
    "curvature_tolerance": Door(
        "curvature_tolerance",
        64.5,
        lambda x, folder: str(_classifier(folder).check(DATA, curvature=True, curvature_tolerance=x)),
    ),
}

TRUTH = {
    "Source.fast": _method(Source, "fast", True),
    "RepresentationSimilarity.cosine": _method(RepresentationSimilarity, "cosine", False),
    "partial": _groups("partial", True, lambda yes: sf.Groups.from_lists([[0]], 3, partial=yes)),
    "Scores.top largest": _groups("largest", False, lambda yes: TRUE.top(0, 3, yes)),
    "refine largest": _refined("largest", False),
    "removal_order largest": _evaluated("largest", False, lambda yes: removal_order(TRUE, yes)),
    "removal_order absolute": _evaluated("absolute", True, lambda yes: removal_order(TRUE, absolute=yes)),
    "retraining_score largest": _removed("largest", False),
    "dataset_pruning largest": _removed("largest", False, dataset_pruning),
    "retraining_score progress": _removed("progress", False),
    "detection largest": _evaluated(
        "largest", True, lambda yes: asdict(noisy_label_detection(TRUE, WRONG, largest=yes, resamples=5))
    ),
    "retrain progress": _evaluated("progress", False, lambda yes: retrain(_kept, KEPT, processes=1, progress=yes)),
    "worst": _evaluated(
        "worst", True, lambda yes: sf.properties.EqualisedOddsGap(DATA, [0, 1] * 6, worst=yes).evaluate(MODEL)
    ),
    "Analyzer progress": _set_up("progress", False),
    "check curvature": Door("curvature", True, lambda yes, folder: str(_classifier(folder).check(DATA, curvature=yes))),
}


PLAIN: dict[Callable[[Any, Path], Any], Any] = {}  # what comes of a door's plain value, which is asked for many times


def _check(door: Door, given: Any, folder: Path) -> None:
    if door.result not in PLAIN:
        PLAIN[door.result] = told(door.result(door.value, folder / "plain"))
    assert told(door.result(given, folder / "given")) == PLAIN[door.result]


def _check_refused(door: Door, given: Any, folder: Path, text: str) -> None:
    with pytest.raises(sf.SegflowError, match=rf"{door.name}\S*=.*{text}"):
        door.result(given, folder)


@pytest.mark.parametrize("kind", WHOLE_KINDS)
@pytest.mark.parametrize("door", WHOLE)
def test_whole_numbers_of_any_kind_give_what_the_plain_one_gives(tmp_path: Path, door: str, kind: str) -> None:
    _check(WHOLE[door], WHOLE_KINDS[kind](WHOLE[door].value), tmp_path)


TAKES_MORE = (
    "Source.segments",
    "split only",
    "leave out chosen",
    "checkpoints",
    "record checkpoints",
    "Scores.top query",
)  # or names
REFUSED = [(door, given) for door in WHOLE for given in (True, 2.5, math.nan, 10**-3)]
REFUSED += [(door, given) for door in WHOLE if door not in TAKES_MORE for given in (torch.tensor([2, 3]), "a")]


@pytest.mark.parametrize(("door", "given"), REFUSED, ids=repr)
def test_what_is_no_whole_number_is_refused_by_its_name(tmp_path: Path, door: str, given: Any) -> None:
    _check_refused(WHOLE[door], given, tmp_path, "expected a whole number")


@pytest.mark.parametrize("kind", REAL_KINDS)
@pytest.mark.parametrize("door", REAL)
def test_real_numbers_of_any_kind_give_what_the_plain_one_gives(tmp_path: Path, door: str, kind: str) -> None:
    _check(REAL[door], REAL_KINDS[kind](REAL[door].value), tmp_path)


@pytest.mark.parametrize("given", [True, math.nan, np.array([0.5]), (), 0.5j], ids=repr)
@pytest.mark.parametrize("door", REAL)
def test_what_is_no_real_number_is_refused_by_its_name(tmp_path: Path, door: str, given: Any) -> None:
    _check_refused(REAL[door], given, tmp_path, "expected a (finite )?number")


@pytest.mark.parametrize("kind", TRUTH_KINDS)
@pytest.mark.parametrize("door", TRUTH)
def test_truths_of_any_kind_give_what_the_plain_one_gives(tmp_path: Path, door: str, kind: str) -> None:
    _check(TRUTH[door], TRUTH_KINDS[kind](TRUTH[door].value), tmp_path)


@pytest.mark.parametrize("given", [1, 0.0, "yes", np.array([True])], ids=repr)
@pytest.mark.parametrize("door", TRUTH)
def test_what_is_no_truth_is_refused_by_its_name(tmp_path: Path, door: str, given: Any) -> None:
    _check_refused(TRUTH[door], given, tmp_path, "expected True or False")


# ---- options that are counts of bytes, sequences, and fingerprints ----


def test_memory_may_be_given_as_a_large_float(tmp_path: Path) -> None:
    assert _analyzer(tmp_path, memory=2e9).context.memory == 2_000_000_000


@pytest.mark.parametrize(
    "steps", [np.array([10, 20]), torch.tensor([10.0, 20.0]), (np.int64(10), 20.0), range(10, 21, 10)], ids=repr
)
def test_sequences_of_steps_may_be_of_any_kind(tmp_path: Path, steps: Any) -> None:
    assert json.dumps(describe(Source(segments=steps))) == json.dumps(describe(Source(segments=(10, 20))))
    assert told(_due(CheckpointSchedule(20, steps))) == told(_due(CheckpointSchedule(20, [10, 20])))
    run = trajectory_of(tmp_path, perturbed_states(mlp(), 2), N)
    assert told(sf.Trajectory(run.checkpoints, steps, 0.1, N).steps) == told((10, 20))


@pytest.mark.parametrize(
    "rates",
    [
        np.full(20, 0.25, dtype=np.float32),
        torch.full((20,), 0.25, requires_grad=True),
        [torch.tensor(0.25)] * 20,
        np.float32(0.25),
        torch.tensor(0.25),
    ],
    ids=["array", "tensor", "list of tensors", "np.float32", "scalar tensor"],
)
def test_learning_rates_may_be_of_any_kind(tmp_path: Path, rates: Any) -> None:
    run = trajectory_of(tmp_path, perturbed_states(mlp(), 2), N, lr=rates)
    assert told(run.lr_steps(0, 20)) == told((5.0,)) and not run.learning_rates.requires_grad


@pytest.mark.parametrize("kind", [float, np.int64, np.float32])
def test_learning_rates_may_be_by_steps_of_any_kind(tmp_path: Path, kind: Any) -> None:
    states = perturbed_states(mlp(), 2)
    run = trajectory_of(tmp_path, states, N, steps=[1, 2], lr={kind(1): 0.5, kind(2): 0.25})
    assert told(run.lr_steps(0, 2)) == told((0.75,))
    for wrong in (True, 1.5, "1", None):
        with pytest.raises(sf.TrajectoryError, match=r"learning_rates: the step=.*: expected a whole number, 1 to 2"):
            trajectory_of(tmp_path, states, N, steps=[1, 2], lr={wrong: 0.5, 2: 0.25})


def test_learning_rates_may_be_a_column_of_a_frame(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    run = trajectory_of(tmp_path, perturbed_states(mlp(), 2), N, lr=pandas.Series([0.25] * 20, index=range(5, 25)))
    assert told(run.lr_steps(0, 20)) == told((5.0,))


def test_a_fingerprint_of_any_numbers_binds_a_bank_as_plain_ones_do(tmp_path: Path) -> None:
    plain = FunctionTraining(_kept, {"lr": 0.5, "epochs": [3]}, processes=1)
    other = FunctionTraining(_kept, {"lr": np.float32(0.5), "epochs": [torch.tensor(3)]}, processes=1)
    assert told(plain.settings()) == told(other.settings())
    Bank(tmp_path, plain, np.eye(3, dtype=bool)).run(progress=False)
    assert Bank(tmp_path, other, np.eye(3, dtype=bool)).missing == []
    with pytest.raises(sf.ScoreError, match=r"fingerprint=.*expected what JSON can hold \(it holds array"):
        FunctionTraining(_kept, {"weights": np.ones(2)})


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_batched_training_is_known_by_its_optimizers_numbers_not_by_their_kind(kind: Any) -> None:
    def settings(lr: Any) -> Any:
        return _batched(_stage(optimizer=partial(torch.optim.SGD, lr=lr)))[0]

    assert settings(kind(0.5)) == settings(0.5) != settings(0.25)


@pytest.mark.parametrize(
    "given", [KEPT.astype(int), torch.from_numpy(KEPT), KEPT.tolist()], ids=["0/1", "tensor", "list"]
)
def test_subsets_may_be_of_any_kind(tmp_path: Path, given: Any) -> None:
    plain = retrain(_kept, KEPT, processes=1, progress=False)
    assert told(retrain(_kept, given, processes=1, progress=False)) == told(plain)
    bank = Bank(tmp_path, FunctionTraining(_kept, {}, processes=1), given, repetitions=1)
    assert bank.fingerprint == Bank(tmp_path, bank.training, KEPT, repetitions=1).fingerprint
    with pytest.raises(sf.ScoreError, match="other numbers than 0 and 1"):
        retrain(_kept, np.array([[0.0, 5.0]]), processes=1)
    indices = [np.flatnonzero(row).tolist() for row in KEPT]
    assert told(retrain(_kept, indices, processes=1, progress=False)) == told(plain)
