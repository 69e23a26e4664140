"""Properties as queries: the streamed gradient is autograd's on the whole of the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow import properties as props
from segflow.errors import MethodError, TaskError
from segflow.runtime.ranks import current
from segflow.tasks.classification import margins

from ..support.gang import Failed, Gang
from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

N = 14
GROUPS = sf.Groups.from_lists([[0, 3, 5], [1], [2, 4], range(6, 14)], N)
DATA = vectors(17, seed=9)
ATTRIBUTE = np.array(list("aabbcabcabcabcaba"))


class SpreadOfLogits(sf.properties.Property):
    """A number that is no function of a sum over examples."""

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cdist(outputs, outputs).max() + 0.0 * targets.sum()


# Each property beside the same number written as loops over the whole of the data, from probabilities p and labels y.


def _rate(p: Tensor, of: list[int], positive: int) -> Tensor:
    return sum(p[i, positive] for i in of) / len(of)  # type: ignore[return-value]


def _gap(p: Tensor, chosen: list[int], positive: int) -> Tensor:
    rates = [_rate(p, [i for i in chosen if ATTRIBUTE[i] == value], positive) for value in "abc"]
    return max(rates) - min(rates)  # type: ignore[type-var, operator]


def _f1(p: Tensor, y: list[int], positive: int) -> Tensor:
    tp = sum(p[i, positive] for i in range(17) if y[i] == positive)
    return 2 * tp / (p[:, positive].sum() + y.count(positive))  # type: ignore[operator]


def _odds(p: Tensor, y: list[int], positive: int) -> list[Tensor]:
    return [_gap(p, [i for i in range(17) if (y[i] == positive) is truly], positive) for truly in (True, False)]


def _calibration(p: Tensor, y: list[int], bins: int, temperature: float) -> Tensor:
    errors = [torch.zeros(()).double() for _ in range(bins)]
    for i in range(17):
        confidence = p[i].max()
        weights = torch.stack([-((confidence - (b + 0.5) / bins) ** 2) / temperature for b in range(bins)]).softmax(0)
        for b in range(bins):
            errors[b] = errors[b] + weights[b] * (float(p[i].argmax() == y[i]) - confidence)
    return sum(error.abs() for error in errors) / 17  # type: ignore[return-value]


def _margin(p: Tensor, y: list[int], of: list[int]) -> Tensor:
    return sum(p[i, y[i]].log() - (1 - p[i, y[i]]).log() for i in of) / len(of)  # type: ignore[return-value]


CASES: dict[str, tuple[sf.properties.Property, Callable[[Tensor, list[int]], Tensor]]] = {
    "mean loss": (
        props.MeanLoss(DATA, sf.tasks.Classification()),
        lambda p, y: -sum(p[i, y[i]].log() for i in range(17)) / 17,
    ),
    "mean measurement": (
        props.MeanMeasurement(DATA, sf.tasks.Classification("margin")),
        lambda p, y: _margin(p, y, list(range(17))),
    ),
    "margin": (props.SliceMargin(DATA), lambda p, y: _margin(p, y, list(range(17)))),
    "margin of a slice": (
        props.SliceMargin(DATA, [2, 5, 11], name="of a slice"),
        lambda p, y: _margin(p, y, [2, 5, 11]),
    ),
    "margin of a mask": (
        props.SliceMargin(DATA, np.isin(np.arange(17), [2, 5, 11]), name="of a mask"),
        lambda p, y: _margin(p, y, [2, 5, 11]),
    ),
    "accuracy": (props.SoftAccuracy(DATA), lambda p, y: sum(p[i, y[i]] for i in range(17)) / 17),
    "F1 of 1": (props.SoftF1(DATA), lambda p, y: _f1(p, y, 1)),
    "F1 of 0": (props.SoftF1(DATA, positive=0), lambda p, y: _f1(p, y, 0)),
    "macro F1": (props.SoftF1(DATA, positive=None), lambda p, y: sum(_f1(p, y, c) for c in range(3)) / 3),
    "parity of 1": (props.DemographicParityGap(DATA, ATTRIBUTE), lambda p, y: _gap(p, list(range(17)), 1)),
    "parity of 2": (props.DemographicParityGap(DATA, ATTRIBUTE, 2), lambda p, y: _gap(p, list(range(17)), 2)),
    "odds": (props.EqualisedOddsGap(DATA, ATTRIBUTE, 2), lambda p, y: sum(_odds(p, y, 2)) / 2),
    "worst odds": (
        props.EqualisedOddsGap(DATA, ATTRIBUTE, 2, worst=True),
        lambda p, y: max(_odds(p, y, 2)),  # type: ignore[type-var]
    ),
    "calibration": (props.CalibrationError(DATA), lambda p, y: _calibration(p, y, 15, 0.01)),
    "few bins": (props.CalibrationError(DATA, bins=4), lambda p, y: _calibration(p, y, 4, 0.01)),
    "soft bins": (props.CalibrationError(DATA, temperature=0.2), lambda p, y: _calibration(p, y, 15, 0.2)),
}


def _analyzer(folder: Path, method: Any = None, **options: Any) -> tuple[sf.Analyzer, nn.Sequential]:
    model = mlp()
    trajectory = trajectory_of(folder / "run", perturbed_states(model, 2), N, lr=0.3)
    task = options.pop("task", sf.tasks.Classification())
    return analyzer_of(model, trajectory, folder / "store", task, method=method or sf.GradientDot(), **options), model


def _whole_gradient(number: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
    found = torch.autograd.grad(number(model), list(model.parameters()))
    return torch.cat([part.flatten() for part in found])


def _expected(model: nn.Module, number: Callable[[nn.Module], Tensor]) -> Tensor:
    """[K]: <gradient of the number, summed gradient of each group> / N, by autograd on whole sets."""
    model.load_state_dict(perturbed_states(mlp(), 2)[-1])
    query = _whole_gradient(number, model)
    x, y = vectors(N).tensors
    rows = []
    for members in GROUPS.members:
        of = torch.from_numpy(members)
        rows.append(
            query
            @ _whole_gradient(lambda m, of=of: nn.functional.cross_entropy(m(x[of]), y[of], reduction="sum"), model)
        )
    return torch.stack(rows) / N


def _by_loops(formula: Callable[[Tensor, list[int]], Tensor]) -> Callable[[nn.Module], Tensor]:
    x, y = DATA.tensors
    return lambda model: formula(model(x).softmax(1), y.tolist())


@pytest.mark.parametrize("name", CASES)
def test_a_streamed_property_has_the_gradient_that_autograd_finds_on_the_whole_set(tmp_path: Path, name: str) -> None:
    one, formula = CASES[name]
    analyzer, model = _analyzer(tmp_path)
    scores = analyzer.score(GROUPS, vectors(N), one, batch_size=4)
    assert scores.query_labels == (one.name,)
    expected = _expected(model, _by_loops(formula))
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(scores.values[0], expected, rtol=1e-9, atol=1e-14)
    value = _by_loops(formula)(model).item()
    assert math.isclose(one.evaluate(model), value, rel_tol=1e-9)
    assert math.isclose(one.evaluate(model, batch_size=5), value, rel_tol=1e-9)


def test_any_function_of_all_outputs_is_differentiated_exactly(tmp_path: Path) -> None:
    analyzer, model = _analyzer(tmp_path)
    found = analyzer.score(GROUPS, vectors(N), SpreadOfLogits(DATA, name="spread"), batch_size=3)
    x = DATA.tensors[0]
    expected = _expected(model, lambda m: torch.cdist(m(x), m(x)).max())
    torch.testing.assert_close(found.values[0], expected, rtol=1e-7, atol=1e-12)


def test_properties_are_rows_of_one_score_call_by_name(tmp_path: Path) -> None:
    analyzer, _ = _analyzer(tmp_path)
    asked = [props.SoftF1(DATA, name="f"), props.SoftAccuracy(DATA), SpreadOfLogits(DATA)]
    together = analyzer.score(GROUPS, vectors(N), asked)
    assert together.query_labels == ("f", "SoftAccuracy", "SpreadOfLogits")
    assert together.provenance["measurement"] == "properties"
    for row, one in enumerate(asked):
        torch.testing.assert_close(together.values[row], analyzer.score(GROUPS, vectors(N), one).values[0])
    renamed = analyzer.score(GROUPS, vectors(N), asked, query_labels=["x", "y", "z"])
    assert renamed.query_labels == ("x", "y", "z")


def test_properties_of_one_class_are_told_apart_by_their_options() -> None:
    asked = [
        *(props.SoftF1(DATA, positive=positive) for positive in (1, 0, None)),
        *(props.EqualisedOddsGap(DATA, ATTRIBUTE, *options) for options in [(), (1, True), (2,), (2, True)]),
        props.DemographicParityGap(DATA, ATTRIBUTE, 2),
        props.CalibrationError(DATA),
        props.CalibrationError(DATA, 4, temperature=0.2),
        props.SoftF1(DATA, 2, name="mine"),
    ]
    assert [one.name for one in asked] == [
        *("SoftF1", "SoftF1(positive=0)", "SoftF1(positive=None)"),
        *("EqualisedOddsGap", "EqualisedOddsGap(worst=True)", "EqualisedOddsGap(positive=2)"),
        "EqualisedOddsGap(positive=2, worst=True)",
        "DemographicParityGap(positive=2)",
        *("CalibrationError", "CalibrationError(bins=4, temperature=0.2)", "mine"),
    ]


class _NeverRead(list[Any]):
    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("data was read before the queries' names were compared")


def test_two_properties_of_one_name_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    analyzer, _ = _analyzer(tmp_path)
    unread = _NeverRead([None] * 17)
    alike = [props.SoftAccuracy(unread), props.SoftAccuracy(unread)]
    for ask in (analyzer.score, analyzer.refine):
        with pytest.raises(sf.ScoreError, match=r"two queries are called 'SoftAccuracy'\. .*or of properties as name="):
            ask(GROUPS, _NeverRead([None] * N), alike)
    with pytest.raises(sf.ScoreError, match="two queries are called '1'"):
        analyzer.score(GROUPS, _NeverRead([None] * N), unread, query_labels=[1, "1", *range(2, 17)])
    with pytest.raises(TaskError, match="SoftAccuracy: name=3: expected text"):
        props.SoftAccuracy(DATA, name=3)  # type: ignore[arg-type]
    both = [props.SoftAccuracy(DATA), props.SoftAccuracy(vectors(9))]
    assert analyzer.score(GROUPS, vectors(N), both, query_labels=["a", "b"]).query_labels == ("a", "b")


@pytest.mark.parametrize(
    "method", [sf.Source(segments=2), sf.InfluenceFunction(), sf.TracIn(), sf.TRAK(6, 0.01), sf.LiSSA(2.0, steps=3)]
)
def test_an_aggregate_query_is_the_mean_of_its_examples_in_every_method(tmp_path: Path, method: Any) -> None:
    task = sf.tasks.Classification("margin")
    analyzer, _ = _analyzer(tmp_path, method, task=task)
    analyzer.fit(vectors(N))
    alone = analyzer.score(GROUPS, vectors(N), DATA).values.mean(0)
    found = analyzer.score(GROUPS, vectors(N), props.MeanMeasurement(DATA, task), batch_size=6)
    torch.testing.assert_close(found.values[0], alone, rtol=1e-8, atol=1e-12)


def test_queries_that_do_not_fit_memory_are_taken_in_blocks(tmp_path: Path) -> None:
    asked = [one for one, _ in CASES.values()]
    roomy, _ = _analyzer(tmp_path / "roomy", sf.Source())
    roomy.fit(vectors(N))
    tight, _ = _analyzer(tmp_path / "tight", sf.Source(), memory=8000)
    tight.fit(vectors(N))
    expected = roomy.score(GROUPS, vectors(N), asked).values
    torch.testing.assert_close(tight.score(GROUPS, vectors(N), asked).values, expected, rtol=1e-9, atol=1e-13)


def _on_ranks(folder: str, store: str, memory: int) -> list[list[float]]:
    model = mlp()
    trajectory = trajectory_of(Path(folder) / f"run-{current().index}", perturbed_states(model, 2), N, lr=0.3)
    method = sf.Source(segments=2)
    analyzer = analyzer_of(
        model, trajectory, Path(folder) / store, sf.tasks.Classification(), method=method, memory=memory
    )
    analyzer.fit(vectors(N))
    asked = [one for one, _ in CASES.values()]
    return analyzer.score(GROUPS, vectors(N), asked, batch_size=7).values.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("count", "memory"),
    [
        (2, 2 << 30),
        pytest.param(3, 2 << 30, marks=pytest.mark.slow),
        pytest.param(4, 8000, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_finds_the_same_properties(gang: Gang, tmp_path: Path, count: int, memory: int) -> None:
    """With four ranks and batches of seven, one rank has no example of the property's data."""
    alone = _on_ranks(str(tmp_path), "alone", 2 << 30)
    for found in gang.run(count, _on_ranks, str(tmp_path), f"store-{count}", memory):
        assert not isinstance(found, Failed), found
        torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), rtol=1e-9, atol=1e-12)


