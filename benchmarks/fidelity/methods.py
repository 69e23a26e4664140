"""The methods of the table. To add one, add an entry; what this segflow does not have yet is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import segflow as sf

from .rows import Row

REFERENCE = "SOURCE"  # the default: what other methods are compared with, pair by pair
EARLIER = "SOURCE, layers apart, final query"  # the default before, and that of rows which were read back


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
    rows: str = ""

    def suits(self, row: Row) -> bool:
        """Whether the row's table has this method."""
        return (
            self.rows in row.name
            and row.recipes[-1].optimizer in self.optimizers
            and (not self.data or row.data in self.data)
        )

    def make(self) -> Any | None:
        """The method, or None where this segflow does not have it."""
        return made(self.kind, **self.options)

    @property
    def slug(self) -> str:
        """The name, for files."""
        return _slug(self.name)


def made(kind: str, **options: Any) -> Any | None:
    """A method of segflow, or None where this segflow does not have it."""
    found = getattr(sf, kind, None)
    try:
        return None if found is None else found(**options)
    except (TypeError, sf.SegflowError):
        return None  # an option of a later segflow


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).lower().split())


BEST = "influence function, best damping (upper bound)"
EKFAC, TRACIN = "influence function (EK-FAC)", "TracIn"
SQUARED, EXACT = "SOURCE, shares squared", "SOURCE, exactly coupled"
SIZED = (REFERENCE, EARLIER, SQUARED, EXACT, EKFAC)  # whose sizes are compared with real changes
_DAMPINGS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
_APART: dict[str, Any] = {"layers": "apart"}
_FINAL: dict[str, Any] = {"query_points": "final"}
_DIAGONAL: dict[str, Any] = {"preconditioner": "diagonal"}  # without effect under SGD
_PAPERS = _APART | _FINAL | _DIAGONAL | {"segments": 3, "checkpoint_weights": "equal"}
_ADAMW = ("adamw",)

METHODS: tuple[Entry, ...] = (
    Entry(REFERENCE, "Source"),
    Entry("SOURCE, layers apart", "Source", _APART),
    Entry("SOURCE, final query", "Source", _FINAL),
    Entry(EARLIER, "Source", _APART | _FINAL),
    Entry(SQUARED, "Source", {"shares_power": 2}),
    Entry("SOURCE, half the steps", "Source", {"lr_steps_scale": 0.5}),
    Entry(EXACT, "Source", {"curvature": "coupled"}, data=("digits",), rows="converged-clean"),
    Entry("SOURCE, 3 segments", "Source", {"segments": 3}),
    Entry("SOURCE, 6 segments", "Source", {"segments": 6}),
    Entry("SOURCE, auto segments", "Source", {"segments": "auto"}),
    Entry("SOURCE, the paper's", "Source", _PAPERS),
    Entry("SOURCE, diagonal preconditioner", "Source", _DIAGONAL, optimizers=_ADAMW),
    Entry("SOURCE, 3 segments, diagonal preconditioner", "Source", _DIAGONAL | {"segments": 3}, optimizers=_ADAMW),
    Entry("SOURCE, no preconditioner", "Source", {"preconditioner": "none"}, optimizers=_ADAMW),
    Entry("Fast-SOURCE, 1 segment", "Source", {"fast": True}),
    Entry("Fast-SOURCE, 3 segments", "Source", {"segments": 3, "fast": True}),
    Entry(EKFAC, "InfluenceFunction"),
    *(Entry(f"influence function, damping {d:g}", "InfluenceFunction", {"damping": d}, BEST) for d in _DAMPINGS),
    Entry("influence function (K-FAC)", "InfluenceFunction", {"curvature": "kfac"}),
    Entry("influence function (diagonal)", "InfluenceFunction", {"curvature": "diagonal"}),
    Entry("influence function (identity)", "InfluenceFunction", {"curvature": "identity"}),
    Entry("LiSSA", "LiSSA", data=("digits", "concrete")),  # hundreds of passes
    Entry(TRACIN, "TracIn"),
    Entry("Hydra", "Hydra"),
    Entry("TRAK", "TRAK", {"dimension": 512}),
    Entry("TRAK, damped", "TRAK", {"dimension": 512, "damping": "heuristic"}),
    Entry("projected Fisher", "ProjectedFisher", {"dimension": 512}),
    Entry("gradient dot product", "GradientDot"),
    Entry("gradient cosine", "GradientCosine"),
    Entry("representation similarity", "RepresentationSimilarity"),
)
