"""What the documents say of their tables in words: parts of sentences, each with what must hold in the result files.

A claim that fails after rows were made anew names the sentence to mend, in `benchmarks/*/notes.md` or in README.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.fidelity.methods import METHODS, REFERENCE
from benchmarks.fidelity.table import free, results, shown_methods, title
from benchmarks.groups.settings import GROUPINGS, SETTINGS
from benchmarks.result_files import FOLDER, read_result

ROOT = FOLDER.parents[1]
Predicate = Callable[[], bool]
BEST = next(entry.best_of for entry in METHODS if entry.best_of)
EKFAC, FAST = "influence function (EK-FAC)", "Fast-SOURCE, 1 segment"
ADAMW = [
    f"digits-adamw-{name}" for name in ("converged-clean", "early-clean", "converged-relabelled", "early-relabelled")
]
SGD = [name.replace("adamw", "sgd") for name in ADAMW]
DIGITS = [*ADAMW, *SGD]
CONVERGED = [name for name in DIGITS if "converged" in name]
EARLY = [name for name in DIGITS if "early" in name]
TWO_STAGE = [f"rotated-mnist-two-stage, {stage} data" for stage in ("pretrain", "finetune")]
HYBRIDS = [f"SOURCE, {count}, diagonal preconditioner" for count in ("1 segment", "3 segments")]
CREDIT = ("credit-lr", "credit-mlp-50-50", "credit-mlp-200-50")
DETECTION = (*CREDIT, "mnist", "cifar10", "polarity")
STUDIED = ("SOURCE", "TracIn")  # the methods by which examples are removed

# ---- what the results say ----


@cache
def blocks() -> Mapping[str, Any]:
    """{title: a block of docs/FIDELITY.md}."""
    return {title(row["row"], stage): part for row in results() for stage, part in row["parts"].items()}


@cache
def methods(block: str) -> Mapping[str, Any]:
    return {name: found for name, found in shown_methods(blocks()[block]).items() if "refused" not in found}


def lds(block: str, method: str, kind: str = "one") -> float:
    return float(methods(block)[method][kind]["mean"])


def over(block: str, method: str) -> tuple[float, float]:
    """The interval of the paired difference from SOURCE, over five runs."""
    found = methods(block)[method]["over_reference"]
    assert found["low"] is not None, f"{block}, {method}: no interval is given"
    return found["low"], found["high"]


def level(block: str, method: str) -> bool:
    low, high = over(block, method)
    return low <= 0 <= high


def behind_source(block: str, method: str, kind: str = "one") -> bool:
    return lds(block, REFERENCE, kind) > lds(block, method, kind)


def best(block: str, kind: str = "one") -> str:
    """The best of the methods that a user can choose."""
    return max((name for name in methods(block) if free(name)), key=lambda name: lds(block, name, kind))


@cache
def explored(row: str) -> Mapping[str, float]:
    found: Mapping[str, float] = read_result(FOLDER / "explored" / f"{row}.json")["variants"]
    return found


@cache
def groups(name: str) -> Any:
    return read_result(FOLDER / "groups" / f"{name}.json")


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


def _ahead_on_all_adamw_rows() -> bool:
    return all(behind_source(row, method) for row in ADAMW for method in (*HYBRIDS, BEST))


def _lissa() -> bool:
    there = [row for row in CONVERGED if "LiSSA" in methods(row)]
    return len(there) == 3 and all(lds(row, "LiSSA") > lds(row, BEST) for row in there)


def _worst_of_the_family(row: str) -> bool:
    family = [name for name in methods(row) if "SOURCE" in name and "preconditioner" not in name]
    return min(family, key=partial(lds, row)) == FAST


def _runs_help(row: str) -> bool:
    gain = {name: lds(row, name, "five") - lds(row, name) for name in (EKFAC, REFERENCE)}
    return gain[EKFAC] > gain[REFERENCE]


_ONE, _THREE = "1 segment (the default)", "3 segments"
_EXPLORED = ("digits-adamw-converged-clean", "digits-sgd-converged-clean", "digits-sgd-converged-relabelled")
_EXPLORED_EARLY = "digits-sgd-early-clean"

FIDELITY: list[tuple[str, Predicate]] = [
    (
        "is ahead of the paper's diagonal hybrid and of the best-damped influence function on all four rows for one",
        _ahead_on_all_adamw_rows,
    ),
    (
        "The hybrid is given with the number of segments that suits it better",
        lambda: (
            lds(ADAMW[0], HYBRIDS[0]) > lds(ADAMW[0], HYBRIDS[1])
            and all(lds(row, HYBRIDS[1]) > lds(row, HYBRIDS[0]) for row in ADAMW[1:])
        ),
    ),
    (
        "Averaged over five runs the hybrid is level on the converged row with clean labels",
        lambda: level(ADAMW[0], HYBRIDS[0]),
    ),
    (
        "and the best-damped influence function on both relabelled rows",
        lambda: all(level(row, BEST) for row in ADAMW if "relabelled" in row),
    ),
    (
        "ahead of the best-damped influence function with clean labels",
        lambda: all(over(row, BEST)[1] < 0 for row in ("digits-sgd-converged-clean", "fashion-mnist")),
    ),
    (
        "With wrong labels SOURCE is slightly ahead for one run",
        lambda: 0 < lds(SGD[2], REFERENCE) - lds(SGD[2], BEST) < 0.02,
    ),
    ("and behind for five", lambda: over(SGD[2], BEST)[0] > 0),
    (
        "SOURCE, TracIn, Hydra and gradient products come close to the ceiling",
        lambda: all(
            blocks()[row]["ceiling"]["mean"] - lds(row, method) < 0.1
            for row in EARLY
            for method in (REFERENCE, "TracIn", "Hydra", "gradient dot product")
        ),
    ),
    (
        "influence functions without a damping that suits, and projections, do not",
        lambda: all(
            blocks()[row]["ceiling"]["mean"] - lds(row, method) > 0.2
            for row in EARLY
            for method in (EKFAC, "TRAK", "TRAK, damped", "projected Fisher")
        ),
    ),
    ("Under AdamW SOURCE is level with TracIn", lambda: all(level(row, "TracIn") for row in EARLY if "adamw" in row)),
    ("and ahead of the best damping with clean labels", lambda: over("digits-adamw-early-clean", BEST)[1] < 0),
    (
        "Under SGD TracIn is ahead",
        lambda: all(
            lds(row, "TracIn") > lds(row, REFERENCE) and over(row, "TracIn")[0] >= 0 for row in EARLY if "sgd" in row
        ),
    ),
    (
        "SOURCE is far ahead for the first stage's data",
        lambda: all(
            over(TWO_STAGE[0], name)[1] < 0 and lds(TWO_STAGE[0], REFERENCE) > 2 * lds(TWO_STAGE[0], name)
            for name in (BEST, "TracIn")
        ),
    ),
    ("and ahead for the second's", lambda: all(over(TWO_STAGE[1], name)[1] < 0 for name in (BEST, "TracIn"))),
    (
        "**Concrete:** influence functions are ahead",
        lambda: all(lds(row, EKFAC) > lds(row, REFERENCE) for row in ("concrete", "concrete-noisy")),
    ),
    ("Over five runs they are level on the clean targets", lambda: level("concrete", EKFAC)),
    ("and ahead on the noisy ones", lambda: over("concrete-noisy", EKFAC)[0] > 0),
    (
        "better than any damping of EK-FAC on the three rows of digits that converged on which it did not diverge",
        _lissa,
    ),
    ("and the best of all on the relabelled AdamW row for five runs", lambda: best(ADAMW[2], "five") == "LiSSA"),
    (
        "clean labels five averaged runs of the best damping pass it",
        lambda: lds(ADAMW[0], BEST, "five") > lds(ADAMW[0], "LiSSA", "five"),
    ),
    (
        "damping it helps on every row",
        lambda: all(lds(row, "TRAK, damped") > lds(row, "TRAK") for row in blocks() if "TRAK" in methods(row)),
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
        "take the gradients of the whole run come back to one segment's level",
        lambda: all(
            abs(explored(row)["3 segments, each with the gradients of the whole run"] - explored(row)[_ONE]) < 0.01
            for row in _EXPLORED
        ),
    ),
    (
        "three segments with the whole run's curvature gain nothing",
        lambda: all(
            explored(row)["3 segments, each with the curvature of the whole run"] <= explored(row)[_THREE]
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
        "better on converged runs with clean labels",
        lambda: all(
            explored(row)[_ONE] > explored(row)["1 segment, checkpoints weigh the same"] for row in _EXPLORED[:2]
        ),
    ),
    (
        "no better elsewhere",
        lambda: all(
            explored(row)[_ONE] <= explored(row)["1 segment, checkpoints weigh the same"]
            for row in (_EXPLORED[2], _EXPLORED_EARLY)
        ),
    ),
    (
        "**lr_steps times 4** gains on converged runs",
        lambda: all(explored(row)["lr_steps times 4"] > explored(row)[_ONE] for row in _EXPLORED),
    ),
    (
        "and loses on an early-stopped one",
        lambda: explored(_EXPLORED_EARLY)["lr_steps times 4"] < explored(_EXPLORED_EARLY)[_ONE],
    ),
    (
        "is no clear gain",
        lambda: (
            any(explored(row)["each checkpoint's own P"] < explored(row)[_ONE] for row in ADAMW)
            and all(explored(row)["each checkpoint's own P"] - explored(row)[_ONE] < 0.03 for row in ADAMW)
        ),
    ),
    (
        "the best of all on digits that converged with clean labels",
        lambda: all(best(row) == FAST for row in CONVERGED if "clean" in row),
    ),
    (
        "and the worst of the SOURCE family (with the Kronecker preconditioner) on relabelled ones",
        lambda: all(_worst_of_the_family(row) for row in CONVERGED if "relabelled" in row),
    ),
    ("helps influence functions more than SOURCE** on the digits", lambda: all(_runs_help(row) for row in DIGITS)),
    ("five influence functions are ahead of five SOURCEs", lambda: over(SGD[2], EKFAC)[0] > 0),
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
        "the intervals of SOURCE and of the influence function overlap",
        lambda: (
            _demo("Source")["low"] <= _demo("InfluenceFunction")["high"]
            and _demo("InfluenceFunction")["low"] <= _demo("Source")["high"]
        ),
    ),
    (
        "both are far ahead of TracIn",
        lambda: min(_demo(name)["low"] for name in ("Source", "InfluenceFunction")) > _demo("TracIn")["high"] + 0.05,
    ),
    (
        "The influence function finds the most wrong labels",
        lambda: max(demo()["methods"], key=lambda name: _demo(name)["found"]) == "InfluenceFunction",
    ),
    ("15% wrong labels", lambda: demo()["wrong share"] == 0.15),
    ("(40 random halves, 5 retrainings each", lambda: (demo()["halves"], demo()["retrainings"]) == (40, 5)),
    ("a minute or two on two cores", lambda: demo()["seconds"] < 120),
    ("tasks and times on six problems", lambda: len([s for s in SETTINGS if groups(f"{s}-detect")]) == 6),
    ("agreement with retraining on 13 problems", lambda: len(results()) == 13),
]

DOCUMENTS: dict[Path, list[tuple[str, Predicate]]] = {
    ROOT / "docs" / "FIDELITY.md": FIDELITY,
    ROOT / "docs" / "GROUPS.md": GROUPS,
    ROOT / "README.md": README,
}
