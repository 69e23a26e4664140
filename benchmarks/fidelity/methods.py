"""The methods of the table. To add one, add an entry; what this segflow does not have yet is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import segflow as sf

from .rows import Row

REFERENCE = "SOURCE, 1 segment"  # what other methods are compared with, pair by pair


@dataclass(frozen=True)
class Entry:
    """One method.

    name: in the table; kind: its class in segflow; options: its arguments; best_of: a family of which the table shows
    the best member only, chosen on the evaluation itself: an upper bound, and named so.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    best_of: str = ""
    optimizers: tuple[str, ...] = ("sgd", "adamw")
    data: tuple[str, ...] = ()

    def suits(self, row: Row) -> bool:
        """Whether the row's table has this method."""
        return row.recipes[-1].optimizer in self.optimizers and (not self.data or row.data in self.data)

    def make(self) -> Any | None:
        """The method, or None where this segflow does not have it."""
        found = getattr(sf, self.kind, None)
        try:
            return None if found is None else found(**self.options)
        except (TypeError, sf.SegflowError):
            return None  # an option of a later segflow

    @property
    def slug(self) -> str:
        """The name, for files."""
        return _slug(self.name)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).lower().split())


_BEST = "influence function, best damping (upper bound)"
_DAMPINGS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)

METHODS: tuple[Entry, ...] = (
    Entry(REFERENCE, "Source", {"segments": 1}),
    Entry("SOURCE, 3 segments", "Source", {"segments": 3}),
    Entry("SOURCE, 6 segments", "Source", {"segments": 6}),
    Entry("SOURCE, auto segments", "Source", {"segments": "auto"}),
    Entry(
        "SOURCE, 1 segment, diagonal preconditioner",
        "Source",
        {"segments": 1, "preconditioner": "diagonal"},
        optimizers=("adamw",),
    ),
    Entry(
        "SOURCE, 3 segments, diagonal preconditioner",
        "Source",
        {"segments": 3, "preconditioner": "diagonal"},
        optimizers=("adamw",),
    ),
    Entry("SOURCE, no preconditioner", "Source", {"segments": 1, "preconditioner": "none"}, optimizers=("adamw",)),
    Entry("Fast-SOURCE, 1 segment", "Source", {"segments": 1, "fast": True}),
    Entry("Fast-SOURCE, 3 segments", "Source", {"segments": 3, "fast": True}),
    Entry("influence function (EK-FAC)", "InfluenceFunction"),
    *(Entry(f"influence function, damping {d:g}", "InfluenceFunction", {"damping": d}, _BEST) for d in _DAMPINGS),
    Entry("influence function (K-FAC)", "InfluenceFunction", {"curvature": "kfac"}),
    Entry("influence function (diagonal)", "InfluenceFunction", {"curvature": "diagonal"}),
    Entry("influence function (identity)", "InfluenceFunction", {"curvature": "identity"}),
    Entry("LiSSA", "LiSSA", data=("digits", "concrete")),  # hundreds of passes
    Entry("TracIn", "TracIn"),
    Entry("Hydra", "Hydra"),
    Entry("TRAK", "TRAK", {"dimension": 512}),
    Entry("TRAK, damped", "TRAK", {"dimension": 512, "damping": "heuristic"}),
    Entry("projected Fisher", "ProjectedFisher", {"dimension": 512}),
    Entry("gradient dot product", "GradientDot"),
    Entry("gradient cosine", "GradientCosine"),
    Entry("representation similarity", "RepresentationSimilarity"),
)
