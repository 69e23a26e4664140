"""What the documents say of their tables in words: parts of sentences, each with what must hold in the result files.

A claim that fails after rows were made anew names the sentence to mend, in `benchmarks/*/notes.md` or in README.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.fidelity.blocks import Block, results, shown_methods
from benchmarks.fidelity.blocks import blocks as fidelity_blocks
from benchmarks.fidelity.methods import BEST, EARLIER, EKFAC, EXACT, REFERENCE, TRACIN
from benchmarks.groups.settings import GROUPINGS, SETTINGS
from benchmarks.result_files import FOLDER, read_result

ROOT = FOLDER.parents[1]
Predicate = Callable[[], bool]
ADAMW = [
    f"digits-adamw-{name}" for name in ("converged-clean", "early-clean", "converged-relabelled", "early-relabelled")
]
SGD = [name.replace("adamw", "sgd") for name in ADAMW]
DIGITS = [*ADAMW, *SGD]
CONVERGED = [name for name in DIGITS if "converged" in name]
EARLY = [name for name in DIGITS if "early" in name]
CREDIT = ("credit-lr", "credit-mlp-50-50", "credit-mlp-200-50")
DETECTION = (*CREDIT, "mnist", "cifar10", "polarity")
STUDIED = ("SOURCE", "TracIn")  # the methods by which examples are removed

# ---- what the results say ----


@cache
def blocks() -> Mapping[str, Block]:
    """{title: a block of docs/FIDELITY.md}."""
    return {block.title: block for block in fidelity_blocks()}


def lds(block: str, method: str, kind: str = "one") -> float:
    """Of one run, or of "all"; SOURCE's is that of its default when the row was made."""
    return float(blocks()[block].method(method)[kind]["mean"])


@cache
def explored(row: str) -> Mapping[str, float]:
    found: Mapping[str, float] = read_result(FOLDER / "explored" / f"{row}.json")["variants"]
    return found


@cache
def groups(name: str) -> Any:
    return read_result(FOLDER / "groups" / f"{name}.json")


@cache
def classes() -> Any:
    return read_result(FOLDER / "fidelity-classes.json")["slopes"]


def found(setting: str, method: str, grouping: str, size: int) -> float:
    """The area under the curve of wrong labels found."""
    return float(groups(f"{setting}-detect")["figures"][method][grouping][str(size)]["mean"])


def detectors(setting: str) -> list[str]:
    return [name for name, by in groups(f"{setting}-detect")["figures"].items() if "refused" not in by]


def after(step: str, series: str, share: str) -> Mapping[str, float]:
    """A number after retraining, with its interval."""
    estimate: Mapping[str, float] = groups(step)["figures"][series][share]
    return estimate


def mean(step: str, series: str, share: str) -> float:
    return after(step, series, share)["mean"]


def overlap(step: str, first: str, second: str, share: str) -> bool:
    a, b = after(step, first, share), after(step, second, share)
    return a["low"] <= b["high"] and b["low"] <= a["high"]


def of_64(step: str, method: str) -> list[str]:
    return [name for name in groups(step)["figures"] if name.startswith(f"{method}, ") and name.endswith(", 64")]


@cache
def demo() -> Any:
    return json.loads((ROOT / "docs" / "demo.json").read_text())


# ---- docs/FIDELITY.md ----


def _lissa() -> bool:
    there = [row for row in CONVERGED if "LiSSA" in blocks()[row].methods]
    return len(there) == 3 and all(lds(row, "LiSSA") > lds(row, BEST) - 0.005 for row in there)


def _runs_help(row: str) -> bool:
    gain = {name: lds(row, name, "all") - lds(row, name) for name in (EKFAC, REFERENCE)}
    return gain[EKFAC] > gain[REFERENCE]


_ONE, _THREE = "1 segment (the default)", "3 segments"
_EXPLORED = ("digits-adamw-converged-clean", "digits-sgd-converged-clean", "digits-sgd-converged-relabelled")
_EXPLORED_EARLY = "digits-sgd-early-clean"
_ALONG = "queries along the run"
_OTHERS = (
    ("influence function (EK-FAC)", "influence function", (_ALONG, "layers coupled")),
    ("projected Fisher", "projected Fisher", (_ALONG,)),
    ("TRAK, damped", "TRAK, damped", (_ALONG,)),
)