def test_another_property_or_other_data_is_not_taken_from_the_store(tmp_path: Path) -> None:
    analyzer, _ = _analyzer(tmp_path)
    values = [
        analyzer.score(GROUPS, vectors(N), one).values[0]
        for one in (
            props.SoftF1(DATA, positive=0),
            props.SoftF1(DATA, positive=1),
            props.SoftF1(vectors(17, seed=10), positive=1),
            props.DemographicParityGap(DATA, ATTRIBUTE),
            props.DemographicParityGap(DATA, ATTRIBUTE[::-1].copy()),
        )
    ]
    for first in range(len(values)):
        for second in range(first):
            assert not torch.allclose(values[first], values[second])


def test_one_logit_stands_for_two_classes() -> None:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0)).double()
    both = torch.stack([torch.zeros(6).double(), logits], 1)
    for outputs in (logits, logits[:, None]):
        torch.testing.assert_close(props.probabilities(outputs), both.softmax(1))


@pytest.mark.parametrize(
    "make",
    [
        props.SoftF1,
        lambda data: props.SoftF1(data, positive=None),
        props.SoftAccuracy,
        props.SliceMargin,
        props.CalibrationError,
        lambda data: props.EqualisedOddsGap(data, ["a", "b"] * 8),
    ],
)
def test_labels_in_a_column_and_floating_point_labels_are_the_same_labels(make: Any) -> None:
    """As a binary cross-entropy of one logit wants them."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 5, generator=generator).double(), torch.tensor([0, 0, 1, 1] * 4)
    model = nn.Linear(5, 1).double()
    flat, column, floating = (make(TensorDataset(x, labels)) for labels in (y, y[:, None], y[:, None].double()))
    assert flat.evaluate(model) == column.evaluate(model) == floating.evaluate(model)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.left(h), self.right(h)


class BothHeads(sf.Task):
    """Trained with both heads, measured by one, which the other head does not enter."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        left, right = model(batch[0])
        return nn.functional.cross_entropy(left, batch[1], reduction="sum") + right.square().sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0])[0], batch[1], reduction="sum")

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        return margins(model(batch[0])[0], batch[1]).sum()


