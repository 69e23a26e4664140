"""What every stage takes, in seconds and in plain forward+backward epochs of the same model and batch size."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from torch.nn import functional
from torch.utils.data import Subset

import segflow as sf

from ..fidelity.scoring import code_digest
from ..setting import interleaved
from .data import Data
from .detect import write
from .retrain import ONE_SIZE
from .runs import BATCH, analyzer_of, cluster, features_of, folder_of, groups_of, load_run, say
from .settings import GROUPINGS, Setting

QUERIES = 100
FEW = 512  # examples, for what curvature costs that does not grow with the data
Works = dict[str, Callable[[], object]]


def measure(setting: Setting) -> Path:
    """Time the stages on the first noisy run; what this state of the code has timed already is not timed again."""
    begun = folder_of(setting) / f"times-{code_digest()}.json"
    found: dict[str, Any] = json.loads(begun.read_text()) if begun.exists() else {}
    epoch = plain_epoch(setting)
    with tempfile.TemporaryDirectory() as scratch:
        for contexts in _stages(setting, Path(scratch)):
            missing = {key: context for key, context in contexts.items() if key not in found}
            if not missing:
                continue
            for key, figure in interleaved(epoch, missing, setting.rounds).items():
                found[key] = {"seconds": figure.seconds("wall"), "epochs": figure.ratio("wall")}
                found[key] |= {"epoch seconds": figure.epoch("wall"), "ratios": figure.ratios("wall")}
                say(f"{setting.name}, {key}: {found[key]['seconds']:.2f} s, {found[key]['epochs']:.2f} epochs")
            begun.write_text(json.dumps(found))
    content = {"batch": BATCH, "queries": QUERIES, "rounds": setting.rounds}
    content["epoch seconds"] = median(one["epoch seconds"] for one in found.values())
    return write(setting, "time", content | {"figures": found})


def plain_epoch(setting: Setting) -> Callable[[], None]:
    """One forward and backward through all parameters for each batch, without optimizer steps."""
    model, _ = load_run(setting, "noisy", 0)
    data = setting.load("noisy")

    def run() -> None:
        for inputs, labels in zip(data.inputs.split(BATCH), data.labels.split(BATCH), strict=True):
            functional.cross_entropy(model(inputs), labels, reduction="sum").backward()
            model.zero_grad()

    return run


def _stages(setting: Setting, scratch: Path) -> Iterator[Works]:
    """Works that are timed together: features, clustering for each kind, factors, scoring for each method."""
    data, kinds = setting.load("noisy"), GROUPINGS[1:]
    yield {f"features, {kind}": _features(setting, data, kind) for kind in kinds}
    for kind in kinds:
        features = features_of(setting, "noisy", 0, kind)
        yield {
            f"clustering, {kind}, {size}": lambda features=features, kind=kind, size=size: cluster(  # type: ignore[misc]
                features, kind, size, 0
            )
            for size in setting.sizes[1:]
        }
    numbers = count()
    whole = "factors, SOURCE" if setting.few is None else f"factors, SOURCE, curvature of {setting.few} examples"
    yield {
        whole: lambda: _fit(setting, data, scratch / str(next(numbers)), setting.few),
        f"factors, SOURCE, curvature of {FEW} examples": lambda: _fit(setting, data, scratch / str(next(numbers)), FEW),
    }
    _fit(setting, data, scratch / "fitted", setting.few)
    for name in ("TracIn", "SOURCE"):
        yield {
            f"scoring, {name}, {grouping}, {size}": _scoring(setting, data, scratch / "fitted", name, (grouping, size))
            for grouping in ("random", "gradient")
            for size in setting.sizes
            if grouping == "random" or size == ONE_SIZE
        }


def _features(setting: Setting, data: Data, kind: str) -> Callable[[], object]:
    analyzer = analyzer_of(setting, "noisy", 0, sf.GradientDot())
    of = "input" if kind == "raw" else kind
    return lambda: analyzer.features(data.train, of=of, batch_size=BATCH)


def _fit(setting: Setting, data: Data, store: Path, few: int | None = None) -> None:
    analyzer_of(setting, "noisy", 0, sf.Source(), store, few).fit(data.train, batch_size=BATCH)


def _scoring(setting: Setting, data: Data, store: Path, name: str, place: tuple[str, int]) -> Callable[[], object]:
    """Scoring of every example against the first queries, each a query of its own; query gradients included."""
    groups = groups_of(setting, "noisy", 0, *place)
    queries = Subset(data.query, range(min(QUERIES, len(data.query))))

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=store.parent) as scratch:
            own = Path(scratch) / "store"  # one that holds the factors, and no scores of an earlier round
            shutil.copytree(store, own, copy_function=os.link)
            analyzer = analyzer_of(setting, "noisy", 0, setting.methods()[name], own, setting.few)
            analyzer.score(groups, data.train, queries, batch_size=BATCH)

    return run