FIDELITY: list[tuple[str, Predicate]] = [
    (
        "TracIn, Hydra and gradient products come close to the ceiling",
        lambda: all(
            blocks()[row].part["ceiling"]["mean"] - lds(row, method) < 0.1
            for row in EARLY
            for method in (TRACIN, "Hydra", "gradient dot product")
        ),
    ),
    (
        "influence functions without a damping that suits, and projections, do not",
        lambda: all(
            blocks()[row].part["ceiling"]["mean"] - lds(row, method) > 0.2
            for row in EARLY
            for method in (EKFAC, "TRAK", "TRAK, damped", "projected Fisher")
        ),
    ),
    (
        "level with the best damping of EK-FAC, or above it, on the three rows of digits that converged where",
        _lissa,
    ),
    (
        "damping it helps on every row",
        lambda: all(lds(row, "TRAK, damped") > lds(row, "TRAK") for row in blocks() if "TRAK" in blocks()[row].methods),
    ),
    (
        "its sign is the opposite of a predicted change on all rows of digits",
        lambda: all(lds(row, "representation similarity") < 0 for row in DIGITS),
    ),
    (
        "Why one segment does better than three on converged runs",
        lambda: all(explored(row)[_ONE] > explored(row)[_THREE] for row in _EXPLORED),
    ),
    (
        "take the gradients of the whole run come close to one segment's level",
        lambda: all(
            0 < explored(row)[_ONE] - explored(row)["3 segments, each with the gradients of the whole run"] < 0.02
            for row in _EXPLORED[:2]
        ),
    ),
    (
        "three segments with the whole run's curvature gain next to nothing",
        lambda: all(
            explored(row)["3 segments, each with the curvature of the whole run"] <= explored(row)[_THREE] + 0.005
            for row in (*_EXPLORED, _EXPLORED_EARLY)
        ),
    ),
    (
        "the last checkpoint's gradients alone are far behind",
        lambda: all(
            explored(row)[_ONE] - explored(row)["1 segment, last checkpoint's gradients"] > 0.05 for row in _EXPLORED
        ),
    ),
    (
        "on converged runs with clean labels), or a little better",
        lambda: all(
            explored(row)[_ONE] > explored(row)["1 segment, checkpoints weigh the same"]
            for row in (*_EXPLORED, _EXPLORED_EARLY)
        ),
    ),
    (
        "**lr_steps times 4** gains little on converged runs",
        lambda: all(-0.002 < explored(row)["lr_steps times 4"] - explored(row)[_ONE] < 0.02 for row in _EXPLORED),
    ),
    (
        "Of one run the rule that costs nothing has nearly all of it",
        lambda: all(lds(row, EXACT) - lds(row, REFERENCE) < 0.02 for row in (SGD[0], ADAMW[0])),
    ),
    (
        "So batch normalisation makes predictions more than twice too large",
        lambda: all(
            classes()["plain"][name]["random tenths"]["value"]
            > 1.4 * classes()["batch normalisation"][name]["random tenths"]["value"]
            and classes()["batch normalisation"][name]["random tenths"]["value"] < 0.5
            for name in (REFERENCE, EARLIER)
        ),
    ),
    (
        "gain little or nothing from SOURCE's two parts",
        lambda: all(
            explored(row)[f"{name}, {part}"] - explored(row)[base] < 0.02
            for row in _EXPLORED
            for base, name, parts in _OTHERS
            for part in parts
        ),
    ),
    (
        "and loses on an early-stopped one",
        lambda: explored(_EXPLORED_EARLY)["lr_steps times 4"] < explored(_EXPLORED_EARLY)[_ONE],
    ),
    (
        "is no clear gain",
        lambda: (
            any(explored(row)["each checkpoint's own P"] < explored(row)[_ONE] for row in ADAMW[:2])
            and all(explored(row)["each checkpoint's own P"] - explored(row)[_ONE] < 0.03 for row in ADAMW[:2])
        ),
    ),
    ("helps influence functions more than SOURCE** on the digits", lambda: all(_runs_help(row) for row in DIGITS)),
]

# ---- docs/GROUPS.md ----


def _gradient_groups_find_most(setting: str, slack: float = 0.0) -> bool:
    return all(
        found(setting, name, "gradient", 64) >= found(setting, name, grouping, 64) - slack
        for name in detectors(setting)
        for grouping in GROUPINGS
    )


def _worse_than_random(setting: str, method: str, title: str) -> bool:
    return mean(f"{setting}-pruning", f"{method}, {title}", "25%") > mean(f"{setting}-pruning", "random", "25%")