class RightHead(sf.properties.Property):
    def outputs(self, batch: Any, model: nn.Module) -> Tensor:
        return model(batch[0])[1]

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().mean()


@pytest.mark.parametrize("method", [sf.GradientDot(), sf.TRAK(6, 0.1)])
def test_a_layer_that_a_measurement_does_not_depend_on_has_a_zero_part(tmp_path: Path, method: Any) -> None:
    model = TwoHeads()
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 1), N, lr=0.3)
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", BothHeads(), method=method)
    analyzer.fit(vectors(N))
    analyzer.check(vectors(N), DATA, curvature_tolerance=float("inf"))
    found = analyzer.score(GROUPS, vectors(N), DATA, keep=("layer",))
    property_of = analyzer.score(GROUPS, vectors(N), RightHead(DATA), keep=("layer",))
    assert found.values.abs().max() > 0 and property_of.values.abs().max() > 0
    if isinstance(method, sf.GradientDot):  # TRAK's features join the layers
        assert not found.by_layer["right"].any() and not property_of.by_layer["left"].any()
        x = DATA.tensors[0]
        model.load_state_dict(perturbed_states(TwoHeads(), 1)[-1])
        query = torch.autograd.grad(model(x)[1].square().mean(), model.trunk.weight)[0]
        tx, ty = vectors(N).tensors
        loss = nn.functional.cross_entropy(model(tx)[0], ty, reduction="sum") + model(tx)[1].square().sum()
        whole = (query * torch.autograd.grad(loss, model.trunk.weight)[0]).sum() / N
        bias = torch.autograd.grad(model(x)[1].square().mean(), model.trunk.bias)[0]
        loss = nn.functional.cross_entropy(model(tx)[0], ty, reduction="sum") + model(tx)[1].square().sum()
        whole = whole + (bias * torch.autograd.grad(loss, model.trunk.bias)[0]).sum() / N
        torch.testing.assert_close(property_of.by_layer["trunk"].sum(), whole, rtol=1e-8, atol=1e-12)


