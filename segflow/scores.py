"""Scores: the labelled result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import digest
from .errors import ScoreError
from .files import read_tensors, write_tensors

FORMAT = 1
_KINDS = ("by_term", "by_layer", "by_run")


class Ranked(NamedTuple):
    """One group in a ranking: its place in `Scores.group_labels`, its label, and its score."""

    group: int
    label: str
    score: float


@dataclass(frozen=True)
class Scores:
    """The predicted change of each query's measurement if a group were removed from training.

    values: [Q, K], in units of the measurement.
    query_labels, group_labels: names of the rows and the columns; group_sizes: examples in each group.
    provenance: the method, its options and terms, and what the scores were computed from.
    by_term: {term: [Q, K]} and by_layer: {layer: [Q, K]}, each adding up to `values`; empty unless asked for.
    by_run: {run: [Q, K]} of an ensemble, whose mean is `values`; empty unless asked for. spread: [Q, K], the standard
    deviation over the runs of an ensemble; None for one run.
    """

    values: Tensor
    query_labels: tuple[str, ...]
    group_labels: tuple[str, ...]
    group_sizes: tuple[int, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    by_term: Mapping[str, Tensor] = field(default_factory=dict)
    by_layer: Mapping[str, Tensor] = field(default_factory=dict)
    by_run: Mapping[str, Tensor] = field(default_factory=dict)
    spread: Tensor | None = None

    def __post_init__(self) -> None:
        expected = (len(self.query_labels), len(self.group_labels))
        named = {name: part for kind in _KINDS for name, part in getattr(self, kind).items()}
        for name, part in {"values": self.values, **named}.items():
            if tuple(part.shape) != expected:
                raise ScoreError(f"{name}: shape {tuple(part.shape)}, expected {expected} from the labels.")
        if len(self.group_sizes) != len(self.group_labels):
            raise ScoreError(f"{len(self.group_sizes)} group sizes for {len(self.group_labels)} groups.")
        object.__setattr__(self, "group_sizes", tuple(map(int, self.group_sizes)))
        try:
            plain = json.loads(json.dumps(dict(self.provenance)))  # as `load` will read it
        except (TypeError, ValueError) as problem:
            raise ScoreError(f"provenance: expected what JSON can hold ({problem}).") from problem
        object.__setattr__(self, "provenance", plain)

    def _parts(self) -> dict[str, Tensor]:
        """Every tensor [Q, K], by the name that it is saved under."""
        found = {"values": self.values}
        for kind in _KINDS:
            found |= {f"{kind}.{index}": part for index, part in enumerate(getattr(self, kind).values())}
        return found if self.spread is None else found | {"spread": self.spread}

    def __repr__(self) -> str:
        queries, groups = self.values.shape
        return f"Scores({queries} queries x {groups} groups, {self.provenance.get('method', 'unknown method')})"

    def total(self) -> Scores:
        """The scores summed over the queries: one row, the change of the summed measurement.

        An ensemble's spread is that of the sums, known only where `by_run` was kept.
        """

        def summed(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: part.sum(0, keepdim=True) for name, part in parts.items()}

        return replace(
            self,
            values=self.values.sum(0, keepdim=True),
            query_labels=("all queries",),
            spread=torch.stack(list(summed(self.by_run).values())).std(0) if len(self.by_run) > 1 else None,
            by_term=summed(self.by_term),
            by_layer=summed(self.by_layer),
            by_run=summed(self.by_run),
        )

    def top(self, query: int | str = 0, k: int = 10, largest: bool = True) -> list[Ranked]:
        """The k groups whose removal raises the query's measurement most (lowers it most: largest=False)."""
        row = self.values[self._row(query)]
        order = torch.argsort(row, descending=largest, stable=True)[: max(k, 0)].tolist()
        return [Ranked(index, self.group_labels[index], row[index].item()) for index in order]

    def _row(self, query: int | str) -> int:
        if isinstance(query, str):
            if query not in self.query_labels:
                raise ScoreError(f"no query {query!r}; the queries are {list(self.query_labels[:8])}...")
            return self.query_labels.index(query)
        if not -len(self.query_labels) <= query < len(self.query_labels):
            raise ScoreError(f"query={query}: there are {len(self.query_labels)} queries.")
        return query

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
        tensors["labels"] = _bytes(json.dumps(labels))
        write_tensors(Path(path), tensors | {"sha256": _bytes(digest(tensors))}, {"segflow": "scores"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote; ScoreError if the file is not whole or not a scores file."""
        tensors = read_tensors(Path(path), None, ScoreError)
        if not {"values", "labels", "sha256"} <= set(tensors):
            raise ScoreError(
                f"{path}: not a scores file (tensors {sorted(tensors)[:4]}). Expected what Scores.save wrote."
            )
        if not tensors.pop("sha256").equal(_bytes(digest(tensors))):
            raise ScoreError(f"{path}: damaged, its content has another checksum. Restore it or make it anew.")
        try:
            return cls._labelled(Path(path), tensors, json.loads(tensors["labels"].numpy().tobytes()))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as problem:
            raise ScoreError(f"{path}: its labels make no sense ({problem}). Restore it or make it anew.") from problem

    @classmethod
    def _labelled(cls, path: Path, tensors: Mapping[str, Tensor], labels: Any) -> Scores:
        if labels["format"] != FORMAT:
            raise ScoreError(f"{path}: scores format {labels['format']!r}, this segflow reads format {FORMAT}.")
        parts = {
            kind: {name: tensors[f"{kind}.{index}"] for index, name in enumerate(labels.get(kind, ()))}
            for kind in _KINDS
        }
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
        """The values as a NumPy array [Q, K]."""
        array: np.ndarray = self.values.cpu().numpy()
        return array

    def to_pandas(self) -> Any:
        """A pandas DataFrame: one row for each query, one column for each group."""
        import pandas

        index = pandas.Index(self.query_labels, name="query")
        return pandas.DataFrame(self.numpy(), index=index, columns=pandas.Index(self.group_labels, name="group"))

    def to_xarray(self) -> Any:
        """An xarray Dataset: values (query, group), group_size, spread, by_term, by_layer and by_run if there."""
        import xarray

        coords: dict[str, Any] = {"query": list(self.query_labels), "group": list(self.group_labels)}
        data: dict[str, Any] = {"values": (("query", "group"), self.numpy())}
        data["group_size"] = (("group",), np.array(self.group_sizes))
        if self.spread is not None:
            data["spread"] = (("query", "group"), self.spread.cpu().numpy())
        for kind in _KINDS:
            parts, axis = getattr(self, kind), kind.removeprefix("by_")
            if parts:
                coords[axis] = list(parts)
                data[kind] = ((axis, "query", "group"), np.stack([part.cpu().numpy() for part in parts.values()]))
        return xarray.Dataset(data, coords, attrs={"provenance": json.dumps(self.provenance)})


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