def _no_groups_of_64_come_near(setting: str) -> bool:
    step, single = f"{setting}-removal", "SOURCE, single examples"
    return all(
        not overlap(step, name, single, "20%") and mean(step, name, "20%") < mean(step, single, "20%")
        for name in of_64(step, "SOURCE")
    )


def _overlap_everywhere(setting: str) -> bool:
    step = f"{setting}-removal"
    return all(
        overlap(step, f"{method}, gradient k-means, 64", f"{method}, single examples", share)
        for method in STUDIED
        for share in groups(step)["figures"]["random"]
    )


def _mnist_best_of_three_quarters(method: str) -> str:
    series = [name for name in groups("mnist-pruning")["figures"] if name.startswith(method)]
    return min(series, key=lambda name: mean("mnist-pruning", name, "75%"))


GROUPS: list[tuple[str, Predicate]] = [
    (
        "Wrong labels are found by groups, if the groups are made of gradients",
        lambda: all(
            found(setting, name, "gradient", 64) > found(setting, name, grouping, 64)
            for setting in DETECTION
            for name in detectors(setting)
            for grouping in ("random", "raw", "representation")
        ),
    ),
    (
        "find more than single examples do with SOURCE, the influence function and the projections",
        lambda: all(
            found(setting, name, "gradient", 64) > found(setting, name, "gradient", 1)
            for setting in CREDIT
            for name in ("SOURCE", "influence function", "TRAK", "projected Fisher", "batched Fisher")
        ),
    ),
    (
        "TracIn's find more on logistic regression",
        lambda: found("credit-lr", "TracIn", "gradient", 64) > found("credit-lr", "TracIn", "gradient", 1),
    ),
    (
        "and less on the MLPs",
        lambda: all(
            found(setting, "TracIn", "gradient", 64) < found(setting, "TracIn", "gradient", 1) for setting in CREDIT[1:]
        ),
    ),
    (
        "With single examples SOURCE is behind TracIn on every data set but one: on logistic regression it is ahead",
        lambda: (
            [s for s in DETECTION if found(s, "SOURCE", "random", 1) >= found(s, "TracIn", "random", 1)]
            == ["credit-lr"]
        ),
    ),
    (
        "one example at a time makes the loss of the queries worse than removing a quarter at random does",
        lambda: all(_worse_than_random(s, method, "single examples") for s in CREDIT for method in STUDIED),
    ),
    (
        "though not SOURCE's accuracy, suffers",
        lambda: all(
            mean(f"{s}-pruning-accuracy", "SOURCE, single examples", "25%")
            > groups(f"{s}-pruning-accuracy")["references"]["nothing removed"]["mean"]
            for s in CREDIT
        ),
    ),
    (
        "Random groups of 64 average that out",
        lambda: not any(_worse_than_random(s, method, "random, 64") for s in CREDIT for method in STUDIED),
    ),
    (
        "and so do groups by k-means on inputs and representations",
        lambda: (
            not any(
                _worse_than_random(s, method, f"{kind} k-means, 64")
                for s in CREDIT
                for method in STUDIED
                for kind in ("raw", "representation")
            )
        ),
    ),
    (
        "Gradient groups of 64 keep hard examples together and do not",
        lambda: all(_worse_than_random(s, method, "gradient k-means, 64") for s in CREDIT for method in STUDIED),
    ),
    (
        "single examples and gradient groups are better than random removal when a quarter is removed",
        lambda: (
            not any(
                _worse_than_random("mnist", method, name)
                for method in STUDIED
                for name in ("single examples", "gradient k-means, 64")
            )
        ),
    ),
    (
        "and level with one another when a quarter or half is",
        lambda: all(
            overlap("mnist-pruning", f"{method}, gradient k-means, 64", f"{method}, single examples", share)
            for method in STUDIED
            for share in ("25%", "50%")
        ),
    ),
    (
        "and small random groups are best",
        lambda: all(
            _mnist_best_of_three_quarters(method) in (f"{method}, random, 4", f"{method}, random, 16")
            for method in STUDIED
        ),
    ),
    (
        "(wide) intervals of gradient groups of 64 overlap with those of single examples",
        lambda: all(map(_overlap_everywhere, CREDIT[1:])),
    ),
    (
        "and on MNIST SOURCE's do not when a fifth is removed, nor do those of any other groups of 64",
        lambda: all(map(_no_groups_of_64_come_near, ("credit-lr", "mnist"))),
    ),
    (
        "Groups of 4 by gradient come near single examples on MNIST",
        lambda: overlap("mnist-removal", "SOURCE, gradient k-means, 4", "SOURCE, single examples", "20%"),
    ),
    (
        "but not on logistic regression",
        lambda: not overlap("credit-lr-removal", "SOURCE, gradient k-means, 4", "SOURCE, single examples", "20%"),
    ),
    (
        "group best for finding labels on MNIST, logistic regression and text",
        lambda: all(map(_gradient_groups_find_most, ("mnist", "credit-lr", "polarity"))),
    ),
    (
        "are level with gradients of the last layer's weights or better elsewhere",
        lambda: all(_gradient_groups_find_most(s, 0.01) for s in ("credit-mlp-50-50", "credit-mlp-200-50", "cifar10")),
    ),
    (
        "gradients of the layer's own weights keep more of what single examples tell",
        lambda: all(
            mean("credit-lr-removal", f"{method}, weight gradient k-means, 64", "20%")
            > mean("credit-lr-removal", f"{method}, gradient k-means, 64", "20%")
            for method in STUDIED
        ),
    ),
    (
        "For MNIST's retraining score representations do best among groups of 64 when a fifth is removed",
        lambda: all(
            max(of_64("mnist-removal", method), key=lambda name: mean("mnist-removal", name, "20%"))
            == f"{method}, representation k-means, 64"
            for method in STUDIED
        ),
    ),
    (
        "it finds more wrong labels than the exact one",
        lambda: all(
            found("mnist", "batched Fisher", "gradient", size) > found("mnist", "projected Fisher", "gradient", size)
            for size in (1, 64)
        ),
    ),
    (
        "CIFAR-10 and review polarity are scored with curvature of 1,024 examples",
        lambda: {name for name, setting in SETTINGS.items() if setting.few == 1024} == {"cifar10", "polarity"},
    ),
    (
        "so features cost less than an epoch of MNIST's MLP",
        lambda: groups("mnist-time")["figures"]["features, gradient"]["epochs"] < 1,
    ),
    (
        "three training runs (two of the ResNet and of the encoder)",
        lambda: (
            {s: len(groups(f"{s}-detect")["accuracy"]) for s in DETECTION}
            == dict.fromkeys(DETECTION, 3) | {"cifar10": 2, "polarity": 2}
        ),
    ),
]