def test_an_output_object_with_logits_and_mapping_batches_are_understood() -> None:
    class Said:
        def __init__(self, logits: Tensor):
            self.logits = logits

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Said(super().forward(x))

    net, plain = Net(5, 3).double(), nn.Linear(5, 3).double()
    plain.load_state_dict(net.state_dict())
    records = [{"pixels": x, "digit": y} for x, y in zip(*DATA.tensors, strict=True)]
    named = props.SoftAccuracy(records, inputs="pixels", targets="digit")
    assert named.evaluate(net) == pytest.approx(props.SoftAccuracy(DATA).evaluate(plain), rel=1e-12)


def test_a_collate_function_of_its_own_is_used(tmp_path: Path) -> None:
    def doubled(items: list[Any]) -> tuple[Tensor, Tensor]:
        return 2 * torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    analyzer, _ = _analyzer(tmp_path)
    twice = TensorDataset(2 * DATA.tensors[0], DATA.tensors[1])
    found = analyzer.score(GROUPS, vectors(N), props.SoftF1(DATA, collate_fn=doubled)).values
    torch.testing.assert_close(found, analyzer.score(GROUPS, vectors(N), props.SoftF1(twice)).values)
    task = sf.tasks.Classification()
    mean = analyzer.score(GROUPS, vectors(N), props.MeanLoss(DATA, task, collate_fn=doubled)).values
    torch.testing.assert_close(mean, analyzer.score(GROUPS, vectors(N), props.MeanLoss(twice, task)).values)


