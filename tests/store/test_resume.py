"""A run that was stopped goes on where it was and ends in the same bytes; what changed is never reused silently."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import segflow as sf
from segflow.store import files

from ..support.gang import forkserver
from ..support.helpers import (
    FixedLabels,
    Stopped,
    analyzer_of,
    mlp,
    perturbed_states,
    stopping_at,
    trajectory_of,
    vectors,
)

N, QUERIES, BATCH = 21, 3, 7
PASSES = N // BATCH  # batches in one pass over the training data
GROUPS = [[0, 3, 5], range(6, 21), [1], [2, 4]]
UNITS = [
    "covariance/step-10",
    "covariance/step-20",
    "covariance/step-30",
    "eigenbasis/steps-10-20-w515fa117",
    "eigenbasis/steps-30",
    "eigenvalues/steps-10-20-w515fa117/step-10",
    "eigenvalues/steps-10-20-w515fa117/step-20",
    "eigenvalues/steps-30/step-30",
]


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here."""
    monkeypatch.setattr(files.os, "fsync", lambda _descriptor: None)


class Drawn(sf.tasks.Classification):
    """Pseudo-labels really drawn, so that a resumed run must draw the same ones."""


def run_of(folder: Path) -> sf.Trajectory:
    return trajectory_of(folder, perturbed_states(mlp(), 3), N, lr=0.3)


class Walked(Dataset):
    """Counts the examples read after its fingerprint was taken, and fails or kills at the one it is told."""

    def __init__(self, data: TensorDataset, stop: int | None = None, how: Callable[[], None] | None = None):
        self.data, self.stop, self.how, self.reads = data, stop, how, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:  # a whole batch: how a DataLoader walks
        if len(indices) == BATCH:
            self.reads += 1
        if self.reads == self.stop and self.how is not None:
            self.how()
        return [self.data[index] for index in indices]


def stop() -> None:
    raise Stopped


def analyzer(folder: Path, store: str = "store", **options: Any) -> sf.Analyzer:
    options = {"method": sf.Source(segments=2), "task": Drawn(), **options}
    return analyzer_of(mlp(), run_of(folder / "run"), folder / store, **options)


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store's units and manifest that is not a leftover of a write that failed."""
    found = [store / "manifest.json", *(path for part in ("manifest", "units") for path in (store / part).rglob("*"))]
    files = sorted(path for path in found if path.is_file() and path.suffix != ".partial")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def fitted(folder: Path, store: str = "store", **options: Any) -> sf.Analyzer:
    found = analyzer(folder, store, **options)
    found.fit(vectors(N), batch_size=BATCH)
    return found


def scored(found: sf.Analyzer, train: Any = None, query: Any = None, groups: Any = GROUPS, **options: Any) -> sf.Scores:
    return found.score(
        sf.Groups.from_lists(groups, N),
        vectors(N) if train is None else train,
        vectors(QUERIES, seed=5) if query is None else query,
        **{"batch_size": BATCH, **options},
    )


# Stopped and gone on


def test_two_fits_and_scorings_end_in_the_same_bytes(tmp_path: Path) -> None:
    for store in ("a", "b"):
        scored(fitted(tmp_path, store), keep=["layer"])
    files = content(tmp_path / "a")
    assert files == content(tmp_path / "b")
    units = {name.removeprefix("units/").removesuffix(".safetensors") for name in files if name.startswith("units/")}
    assert units >= set(UNITS) and len([unit for unit in units if unit.startswith("scores/")]) == 3


