"""Recorded training runs, groupings of their examples, and scores of single examples: made once, kept in the cache."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import segflow as sf

from ..downloads import CACHE
from ..fidelity.scoring import clear_stale, code_digest, trajectory_digest
from .settings import Setting

CHECKPOINTS = 6
BATCH = 256  # examples in a batch of every pass that is no training
_BEGAN = time.perf_counter()


def say(text: str) -> None:
    """Print progress, with the seconds since the command began."""
    print(f"[{time.perf_counter() - _BEGAN:7.1f} s] {text}", flush=True)


def one_thread() -> None:
    """Keep torch, BLAS and scikit-learn to one thread each, so that two commands can run side by side."""
    import sklearn.cluster  # noqa: F401 - its libraries must be there to be limited
    import threadpoolctl  # type: ignore[import-untyped]

    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(limits=1)


def folder_of(setting: Setting) -> Path:
    """Where the setting's runs, groupings, scores and retrainings are."""
    return CACHE / "groups" / setting.name


def run_folder(setting: Setting, variant: str, seed: int) -> Path:
    """Where a training run is recorded."""
    return folder_of(setting) / "runs" / f"{variant}-{seed}"


def record_run(setting: Setting, variant: str, seed: int) -> None:
    """Train once under `sf.record`; nothing if that is done, by the same recipe on as many examples."""
    folder = run_folder(setting, variant, seed)
    data, recipe, done = setting.load(variant), setting.recipe, folder / "done"
    note = f"{setting.model}, {recipe}, {len(data.inputs)} examples, {CHECKPOINTS} checkpoints\n"
    if done.exists() and done.read_text() == note:
        return
    done.unlink(missing_ok=True)
    _forget(setting, f"{variant}-{seed}")
    began = time.perf_counter()
    torch.manual_seed(seed)
    model, generator = setting.build(), torch.Generator().manual_seed(seed)
    optimizer = recipe.make(model.parameters())
    count = len(data.inputs)
    steps = recipe.epochs * -(-count // recipe.batch_size)
    with sf.record(
        model, optimizer, folder, dataset_size=count, total_steps=steps, checkpoints=min(CHECKPOINTS, steps),
        overwrite=True,
    ):  # fmt: skip
        for _ in range(recipe.epochs):
            for batch in torch.randperm(count, generator=generator).split(recipe.batch_size):
                optimizer.zero_grad()
                functional.cross_entropy(model(data.inputs[batch]), data.labels[batch]).backward()
                optimizer.step()
    done.write_text(note)
    seconds, right = time.perf_counter() - began, accuracy(setting, variant, seed)
    say(f"{setting.name}, {variant}, run {seed}: trained in {seconds:.1f} s, accuracy on the queries {right:.3f}")


def _forget(setting: Setting, run: str) -> None:
    """Remove what an earlier run of that name left: its groupings and factors (scores know their run)."""
    shutil.rmtree(folder_of(setting) / "stores" / run, ignore_errors=True)
    for path in (folder_of(setting) / "groupings").glob(f"{run}-*.npy"):
        path.unlink()


def load_run(setting: Setting, variant: str, seed: int) -> tuple[nn.Module, sf.Trajectory]:
    """A model of the setting's shape and a run's trajectory, recorded now if need be."""
    record_run(setting, variant, seed)
    torch.manual_seed(seed)
    return setting.build(), sf.Trajectory.load(run_folder(setting, variant, seed))


def accuracy(setting: Setting, variant: str, seed: int) -> float:
    """The share of the queries that a trained model gets right."""
    model, trajectory = load_run(setting, variant, seed)
    trajectory.load_into(model, len(trajectory) - 1)
    data = setting.load(variant)
    with torch.no_grad():
        predicted = model.eval()(data.query_inputs).argmax(1)
    return (predicted == data.query_labels).double().mean().item()


def analyzer_of(
    setting: Setting, variant: str, seed: int, method: Any, store: Path | None = None, few: int | None = None
) -> sf.Analyzer:
    """An analyzer of a run; its store is the run's own if none is given; few: examples that curvature is fitted to."""
    model, trajectory = load_run(setting, variant, seed)
    own = folder_of(setting) / "stores" / f"{variant}-{seed}" if store is None else store
    return sf.Analyzer(
        model, setting.task(), trajectory, store=own, method=method, progress=False, curvature_examples=few
    )


def features_of(setting: Setting, variant: str, seed: int, kind: str) -> np.ndarray:
    """[N, D]: the features that k-means is given, of a run."""
    data = setting.load(variant)
    if kind == "raw":
        found: np.ndarray = data.features.numpy()
        return found
    analyzer = analyzer_of(setting, variant, seed, sf.GradientDot())
    return analyzer.features(data.train, of=kind, batch_size=BATCH)


def cluster(features: np.ndarray, kind: str, size: int, seed: int) -> sf.Groups:
    """K-means; raw features stay as they are, since whitening hundreds of pixels leaves only noise."""
    return sf.Groups.kmeans(features, size=size, whiten="none" if kind == "raw" else "full", seed=seed)


def groups_of(setting: Setting, variant: str, seed: int, grouping: str, size: int) -> sf.Groups:
    """A grouping of a run's training examples; from the cache if it is there."""
    count = len(setting.load(variant).inputs)
    if size == 1:
        return sf.Groups.singletons(count)
    if grouping == "random":
        return sf.Groups.random(count, size, seed)
    path = folder_of(setting) / "groupings" / f"{variant}-{seed}-{grouping}-{size}.npy"
    if not path.exists():
        began = time.perf_counter()
        groups = cluster(features_of(setting, variant, seed, grouping), grouping, size, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, groups.membership())
        say(f"{path.stem}: {groups} in {time.perf_counter() - began:.1f} s")
    return sf.Groups.by(np.load(path))


def singles_of(setting: Setting, variant: str, seed: int, name: str, reuse: bool = False) -> sf.Scores:
    """A method's scores of single examples for the mean loss of all queries, [1, N]; from the cache if they are there.

    reuse: take scores and factors that another state of segflow's code made.
    """
    path = folder_of(setting) / "scores" / f"{variant}-{seed}-{name.replace(' ', '-')}.safetensors"
    record_run(setting, variant, seed)
    made_from = {"run": trajectory_digest(run_folder(setting, variant, seed)), "code": code_digest()}
    if path.exists():
        scores = sf.Scores.load(path)
        found: Any = scores.provenance["made_from"]
        if found["run"] == made_from["run"] and (reuse or found == made_from):
            return scores
    began = time.perf_counter()
    if not reuse:
        clear_stale(folder_of(setting) / "stores" / f"{variant}-{seed}", made_from)
    data = setting.load(variant)
    analyzer = analyzer_of(setting, variant, seed, setting.methods()[name], few=setting.few)
    analyzer.fit(data.train, batch_size=BATCH)
    query = sf.properties.MeanMeasurement(data.query, setting.task())
    scores = analyzer.score(sf.Groups.singletons(len(data.inputs)), data.train, query, batch_size=BATCH)
    scores = replace(scores, provenance=dict(scores.provenance) | {"made_from": made_from})
    scores.save(path)
    say(f"{setting.name}, {path.stem}: scored in {time.perf_counter() - began:.1f} s")
    return scores


def shared_out(singles: sf.Scores, groups: sf.Groups) -> sf.Scores:
    """What single examples get from the scores of their groups, which are the sums of the singles' own.

    Example:
        >>> import torch
        >>> singles = sf.Scores(torch.tensor([[1.0, 3.0, 5.0]]), ("q",), ("0", "1", "2"), (1, 1, 1))
        >>> shared_out(singles, sf.Groups.from_lists([[0, 1], [2]], 3)).values
        tensor([[2., 2., 5.]])
    """
    summed = torch.stack([singles.values[:, torch.from_numpy(members)].sum(1) for members in groups.members], 1)
    of_groups = sf.Scores(summed, singles.query_labels, groups.labels, tuple(groups.sizes), singles.provenance)
    return of_groups.by_example(groups)