# ---- README.md ----


def _demo(method: str) -> Any:
    return demo()["methods"][method]


README: list[tuple[str, Predicate]] = [
    (
        "SOURCE's interval lies just above that of the influence function",
        lambda: 0 < _demo("Source")["low"] - _demo("InfluenceFunction")["high"] < 0.02,
    ),
    (
        "both are far ahead of TracIn",
        lambda: min(_demo(name)["low"] for name in ("Source", "InfluenceFunction")) > _demo("TracIn")["high"] + 0.05,
    ),
    (
        "SOURCE finds the most wrong labels",
        lambda: max(demo()["methods"], key=lambda name: _demo(name)["found"]) == "Source",
    ),
    (
        "within a factor of three of SOURCE's predictions, in either direction, on all ten",
        lambda: all(
            1 / 3 < blocks()[row].method(REFERENCE)["slopes"][share]["one"]["mean"] < 3
            for row in (*DIGITS, "fashion-mnist", "fashion-mnist-adamw")
            for share in ("halves", "tenth")
        ),
    ),
    ("15% wrong labels", lambda: demo()["wrong share"] == 0.15),
    ("(40 random halves, 5 retrainings each", lambda: (demo()["halves"], demo()["retrainings"]) == (40, 5)),
    ("a minute or two on two cores", lambda: demo()["seconds"] < 120),
    ("tasks and times on six problems", lambda: len([s for s in SETTINGS if groups(f"{s}-detect")]) == 6),
    ("agreement with retraining on 14 problems", lambda: len(results()) == 14),
]


@cache
def _everything() -> Any:
    return json.loads((ROOT / "benchmarks" / "every_parameter.json").read_text())


def _wide_head(method: str, head: str, part: str = "all") -> float:
    rows = _everything()["wide heads"]
    return next(float(r[f"correlation, {part}"]) for r in rows if (r["method"], r["head"]) == (method, head))