@pytest.mark.parametrize("stopped_at", [1, PASSES, PASSES + 1, 3 * PASSES, 4 * PASSES + 2, 6 * PASSES])
def test_a_fit_stopped_while_walking_the_data_does_only_what_is_missing(tmp_path: Path, stopped_at: int) -> None:
    fitted(tmp_path, "whole")
    first = Walked(vectors(N), stopped_at, stop)
    with pytest.raises(Stopped):
        analyzer(tmp_path).fit(first, batch_size=BATCH)
    second = Walked(vectors(N))
    (again := analyzer(tmp_path)).fit(second, batch_size=BATCH)
    finished = (stopped_at - 1) // PASSES  # passes that were committed before the stop
    assert second.reads == (6 - finished) * PASSES
    units = {name: data for name, data in content(tmp_path / "store").items() if name.startswith("units/")}
    assert units == {name: data for name, data in content(tmp_path / "whole").items() if name.startswith("units/")}
    third = Walked(vectors(N))
    again.fit(third, batch_size=BATCH)
    assert third.reads == 0


def test_a_fit_stopped_at_any_sync_or_rename_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopping_at(0, monkeypatch) as calls:
        fitted(tmp_path, "whole")
    expected = content(tmp_path / "whole")
    assert len(calls) == 6 * len(UNITS) + 6  # and the lock's holder, and the store's format
    for call in range(1, len(calls) + 1, 5):  # meets each of a unit's six calls
        store = f"stopped-{call}"
        with stopping_at(call, monkeypatch), pytest.raises(Stopped):
            fitted(tmp_path, store)
        fitted(tmp_path, store)
        assert content(tmp_path / store) == expected, call
        shutil.rmtree(tmp_path / store)


def test_a_scoring_stopped_at_any_sync_or_rename_ends_in_the_same_bytes_and_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(tmp_path, "fitted")
    shutil.copytree(tmp_path / "fitted", tmp_path / "whole")
    with stopping_at(0, monkeypatch) as calls:
        whole = scored(analyzer(tmp_path, "whole"))
    assert len(calls) == 6 * 3 + 3  # three units: one for each checkpoint; and the lock's holder
    expected = content(tmp_path / "whole")
    for call in range(2, len(calls) + 1, 5):
        store = f"stopped-{call}"
        shutil.copytree(tmp_path / "fitted", tmp_path / store)
        with stopping_at(call, monkeypatch), pytest.raises(Stopped):
            scored(analyzer(tmp_path, store))
        assert torch.equal(scored(analyzer(tmp_path, store)).values, whole.values)
        assert content(tmp_path / store) == expected, call


def test_a_scoring_stopped_while_walking_the_data_does_only_what_is_missing(tmp_path: Path) -> None:
    fitted(tmp_path)

    class Read(Dataset):
        """Fails where an example has been read too often."""

        def __init__(self) -> None:
            self.data, self.reads = vectors(N), [0] * N

        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            self.reads[index] += 1
            if self.reads[1] > 3:  # that for its digest, and those of two checkpoints
                raise Stopped
            return self.data[index]

    with pytest.raises(Stopped):
        scored(analyzer(tmp_path), Read())
    left = sum(name.startswith("manifest/scores/") for name in content(tmp_path / "store"))
    assert left in (1, 2)
    for made in (3 - left, 0):
        scores = scored(again := analyzer(tmp_path))
        [row] = [row for row in again.summary().rows if (row.call, row.kind) == ("score", "groups")]
        assert (row.made, row.found) == (made, 3 - made)
    assert torch.equal(scores.values, scored(fitted(tmp_path, "other")).values)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_while_fitting(folder: Path) -> None:
    torch.set_num_threads(1)
    analyzer(folder).fit(Walked(vectors(N), 4 * PASSES + 2, _kill), batch_size=BATCH)


