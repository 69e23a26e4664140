"""Whatever a file says, its checksums right: it is read as something valid, or refused by an error of segflow's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

import segflow as sf
from segflow import cli
from segflow.data.fingerprints import digest
from segflow.evaluation import Bank, FunctionTraining
from segflow.evaluation.retraining.bank import read_bank
from segflow.report import Table
from segflow.report.row import Row
from segflow.store.lock import hold, holder
from segflow.store.store import Store
from segflow.training import record

from .support.forging import forged_json, forged_tensors
from .support.helpers import analyzer_of, perturbed_states, trajectory_of, vectors

Forgeries = Iterable[tuple[str, Any]]


@contextmanager
def _kept(*paths: Path) -> Iterator[None]:
    """Files that are as they were after the block."""
    before = {path: path.read_bytes() for path in paths}
    try:
        yield
    finally:
        for path, content in before.items():
            path.write_bytes(content)


UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)  # it has no checksum


def _attack(
    path: Path, forgeries: Forgeries, read: Callable[[], Any], seal: Callable[[Path], None] | None = None
) -> int:
    """Write each forgery to `path` and read; returns how many were refused."""
    refused = 0
    for what, content in forgeries:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        if seal is not None:
            seal(path)
        try:
            read()
        except sf.SegflowError as problem:
            assert len(str(problem)) < 3000, f"{path.name}, {what}"
            refused += 1
        except BaseException as problem:
            raise AssertionError(f"{path.name}, {what}: {type(problem).__name__}: {problem}") from problem
    return refused


def _sha256(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# Scores, tables, banks


def _sealed(path: Path) -> None:
    """Bring the checksum inside a file up to date, where it can be read at all."""
    with suppress(*UNREADABLE):
        tensors = {name: tensor for name, tensor in load(path.read_bytes()).items() if name != "sha256"}
        seal = torch.frombuffer(bytearray(digest(tensors).encode()), dtype=torch.uint8)
        path.write_bytes(save(tensors | {"sha256": seal}))


def _scores() -> sf.Scores:
    values = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]], dtype=torch.float64)
    parts = {"by_term": {"t": values / 4, "u": values * 3 / 4}, "by_run": {"run 1": values - 1, "run 2": values + 1}}
    provenance = {"method": "Source", "segments": [1, 2], "damping": 0.5}
    return sf.Scores(values, ("p", "q"), ("a", "b", "c"), (1, 2, 3), provenance, **parts, spread=values.abs())


def _valid_scores(path: Path) -> None:
    scores = sf.Scores.load(path)
    shape = (len(scores.query_labels), len(scores.group_labels))
    for part in (scores.values, *scores.by_term.values(), *scores.by_run.values()):
        assert part.shape == shape and part.isfinite().all() and part.is_floating_point()
    assert all(type(size) is int and size > 0 for size in scores.group_sizes) and len(scores.group_sizes) == shape[1]
    assert all(isinstance(label, str) for label in (*scores.query_labels, *scores.group_labels))
    json.dumps(scores.provenance, allow_nan=False)
    scores.save(path.with_name("again"))
    scores.top(0, 1), scores.total(), scores.to_pandas(), repr(scores)


def test_forged_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores"
    _scores().save(path)
    good = load(path.read_bytes())
    with _kept(path):
        assert _attack(path, forged_tensors(path), lambda: _valid_scores(path)) > 100
    assert _attack(path, forged_tensors(path), lambda: _valid_scores(path), _sealed) > 80
    labels = json.loads(good["labels"].numpy().tobytes())

    def with_labels() -> Forgeries:
        for what, text in forged_json(labels):
            yield what, save(good | {"labels": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)})

    assert _attack(path, with_labels(), lambda: _valid_scores(path), _sealed) > 200


def test_forged_tables(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    rows = (Row("Source", 0.1, 2.0, 1.5, 2.5, (1.0, 3.0), "a"), Row("random", 0.1, 1.0, 0.5, 1.5))
    Table("Retraining", "share", "loss", rows, {"none": (0.9, 0.8, 1.0)}, {"notes": {"Source": "x"}}).save(path)
    content = json.loads(path.read_text())

    def valid() -> None:
        table = Table.load(path)
        table.save(path.with_name("again"))
        str(table), table.to_pandas(), table.notes

    def seal(path: Path) -> None:
        with suppress(*UNREADABLE):
            forged = json.loads(path.read_text())
            del forged["sha256"]
            seal = digest(json.dumps({k: v for k, v in forged.items() if k != "segflow"}, sort_keys=True))
            path.write_text(json.dumps(forged | {"sha256": seal}))

    assert _attack(path, forged_json(content), valid) > 300
    assert _attack(path, forged_json(content), valid, seal) > 200


def test_forged_banks(tmp_path: Path) -> None:
    training = FunctionTraining(lambda kept, seed: [float(kept.sum())], {"sum": "of indices"}, processes=1)
    bank = Bank(tmp_path, training, np.array([[1, 0, 1], [0, 1, 1]], dtype=bool), repetitions=2)
    bank.run(progress=False)

    def valid() -> None:
        assert bank.run(progress=False).tolist() == [[[2.0], [2.0]], [[3.0], [3.0]]]
        subsets, measured = read_bank(tmp_path)
        assert subsets.dtype == bool and np.isfinite(measured).all() and measured.shape[0] == len(subsets)

    valid()
    for path in (tmp_path / "bank.json", tmp_path / "subsets.safetensors"):
        with _kept(path):
            forged = forged_json(json.loads(path.read_text())) if path.suffix == ".json" else forged_tensors(path)
            assert _attack(path, forged, valid) > 15


def test_forged_measurements_of_a_bank(tmp_path: Path) -> None:
    training = FunctionTraining(lambda kept, seed: [float(kept.sum())], {"sum": "of indices"}, processes=1)
    bank = Bank(tmp_path, training, np.array([[1, 0, 1], [0, 1, 1]], dtype=bool))
    bank.run(progress=False)
    path = min(tmp_path.glob("measured-*"))

    def valid() -> None:
        measured = read_bank(tmp_path)[1]
        assert np.isfinite(measured).all() and measured.shape == (2, 5, 1)

    assert _attack(path, forged_tensors(path), valid, _sealed) > 15


# Recordings


def _recording(folder: Path, model: nn.Module, optimizer: Any, **options: Any) -> None:
    data = vectors(8, features=2)
    with record(model, optimizer, folder, dataset_size=8, total_steps=2, checkpoints=2, **options):
        for x, y in (tuple(column[:4] for column in data.tensors), tuple(column[4:] for column in data.tensors)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Callable[[], None]]:
    """The folder of a recording of Adam, some of the model frozen, and what reads all of it."""

    def model() -> nn.Module:
        built = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)).double()
        built[0].weight.requires_grad_(False)
        return built

    trained, folder = model(), tmp_path / "run"
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    _recording(folder, trained, optimizer, stage="one", example_weights=[1.0] * 8)

    def valid() -> None:
        trajectory = sf.Trajectory.load(folder)
        for index in range(len(trajectory)):
            into = model()
            trajectory.load_into(into, index)
            assert all(parameter.dtype == torch.float64 for parameter in into.parameters())
            moments = trajectory.second_moments(index) or {}
            assert all((values.float() >= 0).all() for values in moments.values())
            weights = trajectory.example_weights(index)
            assert weights is None or (weights.shape == (8,) and weights.isfinite().all() and (weights >= 0).all())
            trajectory.moves_until(index), trajectory.clip_squares(index), trajectory.digest(index)
        json.dumps(trajectory.observed, allow_nan=False)
        steps = np.array([trajectory.lr_steps(0, 1), trajectory.decay_steps(0, 1)])
        assert not np.isinf(steps).any()  # NaN for an optimizer that is not known
        repr(trajectory), trajectory.why_untrained("0.weight")

    valid()
    return folder, valid


def test_forged_descriptions_of_recordings(recorded: tuple[Path, Callable[[], None]]) -> None:
    folder, valid = recorded
    for path in (folder / "stages.json", folder / "one" / "trajectory.json"):
        with _kept(path):
            assert _attack(path, forged_json(json.loads(path.read_text())), valid) > 30


def test_forged_logs_of_steps(recorded: tuple[Path, Callable[[], None]]) -> None:
    folder, valid = recorded
    path, description = folder / "one" / "steps.jsonl", folder / "one" / "trajectory.json"
    content = json.loads(description.read_text())
    first, *rest = path.read_text().splitlines()

    def seal(path: Path) -> None:
        description.write_text(json.dumps(content | {"log": {**content["log"], "sha256": _sha256(path)["sha256"]}}))

    def logs() -> Forgeries:
        for what, text in forged_json(json.loads(first)):
            yield what, "\n".join([text, *rest, ""])

    assert _attack(path, logs(), valid, seal) > 150


def test_forged_checkpoints(recorded: tuple[Path, Callable[[], None]]) -> None:
    folder, valid = recorded
    description = folder / "one" / "trajectory.json"
    content = json.loads(description.read_text())
    last = content["checkpoints"][-1]["file"]

    def seal(path: Path) -> None:
        if path.name == "frozen.safetensors":
            changed = content | {"frozen": content["frozen"] | _sha256(path)}
        else:
            entries = [entry | (_sha256(path) if entry["file"] == last else {}) for entry in content["checkpoints"]]
            changed = content | {"checkpoints": entries}
        description.write_text(json.dumps(changed))

    for name in (last, "frozen.safetensors", "example_weights.safetensors"):
        path = folder / "one" / name
        with _kept(path, description):
            assert _attack(path, forged_tensors(path), valid, seal) > 10, name


# Stores


def test_forged_entries_and_notes_of_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    made = {"dataset": {"length": 3}, "checkpoint": "abc", "dtype": "torch.float64", "seed": 0}
    store.write("input", {"x": torch.ones(2)}, made)
    store.write("unit", {"x": torch.ones(2)}, made, ("input",))
    note = {"host": "elsewhere", "pid": 7, "born": 1.0, "purpose": "fit", "since": "2026"}
    (tmp_path / "holder.json").write_text(json.dumps(note))

    def valid() -> None:
        for tool in (["ls"], ["ls", "--json"], ["verify"], ["gc", "--dry-run"]):
            cli.main(["store", tool[0], str(tmp_path), *tool[1:]])
        capsys.readouterr()
        assert holder(tmp_path) is None or holder(tmp_path).process.pid > 0
        assert store.open("unit", made).tensor("x").equal(torch.ones(2))

    for path in (store.entry_path("unit"), tmp_path / "manifest.json", tmp_path / "holder.json"):
        with _kept(path):
            refused = _attack(path, forged_json(json.loads(path.read_text())), valid)
            assert refused > 10 or path.name == "holder.json"
    with hold(tmp_path, "test"):
        pass


@pytest.mark.parametrize("method", [sf.Source(segments=1), sf.TRAK(dimension=4)])
def test_forged_units_never_change_scores_without_a_word(tmp_path: Path, method: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 3)).double()
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), 6)
    groups, root = sf.Groups.from_lists([[0, 1, 2], [3, 4, 5]], 6), tmp_path / "store"
    analyzer = analyzer_of(model, trajectory, root, method=method)
    analyzer.fit(vectors(6))
    store = Store(root)

    def valid() -> None:
        for path in (*root.glob("*/scores/**/*.json"), *root.glob("*/scores/**/*.safetensors")):
            path.unlink()
        again = analyzer_of(model, trajectory, root, method=method)
        scores = again.score(groups, vectors(6), vectors(2, seed=5))
        assert scores.values.isfinite().all() and scores.values.dtype == torch.float64

    valid()
    units = [
        name for name in store.names() if name.partition("/")[0] in ("eigenbasis", "eigenvalues", "kernel", "shares")
    ]
    for name in units:
        path, entry = store.unit_path(name), store.entry_path(name)

        def seal(path: Path, entry: Path = entry) -> None:
            entry.write_text(json.dumps(json.loads(entry.read_text()) | _sha256(path)))

        with _kept(path, entry):
            assert _attack(path, forged_tensors(path), valid, seal) > 15, name