LAYERS: list[tuple[str, Predicate]] = [
    ("at .996 (SOURCE, untied head)", lambda: round(_wide_head("Source", "untied"), 3) == 0.996),
    ("and .9995 (tied)", lambda: round(_wide_head("Source", "tied"), 4) == 0.9995),
    (
        "those of the head alone at .94 and .999",
        lambda: [round(_wide_head("Source", h, "head"), d) for h, d in (("untied", 2), ("tied", 3))] == [0.94, 0.999],
    ),
    (
        "influence functions at .990 and .998",
        lambda: [round(_wide_head("InfluenceFunction", head), 3) for head in ("untied", "tied")] == [0.99, 0.998],
    ),
    (
        "6% (untied head) or 9% (tied head) more",
        lambda: [round(100 * _everything()["cost"][k]) for k in ("added", "added, tied head")] == [6, 9],
    ),
]

# ---- docs/REAL_MODELS.md: MiniLM ----


@cache
def minilm() -> Any:
    return read_result(FOLDER / "minilm.json")


@cache
def minilm_example() -> Any:
    return json.loads((ROOT / "docs" / "trainer_minilm.json").read_text())


def _times_chance(method: str) -> float:
    found = minilm_example()
    return float(found["methods"][method]["found"] / (found["wrong"] ** 2 / found["train"]))


def _fresh_shares(place: int, kind: str) -> list[int]:
    return [
        int(film.rsplit("; ", 1)[1].split("%")[0]) for film in minilm_example()["explained"][place][f"{kind} by films"]
    ]


def _own_film_helps(place: int) -> bool:
    one = minilm_example()["explained"][place]
    return any(film.startswith(one["text"].rsplit("(*", 1)[1].split("*")[0]) for film in one["helped by films"])


def _over_source(method: str) -> Mapping[str, float]:
    difference: Mapping[str, float] = shown_methods(minilm())[method]["over_one"]
    return difference


MINILM: list[tuple[str, Predicate]] = [
    (
        "helped by the films with few fresh snippets and harmed by those with many",
        lambda: all(max(_fresh_shares(place, "helped")) + 40 < min(_fresh_shares(place, "harmed")) for place in (0, 1)),
    ),
    (
        "Only for the second is its own film among the first three",
        lambda: [*map(_own_film_helps, (0, 1))] == [False, True],
    ),
    (
        "SOURCE and TracIn find about four times as many flipped labels as chance",
        lambda: all(3.5 < _times_chance(method) < 4.5 for method in ("Source", "TracIn")),
    ),
    ("(one run, 93 flipped labels)", lambda: minilm_example()["wrong"] == 93),
    ("66 for training", lambda: round(minilm_example()["CPU seconds of training"]) == 66),
    ("which gets 76% of the queries right", lambda: round(100 * minilm()["accuracy"]) == 76),
    ("scores are of one recorded run", lambda: minilm()["runs"] == 1),
    ("40 random halves, each retrained twice", lambda: (minilm()["halves"], minilm()["repetitions"]) == (40, 2)),
    ("on 1,024 snippets with their true labels", lambda: minilm()["train"] == 1024),
    (
        "(weight decay .01, peak rate 2e-4, linear warm-up and decay, 3 epochs, batches of 32 of like length",
        lambda: (
            {k: v for k, v in minilm()["recipe"].items() if k != "warm-up"}
            == {"rate": 2e-4, "weight decay": 0.01, "batch": 32, "epochs": 3}
        ),
    ),
    (
        "SOURCE is ahead of the influence function at its default damping, of TracIn and of the gradient dot product",
        lambda: all(_over_source(method)["high"] < 0 for method in (EKFAC, TRACIN, "gradient dot product")),
    ),
    (
        "level with the influence function at the best of 7 dampings",
        lambda: (
            _over_source(BEST)["low"] < 0 < _over_source(BEST)["high"]
            and sum(figures.get("best_of") == BEST for figures in minilm()["methods"].values()) == 7
        ),
    ),
    (
        "All are far below the ceiling",
        lambda: all(f["one"]["mean"] < minilm()["ceiling"]["mean"] - 0.2 for f in minilm()["methods"].values()),
    ),
]

DOCUMENTS: dict[Path, list[tuple[str, Predicate]]] = {
    ROOT / "docs" / "FIDELITY.md": FIDELITY,
    ROOT / "docs" / "GROUPS.md": GROUPS,
    ROOT / "docs" / "LAYERS.md": LAYERS,
    ROOT / "docs" / "REAL_MODELS.md": MINILM,
    ROOT / "README.md": README,
}