def test_check_looks_at_properties(tmp_path: Path) -> None:
    analyzer, _ = _analyzer(tmp_path)
    analyzer.check(vectors(N), [props.SoftF1(DATA), props.SoftAccuracy(DATA)], curvature_tolerance=float("inf"))

    class Detached(sf.properties.Property):
        def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.detach().sum()

    with pytest.raises(TaskError, match="does not depend on the outputs"):
        analyzer.check(vectors(N), Detached(DATA), curvature_tolerance=float("inf"))


class _TwoNumbers(sf.properties.Property):
    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[0]


class _Infinite(sf.properties.Property):
    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * float("inf")


class _OneRow(sf.properties.Property):
    def outputs(self, batch: Any, model: nn.Module) -> Tensor:
        return model(batch[0])[:1]

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()


def _labelled(labels: list[Any]) -> TensorDataset:
    return TensorDataset(DATA.tensors[0][: len(labels)], torch.tensor(labels))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: [props.SoftF1(DATA), (torch.zeros(5), 1)], TaskError, "both properties and examples"),
        (lambda: _TwoNumbers(DATA), TaskError, "expected one number, found"),
        (lambda: _Infinite(DATA), TaskError, "_Infinite: its value is"),
        (lambda: _OneRow(DATA), TaskError, "expected 2 rows, one for each example"),
        (lambda: props.SoftF1(DATA, positive=7), TaskError, "positive=7, but the model has the classes 0..2"),
        (lambda: props.DemographicParityGap(DATA, [1] * 17), TaskError, "expected two or more"),
        (lambda: props.DemographicParityGap(DATA, [0, 1]), TaskError, "2 values, expected one for each of 17"),
        (
            lambda: props.EqualisedOddsGap(DATA, [0] * 16 + [1]),
            TaskError,
            "no example of value 1 is truly (positive|negative)",
        ),
        (lambda: props.SliceMargin(DATA, [0.5]), TaskError, "slice_of: expected a list of example indices.*float64"),
        (lambda: props.SliceMargin(DATA, [[1], [2]]), TaskError, r"found int64 of shape \(2, 1\)"),
        (lambda: props.SliceMargin(DATA, []), TaskError, "slice_of names no example"),
        (lambda: props.SliceMargin(DATA, [False] * 17), TaskError, "slice_of names no example"),
        (lambda: props.SliceMargin(DATA, [True] * 16), TaskError, "slice_of is a mask of 16, but the data has 17"),
        (lambda: props.SliceMargin(DATA, [3, 1, 3]), TaskError, "example 3 more than once"),
        (lambda: props.SliceMargin(DATA, [1, 0] * 8 + [0]), TaskError, "if it is a mask, give booleans"),
        (lambda: props.SliceMargin(DATA, [17]), TaskError, "slice_of names example 17, but the data has 0..16"),
        (lambda: props.SliceMargin(DATA, [5, -1]), TaskError, "slice_of names example -1, but the data has 0..16"),
        (lambda: props.SoftF1(_labelled([0, 3])), TaskError, "example 1 has the label 3, but .* classes 0..2"),
        (lambda: props.SoftAccuracy(_labelled([0, -1])), TaskError, "example 1 has the label -1"),
        (lambda: props.SoftAccuracy(_labelled([0.0, 1.5])), TaskError, "expected one whole number, a class"),
        (lambda: props.CalibrationError(_labelled([[0, 1], [1, 0]])), TaskError, r"found labels .* shape \(2, 2\)"),
        (
            lambda: props.SoftF1(DATA, positive=True),
            TaskError,
            "positive=True: expected a whole number, at least 0. It is the number of a class",
        ),
        (
            lambda: props.DemographicParityGap(DATA, ATTRIBUTE, None),
            TaskError,
            "positive=None: expected a whole number",
        ),
        (
            lambda: props.DemographicParityGap(DATA, ["a", None] * 8 + ["a"]),
            TaskError,
            "attribute: example 1's label is None",
        ),
        (
            lambda: props.DemographicParityGap(DATA, [0.0, float("nan")] * 8 + [1.0]),
            TaskError,
            "example 1's label is nan",
        ),
        (lambda: props.MeanLoss(DATA, sf.tasks.Classification), TaskError, "expected an object"),
        (lambda: props.CalibrationError(DATA, bins=2.7), TaskError, "bins=2.7"),
        (lambda: props.CalibrationError(DATA, bins=0), TaskError, "bins=0"),
        (lambda: props.CalibrationError(DATA, temperature=0.0), TaskError, "temperature=0.0"),
        (lambda: props.SoftF1([]), TaskError, "SoftF1's dataset is empty"),
    ],
)
def test_what_is_wrong_with_a_property_is_said(tmp_path: Path, make: Any, kind: Any, message: str) -> None:
    analyzer, _ = _analyzer(tmp_path)
    with pytest.raises(kind, match=message):
        analyzer.score(GROUPS, vectors(N), make())


def test_a_property_has_no_representation(tmp_path: Path) -> None:
    analyzer, _ = _analyzer(tmp_path, sf.RepresentationSimilarity())
    with pytest.raises(MethodError, match="no representation"):
        analyzer.score(GROUPS, vectors(N), props.SoftF1(DATA))