def _killed_while_scoring(folder: Path) -> None:
    torch.set_num_threads(1)
    real, calls = os.replace, []

    def replace(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 3:
            _kill()
        real(*paths)

    os.replace = replace  # type: ignore[assignment]
    scored(analyzer(folder))


def killed(job: Callable[[Path], None], folder: Path) -> None:
    """Run a job in a process of its own, which must end by being killed."""
    process = forkserver().Process(target=job, args=(folder,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_process_s_store_is_gone_on_with_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL in the middle of a pass while fitting, then in the middle of a commit while scoring."""
    whole = scored(fitted(tmp_path, "whole"))
    killed(_killed_while_fitting, tmp_path)
    train = Walked(vectors(N))
    (found := analyzer(tmp_path)).fit(train, batch_size=BATCH)
    assert train.reads == 2 * PASSES  # four of six passes were committed
    killed(_killed_while_scoring, tmp_path)
    assert list((tmp_path / "store").rglob("*.partial"))
    assert torch.equal(scored(found).values, whole.values)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.mark.parametrize("unit", [UNITS[3], UNITS[5]])
def test_a_damaged_unit_is_an_error_and_deleting_its_file_repairs_the_store(tmp_path: Path, unit: str) -> None:
    fitted(tmp_path)
    expected = content(tmp_path / "store")
    file = tmp_path / "store" / "units" / f"{unit}.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    with pytest.raises(sf.StoreError, match=r"damaged, .* Delete the file to have it made anew"):
        scored(analyzer(tmp_path), groups=[[index] for index in range(N)])
    file.unlink()
    fitted(tmp_path)
    assert {name: content(tmp_path / "store")[name] for name in expected} == expected


def test_a_damaged_covariance_is_an_error_where_it_is_needed_and_not_where_its_eigenbasis_is_there(
    tmp_path: Path,
) -> None:
    expected = scored(fitted(tmp_path)).values
    file, basis = (tmp_path / "store" / "units" / f"{unit}.safetensors" for unit in (UNITS[1], UNITS[3]))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert torch.equal(scored(fitted(tmp_path)).values, expected)
    basis.unlink()
    with pytest.raises(sf.StoreError, match=rf"{file.name}: damaged"):
        fitted(tmp_path)
    file.unlink()
    assert torch.equal(scored(fitted(tmp_path)).values, expected)


def test_a_damaged_score_unit_is_an_error_and_deleting_its_file_repairs_the_store(tmp_path: Path) -> None:
    expected = scored(fitted(tmp_path)).values
    for file in sorted((tmp_path / "store" / "units" / "scores").rglob("*.safetensors")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(sf.StoreError, match=rf"{file.name}: damaged"):
            scored(analyzer(tmp_path))
        file.unlink()
        assert torch.equal(scored(analyzer(tmp_path)).values, expected)


def test_scoring_before_fitting_says_so(tmp_path: Path) -> None:
    with pytest.raises(sf.StoreError, match=r"no unit 'eigenbasis/.*'\. Run Analyzer.fit\(\)"):
        scored(analyzer(tmp_path))


def test_methods_share_a_store_and_what_they_have_in_common(tmp_path: Path) -> None:
    fitted(tmp_path)
    before = content(tmp_path / "store")
    train = Walked(vectors(N))
    analyzer(tmp_path, method=sf.InfluenceFunction()).fit(train, batch_size=BATCH)
    assert train.reads == 0  # the last segment's factors are those of the last checkpoint
    assert content(tmp_path / "store") == before


# What changed is refused by name: factors


class Tempered(sf.tasks.Classification):
    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
        return super().compute_train_loss(batch, lambda x: model(x) / self.temperature, sample)


def rewritten(base: type) -> type:
    """The same class by name, with other code in its training loss."""

    def compute_train_loss(self: Any, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
        return 2 * base.compute_train_loss(self, batch, model, sample)

    return type(base.__name__, (base,), {"compute_train_loss": compute_train_loss, "__qualname__": base.__qualname__})


def other_content() -> TensorDataset:
    data = vectors(N)
    data.tensors[1][4] = (data.tensors[1][4] + 1) % 3
    return data


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "seed": ({"seed": 1}, {}, "seed: stored 0, now 1"),
    "one label of the dataset": ({}, {"train": other_content}, r"dataset: examples: stored '\w+', now '\w+'"),
    "another task": ({"task": FixedLabels()}, {}, r"task: class: stored 'Drawn', now 'FixedLabels'"),
    "a task option": ({"task": Drawn(inputs="x")}, {}, r"task: self.inputs: stored 'None', now \"'x'\""),
    "the task's code": ({"task": rewritten(Drawn)()}, {}, r"task: compute_train_loss\(\).*: stored .*, now '\w+'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_factors_made_from_something_else_are_refused_naming_both_sides(tmp_path: Path, name: str) -> None:
    options, fit, sides = REFUSED[name]
    fitted(tmp_path)
    before = content(tmp_path / "store")
    changed = analyzer(tmp_path, **options)
    train = fit.get("train", lambda: vectors(N))()
    with pytest.raises(sf.StoreError, match=rf"unit 'covariance/step-30' was made from something else \({sides}"):
        changed.fit(train, batch_size=fit.get("batch_size", BATCH))
    with pytest.raises(sf.StoreError, match=rf"unit 'eigenbasis/.*' was made from something else \({sides}"):
        scored(changed, train)
    assert content(tmp_path / "store") == before


def test_a_task_option_read_by_its_losses_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path, task=Tempered(1.0))
    with pytest.raises(sf.StoreError, match=r"task: self.temperature: stored '1.0', now '2.0'"):
        fitted(tmp_path, task=Tempered(2.0))


def test_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    fitted(tmp_path)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    trajectory = trajectory_of(tmp_path / "other", perturbed_states(model, 3), N, lr=0.3)
    other = analyzer_of(model, trajectory, tmp_path / "store", Drawn(), method=sf.Source(segments=2))
    sides = r"(?=.*model: 0: stored \[1, 6, 6\], now \[1, 7, 6\]).*checkpoint: stored"
    with pytest.raises(sf.StoreError, match=sides):
        other.fit(vectors(N), batch_size=BATCH)


def test_factors_of_another_precision_are_refused(tmp_path: Path) -> None:
    fitted(tmp_path)
    found = analyzer_of(
        mlp(torch.float32), run_of(tmp_path / "run"), tmp_path / "store", Drawn(), method=sf.Source(segments=2)
    )
    data = TensorDataset(*vectors(N, torch.float32).tensors)
    with pytest.raises(sf.StoreError, match=r"dtype: stored 'torch.float64', now 'torch.float32'"):
        found.fit(data, batch_size=BATCH)


def test_a_dataset_of_another_length_is_refused(tmp_path: Path) -> None:
    found = fitted(tmp_path)
    with pytest.raises(sf.TrajectoryError, match="the training dataset has 20 examples, but the run was recorded with"):
        found.fit(vectors(20), batch_size=BATCH)
    longer = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 3), 22, lr=0.3)
    other = analyzer_of(mlp(), longer, tmp_path / "store", Drawn(), method=sf.Source(segments=2))
    with pytest.raises(sf.StoreError, match=r"dataset: .*length: stored 21, now 22"):
        other.fit(vectors(22), batch_size=BATCH)


@pytest.mark.parametrize("same_analyzer", [True, False])
@pytest.mark.parametrize("step", [10, 30])
def test_a_checkpoint_with_other_content_is_refused(tmp_path: Path, same_analyzer: bool, step: int) -> None:
    found = fitted(tmp_path)
    index = found.context.trajectory.steps.index(step)
    path = found.context.trajectory.checkpoints[index]
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path)
    if not same_analyzer:
        trajectory = sf.Trajectory(found.context.trajectory.checkpoints, (10, 20, 30), 0.3, N)
        found = analyzer_of(mlp(), trajectory, tmp_path / "store", Drawn(), method=sf.Source(segments=2))
    with pytest.raises(sf.StoreError, match=rf"unit 'covariance/step-{step}' .*checkpoint: stored '\w+', now '\w+'"):
        found.fit(vectors(N), batch_size=BATCH)
    with pytest.raises(sf.StoreError, match=r"unit 'eigen.*checkpoints: stored \[.*\], now \["):
        scored(found)


def test_a_store_of_another_format_version_is_refused(tmp_path: Path) -> None:
    found = fitted(tmp_path)
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    for run in (lambda: found.fit(vectors(N), batch_size=BATCH), lambda: scored(found)):
        with pytest.raises(sf.StoreError, match="store format 3, this segflow reads format 2"):
            run()


def test_an_augmented_training_set_that_was_stopped_ends_in_the_same_bytes(tmp_path: Path) -> None:
    class Augmented(Dataset):
        def __init__(self, stop_at: int = 0):
            self.data, self.reads, self.stop_at = vectors(N), 0, stop_at

        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            if self.reads == self.stop_at:
                raise Stopped
            x, y = self.data[index]
            return x + 0.01 * torch.randn_like(x), y

    analyzer(tmp_path, "whole").fit(Augmented(), batch_size=BATCH)
    with pytest.raises(Stopped):
        analyzer(tmp_path).fit(Augmented(6 * N), batch_size=BATCH)
    left = content(tmp_path / "store")
    assert 0 < len(left) < len(content(tmp_path / "whole"))
    (found := analyzer(tmp_path)).fit(Augmented(), batch_size=BATCH)
    assert (
        content(tmp_path / "store") == content(tmp_path / "whole")
        and left.items() <= content(tmp_path / "store").items()
    )
    assert torch.equal(scored(found, Augmented()).values, scored(analyzer(tmp_path, "whole"), Augmented()).values)


# What changed is never reused silently: scores


QUERY_CHANGES: dict[str, dict[str, Any]] = {
    "query data": {"query": vectors(QUERIES, seed=6)},
    "queries in another order": {"query": TensorDataset(*(c.flip(0) for c in vectors(QUERIES, seed=5).tensors))},
    "fewer queries": {"query": vectors(QUERIES - 1, seed=5)},
    "groups": {"groups": [[0, 3], range(5, 21), [1], [2, 4]]},
    "groups in another order": {"groups": GROUPS[::-1]},
}


@pytest.mark.parametrize("method", [sf.Source(segments=2), sf.InfluenceFunction(damping=0.1), sf.TracIn()])
@pytest.mark.parametrize("name", QUERY_CHANGES)
def test_other_queries_or_groups_score_as_in_a_new_store(tmp_path: Path, method: Any, name: str) -> None:
    found = fitted(tmp_path, method=method)
    first = scored(found)
    after = scored(found, **QUERY_CHANGES[name])
    clean = scored(fitted(tmp_path, "clean", method=method), **QUERY_CHANGES[name])
    assert torch.equal(after.values, clean.values)
    assert after.values.shape != first.values.shape or not torch.equal(after.values, first.values)
    assert torch.equal(scored(found).values, first.values)


def test_another_measurement_scores_as_in_a_new_store(tmp_path: Path) -> None:
    found, clean = fitted(tmp_path), fitted(tmp_path, "clean")
    first = scored(found).values

    def first_logit(batch: Any, model: nn.Module) -> torch.Tensor:
        return model(batch[0])[:, 0].sum()

    for name, value in (("measurement", "margin"), ("compute_measurement", first_logit)):
        for one in (found, clean):
            setattr(one.context.task, name, value)
        changed = scored(found).values
        assert torch.equal(changed, scored(clean).values) and not torch.equal(changed, first)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (sf.Source(segments=[15]), sf.Source(segments=[18])),  # the same pools, other learning rates
        (sf.InfluenceFunction(damping=0.1), sf.InfluenceFunction(damping=0.2)),
        (sf.InfluenceFunction(), sf.Source(segments=3)),
    ],
)
def test_another_method_or_option_scores_as_in_a_new_store(tmp_path: Path, before: Any, after: Any) -> None:
    first = scored(fitted(tmp_path, method=before)).values
    changed = scored(fitted(tmp_path, method=after)).values
    assert torch.equal(changed, scored(fitted(tmp_path, "clean", method=after)).values)
    assert not torch.equal(changed, first)


def test_other_learning_rates_score_as_in_a_new_store(tmp_path: Path) -> None:
    first = scored(fitted(tmp_path)).values
    found = fitted(tmp_path)
    faster = sf.Trajectory(found.context.trajectory.checkpoints, (10, 20, 30), 0.6, N)

    def at(store: str) -> sf.Scores:
        other = analyzer_of(mlp(), faster, tmp_path / store, Drawn(), method=sf.Source(segments=2))
        other.fit(vectors(N), batch_size=BATCH)
        return scored(other)

    assert torch.equal(at("store").values, at("clean").values)
    assert not torch.equal(at("store").values, first)


@pytest.mark.parametrize("same_analyzer", [True, False])
def test_another_training_checkpoint_scores_as_in_a_new_store(tmp_path: Path, same_analyzer: bool) -> None:
    """The method needs no factors and queries another checkpoint: only the scores' own binding prevents stale ones."""
    found = fitted(tmp_path, method=sf.Hydra())
    first = scored(found).values
    path = found.context.trajectory.checkpoints[0]
    save_file({name: value * 1.5 for name, value in load_file(path).items()}, path)
    trajectory = found.context.trajectory
    if not same_analyzer:
        trajectory = sf.Trajectory(trajectory.checkpoints, (10, 20, 30), 0.3, N)
        found = analyzer_of(mlp(), trajectory, tmp_path / "store", Drawn(), method=sf.Hydra())
    clean = analyzer_of(mlp(), trajectory, tmp_path / "clean", Drawn(), method=sf.Hydra())
    changed = scored(found).values
    assert torch.equal(changed, scored(clean).values) and not torch.equal(changed, first)


TASK_CHANGES: dict[str, Callable[[], Any]] = {
    "an option": lambda: Tempered(2.0),
    "the training loss's code": lambda: rewritten(Tempered)(1.0),
}


@pytest.mark.parametrize("name", TASK_CHANGES)
def test_another_training_loss_scores_as_in_a_new_store(tmp_path: Path, name: str) -> None:
    def scores(task: Any, store: str) -> torch.Tensor:
        return scored(analyzer(tmp_path, store, task=task, method=sf.TracIn())).values

    first, changed = scores(Tempered(1.0), "store"), scores(TASK_CHANGES[name](), "store")
    assert torch.equal(changed, scores(TASK_CHANGES[name](), "clean")) and not torch.equal(changed, first)


def test_other_training_data_scores_as_in_a_new_store(tmp_path: Path) -> None:
    found = analyzer(tmp_path, method=sf.TracIn())
    first, changed = scored(found).values, scored(found, other_content()).values
    clean = scored(analyzer(tmp_path, "clean", method=sf.TracIn()), other_content()).values
    assert torch.equal(changed, clean) and not torch.equal(changed, first)


def test_scores_kept_by_layer_do_not_stand_in_for_the_sum_and_back(tmp_path: Path) -> None:
    found = fitted(tmp_path)
    whole = scored(found)
    layered = scored(found, keep=["layer"])
    assert not whole.by_layer and set(layered.by_layer) == {"0", "2", "4"}
    torch.testing.assert_close(sum(layered.by_layer.values()), whole.values, rtol=1e-12, atol=1e-15)


# The user's random state


def test_fitting_and_scoring_leave_the_random_state_as_it_was(tmp_path: Path) -> None:
    found = analyzer(tmp_path)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    found.check(vectors(N), vectors(QUERIES))
    found.fit(vectors(N), batch_size=BATCH)
    scored(found)
    assert torch.equal(torch.get_rng_state(), before)


def test_fitted_factors_do_not_depend_on_the_users_random_state(tmp_path: Path) -> None:
    for store, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        found = analyzer(tmp_path, store)
        torch.manual_seed(seed)
        found.fit(vectors(N), batch_size=BATCH)
    assert content(tmp_path / "a") == content(tmp_path / "b")


# What changed out of sight of the names, options and code


class Weighted(sf.tasks.Classification):
    """Cross-entropy with a weight for each class, in a tensor."""

    factor = 1.0

    def __init__(self, weights: list[float]):
        super().__init__()
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
        logits, labels = self._logits(batch, model)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return self.factor * (self.weights[labels] * losses).sum()


def closed_over(factor: float) -> sf.Task:
    class Scaled(sf.tasks.Classification):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
            return factor * sf.tasks.Classification.compute_train_loss(self, batch, model, sample)

    return Scaled()


def with_own(method: Callable[..., Any]) -> sf.Task:
    task = Weighted([1.0, 1.0, 1.0])
    task.compute_train_loss = lambda *args, **options: method(task, *args, **options)  # type: ignore[method-assign]
    return task


def faster() -> sf.Task:
    return type("Weighted", (Weighted,), {"factor": 3.0, "__qualname__": "Weighted"})([1.0, 1.0, 1.0])


HIDDEN_CHANGES: dict[str, Callable[[], tuple[sf.Task, sf.Task]]] = {
    "a tensor": lambda: (Weighted([1.0, 1.0, 1.0]), Weighted([1.0, 2.0, 3.0])),
    "an attribute of the class": lambda: (Weighted([1.0, 1.0, 1.0]), faster()),
    "a method of the instance": lambda: (
        Weighted([1.0, 1.0, 1.0]),
        with_own(lambda task, *args, **options: 5 * Weighted.compute_train_loss(task, *args, **options)),
    ),
    "a closure": lambda: (closed_over(1.0), closed_over(4.0)),
}


@pytest.mark.parametrize("name", HIDDEN_CHANGES)
def test_scores_of_a_training_loss_changed_out_of_sight_are_made_anew(tmp_path: Path, name: str) -> None:
    before, after = HIDDEN_CHANGES[name]()
    first = scored(analyzer(tmp_path, task=before, method=sf.TracIn()))
    again = scored(analyzer(tmp_path, task=after, method=sf.TracIn()))
    assert torch.equal(again.values, scored(analyzer(tmp_path, "fresh", task=after, method=sf.TracIn())).values)
    assert not torch.allclose(again.values, first.values)


def test_factors_made_with_another_collate_are_refused(tmp_path: Path) -> None:
    def doubled(items: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(items)
        return 2 * x, y

    fitted(tmp_path)
    with pytest.raises(sf.StoreError, match=r"dataset: examples: stored .*training losses: 34 of 34 differ"):
        fitted(tmp_path, collate_fn=doubled)


def test_queries_whose_gradients_have_equal_sums_are_told_apart(tmp_path: Path) -> None:
    model = nn.Linear(6, 2, bias=False).double()
    trajectory = trajectory_of(tmp_path / "run", [{"weight": torch.zeros(2, 6, dtype=torch.float64)}], N)
    train = TensorDataset(vectors(N, features=6).tensors[0], torch.arange(N) % 2)
    found = analyzer_of(model, trajectory, tmp_path / "store", Drawn(), method=sf.TracIn())
    one_hot = torch.eye(6, dtype=torch.float64)
    first, second = (scored(found, train, TensorDataset(one_hot[i : i + 1], torch.tensor([0]))).values for i in (0, 1))
    assert not torch.equal(first, second)


def test_a_segment_of_many_checkpoints_fits_a_file_name(tmp_path: Path) -> None:
    steps = [100_000 * place for place in range(1, 46)]
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(mlp(), 1) * len(steps), 4, steps=steps, lr=1e-6)
    analyzer_of(mlp(), trajectory, tmp_path / "store", method=sf.Source(segments=1)).fit(vectors(4))
