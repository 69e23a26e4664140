"""Scores: the labelled result.

Axis letters: Q queries, K groups, N examples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arguments import settle, shown, truth, whole_number, whole_numbers
from ..errors import ScoreError
from ..groups.groups import Groups, membership_digest
from ..groups.nesting import parents
from ..store.json_form import fitting, parse_json
from .frames import as_numpy, dataset, frame
from .score_checks import check_part, check_sum, distinct_labels, place
from .sealed import as_bytes, read_sealed, write_sealed
from .slope import CALIBRATION, HasSlope, Slope, slope_for

FORMAT = 1
GROUP_DIGEST = "group_digest"  # in the provenance: `Groups.digest` of the groups that were scored
REST = "rest"  # in `by_token`: what is of no token
_KINDS = ("by_term", "by_layer", "by_run", "by_token")
_LABELS = {
    "query_labels": [str],
    "group_labels": [str],
    "group_sizes": [range(1, 2**53)],
    "provenance": {str: object},
    **{f"{kind}?": [str] for kind in _KINDS},
}  # of a file


class Ranked(NamedTuple):
    """One group in a ranking: its place in `Scores.group_labels`, its label, and its score."""

    group: int
    label: str
    score: float


@dataclass(frozen=True)
class Scores:
    """The predicted change of each query's measurement if a group were removed from training.

    Args:
        values: [Q, K], in units of the measurement.
        query_labels, group_labels: names of the rows and the columns.
        group_sizes: the number of examples in each group.
        provenance: the method, its options and terms, and what the scores were computed from; "additive" is False where
            a group's score is not the sum of its parts' (see `segflow.methods.Method`), and "group_digest" is
            `Groups.digest` of the groups that were scored, by which they are known again.
        by_term: {term: [Q, K]}, which add up to `values`; empty unless asked for.
        by_layer: {layer: [Q, K]}, which add up to `values`; empty unless asked for.
        by_run: {run: [Q, K]} of an ensemble, whose mean is `values`; empty unless asked for.
        by_token: {"rest", "0", "1", ...: [Q, K]} of groups of one example each, which add up to `values`: what the
            example's tokens add to its score, and what is of no token; empty unless asked for. See `tokens`.
        spread: [Q, K], the standard deviation over the runs of an ensemble; None for one run.

    Raises:
        ScoreError: shapes do not fit the labels, labels are no text or come twice, numbers are not finite, parts do not
            add up, or the provenance is not what JSON can hold.
    """

    values: Tensor
    query_labels: tuple[str, ...]
    group_labels: tuple[str, ...]
    group_sizes: tuple[int, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    by_term: Mapping[str, Tensor] = field(default_factory=dict)
    by_layer: Mapping[str, Tensor] = field(default_factory=dict)
    by_run: Mapping[str, Tensor] = field(default_factory=dict)
    by_token: Mapping[str, Tensor] = field(default_factory=dict)
    spread: Tensor | None = None

    def __post_init__(self) -> None:
        labels = {name: distinct_labels(name, getattr(self, name)) for name in ("query_labels", "group_labels")}
        advice = "It counts the examples of a group."
        sizes = whole_numbers("group_sizes", self.group_sizes, ScoreError, 1, advice=advice)
        expected = (len(labels["query_labels"]), len(labels["group_labels"]))
        if len(sizes) != expected[1]:
            raise ScoreError(f"{len(sizes)} group sizes for {expected[1]} groups.")
        named = {name: part for kind in _KINDS for name, part in getattr(self, kind).items()}
        spread = {} if self.spread is None else {"spread": self.spread}
        for name, part in ({"values": self.values} | named | spread).items():
            check_part(name, part, expected)
        if self.spread is not None and (self.spread < 0).any():
            raise ScoreError("spread: holds negative numbers, expected standard deviations.")
        for kind in _KINDS:
            check_sum(kind, list(getattr(self, kind).values()), self.values)
        settle(self, **labels, group_sizes=sizes, provenance=_as_json(self.provenance))

    def _parts(self) -> dict[str, Tensor]:
        """Every tensor [Q, K], by the name that it is saved under."""
        tensors = {"values": self.values}
        for kind in _KINDS:
            tensors |= {f"{kind}.{index}": part for index, part in enumerate(getattr(self, kind).values())}
        return tensors if self.spread is None else tensors | {"spread": self.spread}

    def __repr__(self) -> str:
        queries, groups = self.values.shape
        return f"Scores({queries} queries x {groups} groups, {self.provenance.get('method', 'unknown method')})"

    def total(self) -> Scores:
        """The scores summed over the queries: one row, the change of the summed measurement.

        An ensemble's spread is that of the sums, known only where `by_run` was kept.
        """
        summed = self._mapped(lambda part: part.sum(0, keepdim=True))
        return replace(self, query_labels=("all queries",), **summed, spread=_spread(summed["by_run"]))

    def by_example(self, groups: Groups) -> Scores:
        """The scores of single examples [Q, N]: each gets its group's score divided by the group's size.

        How methods that score groups are compared on tasks about examples, such as finding wrong labels. Parts and
        spread are divided alike.

        Args:
            groups: the groups that were scored; they must cover all N examples.

        Raises:
            ScoreError: the groups are others than those of the scores, or leave examples out, or hold several examples
                each and the method's scores do not add up.

        Example:
            >>> groups = Groups.from_lists([[0, 2], [1]], length=3)
            >>> Scores(torch.tensor([[6.0, 5.0]]), ("q",), groups.labels, (2, 1)).by_example(groups).values
            tensor([[3., 5., 3.]])
        """
        self.check_groups(groups, "by_example: groups")
        if max(self.group_sizes, default=1) > 1:  # a share of what is no sum means nothing
            check_additive(self.provenance, "by_example")
        group_N = torch.from_numpy(groups.membership()).to(self.values.device)
        missed = torch.nonzero(group_N < 0).flatten().tolist()
        if missed:
            raise ScoreError(
                f"by_example: the groups leave out {len(missed)} of {groups.length} examples, the first is "
                f"{missed[0]}, which have no score. Score groups that cover all examples."
            )
        sizes_N = torch.tensor(self.group_sizes, device=group_N.device)[group_N]
        return replace(
            self,
            **self._mapped(lambda part: part[:, group_N] / sizes_N),
            group_labels=tuple(map(str, range(groups.length))),
            group_sizes=(1,) * groups.length,
            provenance={
                **self.provenance,
                "shared_out_from": f"{len(groups)} groups",
                GROUP_DIGEST: membership_digest(np.arange(groups.length)),
            },
            spread=None if self.spread is None else self.spread[:, group_N] / sizes_N,
        )

    def rolled_up(self, fine: Groups, coarse: Groups) -> Scores:
        """The scores of coarser groups: those of the finer groups within each, added up in float64.

        An ensemble's spread is that of the sums, known only where `by_run` was kept.

        Args:
            fine: the groups that were scored. coarse: groups of the same examples; each finer one lies within one.

        Raises:
            ScoreError: `fine` are not the scores' groups, or the method's scores do not add up.
            GroupError: the two are not about the same examples, or a finer group does not lie within one coarser group.

        Example:
            >>> fine, coarse = Groups.singletons(3), Groups.from_lists([[0, 2], [1]], length=3)
            >>> Scores(torch.tensor([[1.0, 5.0, 2.0]]), ("q",), fine.labels, (1, 1, 1)).rolled_up(fine, coarse).values
            tensor([[3., 5.]])
        """
        self.check_groups(fine, "rolled_up: fine")
        check_additive(self.provenance, "rolled_up")
        parent_K = torch.from_numpy(parents(fine, coarse, "rolled_up")).to(self.values.device)

        def added(part: Tensor) -> Tensor:
            sums = part.new_zeros(len(part), len(coarse), dtype=torch.float64)
            return sums.index_add_(1, parent_K, part.double()).to(part.dtype)

        mapped = self._mapped(added) | {"by_token": {}}  # one text's tokens are not another's
        return replace(
            self,
            **mapped,
            group_labels=coarse.labels,
            group_sizes=tuple(coarse.sizes.tolist()),
            provenance={
                **self.provenance,
                "rolled_up_from": f"{len(fine)} groups",
                GROUP_DIGEST: coarse.digest,
            },
            spread=_spread(mapped["by_run"]),
        )

    def calibrated(self, by: Slope | HasSlope) -> Scores:
        """All values, parts and spreads times the slope of real changes on predicted ones; the provenance tells it.

        It holds for removals of about the size that was retrained; the slope's error is not in `spread`.

        by: a `segflow.evaluation.Bank`, whose slope is fitted to these scores; or the `Slope` of others like them.

        Raises:
            ScoreError: the scores are calibrated already or do not add up, or the slope is of other scores or not
                known to be positive; and as the bank's `slope`.

        Example:
            >>> scores = Scores(torch.tensor([[1.0, 4.0]]), ("q",), ("a", "b"), (1, 1))
            >>> scores.calibrated(Slope(0.5, 0.4, 0.6, subsets=20, repetitions=1, queries=50)).values
            tensor([[0.5000, 2.0000]])
        """
        check_additive(self.provenance, "calibrated")
        slope = slope_for(self, self.provenance, by)
        return replace(
            self,
            **self._mapped(lambda part: part * slope.value),
            provenance={**self.provenance, CALIBRATION: slope.described()},
            spread=None if self.spread is None else self.spread * slope.value,
        )

    @property
    def group_digest(self) -> str | None:
        """`Groups.digest` of the groups that were scored; None where it is not known, as of scores made by hand."""
        return self.provenance.get(GROUP_DIGEST)

    def check_groups(self, groups: Groups, where: str = "groups") -> None:
        """Raise ScoreError, which says where, unless these are the groups that were scored.

        They are known by their labels, their sizes, and their members where the provenance tells them.
        """
        if (self.group_labels, self.group_sizes) != (groups.labels, tuple(groups.sizes.tolist())):
            raise ScoreError(
                f"{where}: {groups!r}, labels {list(groups.labels[:4])}..., are not the groups of these scores: "
                f"{len(self.group_labels)} groups of {sum(self.group_sizes)} examples, labels "
                f"{list(self.group_labels[:4])}... Give the groups that were scored."
            )
        if self.group_digest not in (None, groups.digest):
            raise ScoreError(
                f"{where}: {groups!r} have the labels and sizes of the groups of these scores, but hold other examples "
                "(made with another seed, or from data in another order?). Give the groups that were scored."
            )

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Values and parts after a linear change of each; not the spread."""
        parts = {kind: {name: change(part) for name, part in getattr(self, kind).items()} for kind in _KINDS}
        return {"values": change(self.values), **parts}

    def top(self, query: int | str = 0, k: int = 10, largest: bool = True) -> list[Ranked]:
        """The k groups whose removal raises the query's measurement most (lowers it most: largest=False)."""
        row = self.values[self._row(query)]
        falling = truth("largest", largest, ScoreError)
        count = whole_number("k", k, ScoreError, advice="It counts groups.")
        order = torch.argsort(row, descending=falling, stable=True)[:count].tolist()
        return [Ranked(index, self.group_labels[index], row[index].item()) for index in order]

    def tokens(self, query: int | str, group: int | str) -> Tensor:
        """[S]: what each token of a training example adds to its score, where `by_token` was asked for.

        A token's share is that of its position in every layer that sees the example's positions, so that it also holds
        what later tokens take of it. Tokens are the positions that the task's mask leaves, counted from the first of
        them; those beyond an example's own are 0. "rest" in `by_token` is what is of no position: of layers on pooled
        features, and of all layers that are run example by example, as where rows are routed or texts packed.

        Args:
            query, group: by place or by label.

        Raises:
            ScoreError: there is no such query or group, or no `by_token`.

        Example:
            >>> parts = {name: torch.tensor([[part]]) for name, part in (("rest", 0.5), ("0", 2.0), ("1", -1.0))}
            >>> Scores(torch.tensor([[1.5]]), ("q",), ("7",), (1,), by_token=parts).tokens("q", "7")
            tensor([ 2., -1.])
        """
        if not self.by_token:
            raise ScoreError('tokens: these scores keep no tokens. Score with keep=("token",).')
        row, column = self._row(query), place("group", group, self.group_labels)
        return torch.stack([part[row, column] for name, part in self.by_token.items() if name != REST])

    def _row(self, query: int | str) -> int:
        return place("query", query, self.query_labels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically."""
        tensors = self._parts()
        labels = {
            "format": FORMAT,
            "query_labels": self.query_labels,
            "group_labels": self.group_labels,
            "group_sizes": self.group_sizes,
            "provenance": self.provenance,
            **{kind: list(getattr(self, kind)) for kind in _KINDS},
        }
        write_sealed(path, tensors | {"labels": as_bytes(json.dumps(labels))}, {"segflow": "scores"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote; ScoreError if the file is not whole, not a scores file, or makes no sense."""
        tensors = read_sealed(path, {"values", "labels"}, "a scores file", "Scores.save")
        try:
            labels = parse_json(bytes(tensors["labels"].tolist()), {"format": int})
            if labels["format"] == FORMAT:
                return cls._labelled(tensors, fitting(labels, _LABELS))
        except (ValueError, TypeError, KeyError, ScoreError) as problem:
            raise ScoreError(f"{path}: its labels make no sense ({problem}). Restore it or make it anew.") from problem
        raise ScoreError(f"{path}: scores format {labels['format']!r}, this segflow reads format {FORMAT}.")

    @classmethod
    def _labelled(cls, tensors: Mapping[str, Tensor], labels: Mapping[str, Any]) -> Scores:
        parts = {}
        for kind in _KINDS:
            names = distinct_labels(kind, labels.get(kind, ()))
            parts[kind] = {name: tensors[f"{kind}.{index}"] for index, name in enumerate(names)}
        return cls(
            tensors["values"],
            tuple(labels["query_labels"]),
            tuple(labels["group_labels"]),
            tuple(labels["group_sizes"]),
            labels["provenance"],
            **parts,
            spread=tensors.get("spread"),
        )

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array [Q, K]; those in bfloat16, which NumPy lacks, in single precision."""
        return as_numpy(self.values)

    def to_pandas(self) -> Any:
        """A pandas DataFrame: one row for each query, one column for each group."""
        return frame(self.values, self.query_labels, self.group_labels)

    def to_xarray(self) -> Any:
        """An xarray Dataset: values (query, group), group_size, spread, and by_term and the like if there."""
        sizes, parts = self.group_sizes, {kind: getattr(self, kind) for kind in _KINDS}
        return dataset(self.values, self.query_labels, self.group_labels, sizes, self.spread, parts, self.provenance)


def _as_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance as `load` will read it."""
    try:
        plain: dict[str, Any] = parse_json(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as problem:
        raise ScoreError(f"provenance: expected what JSON can hold ({problem}).") from problem
    truth("provenance: additive", plain.get("additive", True), ScoreError)
    if not isinstance(plain.get(GROUP_DIGEST, ""), str):
        raise ScoreError(f"provenance: {GROUP_DIGEST}={shown(plain[GROUP_DIGEST])}: expected text, a Groups.digest.")
    return plain


def _spread(by_run: Mapping[str, Tensor]) -> Tensor | None:
    """The standard deviation over the runs, where there are some."""
    return torch.stack(list(by_run.values())).std(0) if len(by_run) > 1 else None


def check_additive(provenance: Mapping[str, Any], where: str) -> None:
    """Raise ScoreError, which says where, if these scores are of a method whose scores do not add up over groups."""
    if not provenance.get("additive", True):
        raise ScoreError(
            f"{where}: scores of {provenance.get('method')} do not add up: a group's score is not the sum of its "
            "parts'. Score the groups of each size, or single examples, themselves."
        )
